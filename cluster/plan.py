"""What the cluster has → which replica groups run, and what to say where no GPU is.

Pure functions, so that every cluster can be planned in a test; `probe_resources` is the one question to Ray. In mode
"auto" the GPU group follows the cluster while the service runs: a GPU that is not there is never asked for (Ray would
keep the replica waiting for ever). Mode "fixed" exists to show a node autoscaler the demand.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

logger = logging.getLogger(__name__)

GroupName = Literal["gpu", "cpu"]
GpuMode = Literal["auto", "fixed", "off"]


@dataclass(frozen=True)
class Scale:
    """Replicas of a group: fixed if minimum equals maximum, else between the two by load."""

    minimum: int = 1
    maximum: int = 1

    @property
    def fixed(self) -> bool:
        return self.minimum == self.maximum


@dataclass(frozen=True)
class GroupRequest:
    """What the configuration asks for. num_cpus and num_gpus are per replica; num_gpus may be a fraction."""

    num_cpus: float = 1.0
    num_gpus: float = 0.0
    scale: Scale = Scale()


@dataclass(frozen=True)
class PlannedGroup:
    """A group that exists as a deployment.

    follows_gpus: at most as many replicas as the cluster's GPUs hold at any moment, none without a GPU.
    """

    name: GroupName
    num_cpus: float
    num_gpus: float
    scale: Scale
    follows_gpus: bool = False


@dataclass(frozen=True)
class Plan:
    """The groups in the order of preference, and what is likely to go wrong, for the log and /v1/info."""

    groups: tuple[PlannedGroup, ...]
    warnings: tuple[str, ...] = ()

    def group(self, name: str) -> PlannedGroup | None:
        return next((group for group in self.groups if group.name == name), None)


def gpu_slots(total_gpus: float, num_gpus: float) -> int:
    """How many replicas with num_gpus GPUs each fit. A fraction never spans two GPUs: 3 × 0.4 does not fit on one."""
    # The epsilon keeps 1/0.1 from being floored to 9.
    if num_gpus <= 0:
        raise ValueError(f"a GPU replica needs num_gpus > 0, not {num_gpus}")
    if num_gpus <= 1:
        return int(total_gpus) * int(1 / num_gpus + 1e-9)
    return int(total_gpus / num_gpus + 1e-9)


def plan_groups(
    resources: Mapping[str, float] | None,
    *,
    gpu: GroupRequest,
    cpu: GroupRequest,
    gpu_mode: GpuMode = "auto",
    reserved_cpus: float = 0.0,
) -> Plan:
    """Decides which groups exist. The CPU group always does: it answers where the GPU group does not.

    resources: Ray's totals, such as {"CPU": 8.0, "GPU": 2.0}; None if the cluster could not be asked.
    gpu_mode: "auto" has as many GPU replicas as the cluster's GPUs hold, up to gpu.scale, at every moment; "fixed" asks
        Ray for them whatever the cluster has; "off" never.
    reserved_cpus: what the ingress takes, for the warning about too few CPUs.
    Raises ValueError for gpu.num_gpus ≤ 0 with a mode that would use it.
    """
    groups: list[PlannedGroup] = []
    slots = 0
    if gpu_mode != "off":
        slots = gpu_slots((resources or {}).get("GPU", 0.0), gpu.num_gpus)
        groups.append(PlannedGroup("gpu", gpu.num_cpus, gpu.num_gpus, gpu.scale, follows_gpus=gpu_mode == "auto"))
    groups.append(PlannedGroup("cpu", cpu.num_cpus, 0.0, cpu.scale))

    needed = reserved_cpus
    for group in groups:
        at_start = min(group.scale.minimum, slots) if group.follows_gpus else group.scale.minimum
        needed += group.num_cpus * at_start
    warnings = []
    if resources is not None and needed > (total := resources.get("CPU", 0.0)):
        warnings.append(
            f"the groups ask for {needed:g} CPUs and the cluster has {total:g}: replicas that do not fit wait; "
            "lower num_cpus or replicas"
        )
    return Plan(tuple(groups), tuple(warnings))


def why_no_gpu(resources: Mapping[str, float] | None, num_gpus: float) -> str:
    """Why no GPU replica answers, on a cluster with these resources (None: unknown)."""
    if resources is None:
        return "it is not known yet whether the cluster has a GPU: forecasts run on the CPU"
    total = resources.get("GPU", 0.0)
    if total <= 0:
        return "the cluster has no GPU: forecasts run on the CPU"
    if gpu_slots(total, num_gpus) == 0:
        return (
            f"the cluster has {total:g} GPU(s), fewer than the {num_gpus:g} that one replica asks for: "
            "forecasts run on the CPU"
        )
    return "the GPU group has no live replica now: forecasts run on the CPU"


def probe_resources() -> dict[str, float] | None:
    """Ray's total resources, or None if no Ray is running in this process (asking would start one)."""
    import ray

    if not ray.is_initialized():
        logger.warning("Ray is not initialised here: the cluster's GPUs are unknown")
        return None
    return {name: float(amount) for name, amount in ray.cluster_resources().items()}
