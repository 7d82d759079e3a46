"""Mixed precision: what the matrix products of a training step are computed in. Weights and losses are always fp32."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

from model.device import precision_obstacle

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Precision:
    """name: what is used. warning: why it is not what was asked for."""

    name: str
    device: torch.device
    warning: str | None = None

    def autocast(self) -> AbstractContextManager[object]:
        """For the forward pass."""
        if self.name == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=DTYPES[self.name])

    def scaler(self) -> torch.amp.GradScaler:
        """fp16 has few small numbers, so its loss is scaled up; the others pass through."""
        return torch.amp.GradScaler(self.device.type, enabled=self.name == "fp16")


def resolve_training_precision(requested: str, device: torch.device) -> Precision:
    """requested: fp32, bf16 or fp16. What the device cannot train in falls back, with a warning: fp16 to bf16 where
    there is no CUDA (nothing else scales the loss), bf16 to fp32.
    """
    if requested == "fp32":
        return Precision("fp32", device)
    if requested == "fp16" and device.type == "cuda":
        return Precision("fp16", device)
    obstacle = precision_obstacle("bf16", device)
    used = "fp32" if obstacle else "bf16"
    if used == requested:
        return Precision(used, device)
    reason = obstacle if requested == "bf16" else f"fp16 is trained on CUDA only, not on {device}"
    return Precision(used, device, f"precision {requested!r} was requested but {reason}; using {used!r}")
