"""A bundle: a folder that the server lists and serves by its name.

tokenizer/ model/     config.json and model.safetensors each
training.json         how it was made, without secrets
report.json           cluster.evaluate's, if it was measured
calibration.json      if it was calibrated
SHA256SUMS            of all of these; the server refuses a bundle that is not what it lists
README.md             the card; not listed, so that a word in it can be corrected
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from cluster.candles.simulate import simulate
from model.calibration import load_calibration
from model.checkpoint import CONFIG_FILE, WEIGHTS_FILE
from model.errors import CheckpointMismatchError, InputError
from model.predictor import KronosPredictor
from model.registry import MANIFEST_FILE, Checkpoint, CheckpointSource, load_checkpoint, sha256_of
from model.types import Sampling, Series

NETWORKS = ("tokenizer", "model")
CARD_FILE, REPORT_FILE = "README.md", "report.json"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
"""Names that the server takes."""


def check_name(name: str) -> None:
    """Raises InputError for a name that no server would serve."""
    if not NAME.fullmatch(name):
        raise InputError(
            f"{name[:64]!r} cannot be served: a name has letters, digits, dots, underscores and hyphens, 64 at most, "
            "and begins with a letter or a digit",
            code="bad_name",
        )


def read_json(path: Path) -> dict[str, Any]:
    """Raises InputError for a file that is not there or holds no JSON object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}", code="no_such_file") from None
    except ValueError as error:
        raise InputError(f"{path} is not JSON: {error}", code="unreadable_file") from None
    if not isinstance(value, dict):
        raise InputError(f"{path} is not a JSON object", code="unreadable_file")
    return value


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


@contextmanager
def new_folder(destination: Path, *, replace: bool) -> Iterator[Path]:
    """A folder beside destination to fill, which takes its place at the end; after an error nothing has changed.

    Hidden until then, so that a server never sees half a bundle. Raises InputError if destination exists and is not to
    be replaced, or is no bundle: whoever leaves out the name at the end of models/mine must not lose models.
    """
    if destination.exists() and not replace:
        raise InputError(f"{destination} exists: choose another folder, or give --replace", code="exists")
    if destination.exists() and not _may_be_replaced(destination):
        text = f"{destination} is no bundle and is not replaced: name the bundle's own folder, as in {destination}/mine"
        raise InputError(text, code="not_a_bundle")
    destination.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=destination.parent, prefix=f".{destination.name}.") as temporary:
        part = Path(temporary) / "new"
        part.mkdir()
        yield part
        for file in part.rglob("*"):
            if file.is_file():
                _to_disk(file)
        if not destination.exists():
            part.rename(destination)
        elif not _exchange(part, destination):
            _replace_in_two_steps(part, destination, Path(temporary) / "old")


def _may_be_replaced(path: Path) -> bool:
    """Whether a bundle lies there, or an empty folder."""
    return path.is_dir() and ((path / "model" / CONFIG_FILE).is_file() or not any(path.iterdir()))


def _exchange(one: Path, other: Path) -> bool:
    """Swaps two folders in one step, so that a server finds the old bundle or the new one; False where Linux cannot."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE of linux/fs.h
    return rename is not None and rename(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0


def _replace_in_two_steps(new: Path, destination: Path, old: Path) -> None:
    """For other systems: for an instant there is nothing at destination."""
    destination.rename(old)
    try:
        new.rename(destination)
    except OSError:
        old.rename(destination)
        raise


def _to_disk(file: Path) -> None:
    with file.open("rb") as opened:
        os.fsync(opened.fileno())


def copy_networks(sources: dict[str, Path], folder: Path) -> None:
    """sources: "tokenizer" and "model" → their folders. Raises InputError if a file is missing."""
    for part in NETWORKS:
        (folder / part).mkdir()
        for name in (CONFIG_FILE, WEIGHTS_FILE):
            if not (sources[part] / name).is_file():
                raise InputError(f"{sources[part]} holds no {name}", code="no_such_file")
            shutil.copyfile(sources[part] / name, folder / part / name)


def write_manifest(folder: Path) -> None:
    """SHA256SUMS of everything but the card, as sha256sum writes it."""
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    lines = [f"{sha256_of(folder / name)}  {name}\n" for name in files if name not in (MANIFEST_FILE, CARD_FILE)]
    (folder / MANIFEST_FILE).write_text("".join(lines), encoding="utf-8")


def pair_sha256(model: Path, tokenizer: Path) -> str:
    """What model.registry calls the sha256 of a model and its tokenizer, from their folders."""
    return digest_of_pair(*(sha256_of(folder / WEIGHTS_FILE) for folder in (model, tokenizer)))


def digest_of_pair(model: str, tokenizer: str) -> str:
    """The same from the sha256 of both weights files."""
    return hashlib.sha256((model + tokenizer).encode()).hexdigest()


def open_bundle(folder: Path) -> Checkpoint:
    """Loads a bundle as the server does. Raises InputError or a CheckpointError."""
    if not folder.is_dir():
        raise InputError(f"there is no folder {folder}", code="no_such_file")
    return load_checkpoint(CheckpointSource(id=folder.name, model=str(folder)))


def verify_bundle(folder: Path) -> Checkpoint:
    """Loads a bundle as the server does, manifest and calibration included, and makes one forecast on the CPU.

    Raises a CheckpointError, also if the forecast is not finite or the calibration is one of other weights.
    """
    checkpoint = open_bundle(folder)
    load_calibration(folder, checkpoint.sha256)
    predictor = KronosPredictor(checkpoint.model, checkpoint.tokenizer, device="cpu", precision="fp32")
    [bars] = simulate(0, 1, 40)
    series = Series(bars.candles[:32], bars.marks[:32], bars.marks[32:])
    if not np.isfinite(predictor.forecast_series(series, Sampling(samples=1, seed=0)).values).all():
        raise CheckpointMismatchError(f"{folder}: a forecast of simulated bars is not finite")
    return checkpoint
