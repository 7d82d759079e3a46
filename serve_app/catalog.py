"""Which models may be asked for: those that the configuration lists, and the folders that lie under models_root now."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from serve_app.config import ALIAS, AppConfig, ModelConfig

FILES = tuple(f"{part}/{name}" for part in ("model", "tokenizer") for name in ("config.json", "model.safetensors"))
OPTIONAL = ("SHA256SUMS", "calibration.json")
FRESH_S = 1.0
"""How old an answer about the file system may be."""

Fingerprint = tuple[tuple[int, int, int], ...]


@dataclass(frozen=True)
class ModelSpec:
    """What decides the numbers of a model. Two that are equal need not be loaded twice.

    settings: without always_on. fingerprint: inode, size, time of change of a found folder's files, optional ones too.
    """

    settings: ModelConfig
    fingerprint: Fingerprint = ()


class Catalog:
    """alias → ModelSpec. A listed model wins over a folder of its name."""

    def __init__(self, config: AppConfig, clock: Callable[[], float] = time.monotonic) -> None:
        self._listed = {
            alias: ModelSpec(settings.model_copy(update={"always_on": False}))
            for alias, settings in config.models.items()
        }
        self._root = None if config.models_root is None else Path(config.models_root)
        self._clock = clock
        self._found: dict[str, tuple[float, ModelSpec | None]] = {}

    def get(self, alias: str) -> ModelSpec | None:
        """None for a name that is not served. Reads the file system at most once in FRESH_S for a name."""
        listed = self._listed.get(alias)
        if listed is not None or self._root is None or not ALIAS.fullmatch(alias):
            return listed
        known = self._found.get(alias)
        if known is None or self._clock() - known[0] > FRESH_S:
            known = (self._clock(), find(self._root, alias))
            if known[1] is None:
                # Not remembered: names that clients make up must not fill the memory.
                self._found.pop(alias, None)
                return None
            self._found[alias] = known
        return known[1]

    def all(self) -> dict[str, ModelSpec]:
        """Every model, listed ones first, then found ones by name."""
        specs = dict(self._listed)
        try:
            names = sorted(entry.name for entry in self._root.iterdir()) if self._root is not None else []
        except OSError:
            names = []  # no such folder yet
        for name in names:
            if name not in specs and (spec := self.get(name)) is not None:
                specs[name] = spec
        return specs


def find(root: Path, name: str) -> ModelSpec | None:
    """The checkpoint root/name, if it is complete and no link leads out of root. name matches ALIAS."""
    try:
        base = root.resolve(strict=True)
        folder = (base / name).resolve(strict=True)
        paths = [(folder / part).resolve(strict=True) for part in FILES]
        if not all(path.is_relative_to(base) and path.is_file() for path in paths):
            return None
        # What need not be there counts too: a calibration that is fitted later is taken over like new weights.
        paths += [path for name in OPTIONAL if (path := (folder / name).resolve()).is_file()]
        if not all(path.is_relative_to(base) for path in paths):
            return None
        stats = [path.stat() for path in paths]
    except OSError:
        return None
    fingerprint = tuple((stat.st_ino, stat.st_size, stat.st_mtime_ns) for stat in stats)
    return ModelSpec(ModelConfig(source=str(folder)), fingerprint)
