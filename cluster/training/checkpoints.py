"""The checkpoints of one stage of one run: a folder per step, whole or not there, and only believed after a check.

    <run folder>/step_0000250/   network/… or adapters.safetensors   state.pt   manifest.json
    <run folder>/checkpoints.json   which is the best, which the last: for people; nothing here reads it

A folder is written under another name, flushed to the disk, and renamed; the manifest holds a sha256 of every file, and
the fingerprint of the run (all that decides its numbers). What fails the check is refused by name and skipped.

The trainer keeps its checkpoints itself rather than hand them to Ray Train, so that a run in one process, on Ray, after
a lost worker and after a lost driver finds them by one rule; the folder must be one that all nodes share.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster.files import write_atomically
from model.errors import CheckpointMismatchError
from model.registry import sha256_of

MANIFEST_FILE = "manifest.json"
INDEX_FILE = "checkpoints.json"
VERSION = 1
_NAME = re.compile(r"step_(\d{7,})")
_SCORE = "validation_loss"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Saved:
    """A checkpoint that has passed the check. score: its validation loss; None where it was not validated."""

    folder: Path
    step: int
    metrics: dict[str, float] = field(default_factory=dict)

    @property
    def score(self) -> float | None:
        return self.metrics.get(_SCORE)


class Checkpoints:
    """fingerprint: what other runs' checkpoints do not have. keep: how many of the best stay, beside the last."""

    def __init__(self, folder: Path, fingerprint: str, *, keep: int = 1) -> None:
        self.folder, self.fingerprint, self.keep = folder, fingerprint, keep
        self.refused: list[str] = []
        """What was wrong with the checkpoints that were passed over, in words."""

    def save(self, step: int, write: Callable[[Path], None], metrics: dict[str, float]) -> Path:
        """write(folder) puts the files there. Afterwards the checkpoints that need not be kept are removed."""
        final = self.folder / _name(step)
        partial = self.folder / f".partial-{final.name}"
        for leftover in [*self.folder.glob(".partial-*"), *self.folder.glob(".removed-*")]:  # of a process that died
            shutil.rmtree(leftover)
        partial.mkdir(parents=True)
        write(partial)
        files = {}
        for path in sorted(p for p in partial.rglob("*") if p.is_file()):
            _flush(path)
            files[path.relative_to(partial).as_posix()] = {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
        manifest = {
            "version": VERSION,
            "step": step,
            "fingerprint": self.fingerprint,
            "metrics": metrics,
            "files": files,
        }
        manifest["sha256"] = _digest(manifest)
        (partial / MANIFEST_FILE).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        _flush(partial / MANIFEST_FILE)
        for directory in (p for p in partial.rglob("*") if p.is_dir()):
            _flush(directory)
        _flush(partial)
        if final.exists():  # of before a restart, or damaged
            self._remove(final)
        os.rename(partial, final)
        _flush(self.folder)
        self._prune(step)
        return final

    def latest(self) -> Saved | None:
        """The last checkpoint that is whole and of this run; those after it are refused in the log."""
        return next(self._valid(reversed(self._folders())), None)

    def best(self) -> Saved | None:
        """The one with the lowest validation loss (of equals the earliest), whole and of this run."""
        scored = []
        for folder in self._folders():
            manifest = _read_manifest(folder)
            if manifest is not None and _SCORE in manifest["metrics"]:
                scored.append((manifest["metrics"][_SCORE], folder))
        return next(self._valid(folder for _, folder in sorted(scored)), None)

    @property
    def empty(self) -> bool:
        """Whether there is no checkpoint at all, not even one that would be refused."""
        return not self._folders()

    def _folders(self) -> list[Path]:
        """In order of their steps."""
        if not self.folder.is_dir():
            return []
        found = [(int(match[1]), path) for path in self.folder.iterdir() if (match := _NAME.fullmatch(path.name))]
        return [path for _, path in sorted(found)]

    def _valid(self, folders: Iterable[Path]) -> Iterator[Saved]:
        for folder in folders:
            try:
                yield self.check(folder)
            except CheckpointMismatchError as error:
                message = f"checkpoint {folder.name} is refused: {error}"
                if message not in self.refused:
                    self.refused.append(message)
                    logger.warning(message)

    def check(self, folder: Path) -> Saved:
        """Raises CheckpointMismatchError, naming the file, if the checkpoint is not whole or not of this run."""
        manifest = _read_manifest(folder)
        if manifest is None:
            raise CheckpointMismatchError(f"{MANIFEST_FILE} is missing, cut off or changed")
        if manifest.get("version") != VERSION:
            raise CheckpointMismatchError(f"its version is {manifest.get('version')!r}, and {VERSION} is read here")
        if manifest["fingerprint"] != self.fingerprint:
            raise CheckpointMismatchError("it is of a run with another configuration, other data or other weights")
        if folder.name != _name(manifest["step"]):
            raise CheckpointMismatchError(f"its manifest is of step {manifest['step']}")
        for name, wanted in manifest["files"].items():
            path = folder / name
            if not path.is_file():
                raise CheckpointMismatchError(f"{name} is missing")
            if path.stat().st_size != wanted["bytes"]:
                raise CheckpointMismatchError(f"{name} has {path.stat().st_size} bytes, not {wanted['bytes']}")
            if sha256_of(path) != wanted["sha256"]:
                raise CheckpointMismatchError(f"{name} does not have the sha256 of its manifest")
        present = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()} - {MANIFEST_FILE}
        if foreign := sorted(present - manifest["files"].keys()):
            raise CheckpointMismatchError(f"{foreign[0]} is not in its manifest")
        return Saved(folder, manifest["step"], manifest["metrics"])

    def _prune(self, step: int) -> None:
        """Keeps the best few and the one just saved. Later ones were refused when the run resumed: they have no say."""
        read = [(path, manifest) for path in self._folders() if (manifest := _read_manifest(path))]
        mine = [(path, m) for path, m in read if m["fingerprint"] == self.fingerprint and m["step"] <= step]
        known = [(path, m) for path, m in mine if path.name == _name(m["step"])]
        scored = sorted((m["metrics"][_SCORE], path) for path, m in known if _SCORE in m["metrics"])
        best = [path for _, path in scored[: self.keep]]
        last = known[-1][0]
        kept = [path for path, _ in known if path in best or path == last]
        index = {"best": best[0].name if best else None, "last": last.name, "kept": [path.name for path in kept]}
        write_atomically(self.folder / INDEX_FILE, json.dumps(index, indent=2) + "\n")
        for path, _ in known:
            if path not in kept:
                self._remove(path)

    def _remove(self, path: Path) -> None:
        # Renamed first: a removal that is cut short must not leave half a checkpoint under its name.
        gone = self.folder / f".removed-{path.name}"
        shutil.rmtree(gone, ignore_errors=True)
        os.rename(path, gone)
        shutil.rmtree(gone)


def _name(step: int) -> str:
    return f"step_{step:07d}"


def _digest(manifest: dict[str, Any]) -> str:
    """Of all of a manifest but its own digest."""
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _read_manifest(folder: Path) -> dict[str, Any] | None:
    """None for one that is missing, cut off or changed; what save wrote otherwise."""
    try:
        manifest = json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    whole = isinstance(manifest, dict) and manifest.get("sha256") == _digest(manifest)
    return manifest if whole else None


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
