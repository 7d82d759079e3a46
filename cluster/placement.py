"""Where workers and actors run, decided before the start: Ray would wait without an end for what is not there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from cluster.plan import gpu_slots
from cluster.training.config import TrainingConfig
from model.device import resolve_device
from model.errors import InputError


class WorkerPlacement(NamedTuple):
    """use_gpu: workers ask Ray for a GPU each. device: what a worker without one resolves. warning: what differs."""

    use_gpu: bool
    device: str
    warning: str | None = None


def place_here(training: TrainingConfig) -> WorkerPlacement:
    """For num_workers: 0, where this process is the worker. Raises as place_workers."""
    device, warning = resolve_device(training.device)
    placement = WorkerPlacement(False, str(device), warning)
    _require(training, device.type in ("cuda", "mps"), "this machine has none that PyTorch can use")
    return placement


def place_workers(training: TrainingConfig, resources: Mapping[str, float]) -> WorkerPlacement:
    """All of a training run's workers on GPUs, or none. resources: as ray.cluster_resources().

    An elastic run needs room for its least number of workers.
    Raises InputError if the cluster has fewer CPUs than the workers need, or no GPUs and they are required, ValueError
    for a device that is not one.
    """
    workers = training.num_workers if isinstance(training.num_workers, int) else training.num_workers[0]
    wanted, cpus = workers * training.cpus_per_worker, resources.get("CPU", 0.0)
    if wanted > cpus:
        raise InputError(
            f"{workers} workers of {training.cpus_per_worker:g} CPUs need {wanted:g} CPUs and the cluster has {cpus:g}"
            ": lower training.num_workers or training.cpus_per_worker",
            code="too_few_cpus",
        )
    device = training.device.strip().lower()
    kind = device.partition(":")[0]
    gpus = resources.get("GPU", 0.0)
    if kind in ("auto", "cuda") and gpus >= max(1, workers):
        return WorkerPlacement(True, "cuda")
    missing = f"the cluster has {gpus:g} GPUs for {workers} worker(s)"
    if kind == "cuda" or (kind == "auto" and gpus > 0):  # auto: nobody asked for them, but they will stand idle
        resolve_device(device)  # refuses nonsense such as cuda:x
        _require(training, False, missing)
        return WorkerPlacement(False, "cpu", f"device {device!r} was requested, but {missing}; using 'cpu'")
    resolved, warning = resolve_device(device)
    if kind == "auto" and resolved.type == "cuda":
        # This process sees a GPU that the cluster does not lend.
        resolved = resolve_device("cpu")[0]
    _require(training, resolved.type == "mps", missing)
    return WorkerPlacement(False, resolved.type, warning)


def _require(training: TrainingConfig, present: bool, reason: str) -> None:
    if training.require_gpu and not present:
        raise InputError(
            f"training.require_gpu is set and there is no GPU for device {training.device!r}: {reason}; start where "
            "one is, or set training.require_gpu=false",
            code="no_gpu",
        )


@dataclass(frozen=True)
class ActorPlacement:
    """actors: how many, each with num_cpus and num_gpus. device: what each asks model.device for.

    warnings: what is not as it was asked for.
    """

    actors: int
    num_cpus: float
    num_gpus: float
    device: str
    warnings: tuple[str, ...] = ()

    @property
    def kind(self) -> str:
        return self.device.partition(":")[0]


def place_actors(
    room: Mapping[str, float], *, device: str, actors: int | None, num_cpus: float, num_gpus: float
) -> ActorPlacement:
    """As many forecasting actors as were asked for or fit. room: Ray's available resources, or all it has.

    device: auto takes GPUs if there is one; cuda falls back to the CPU with a warning. num_gpus: of one actor; a
    fraction shares a GPU. Raises InputError if not even one actor fits, ValueError for an unknown device.
    """
    if num_gpus <= 0 or num_cpus <= 0 or (actors is not None and actors < 1):
        raise InputError("--num-gpus, --num-cpus and --actors must be positive", code="bad_size")
    requested = device.strip().lower()
    wants_gpu = requested == "auto" or requested.startswith("cuda")
    # Whether there is CUDA, the cluster says, not the machine that this process runs on.
    resolved, warning = resolve_device("cpu" if requested == "cuda" else requested)
    warnings = [warning] if warning is not None and not wants_gpu else []
    cpus, gpus = room.get("CPU", 0.0), room.get("GPU", 0.0)
    by_cpus = int(cpus / num_cpus + 1e-9)
    if by_cpus < 1:
        raise InputError(
            f"an actor needs {num_cpus:g} CPU(s) and the cluster has {cpus:g} for it: lower --num-cpus (of an "
            "evaluation: --threads), or wait until others have finished",
            code="too_few_cpus",
        )
    by_gpus = gpu_slots(gpus, num_gpus) if wants_gpu else 0
    if wants_gpu and by_gpus == 0 and (requested != "auto" or gpus > 0):
        warnings.append(
            f"device {requested!r} with {num_gpus:g} GPU(s) an actor was requested, but the cluster has {gpus:g} "
            "GPU(s) for it; using 'cpu'"
        )
    fitting = min(by_gpus, by_cpus) if by_gpus else by_cpus
    if actors is not None and actors > fitting:
        warnings.append(f"{actors} actors were requested and {fitting} fit into the cluster; using {fitting}")
    # Ray hides no GPU from an actor that reserved none, so the CPU is asked for by name.
    where = "cuda" if by_gpus else ("mps" if resolved.type == "mps" else "cpu")
    return ActorPlacement(
        min(actors or fitting, fitting), num_cpus, num_gpus if by_gpus else 0.0, where, tuple(warnings)
    )
