"""Which devices the workers get, decided before the start: Ray would wait without an end for what is not there."""

from __future__ import annotations

from typing import NamedTuple

from cluster.config import TrainingConfig
from model.device import resolve_device
from model.errors import InputError


class Placement(NamedTuple):
    """use_gpu: workers ask Ray for a GPU each. device: what a worker without one resolves. warning: what differs."""

    use_gpu: bool
    device: str
    warning: str | None = None


def place_here(training: TrainingConfig) -> Placement:
    """For num_workers: 0, where this process is the worker. Raises as place_workers."""
    device, warning = resolve_device(training.device)
    placement = Placement(False, str(device), warning)
    _require(training, device.type in ("cuda", "mps"), "this machine has none that PyTorch can use")
    return placement


def place_workers(training: TrainingConfig, resources: dict[str, float]) -> Placement:
    """resources: as ray.cluster_resources(). An elastic run needs room for its least number of workers.

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
        return Placement(True, "cuda")
    missing = f"the cluster has {gpus:g} GPUs for {workers} worker(s)"
    if kind == "cuda":
        resolve_device(device)  # refuses nonsense such as cuda:x
        _require(training, False, missing)
        return Placement(False, "cpu", f"device {device!r} was requested, but {missing}; using 'cpu'")
    resolved, warning = resolve_device(device)
    if kind == "auto" and resolved.type == "cuda":
        # This process sees a GPU that the cluster does not lend.
        resolved = resolve_device("cpu")[0]
    _require(training, resolved.type == "mps", missing)
    return Placement(False, resolved.type, warning)


def _require(training: TrainingConfig, present: bool, reason: str) -> None:
    if training.require_gpu and not present:
        raise InputError(
            f"training.require_gpu is set and there is no GPU for device {training.device!r}: {reason}; start where "
            "one is, or set training.require_gpu=false",
            code="no_gpu",
        )
