"""A folder of checkpoints whose content changes while the service runs."""

from __future__ import annotations

import asyncio
import os
import pickle
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from safetensors.numpy import load_file, save_file

from benchmarks.load import forecast_body
from benchmarks.open_loop import Run
from benchmarks.service import bundled_config

BUNDLED = Path(__file__).parents[1] / "model" / "bundled"
ALIAS = "swapped"
WEIGHTS = "model/model.safetensors"

SETTLE_S = 8.0
"""For a change to be noticed, read and warmed up, or refused, after the load."""

Change = Callable[[Path], None]


def config(root: Path) -> dict[str, Any]:
    """The bundled model, and what lies under root: the folder ALIAS is served as the model of that name."""
    data = bundled_config(2)
    args = data["applications"][0]["args"]
    args["models_root"] = str(root)
    return data


def install(root: Path, source: Path, change: Change = lambda folder: None) -> None:
    """Puts a copy of the checkpoint, changed, in the place of the one that is served, in one step."""
    fresh = Path(tempfile.mkdtemp(dir=root, prefix=".new-"))
    shutil.copytree(source, fresh, dirs_exist_ok=True)
    change(fresh)
    place = root / ALIAS
    old = root / f".old-{time.monotonic_ns()}"
    if place.exists():
        os.rename(place, old)
    os.rename(fresh, place)
    shutil.rmtree(old, ignore_errors=True)


def _edit(change: Callable[[dict[str, np.ndarray]], None]) -> Change:
    def apply(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS)

    return apply


def _scale(tensors: dict[str, np.ndarray]) -> None:
    for name in tensors:
        tensors[name] = (tensors[name] * 1.01).astype(tensors[name].dtype)


def _nan(tensors: dict[str, np.ndarray]) -> None:
    for name in tensors:
        tensors[name] = np.full_like(tensors[name], np.nan)


def _wrong_shape(tensors: dict[str, np.ndarray]) -> None:
    name = max(tensors, key=lambda key: tensors[key].size)
    tensors[name] = np.ascontiguousarray(tensors[name][:-1])


def _truncate(folder: Path) -> None:
    path = folder / WEIGHTS
    path.write_bytes(path.read_bytes()[:-1000])


def _pickle(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes(pickle.dumps({"weights": [1, 2, 3]}))


CHANGES: list[tuple[str, Change, bool]] = [
    ("other weights", _edit(_scale), True),
    ("truncated file", _truncate, False),
    ("NaN weights", _edit(_nan), False),
    ("wrong shape", _edit(_wrong_shape), False),
    ("a pickle", _pickle, False),
]
"""Name, what is done to a good checkpoint, and whether it may take over."""


def shown(url: str) -> dict[str, Any]:
    """What /v1/models says of the model."""
    models = httpx.get(f"{url}/v1/models", timeout=30).json()["models"]
    return next((one for one in models if one["id"] == ALIAS), {"sha256": None, "pending": None, "replicas": 0})


def refused(model: dict[str, Any]) -> bool:
    """True if a checkpoint was tried in the place of the one that serves, and found bad."""
    return model["pending"] is not None and model["pending"]["state"] == "failed" and bool(model["error"])


def wait_for(url: str, holds: Callable[[dict[str, Any]], bool], timeout_s: float = SETTLE_S) -> dict[str, Any]:
    """The model as soon as `holds` is true of it, or as it is when the time is over."""
    end = time.monotonic() + timeout_s
    while not holds(model := shown(url)) and time.monotonic() < end:
        time.sleep(0.2)
    return model


def load_everywhere(url: str, replicas: int, timeout_s: float = 60.0) -> None:
    """Asks for the model until every replica has it: it loads on first use. Raises TimeoutError."""
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        httpx.post(f"{url}/v1/forecast", json=forecast_body(0, model=ALIAS), timeout=60)
        if shown(url)["replicas"] == replicas:
            return
        time.sleep(0.1)
    raise TimeoutError(f"{ALIAS} is not loaded everywhere")


def swap_under_load(
    url: str, root: Path, change: Change, good: bool, load: Callable[..., Run], quick: bool
) -> tuple[Run, dict[str, bool]]:
    """Changes the checkpoint under load; the run, and what is to be shown. What was bad is replaced by a good one."""
    before = shown(url)["sha256"]

    async def swap(run: Run) -> None:
        await asyncio.sleep(2)
        await asyncio.to_thread(install, root, BUNDLED, change)

    run = load(10 if quick else 20, during=swap)
    if good:
        after = wait_for(url, lambda model: model["sha256"] != before)
        return run, {"the new weights answer": after["sha256"] not in (None, before)}
    after = wait_for(url, refused)
    verdict = {"the new weights are refused": refused(after), "the old ones answer": after["sha256"] == before}
    # The next case must not take this refusal for its own.
    install(root, BUNDLED)
    healed = wait_for(url, lambda model: model["pending"] is None)
    return run, {**verdict, "a good one is taken afterwards": healed["pending"] is None}
