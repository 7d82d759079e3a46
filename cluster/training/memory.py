"""How many windows fit into a worker's memory at once: for `auto`, and for the advice when they did not fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import psutil
import torch

from cluster.data import WindowStream
from cluster.files import write_atomically
from cluster.training.worker import Worker
from model.errors import InputError

SIZES_FILE = "batch_sizes.json"
"""In the run folder: what `auto` was found to be, so that a resumed run uses the same."""
MOST_WINDOWS = 256
"""What `auto` stops at: past it a step only takes longer."""
SHARE = 0.5
"""Of the memory that is free, on a CPU: other processes want some, and the estimate leaves the temporaries out."""
CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
CGROUP_USE = Path("/sys/fs/cgroup/memory.current")


def settle_batch_sizes(worker: Worker, run_folder: Path) -> None:
    """Puts numbers where the worker's batch sizes are auto, the same on every worker and after every restart."""
    if "auto" not in (*worker.batch_sizes, worker.micro_batch_size):
        return
    recorded = worker.group.from_first(_read(run_folder / SIZES_FILE) if worker.group.rank == 0 else None)
    if recorded is None:
        recorded = _find(worker)
        if worker.group.rank == 0:
            write_atomically(run_folder / SIZES_FILE, json.dumps(recorded) + "\n")
    worker.batch_sizes, worker.micro_batch_size = recorded["batch_sizes"], recorded["micro_batch_size"]
    if worker.group.rank == 0:
        print(
            f"{worker.name}: batch sizes {worker.batch_sizes}, at most {worker.micro_batch_size or 'all'} windows of a "
            "worker at once (auto)",
            flush=True,
        )


def _read(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def _find(worker: Worker) -> dict[str, Any]:
    most_workers = worker.config.training.most_workers
    sizes, pieces = [], []
    for number, phase in enumerate(worker.stage.phases):
        known = worker.batch_sizes[number]
        windows = len(worker.windows("train", phase.window))
        wanted = -(-known // worker.group.size) if isinstance(known, int) else MOST_WINDOWS
        fits = worker.group.least(windows_that_fit(worker, number, min(wanted, MOST_WINDOWS)))
        # Not more than one epoch; a window for every worker at least.
        sizes.append(known if isinstance(known, int) else max(most_workers, min(fits * most_workers, windows)))
        pieces.append(fits)
    # An elastic run with fewer workers has more windows for each: they go through in pieces that fit.
    given = worker.micro_batch_size
    return {"batch_sizes": sizes, "micro_batch_size": given if isinstance(given, int) else min(pieces)}


def windows_that_fit(worker: Worker, phase: int, most: int) -> int:
    """The largest of 1, 2, 4, …, most whose forward and backward pass fits. Raises InputError if one does not."""
    sizes = [2**power for power in range(most.bit_length()) if 2**power < most] + [most]
    if worker.device.type == "cpu":
        bytes_each = saved_bytes(worker, phase)
        # The optimizer's two moments and the gradient come on top, once they exist.
        free = free_memory() * SHARE / worker.config.training.most_workers - 3 * 4 * worker.weights()[1]
        fitting = [size for size in sizes if size * bytes_each <= free]
        if not fitting:
            raise too_large(worker, 1)
        return fitting[-1]
    best = 0
    for size in sizes:
        try:
            _try(worker, phase, size)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            break
        finally:
            worker.optimizer.zero_grad(set_to_none=True)
            if worker.device.type == "cuda":
                torch.cuda.empty_cache()
        best = size
    if best == 0:
        raise too_large(worker, 1)
    # The moments of the optimizer are not there yet: leave a step's room.
    return max(1, best // 2) if best < most else best


def saved_bytes(worker: Worker, phase: int) -> int:
    """Bytes that the forward pass of one window keeps for its backward pass."""
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = _forward(worker, phase, 1)
    weights = {p.untyped_storage().data_ptr() for p in worker.task.network.parameters()}
    found = sum(size for pointer, size in kept.items() if pointer not in weights)
    del loss
    return max(1, found)


def _forward(worker: Worker, phase: int, rows: int) -> torch.Tensor:
    windows = worker.windows("train", worker.stage.phases[phase].window)
    batch = WindowStream(windows, worker.config.run.seed, rows).batch(0)
    worker.network.train()
    with worker.precision.autocast():
        # The bare network: a trial exchanges nothing with other workers.
        return worker.task.loss(worker.task.network, batch, worker.device).total


def _try(worker: Worker, phase: int, rows: int) -> None:
    _forward(worker, phase, rows).backward()


def free_memory() -> float:
    """Bytes that this process may still take: of the machine, or of its container where that has less."""
    free = float(psutil.virtual_memory().available)
    try:
        limit, used = CGROUP_LIMIT.read_text().strip(), CGROUP_USE.read_text().strip()
    except OSError:
        return free
    return free if limit == "max" else min(free, float(limit) - float(used))


def is_out_of_memory(error: BaseException) -> bool:
    """PyTorch's CPU allocator raises a plain RuntimeError."""
    words = ("can't allocate memory", "not enough memory", "out of memory")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(word in str(error).lower() for word in words)


def too_large(worker: Worker, rows: int) -> InputError:
    """rows: windows that the worker computed at once when its memory was used up."""
    what = f"{worker.name}: {rows} window(s) at once do not fit into the memory of {worker.device}"
    if rows <= 1:
        return InputError(
            f"{what}: take a shorter window ({worker.name}.phases.*.window) or a smaller network", code="out_of_memory"
        )
    smaller = 2 ** ((rows - 1).bit_length() - 1)
    return InputError(
        f"{what}: set training.micro_batch_size={smaller}, which leaves the batch and its gradient as they are",
        code="out_of_memory",
    )
