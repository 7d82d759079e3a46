"""Forecasts as Arrow IPC streams, in both directions: a universe of symbols must not go through JSON.

Both tables are long: one row per series and bar (of a request), or per series, row kind and bar (of an answer). What a
JSON body says beside its columns stands as JSON in the schema's metadata, under the key "kronos".
"""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from model.types import COLUMNS
from serve_app.answers import answer_head, quantile_tables, repaired_values, series_facts
from serve_app.arrow_frames import check_frames, malformed
from serve_app.bodies import parse_json
from serve_app.config import Limits
from serve_app.errors import FieldError, invalid_fields
from serve_app.jobs import Answered
from serve_app.prepare import Prepared, require_count
from serve_app.reading import Asked
from serve_app.times import ClockTimes

METADATA_KEY = b"kronos"
SERIES_ID, TIMESTAMP = "series_id", "timestamp"
KINDS = ("mean", "quantile", "path")
_REQUIRED = (TIMESTAMP, *COLUMNS[:4])
_KNOWN = (SERIES_ID, TIMESTAMP, *COLUMNS)
_LONGEST_VIEW = 256
"""Bytes. Ids have at most 64 characters, timestamps 40."""


def forecast_body(raw: bytes, limits: Limits) -> dict[str, Any]:
    """A request table as the body of /v1/forecast, with arrays for columns, to be validated like one.

    Columns: series_id (text; absent if there is one series), timestamp (timestamp, date or ISO 8601 text), open, high,
    low, close, and volume and amount where they are known (numbers). The rows of a series need not be neighbours, but
    come in order. Raises ServiceError: malformed_arrow, malformed_json (metadata), and field errors of whole columns.
    """
    check_frames(raw, limits.max_series * limits.max_history)
    table = _read(raw)
    settings = parse_json(table.schema.metadata[METADATA_KEY]) if METADATA_KEY in (table.schema.metadata or {}) else {}
    if not isinstance(settings, dict):
        raise invalid_fields([FieldError((), "not_an_object", 'the metadata "kronos" must be a JSON object')])
    if not table.num_rows:
        raise invalid_fields([FieldError(("series",), "too_few", "the table has no rows")])
    groups = _groups(table, limits)
    columns = {name: table[name].chunk(0) for name in COLUMNS if name in table.column_names}
    values = {name: _numbers(column) for name, column in columns.items()}
    known = {name: column.is_valid().to_numpy(zero_copy_only=False) for name, column in columns.items()}
    times = _times(table[TIMESTAMP].chunk(0))
    series = []
    for name, rows in groups:
        # Volume and amount that are null throughout are not given; a single null is a gap, which is refused.
        given = [key for key in values if key in _REQUIRED or known[key][rows].any()]
        series.append({"id": name, "timestamps": times(rows), **{key: values[key][rows] for key in given}})
    return {**settings, "series": _with_settings(series, settings.get("series", []))}


def _read(raw: bytes) -> pa.Table:
    try:
        source = pa.BufferReader(raw)
        with pa.ipc.open_stream(source) as reader:
            _check_schema(reader.schema)
            batches = list(reader)
            for batch in batches:
                _check_views(batch)
                # Offsets that point outside their buffers are found here, before anything follows them.
                batch.validate(full=True)
            if source.tell() != len(raw):
                raise malformed("there are bytes after its end: send one stream")
            return pa.Table.from_batches(batches, reader.schema).combine_chunks()
    except (pa.ArrowException, OSError, ValueError, KeyError, MemoryError):
        raise malformed("pyarrow cannot read it") from None


def _check_views(batch: pa.RecordBatch) -> None:
    """Raises ServiceError malformed_arrow for a view of a long text.

    A view takes 16 bytes whatever it shows: a million of them on one text of megabytes would be read, and kept, one by
    one. So their lengths come before the full validation, which reads the texts.
    """
    batch.validate()
    for column in batch.columns:
        values = column.dictionary if isinstance(column, pa.DictionaryArray) else column
        if pa.types.is_string_view(values.type) and len(values):
            # The first of the four numbers of each view is its length; that of a null means nothing.
            views = np.frombuffer(values.buffers()[1], np.int32)[: 4 * (values.offset + len(values))]
            lengths = views[4 * values.offset :: 4][values.is_valid().to_numpy(zero_copy_only=False)]
            if ((lengths < 0) | (lengths > _LONGEST_VIEW)).any():
                raise malformed(f"a text is over {_LONGEST_VIEW} bytes")


def _check_schema(schema: pa.Schema) -> None:
    names = schema.names
    faults = [
        FieldError((name,), "unknown_field", f"unknown column; a table has {', '.join(_KNOWN)}")
        for name in sorted({*names} - {*_KNOWN})
    ]
    for name in _KNOWN:
        if names.count(name) > 1:
            faults.append(FieldError((name,), "duplicate", "this column is there more than once"))
        elif name in names:
            accepts, code, text = _KINDS[name]
            if not accepts(schema.field(name).type):
                faults.append(FieldError((name,), code, text))
        elif name in _REQUIRED:
            faults.append(FieldError((name,), "missing", "this column is required"))
    if faults:
        raise invalid_fields(faults)


def _is_text(kind: pa.DataType) -> bool:
    # Polars writes views.
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _is_label(kind: pa.DataType) -> bool:
    return _is_text(kind) or (pa.types.is_dictionary(kind) and _is_text(kind.value_type))


def _is_time(kind: pa.DataType) -> bool:
    return pa.types.is_timestamp(kind) or pa.types.is_date(kind) or _is_text(kind)


def _is_number(kind: pa.DataType) -> bool:
    return pa.types.is_float32(kind) or pa.types.is_float64(kind) or pa.types.is_integer(kind)


def _is_number_or_absent(kind: pa.DataType) -> bool:
    # pandas and Polars give a column that holds nothing but nulls a type of its own.
    return _is_number(kind) or pa.types.is_null(kind)


_NUMBER = ("not_a_number", "must be a column of float64, float32 or integers")


_KINDS = {
    SERIES_ID: (_is_label, "not_a_string", "must be a column of strings"),
    TIMESTAMP: (_is_time, "not_a_time", "must be a column of timestamps, dates or ISO 8601 strings"),
    **dict.fromkeys(COLUMNS[:4], (_is_number, *_NUMBER)),
    **dict.fromkeys(COLUMNS[4:], (_is_number_or_absent, *_NUMBER)),
}


def _numbers(column: pa.Array) -> np.ndarray:
    """float64; null is NaN, which the schemas refuse by its place."""
    return column.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False)


def _times(column: pa.Array) -> Callable[[np.ndarray], Any]:
    """Rows → what the schemas read as timestamps."""
    if _is_text(column.type):
        texts = column.to_numpy(zero_copy_only=False)
        return lambda rows: texts[rows].tolist()
    try:
        zone = getattr(column.type, "tz", None)
        utc = column.cast(pa.timestamp("us", zone))
        # The wall clock, as the model's time marks are read off it.
        local = pc.local_timestamp(utc) if zone else utc
    except pa.ArrowException:
        text = "must be whole microseconds of the years 1 to 9999, in a time zone that is known"
        raise invalid_fields([FieldError((TIMESTAMP,), "not_a_time", text)]) from None
    clock = local.to_numpy(zero_copy_only=False).astype("datetime64[us]")
    if not zone:
        return lambda rows: ClockTimes(clock[rows], None)
    offsets = clock - utc.cast(pa.timestamp("us")).to_numpy(zero_copy_only=False)
    return lambda rows: ClockTimes(clock[rows], offsets[rows])


def _groups(table: pa.Table, limits: Limits) -> list[tuple[str | None, np.ndarray]]:
    """(id, its rows) of every series, in the order of their first rows."""
    if SERIES_ID not in table.column_names:
        return [(None, np.arange(table.num_rows))]
    column = table[SERIES_ID].chunk(0)
    if column.null_count:
        row = int(np.flatnonzero(column.is_null().to_numpy(zero_copy_only=False))[0])
        raise invalid_fields([FieldError((SERIES_ID, row), "not_a_string", "must be a string, not null")])
    encoded = column if pa.types.is_dictionary(column.type) else column.dictionary_encode()
    # The dictionary alone is turned into Python's strings: one long entry may stand behind any number of rows.
    names = encoded.dictionary.to_pylist()
    codes = encoded.indices.to_numpy(zero_copy_only=False)
    used, first = np.unique(codes, return_index=True)
    if any(names[code] is None for code in used.tolist()) or len({names[code] for code in used.tolist()}) != len(used):
        raise malformed("the dictionary of series_id holds a null, or a value twice")
    require_count(("series",), len(used), limits.max_series, "series")
    by_code = np.argsort(codes, kind="stable")
    rows = np.split(by_code, np.flatnonzero(np.diff(codes[by_code])) + 1)
    order = np.argsort(first, kind="stable").tolist()
    return [(names[used[index]], rows[index]) for index in order]


def _with_settings(series: list[dict[str, Any]], given: Any) -> list[dict[str, Any]]:
    """series with the settings that the metadata names for some of them."""
    if not isinstance(given, list):
        text = "must be a list of objects, each with the id of a series and its settings"
        raise invalid_fields([FieldError(("series",), "not_a_list", text)])
    places = {one["id"]: index for index, one in enumerate(series)}
    own: dict[int, dict[str, Any]] = {}
    for index, entry in enumerate(given):
        name = entry.get("id") if isinstance(entry, dict) else None
        place = places.get(name) if isinstance(name, str) else None
        if place is None or place in own:
            text = "must be the series_id of some rows, and named once"
            raise invalid_fields([FieldError(("series", index, "id"), "unknown_value", text)])
        own[place] = entry
        if columns := sorted(entry.keys() & {"timestamps", *COLUMNS}):
            text = "columns belong in the table, the metadata holds settings"
            raise invalid_fields([FieldError(("series", index, columns[0]), "unknown_field", text)])
    return [{**one, **own.get(index, {})} for index, one in enumerate(series)]


def forecast_table(asked: Asked, answered: Answered, warning: str | None) -> bytes:
    """The answer as an IPC stream, one record batch per series.

    Columns: series_id, timestamp, kind (mean | quantile | path), level (of a quantile, else null), path (its index,
    else null), and the six columns, float64, not rounded. Rows of a series: the mean, the quantiles as they were asked
    for, then the paths if they were; each oldest bar first. Metadata "kronos": the JSON answer without its tables.
    """
    request, items = asked.body, asked.items
    values, repaired = repaired_values(request, answered.done)
    facts = [
        series_facts(item, table, paths) for item, table, paths in zip(items, values, answered.done.paths, strict=True)
    ]
    head = {**answer_head(request, items, asked.seed, answered, warning, repaired), "series": facts}
    zone = _zone(items)
    schema = pa.schema(
        [
            pa.field(SERIES_ID, pa.dictionary(pa.int32(), pa.string()), nullable=False),
            pa.field(TIMESTAMP, pa.timestamp("us", zone), nullable=False),
            pa.field("kind", pa.dictionary(pa.int8(), pa.string()), nullable=False),
            pa.field("level", pa.float64()),
            pa.field("path", pa.int32()),
            *(pa.field(name, pa.float64(), nullable=False) for name in COLUMNS),
        ],
        {METADATA_KEY: json.dumps(head, allow_nan=False).encode()},
    )
    names = pa.array([item.id for item in items], pa.string())
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, schema) as writer:
        for index, (item, table) in enumerate(zip(items, values, strict=True)):
            writer.write_batch(_batch(schema, names, index, item, table, request.quantiles, request.return_paths))
    content: bytes = sink.getvalue().to_pybytes()
    return content


def _batch(
    schema: pa.Schema,
    names: pa.Array,
    index: int,
    item: Prepared,
    values: np.ndarray,
    levels: list[float],
    with_paths: bool,
) -> pa.RecordBatch:
    """values: [S, H, 6]."""
    samples, horizon, _ = values.shape
    parts = [values.mean(axis=0)[None], quantile_tables(values, levels), *([values] if with_paths else [])]
    counts = [len(part) for part in parts]
    rows = sum(counts) * horizon
    flat = np.concatenate(parts).reshape(rows, len(COLUMNS))
    kinds = np.repeat(np.arange(len(parts), dtype=np.int8), [count * horizon for count in counts])
    level, path = np.zeros(sum(counts)), np.zeros(sum(counts), np.int32)
    level[1 : 1 + len(levels)] = levels
    path[1 + len(levels) :] = np.arange(samples if with_paths else 0)
    offset = item.offset or timedelta(0)
    utc = np.tile(item.local - np.timedelta64(offset), sum(counts))
    return pa.RecordBatch.from_arrays(
        [
            pa.DictionaryArray.from_arrays(pa.array(np.full(rows, index, np.int32)), names),
            pa.array(utc, pa.timestamp("us")).cast(schema.field(TIMESTAMP).type),
            pa.DictionaryArray.from_arrays(pa.array(kinds), pa.array(KINDS)),
            pa.array(np.repeat(level, horizon), mask=kinds != KINDS.index("quantile")),
            pa.array(np.repeat(path, horizon), mask=kinds != KINDS.index("path")),
            *(pa.array(np.ascontiguousarray(column)) for column in flat.T),
        ],
        schema=schema,
    )


def _zone(items: list[Prepared]) -> str | None:
    """The time zone of the answer's one time column: the series' offset; UTC if they differ; none if they have none."""
    (first, *others) = {item.offset for item in items}
    if first is None:
        return None
    minutes, rest = divmod(first, timedelta(minutes=1))
    if others or rest:
        return "UTC"
    return f"{'-' if minutes < 0 else '+'}{abs(minutes) // 60:02d}:{abs(minutes) % 60:02d}"
