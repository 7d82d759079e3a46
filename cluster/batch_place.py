"""Where the actors of a batch forecast run: decided before the start, since Ray would wait for what is not there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from cluster.plan import gpu_slots
from model.device import resolve_device
from model.errors import InputError


@dataclass(frozen=True)
class Placement:
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
    free: Mapping[str, float], *, device: str, actors: int | None, num_cpus: float, num_gpus: float
) -> Placement:
    """As many actors as were asked for or fit into what is free now (Ray's available resources).

    device: auto takes GPUs if the cluster has one free; cuda falls back to the CPU with a warning. num_gpus: of one
    actor; a fraction shares a GPU. Raises InputError if not even one actor fits, ValueError for an unknown device.
    """
    if num_gpus <= 0 or num_cpus <= 0 or (actors is not None and actors < 1):
        raise InputError("--num-gpus, --num-cpus and --actors must be positive", code="bad_size")
    requested = device.strip().lower()
    resolved = resolve_device(requested)[0].type if requested not in ("auto", "cuda") else requested
    wants_gpu = requested == "auto" or requested.startswith("cuda")
    warnings: list[str] = []
    cpus = int(free.get("CPU", 0.0) / num_cpus + 1e-9)
    if cpus < 1:
        raise InputError(
            f"an actor needs {num_cpus:g} CPU(s) and the cluster has {free.get('CPU', 0.0):g} free: lower --num-cpus, "
            "or wait until others have finished",
            code="too_few_cpus",
        )
    gpus = gpu_slots(free.get("GPU", 0.0), num_gpus) if wants_gpu else 0
    if wants_gpu and gpus == 0 and (requested != "auto" or free.get("GPU", 0.0) > 0):
        warnings.append(
            f"device {requested!r} with {num_gpus:g} GPU(s) an actor was requested, but the cluster has "
            f"{free.get('GPU', 0.0):g} GPU(s) free; using 'cpu'"
        )
    room = min(gpus, cpus) if gpus else cpus
    if actors is not None and actors > room:
        warnings.append(f"{actors} actors were requested and {room} fit into the cluster now; using {room}")
    # Ray hides no GPU from an actor that reserved none, so the CPU is asked for by name.
    where = "cuda" if gpus else ("mps" if resolved == "mps" or (requested == "auto" and _has_mps()) else "cpu")
    return Placement(min(actors or room, room), num_cpus, num_gpus if gpus else 0.0, where, tuple(warnings))


def _has_mps() -> bool:
    return resolve_device("auto")[0].type == "mps"
