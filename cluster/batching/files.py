"""The input of a batch forecast: which files there are, how they are laid out, and which symbols lie where.

Three layouts, told apart by the columns:
- single: time, open, high, low, close, and volume and amount if known; the file is one symbol, named after the file.
- long: the same and a column with the symbol of each row.
- wide: time, and per symbol the columns SYMBOL.open, SYMBOL.high, SYMBOL.low, SYMBOL.close (SYMBOL.volume,
  SYMBOL.amount). A row in which all columns of a symbol are empty is no bar of it.
The names of columns, but for the SYMBOL in them, may be in any case: model.frames.columns_by_name.
"""

from __future__ import annotations

import glob
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.dataset
import pyarrow.parquet

from cluster.candles.bars import symbols_as_text
from model.errors import InputError
from model.frames import PRICE_COLUMNS, columns_by_name, same_name
from model.types import COLUMNS

PARQUET = (".parquet", ".pq")
SUFFIXES = (".csv", *PARQUET)
SCAN_THREADS = 8


@dataclass(frozen=True)
class Layout:
    """Names of the columns that are not candles."""

    time: str = "timestamps"
    symbol: str = "symbol"


@dataclass(frozen=True)
class Source:
    """One input file. layout: single | long | wide, or "" if it cannot be read, and then fault says why.

    size: bytes that its rows take in memory, roughly. symbols: in the order in which they appear.
    """

    path: str
    layout: str
    symbols: tuple[str, ...]
    size: int = 0
    fault: InputError | None = None


def find_files(patterns: Iterable[str]) -> list[Path]:
    """Files, the .csv and .parquet files of folders (and of the folders in them), and globs, sorted, each once.

    Raises InputError for a pattern that names nothing.
    """
    found: set[Path] = set()
    for pattern in patterns:
        path = Path(pattern)
        # A file of that very name wins over what its brackets or stars would match.
        matches = [path] if path.exists() else [Path(match) for match in glob.glob(pattern, recursive=True)]
        files = {file for match in matches for file in _files_of(match)}
        if not files:
            raise InputError(
                f"--input {pattern}: there is no .csv or .parquet file of that name, pattern or folder",
                code="no_such_file",
            )
        found |= files
    return sorted(file.resolve() for file in found)


def _files_of(path: Path) -> Iterator[Path]:
    if path.is_dir():
        yield from (file for file in path.rglob("*") if file.is_file() and file.suffix.lower() in SUFFIXES)
    elif path.suffix.lower() in SUFFIXES:
        yield path


def scan(files: Sequence[Path], names: Layout) -> list[Source]:
    """Layout and symbols of every file; only headers and symbol columns are read.

    Raises InputError, the first file's, if no file can be read at all.
    """
    with ThreadPoolExecutor(SCAN_THREADS) as pool:
        sources = list(pool.map(lambda file: _scan_file(file, names), files))
    readable = [source for source in sources if source.fault is None]
    if not readable:
        raise sources[0].fault or InputError("there are no files", code="no_rows")
    return sources


def _scan_file(file: Path, names: Layout) -> Source:
    try:
        schema = _schema(file)
        layout = layout_of(schema.names, names, str(file))
        size = _size(file)
        if layout == "single":
            return Source(str(file), layout, (file.stem,), size)
        if layout == "wide":
            return Source(str(file), layout, tuple(wide_columns(schema.names, names)), size)
        symbols = tuple(_long_symbols(file, names, known_columns(schema.names, names)[names.symbol]))
        if not symbols:
            raise InputError(f"{file}: there are no rows: give at least one bar of history", code="no_rows")
        return Source(str(file), layout, symbols, size)
    except InputError as fault:
        return Source(str(file), "", (file.stem,), fault=fault)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        return Source(str(file), "", (file.stem,), fault=unreadable(file, error))


def unreadable(file: Path | str, error: Exception) -> InputError:
    """What a reader of files says, as an error of ours."""
    return InputError(f"{file} cannot be read: {str(error).strip().partition(chr(10))[0]}", code="unreadable_file")


def layout_of(columns: Sequence[str], names: Layout, where: str) -> str:
    """single | long | wide. Raises InputError that says which column is missing, or there twice."""
    known = known_columns(columns, names, f"{where}: ")
    if names.time not in known:
        raise InputError(
            f"{where}: column {names.time!r} is missing: give each bar its time, or name its column with --time-column",
            code="missing_column",
            column=names.time,
        )
    if any(name in known for name in PRICE_COLUMNS):
        missing = next((name for name in PRICE_COLUMNS if name not in known), None)
        if missing is not None:
            raise InputError(
                f"{where}: column {missing!r} is missing: {', '.join(PRICE_COLUMNS)} are needed",
                code="missing_column",
                column=missing,
            )
        return "long" if names.symbol in known else "single"
    symbols = wide_columns(columns, names)
    present = {symbol: {field.lower() for field in fields} for symbol, fields in symbols.items()}
    missing_of = {s: next((name for name in PRICE_COLUMNS if name not in present[s]), None) for s in symbols}
    if symbols and all(missing_of.values()):  # else it is the fault of those symbols alone
        symbol = next(iter(symbols))
        raise InputError(
            f"{where}: column '{symbol}.{missing_of[symbol]}' is missing: a wide table has SYMBOL.open, SYMBOL.high, "
            "SYMBOL.low and SYMBOL.close for every symbol",
            code="missing_column",
            column=f"{symbol}.{missing_of[symbol]}",
        )
    if not symbols:
        raise InputError(
            f"{where}: no candles: give the columns {', '.join(PRICE_COLUMNS)} (one symbol, or many with a column "
            f"{names.symbol!r}), or SYMBOL.open, SYMBOL.high, SYMBOL.low, SYMBOL.close for every symbol; one price a "
            "symbol is not enough for candles",
            code="missing_column",
            column="close",
        )
    return "wide"


def known_columns(columns: Iterable[str], names: Layout, where: str = "") -> dict[str, str]:
    """{name: the column that has it} of the time, the symbol and the candles, as far as they are there. Raises."""
    return columns_by_name(columns, (names.time, names.symbol, *COLUMNS), where)


def wide_columns(columns: Sequence[str], names: Layout) -> dict[str, dict[str, str]]:
    """symbol → {field as it is written: its column}, in the order of their first columns; a symbol may hold dots."""
    found: dict[str, dict[str, str]] = {}
    for column in columns:
        symbol, _, field = column.rpartition(".")
        if symbol and field.lower() in COLUMNS and not same_name(column, names.time):
            found.setdefault(symbol, {})[field] = column
    return found


def schema_names(file: str) -> list[str]:
    """The columns of a file. Raises pyarrow's errors."""
    return list(_schema(Path(file)).names)


def _schema(file: Path) -> pa.Schema:
    if file.suffix.lower() in PARQUET:
        return pyarrow.parquet.read_schema(file)
    with pyarrow.csv.open_csv(file) as reader:
        return reader.schema


def _size(file: Path) -> int:
    if file.suffix.lower() not in PARQUET:
        return file.stat().st_size
    metadata = pyarrow.parquet.read_metadata(file)
    return sum(metadata.row_group(group).total_byte_size for group in range(metadata.num_row_groups))


def _long_symbols(file: Path, names: Layout, column: str) -> list[str]:
    """Symbols as text, as a filter on them reads it; a missing one is "", whose rows become one error row."""
    seen: dict[str, None] = {}
    table = dataset(file, names, None)
    _require_symbols(table.schema, column, file)
    for batch in table.to_batches(columns=[column]):
        texts = symbols_as_text(pc.unique(batch.column(0)), column, file)
        seen.update(dict.fromkeys(texts.fill_null("").to_pylist()))
    return list(seen)


def _require_symbols(schema: pa.Schema, column: str, file: Path | str) -> None:
    """Raises InputError for a symbol column of lists or structures, which a Parquet file can hold."""
    if pa.types.is_nested(kind := schema.field(column).type):
        raise InputError(
            f"{file}: column {column!r} holds {kind}, not symbols: write each symbol as text",
            code="not_a_symbol",
            column=column,
        )


def dataset(file: Path | str, names: Layout, number: pa.DataType | None) -> pyarrow.dataset.Dataset:
    """A file as a dataset that can be read in pieces. number: type of the candle columns of a CSV; None infers it.

    Times and symbols of a CSV stay text: "000001" is no number, and a time keeps its offset.
    """
    if Path(file).suffix.lower() in PARQUET:
        return pyarrow.dataset.dataset(file, format="parquet")
    columns = _schema(Path(file)).names
    types = {name: pa.string() for name in columns if same_name(name, names.time) or same_name(name, names.symbol)}
    if number is not None:
        types |= {name: number for name in columns if name not in types and name.rpartition(".")[2].lower() in COLUMNS}
    options = pyarrow.csv.ConvertOptions(column_types=types, strings_can_be_null=True, null_values=["", "NaN", "nan"])
    return pyarrow.dataset.dataset(file, format=pyarrow.dataset.CsvFileFormat(convert_options=options))


def read_columns(file: str, names: Layout, columns: Mapping[str, str], wanted: Sequence[str] | None) -> pa.Table:
    """Some columns of a file, and with `wanted` only the rows of those symbols.

    columns: what each is called in the table → in the file. The candles of a CSV are numbers, or all of them text where
    one is no number: then the symbol it belongs to can say so, and the others can be read. Raises pyarrow's errors, and
    InputError for symbols that are none.
    """
    number: pa.DataType
    for number in (pa.float64(), pa.string()):
        try:
            found = dataset(file, names, number)
            keep = None
            if wanted is not None:
                _require_symbols(found.schema, columns[names.symbol], file)
                keep = _symbol_is_in(found.schema, columns[names.symbol], wanted)
            return found.to_table(columns=list(columns.values()), filter=keep).rename_columns(list(columns))
        except pa.ArrowInvalid:
            if number == pa.string() or Path(file).suffix.lower() in PARQUET:
                if wanted is not None:
                    _long_symbols(
                        Path(file), names, columns[names.symbol]
                    )  # raises what the scan found, if it was that
                raise
    raise AssertionError("unreachable")


def _symbol_is_in(schema: pa.Schema, column: str, wanted: Sequence[str]) -> pyarrow.dataset.Expression:
    field = pyarrow.dataset.field(column)
    texts = field if pa.types.is_string(schema.field(column).type) else field.cast(pa.string())
    keep = texts.isin(pa.array([symbol for symbol in wanted if symbol], pa.string()))
    return keep | field.is_null() | (texts == "") if "" in wanted else keep
