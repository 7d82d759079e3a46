"""Where workers and actors run, decided before the start: Ray would wait without an end for what is not there."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from cluster.plan import gpu_slots
from cluster.training.config import TrainingConfig
from model.device import resolve_device
from model.errors import InputError

Node = Mapping[str, float]
"""What one node of the cluster has, or has free: {"CPU": 8.0, "GPU": 2.0, …} (cluster.ray_session asks Ray)."""


def slots(node: Node, num_cpus: float, num_gpus: float = 0.0) -> int:
    """How many workers of num_cpus CPUs and num_gpus GPUs each fit on one node; num_cpus > 0."""
    # The epsilon keeps 0.3 / 0.1 from being floored to 2.
    by_cpus = int(node.get("CPU", 0.0) / num_cpus + 1e-9)
    return min(by_cpus, gpu_slots(node.get("GPU", 0.0), num_gpus)) if num_gpus > 0 else by_cpus


def _sum(nodes: Sequence[Node], name: str) -> float:
    return sum(node.get(name, 0.0) for node in nodes)


class WorkerPlacement(NamedTuple):
    """use_gpu: workers ask Ray for a GPU each. device: what a worker without one resolves.

    warnings: what is not as it was asked for.
    """

    use_gpu: bool
    device: str
    warnings: tuple[str, ...] = ()


def place_here(training: TrainingConfig) -> WorkerPlacement:
    """For num_workers: 0, where this process is the worker. Raises as place_workers."""
    device, warning = resolve_device(training.device)
    _require(training, device.type in ("cuda", "mps"), "this machine has none that PyTorch can use")
    warnings = [] if warning is None else [warning]
    if ignored := training.without_effect:
        warnings.append(
            f"training.num_workers is 0, so that this process trains without Ray and {_settings(training, ignored)} "
            "without effect: leave that out, or set training.num_workers to 1 or more"
        )
    return WorkerPlacement(False, str(device), tuple(warnings))


def _settings(training: TrainingConfig, names: Sequence[str]) -> str:
    listed = " and ".join(f"training.{name}={getattr(training, name)}" for name in names)
    return f"{listed} {'is' if len(names) == 1 else 'are'}"


def place_workers(training: TrainingConfig, nodes: Sequence[Node]) -> WorkerPlacement:
    """All of a training run's workers on GPUs, or none. nodes: all that each of the cluster's nodes has.

    A worker lies on one node: what is left over on several makes no room. An elastic run needs room for its least
    number of workers.
    Raises InputError if the nodes have too few CPUs for the workers, or no GPUs and they are required, ValueError
    for a device that is not one.
    """
    workers = training.num_workers if isinstance(training.num_workers, int) else training.num_workers[0]
    each = training.cpus_per_worker
    room = sum(slots(node, each) for node in nodes)
    if room < workers:
        raise InputError(
            f"{workers} workers of {each:g} CPUs need {workers * each:g} CPUs and the cluster has "
            f"{_sum(nodes, 'CPU'):g} on {len(nodes)} node(s), where {room} of them fit"
            ": lower training.num_workers or training.cpus_per_worker",
            code="too_few_cpus",
        )
    device = training.device.strip().lower()
    kind = device.partition(":")[0]
    gpus = _sum(nodes, "GPU")
    beside_cpus = sum(slots(node, each, 1.0) for node in nodes)
    if kind in ("auto", "cuda") and beside_cpus >= max(1, workers):
        return WorkerPlacement(True, "cuda")
    missing = f"the cluster has {gpus:g} GPUs for {workers} worker(s)"
    if gpus >= workers:
        missing += f", and room for {beside_cpus} with a GPU and {each:g} CPUs on one node"
    if kind == "cuda" or (kind == "auto" and gpus > 0):  # auto: nobody asked for them, but they will stand idle
        resolve_device(device)  # refuses nonsense such as cuda:x
        _require(training, False, missing)
        return WorkerPlacement(False, "cpu", (f"device {device!r} was requested, but {missing}; using 'cpu'",))
    resolved, warning = resolve_device(device)
    if kind == "auto" and resolved.type == "cuda":
        # This process sees a GPU that the cluster does not lend.
        resolved = resolve_device("cpu")[0]
    _require(training, resolved.type == "mps", missing)
    return WorkerPlacement(False, resolved.type, () if warning is None else (warning,))


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


HANDOVER_S = 10.0
"""How long actors of a command that has ended may take to give back what they held: Ray reports it with a delay."""


def place_when_free(
    total: Sequence[Node],
    free: Callable[[], Sequence[Node]],
    *,
    device: str,
    actors: int | None,
    num_cpus: float,
    num_gpus: float,
    patience_s: float = HANDOVER_S,
    say: Callable[[str], None] = lambda text: None,
) -> ActorPlacement:
    """place_actors in what is free, after a wait of at most patience_s for what the cluster has and others hold.

    total: what each node has in all: what that has no room for is not waited for. free: asks what each has left.
    Waited for: the actors that were asked for, or one if no number was, on the kind of device that `total` gives. After
    the wait, what fits; say: hears that there is one. Raises as place_actors.
    """
    asked: dict[str, Any] = {"device": device, "num_cpus": num_cpus, "num_gpus": num_gpus}
    best = place_actors(total, actors=actors, **asked)
    wanted = 1 if actors is None else best.actors
    until = time.monotonic() + patience_s
    told = False
    while True:
        last_look = time.monotonic() >= until
        try:
            place = place_actors(free(), actors=actors, **asked)
        except InputError:
            if last_look:
                raise
        else:
            if place.kind == best.kind and place.actors >= wanted:
                return place
            if last_look:
                return _name_what_others_hold(place, best)
        if not told:
            say(f"the cluster's resources are in use: waiting up to {patience_s:g} s for them to be given back")
            told = True
        time.sleep(0.1)


def _name_what_others_hold(place: ActorPlacement, best: ActorPlacement) -> ActorPlacement:
    """A fallback that only the others' use explains is never silent: what is free shows no GPU to miss."""
    if place.kind == best.kind:
        return place
    held = f"the cluster's {best.kind} devices are in use by others; using {place.kind!r}"
    return replace(place, warnings=(*place.warnings, held))


def place_actors(
    nodes: Sequence[Node], *, device: str, actors: int | None, num_cpus: float, num_gpus: float
) -> ActorPlacement:
    """As many forecasting actors as were asked for or fit. nodes: what each of the cluster's nodes has, or has free.

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
    gpus = _sum(nodes, "GPU")
    by_cpus = sum(slots(node, num_cpus) for node in nodes)
    if by_cpus < 1:
        most = max((node.get("CPU", 0.0) for node in nodes), default=0.0)
        raise InputError(
            f"an actor needs {num_cpus:g} CPU(s) on one node and no node has more than {most:g} for it: lower "
            "--num-cpus (of an evaluation: --threads), or wait until others have finished",
            code="too_few_cpus",
        )
    by_gpus = sum(slots(node, num_cpus, num_gpus) for node in nodes) if wants_gpu else 0
    if wants_gpu and by_gpus == 0 and (requested != "auto" or gpus > 0):
        warnings.append(
            f"device {requested!r} with {num_gpus:g} GPU(s) and {num_cpus:g} CPU(s) an actor was requested, but the "
            f"cluster has {gpus:g} GPU(s) for it and no node has both; using 'cpu'"
        )
    fitting = by_gpus or by_cpus
    if actors is not None and actors > fitting:
        warnings.append(f"{actors} actors were requested and {fitting} fit into the cluster; using {fitting}")
    # Ray hides no GPU from an actor that reserved none, so the CPU is asked for by name.
    where = "cuda" if by_gpus else ("mps" if resolved.type == "mps" else "cpu")
    return ActorPlacement(
        min(actors or fitting, fitting), num_cpus, num_gpus if by_gpus else 0.0, where, tuple(warnings)
    )
