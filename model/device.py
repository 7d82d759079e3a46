"""The one place that decides where the model runs and at which precision. Every choice comes with its reason.

python -m model.device [REQUESTED]      prints the device, its precision and why
"""

from __future__ import annotations

import logging
import os
import platform
import re
import sys
from dataclasses import dataclass
from functools import cache

import psutil
import torch
import torch.nn.functional as F

ACCEPTED = "auto, cpu, cuda, cuda:N (N = 0, 1, …), mps"
PRECISIONS = ("fp32", "bf16", "int8")

logger = logging.getLogger(__name__)


def cuda_available() -> bool:
    """True if torch can run on a CUDA device. A CUDA installation that fails when asked counts as absent."""
    try:
        return torch.cuda.is_available()
    except Exception as error:  # a broken driver raises whatever it likes; the CPU still works
        _log_once(f"CUDA counts as absent: asking for it raised {type(error).__name__}: {error}")
        return False


def mps_available() -> bool:
    """True if torch can run on Apple's GPU."""
    return torch.backends.mps.is_available()


@cache
def _log_once(message: str) -> None:
    logger.warning(message)


def resolve_device(requested: str | torch.device | None = None) -> tuple[torch.device, str | None]:
    """The device to use, and a warning if it is not the one that was asked for.

    requested: auto (cuda, else mps, else cpu), cpu, cuda, cuda:N or mps; None reads KRONOS_DEVICE and then means auto.
    Something that is not there falls back: an index that is too high to cuda:0, an absent kind of device to the CPU
    (never to another kind of accelerator, which nobody asked for). The warning says what was asked and what is used,
    and is logged once per process.
    Raises ValueError, listing what is accepted, for anything else.
    """
    if requested is None:
        requested = os.environ.get("KRONOS_DEVICE", "").strip() or "auto"
    if not isinstance(requested, str | torch.device):
        raise ValueError(f"device must be a string or a torch.device, not {requested!r}; accepted: {ACCEPTED}")
    name = str(requested).strip().lower()
    if name == "auto":
        return torch.device("cuda:0" if cuda_available() else "mps" if mps_available() else "cpu"), None
    match = re.fullmatch(r"(cpu|mps)(?::0)?|(cuda)(?::([0-9]{1,4}))?", name)
    if match is None:
        raise ValueError(f"unknown device {str(requested)[:64]!r}; accepted: {ACCEPTED}")
    if match[1] == "cpu":
        return torch.device("cpu"), None
    if match[1] == "mps":
        if mps_available():
            return torch.device("mps"), None
        return _fall_back(name, "cpu", "MPS is not available on this machine")
    if not cuda_available():
        return _fall_back(name, "cpu", "CUDA is not available on this machine")
    index, count = int(match[3] or 0), torch.cuda.device_count()
    if index >= count:
        return _fall_back(name, "cuda:0", f"this machine has {count} CUDA device{'s' if count != 1 else ''}")
    return torch.device("cuda", index), None


def _fall_back(requested: str, used: str, reason: str) -> tuple[torch.device, str]:
    warning = f"device {requested!r} was requested but {reason}; using {used!r}"
    _log_once(warning)
    return torch.device(used), warning


def precision_policy(device: torch.device) -> tuple[str, str]:
    """("fp32" | "bf16", the reason)."""
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return "bf16", "this CUDA device computes bfloat16 in hardware"
        return "fp32", "this CUDA device has no bfloat16 arithmetic"
    if device.type == "mps":
        return "fp32", "bfloat16 is incomplete on MPS"
    return "fp32", "on the CPU fp32 is exact: it equals the published implementation"


def resolve_precision(requested: str, device: torch.device) -> tuple[str, str, str | None]:
    """(precision, the reason, a warning if it is not the one that was asked for).

    requested: auto, which is precision_policy's choice, fp32, bf16 or int8. What the device cannot compute falls back
    to that choice; the warning is logged once per process. Raises ValueError for anything else.
    """
    if requested != "auto" and requested not in PRECISIONS:
        raise ValueError(f"precision must be auto, {', '.join(PRECISIONS)}, not {str(requested)[:64]!r}")
    policy, reason = precision_policy(device)
    if requested in ("auto", policy):
        return policy, reason, None
    obstacle = precision_obstacle(requested, device)
    if obstacle is None:
        return requested, "as requested", None
    warning = f"precision {requested!r} was requested but {obstacle}; using {policy!r}"
    _log_once(warning)
    return policy, reason, warning


def precision_obstacle(precision: str, device: torch.device) -> str | None:
    """Why the device cannot compute at that precision; None if it can."""
    if precision == "fp32":
        return None
    if precision == "int8":
        return None if device.type == "cpu" else f"int8 runs on the CPU only, not on {device}"
    if device.type == "cuda":
        supported = torch.cuda.is_bf16_supported(including_emulation=False)
        return None if supported else "this CUDA device has no bfloat16 arithmetic"
    if device.type == "mps":
        return "bfloat16 is incomplete on MPS"
    supported = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return None if supported else "this CPU has no instructions for bfloat16 (on x86: AVX-512)"


@dataclass(frozen=True)
class DeviceInfo:
    """What a replica shows of the device it runs on."""

    device_type: str
    device_name: str
    memory_total_bytes: int
    gpu_available: bool
    cuda_available: bool
    mps_available: bool
    precision: str
    precision_reason: str

    def summary(self) -> str:
        """One line for a log."""
        memory = f"{self.memory_total_bytes / 2**30:.1f} GiB"
        return f"{self.device_type} ({self.device_name}, {memory}), {self.precision}: {self.precision_reason}"


def device_info(device: torch.device | None = None) -> DeviceInfo:
    """Facts about a device that resolve_device returned; None: about the one that it chooses."""
    if device is None:
        device, _ = resolve_device()
    has_cuda, has_mps = cuda_available(), mps_available()
    precision, reason = precision_policy(device)
    return DeviceInfo(
        device_type=device.type,
        device_name=_device_name(device),
        memory_total_bytes=memory_bytes(device),
        gpu_available=has_cuda or has_mps,
        cuda_available=has_cuda,
        mps_available=has_mps,
        precision=precision,
        precision_reason=reason,
    )


def memory_bytes(device: torch.device) -> int:
    """The device's memory in all."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if device.type == "mps":
        return torch.mps.recommended_max_memory()
    return psutil.virtual_memory().total


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).name
    if device.type == "mps":
        return f"Apple {platform.machine()} GPU"
    return _cpu_name()


@cache
def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass  # not Linux: the platform module knows what there is to know
    return platform.processor() or platform.machine() or "unknown CPU"


def check_mps_compatibility() -> tuple[bool, str]:
    """Runs the operations that the model needs on MPS and holds the results against the CPU's: (usable, the reason)."""
    if not torch.backends.mps.is_built():
        return False, "this torch build has no MPS support"
    if not mps_available():
        return False, "MPS needs an Apple GPU and macOS 12.3 or newer"
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 4, 16, 8, generator=generator)

    def attend(x: torch.Tensor) -> torch.Tensor:
        tokens = (x.flatten(2).long() & 7).sum(-1)
        mixed = F.scaled_dot_product_attention(x, x, x, is_causal=True)
        return F.silu(F.normalize(mixed, dim=-1)).softmax(-1) + tokens[..., None, None]

    try:
        difference = (attend(x) - attend(x.to("mps")).cpu()).abs().max().item()
    except (RuntimeError, NotImplementedError) as error:
        return False, f"an operation that the model needs failed on MPS: {error}"
    if not difference < 1e-4:
        return False, f"MPS differs from the CPU by {difference:.1e} on the operations that the model needs"
    return True, f"MPS agrees with the CPU within {difference:.1e}"


def main(arguments: list[str]) -> int:
    try:
        device, warning = resolve_device(arguments[0] if arguments else None)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    print(device_info(device).summary())
    if warning:
        print(f"warning: {warning}")
    print(f"mps: {check_mps_compatibility()[1]}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
