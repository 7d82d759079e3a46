"""How the symbols of a batch forecast are divided into units: what one actor reads, computes and writes in one piece.

A unit's rows are read with a filter, file by file: nothing is shuffled. Only files that are too large to be read anew
for every unit are first split by a hash of the symbol into partitions on disk (spread), in one pass. Ray Data's groupby
would hold all rows in its object store and shuffle them at every run; a partition on disk is read again after a
restart, and a symbol's place depends on its name alone.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet

from cluster.batching.files import PARQUET, Layout, Source, dataset, known_columns

SPREAD_BYTES = 64 * 2**20
"""Symbols whose files are larger than this are read from partitions of about this size."""


@dataclass(frozen=True)
class Unit:
    """symbols: in their order. files: (path, layout) of all files that hold bars of them."""

    symbols: tuple[str, ...]
    files: tuple[tuple[str, str], ...]

    def text(self) -> str:
        return json.dumps([self.symbols, self.files])

    @staticmethod
    def parse(text: str) -> Unit:
        symbols, files = json.loads(text)
        return Unit(tuple(symbols), tuple((path, layout) for path, layout in files))


@dataclass(frozen=True)
class Spread:
    """Files to be split, and into how many partitions below folder."""

    files: frozenset[str]
    partitions: int
    folder: str

    def place(self, symbol: str) -> str:
        """The folder of the partition that a symbol's rows go to."""
        return str(Path(self.folder) / f"{partition(symbol, self.partitions):05d}")


def partition(symbol: str, partitions: int) -> int:
    """A number below `partitions` that depends on the symbol alone."""
    return int.from_bytes(hashlib.blake2b(symbol.encode(), digest_size=8).digest()) % partitions


def plan_spread(sources: Sequence[Source], folder: Path, limit: int = SPREAD_BYTES) -> Spread | None:
    """The long files that a unit should not read as they are; None if there are none."""
    weight: dict[str, int] = {}
    for source in sources:
        for symbol in source.symbols:
            weight[symbol] = weight.get(symbol, 0) + source.size
    chosen = [s for s in sources if s.layout == "long" and any(weight[symbol] > limit for symbol in s.symbols)]
    if not chosen:
        return None
    files = sorted(source.path for source in chosen)
    size = sum(source.size for source in chosen)
    key = hashlib.sha256(json.dumps([files, size]).encode()).hexdigest()[:16]
    return Spread(frozenset(files), max(1, -(-size // limit)), str(folder / key))


def plan_units(sources: Sequence[Source], spread: Spread | None, skip: Iterable[str], size: int) -> list[Unit]:
    """Every symbol that is not in skip, in exactly one unit of at most `size` symbols; near each other on disk."""
    done = set(skip)
    places: dict[str, list[tuple[str, str]]] = {}
    for source in sources:
        for symbol in source.symbols:
            if symbol in done:
                continue
            place = (source.path, source.layout)
            if spread is not None and source.path in spread.files:
                place = (spread.place(symbol), "spread")
            known = places.setdefault(symbol, [])
            if place not in known:
                known.append(place)
    order = sorted(places, key=lambda symbol: (places[symbol][0], symbol))
    units = []
    for start in range(0, len(order), size):
        symbols = order[start : start + size]
        files = dict.fromkeys(place for symbol in symbols for place in places[symbol])
        units.append(Unit(tuple(symbols), tuple(files)))
    return units


def spread_file(path: str, number: int, spread: Spread, names: Layout) -> None:
    """Writes one file's rows into the partitions, batch by batch. A second try replaces what the first one left."""
    finished = Path(spread.folder) / f"{number:06d}.done"
    if finished.exists():
        return
    try:
        _write_partitions(dataset(path, names, pa.float64()), number, spread, names)
    except pa.ArrowInvalid:
        if path.lower().endswith(PARQUET):
            raise
        # A text among the numbers of a CSV: as text everywhere, so that the symbol it belongs to can say so.
        _write_partitions(dataset(path, names, pa.string()), number, spread, names)
    finished.touch()


def _write_partitions(rows: pyarrow.dataset.Dataset, number: int, spread: Spread, names: Layout) -> None:
    writers: dict[int, Any] = {}
    symbol = known_columns(rows.schema.names, names)[names.symbol]
    try:
        for batch in rows.to_batches():
            table = pa.table(batch)
            codes = table.column(symbol).cast(pa.string()).combine_chunks().dictionary_encode()
            # The last one is for rows without a symbol.
            targets = [partition(text, spread.partitions) for text in [*codes.dictionary.to_pylist(), ""]]
            places = np.asarray(targets)[codes.indices.fill_null(len(targets) - 1).to_numpy(zero_copy_only=False)]
            for place in np.unique(places).tolist():
                if place not in writers:
                    folder = Path(spread.folder) / f"{place:05d}"
                    folder.mkdir(parents=True, exist_ok=True)
                    writers[place] = pyarrow.parquet.ParquetWriter(folder / f"{number:06d}.parquet", table.schema)
                writers[place].write_table(table.take(np.flatnonzero(places == place)))  # keeps the order of the rows
    finally:
        for writer in writers.values():
            writer.close()


def remove_spread(folder: Path) -> None:
    """Partitions are not needed once every symbol is written."""
    if folder.exists():
        shutil.rmtree(folder)
