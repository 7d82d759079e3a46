"""From a configured source to its series, and what identifies the data of a run in its record."""

from __future__ import annotations

import hashlib
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from cluster.candles.bars import SymbolBars, find_files, read_bars
from cluster.candles.data_config import FileSource, QlibSource, SimulatedSource
from cluster.candles.qlib import read_qlib
from model.errors import InputError
from model.registry import sha256_of

CACHE_PARTS = ("times", "candles", "marks")
CACHE_RULES = 3
"""Of reading files; raised when the same file is read otherwise: under 1 a column Volume counted as none, and symbols
that were bytes were called b'A'; under 2 prices might be 0 or less."""


def read_source(source: FileSource | QlibSource) -> list[SymbolBars]:
    """Every symbol of the source, as a whole. Raises InputError."""
    if isinstance(source, QlibSource):
        return read_qlib(source.path, freq=source.freq, market=source.market)
    if source.cache is None:
        return _read_files(source)
    folder = source.cache / _cache_key(source)
    if not folder.is_dir():
        _write_cache(folder, _read_files(source))
    return _open_cache(folder)


def _read_files(source: FileSource) -> list[SymbolBars]:
    return read_bars(source.paths, time_column=source.time_column, symbol_column=source.symbol_column)


def _cache_key(source: FileSource) -> str:
    """Of what decides the arrays: which files, that they are as they were, and how they are read."""
    files = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in find_files(source.paths)]
    key = json.dumps([CACHE_RULES, source.time_column, source.symbol_column, files])
    return hashlib.sha256(key.encode()).hexdigest()[:16]


def _write_cache(folder: Path, series: list[SymbolBars]) -> None:
    """One file an array, all symbols one after the other. Whoever comes first writes; others find it whole or not."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        part = Path(temporary) / "cache"
        part.mkdir()
        for name in CACHE_PARTS:
            np.save(part / f"{name}.npy", np.concatenate([getattr(bars, name) for bars in series]))
        index = [{"symbol": bars.symbol, "zone": bars.zone, "bars": len(bars)} for bars in series]
        (part / "index.json").write_text(json.dumps(index), encoding="utf-8")
        try:
            part.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another worker was faster
                raise


def _open_cache(folder: Path) -> list[SymbolBars]:
    try:
        index = json.loads((folder / "index.json").read_text(encoding="utf-8"))
        times, candles, marks = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in CACHE_PARTS)
    except (OSError, ValueError) as error:
        raise InputError(f"{folder} is damaged ({error}): remove it", code="unreadable_file") from None
    ends = np.cumsum([entry["bars"] for entry in index])
    spans = [slice(int(end) - entry["bars"], int(end)) for end, entry in zip(ends, index, strict=True)]
    return [
        SymbolBars(entry["symbol"], times[span], candles[span], marks[span], entry["zone"])
        for entry, span in zip(index, spans, strict=True)
    ]


def describe_source(source: SimulatedSource | FileSource | QlibSource) -> dict[str, Any]:
    """What a run's record and a model card say of the data: {"sha256", "files": [{"name", "bytes", "sha256"}]}.

    sha256: over the files' names and contents; for simulated series over the settings that make them, with no files.
    """
    if isinstance(source, SimulatedSource):
        settings = json.dumps(source.model_dump(mode="json"), sort_keys=True)
        return {"sha256": hashlib.sha256(settings.encode()).hexdigest(), "files": []}
    paths = find_files(source.paths) if isinstance(source, FileSource) else _qlib_files(source)
    files = []
    for path in paths:
        name = path.name if isinstance(source, FileSource) else path.relative_to(source.path).as_posix()
        files.append({"name": name, "bytes": path.stat().st_size, "sha256": sha256_of(path)})
    listed = "".join(f"{entry['name']} {entry['sha256']}\n" for entry in files)
    # A market of thousands of symbols has tens of thousands of files: its one hash must do.
    return {"sha256": hashlib.sha256(listed.encode()).hexdigest(), "files": files if len(files) <= 100 else []}


def _qlib_files(source: QlibSource) -> list[Path]:
    calendar = source.path / "calendars" / f"{source.freq}.txt"
    market = source.path / "instruments" / f"{source.market}.txt"
    return [calendar, market, *sorted(source.path.glob(f"features/*/*.{source.freq}.bin"))]
