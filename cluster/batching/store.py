"""The output folder of a batch forecast: its parts, what is finished, and whose it is.

    part-….parquet     the forecasts of one unit's symbols, written whole or not at all
    _run.json          settings, the model's identity; another run's are refused
    _inputs.parquet    the input files as they were
    _owner             the run that may write now: a killed run's actors, which may outlive it, find another name there
    _spread/           partitions of large inputs, while the run lasts

pandas.read_parquet(folder) reads the parts alone: names that begin with _ or . are no data to it.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet

from model.errors import InputError
from model.types import COLUMNS

RUN_FILE, INPUTS_FILE, OWNER_FILE, SPREAD_FOLDER = "_run.json", "_inputs.parquet", "_owner", "_spread"
_METADATA = b"kronos"
_WORD = pa.dictionary(pa.int32(), pa.string())
PROVENANCE = ("model", "revision", "sha256", "device", "precision", "window")


class Part(NamedTuple):
    """What a finished part says of itself: its symbols, and the error code of each that failed."""

    symbols: tuple[str, ...]
    errors: dict[str, str]


class Finished(NamedTuple):
    """What a complete output holds."""

    symbols: int
    errors: int


def schema(quantiles: Sequence[float], paths: bool) -> pa.Schema:
    """The columns of every part; docs/batch.md describes them."""
    fields = [
        pa.field("symbol", pa.string()),
        pa.field("timestamp", pa.timestamp("us")),
        pa.field("time_zone", _WORD),
        pa.field("step", pa.int32()),
    ]
    for name in COLUMNS:
        fields.append(pa.field(f"{name}_mean", pa.float64()))
        fields += [pa.field(f"{name}_q{level:g}", pa.float64()) for level in quantiles]
    if paths:
        fields += [pa.field(f"{name}_paths", pa.list_(pa.float32())) for name in COLUMNS]
    fields += [pa.field("history", pa.int32()), pa.field("seed", pa.int64())]
    fields += [pa.field(name, _WORD) for name in PROVENANCE]
    fields += [pa.field("error_code", _WORD), pa.field("error", pa.string())]
    return pa.schema(fields)


def part_name(symbols: Sequence[str]) -> str:
    """The same symbols are the same part, so that a unit that is computed twice is written once."""
    return f"part-{hashlib.sha256(json.dumps(sorted(symbols)).encode()).hexdigest()[:20]}.parquet"


class Store:
    """One output folder, seen by one run. Cheap to send to actors."""

    def __init__(self, folder: str | Path, token: str = "") -> None:
        self.folder, self.token = Path(folder), token

    def claim(self, run: Mapping[str, Any], inputs: Mapping[str, tuple[int, int]]) -> None:
        """Makes the folder this run's, and this run the one that may write.

        run: "settings" and "model", which must be those that the folder was begun with. inputs: path → (bytes, time of
        change in ns); files may be added to them later, none may change.
        Raises InputError, naming the settings or the file.
        """
        known = self.folder / RUN_FILE
        if known.is_file():
            self._check_run(json.loads(known.read_text(encoding="utf-8")), run)
            self._check_inputs(inputs)
        elif self.folder.exists() and any(self.folder.iterdir()):
            raise InputError(
                f"--output {self.folder} holds files that are not of a batch forecast: give a new or empty folder",
                code="output_not_empty",
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        _write_text(known, json.dumps(run, indent=1))
        paths, facts = list(inputs), list(inputs.values())
        table = pa.table({"path": paths, "size": [size for size, _ in facts], "changed_ns": [t for _, t in facts]})
        _write_table(self.folder / INPUTS_FILE, table)
        self.token = secrets.token_hex(8)
        _write_text(self.folder / OWNER_FILE, self.token)

    def complete(self, symbols: int, errors: int) -> None:
        """Notes that every symbol of the inputs is in a part."""
        path = self.folder / RUN_FILE
        run = json.loads(path.read_text(encoding="utf-8"))
        _write_text(path, json.dumps({**run, "complete": {"symbols": symbols, "errors": errors}}, indent=1))

    def finished(self, run: Mapping[str, Any], inputs: Mapping[str, tuple[int, int]]) -> Finished | None:
        """What a complete output of the same settings and files holds; None if there is something to do.

        Raises InputError for another run's folder, as claim does.
        """
        path = self.folder / RUN_FILE
        if not path.is_file():
            return None
        known = json.loads(path.read_text(encoding="utf-8"))
        self._check_run(known, run)
        self._check_inputs(inputs)
        if "complete" not in known or self.input_files() != set(inputs):
            return None
        told = Finished(**known["complete"])
        # A part that was deleted is to be computed again.
        return told if sum(len(part.symbols) for part in self.parts()) == told.symbols else None

    def _check_run(self, known: Mapping[str, Any], run: Mapping[str, Any]) -> None:
        changed = [
            f"{name} ({_shown(known.get(section, {}).get(name))}, now {_shown(value)})"
            for section in ("settings", "model")
            for name, value in run[section].items()
            if known.get(section, {}).get(name) != value
        ]
        if changed:
            raise InputError(
                f"--output {self.folder} was begun with another {', '.join(changed)}: take another --output, or the "
                "settings it was begun with",
                code="run_exists",
            )

    def _check_inputs(self, inputs: Mapping[str, tuple[int, int]]) -> None:
        stored = pyarrow.parquet.read_table(self.folder / INPUTS_FILE).to_pylist()
        for row in stored:
            path, facts = row["path"], (row["size"], row["changed_ns"])
            if path in inputs and inputs[path] == facts:
                continue
            what = "has changed" if path in inputs else "is not among the input files any more"
            raise InputError(
                f"--output {self.folder} was begun with {path}, which {what}: take another --output",
                code="input_changed",
            )

    def input_files(self) -> set[str]:
        """The input files of the run that used this folder last; none for a new folder."""
        path = self.folder / INPUTS_FILE
        return set(pyarrow.parquet.read_table(path, columns=["path"])["path"].to_pylist()) if path.is_file() else set()

    def parts(self) -> list[Part]:
        """Everything that is finished; only the files' ends are read. Raises InputError for one that cannot be."""
        found = []
        for file in sorted(self.folder.glob("part-*.parquet")):
            part = read_part(file)
            if part is None:
                raise InputError(
                    f"{file} is damaged: delete it, and the next run computes its symbols again", code="unreadable_file"
                )
            found.append(part)
        return found

    def read(self, symbols: Sequence[str]) -> Part | None:
        """The finished part of exactly these symbols, if there is one."""
        return read_part(self.folder / part_name(symbols))

    def write(self, table: pa.Table, part: Part) -> None:
        """Writes a part whole or not at all. Raises RuntimeError if the folder is another run's by now."""
        if (self.folder / OWNER_FILE).read_text(encoding="utf-8") != self.token:
            raise RuntimeError(f"another run has taken {self.folder} over: this one writes no more")
        metadata = {_METADATA: json.dumps({"symbols": part.symbols, "errors": part.errors}).encode()}
        _write_table(self.folder / part_name(part.symbols), table.replace_schema_metadata(metadata))


def read_part(file: Path) -> Part | None:
    """What a part says of itself; None if there is no such file, or no whole one."""
    try:
        metadata = pyarrow.parquet.read_schema(file).metadata or {}
        told = json.loads(metadata[_METADATA])
        return Part(tuple(told["symbols"]), told["errors"])
    except (OSError, pa.ArrowException, KeyError, ValueError):
        return None


def _shown(value: Any) -> str:
    return str(value) if not isinstance(value, str) or len(value) < 20 else f"{value[:12]}…"


def _write_table(path: Path, table: pa.Table) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    try:
        pyarrow.parquet.write_table(table, temporary, compression="zstd")
        _finish(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _write_text(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    _finish(temporary, path)


def _finish(temporary: Path, path: Path) -> None:
    """On disk before it has its name: after a loss of power a file is whole or not there."""
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)
