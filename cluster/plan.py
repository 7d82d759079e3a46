"""What the cluster has → which replica groups run.

`plan_groups` is a pure function, so that every cluster can be planned in a test; `probe_resources` is the one question
to Ray. A GPU that the cluster does not have is never asked for (Ray would keep the replica waiting for ever), except in
mode "fixed", which exists to show a node autoscaler the demand.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
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
    """A group that will run."""

    name: GroupName
    num_cpus: float
    num_gpus: float
    scale: Scale


@dataclass(frozen=True)
class Plan:
    """The groups that run, in the order of preference, and what differs from what was asked.

    device_warning: why forecasts run on the CPU although a GPU was wanted; carried by every answer. None if nothing was
    given up.
    warnings: every deviation, device_warning among them, for the log and /v1/info.
    """

    groups: tuple[PlannedGroup, ...]
    device_warning: str | None = None
    warnings: tuple[str, ...] = ()


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
    hybrid: bool = False,
    reserved_cpus: float = 0.0,
) -> Plan:
    """Decides which groups run on a cluster with these resources.

    resources: Ray's totals, such as {"CPU": 8.0, "GPU": 2.0}; None if the cluster could not be asked.
    gpu_mode: "auto" runs the GPU group if at least one replica fits, "fixed" always (with a CPU group beside it, which
        serves until the GPU is there), "off" never.
    hybrid: a CPU group beside a GPU group that runs.
    reserved_cpus: what the ingress takes, for the warning about too few CPUs.
    Raises ValueError for gpu.num_gpus ≤ 0 with a mode that would use it.
    """
    total_gpus = float((resources or {}).get("GPU", 0.0))
    total_cpus = None if resources is None else float(resources.get("CPU", 0.0))
    groups: list[PlannedGroup] = []
    warnings: list[str] = []
    device_warning = None
    slots = gpu_slots(total_gpus, gpu.num_gpus) if gpu_mode != "off" else 0

    if gpu_mode == "fixed" or slots > 0:
        scale = gpu.scale
        if gpu_mode == "auto" and scale.maximum > slots:
            scale = replace(scale, minimum=min(scale.minimum, slots), maximum=slots)
            warnings.append(
                f"the GPU group was cut to {slots} replica(s): the cluster has {total_gpus:g} GPU(s), "
                f"{gpu.num_gpus:g} per replica, {gpu.scale.maximum} replicas were configured"
            )
        groups.append(PlannedGroup("gpu", gpu.num_cpus, gpu.num_gpus, scale))
    if gpu_mode != "off" and slots == 0:
        device_warning = _why_no_gpu(resources, total_gpus, gpu.num_gpus)
        warnings.append(device_warning)
    if not groups or hybrid or slots == 0:
        groups.append(PlannedGroup("cpu", cpu.num_cpus, 0.0, cpu.scale))

    needed = reserved_cpus + sum(group.num_cpus * max(1, group.scale.minimum) for group in groups)
    if total_cpus is not None and needed > total_cpus:
        warnings.append(
            f"the groups ask for {needed:g} CPUs and the cluster has {total_cpus:g}: replicas that do not fit wait; "
            "lower num_cpus or replicas"
        )
    return Plan(tuple(groups), device_warning, tuple(warnings))


def _why_no_gpu(resources: Mapping[str, float] | None, total_gpus: float, num_gpus: float) -> str:
    if resources is None:
        return "the cluster was not asked for GPUs, because Ray was not running yet: forecasts run on the CPU"
    if total_gpus <= 0:
        return "the cluster has no GPU: forecasts run on the CPU"
    return (
        f"the cluster has {total_gpus:g} GPU(s), fewer than the {num_gpus:g} that one replica asks for: "
        "forecasts run on the CPU"
    )


def probe_resources() -> dict[str, float] | None:
    """Ray's total resources, or None if no Ray is running in this process (asking would start one)."""
    import ray

    if not ray.is_initialized():
        logger.warning("Ray is not initialised here: the cluster's GPUs are unknown")
        return None
    return {name: float(amount) for name, amount in ray.cluster_resources().items()}
