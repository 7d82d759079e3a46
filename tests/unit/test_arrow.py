"""Arrow requests and answers: the same numbers, rules and places as in JSON, and nothing that bites."""

import json
import struct
import time
from datetime import datetime

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from model.types import COLUMNS

ARROW = "application/vnd.apache.arrow.stream"


def written(table, options=None):
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema, options=options) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def read(response):
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == ARROW
    table = pa.ipc.open_stream(response.content).read_all()
    table.validate(full=True)
    return table, json.loads(table.schema.metadata[b"kronos"])


def with_settings(table, **values):
    return table.replace_schema_metadata({"kronos": json.dumps(values)})


@pytest.fixture
def series(columns):
    """Two series as JSON, the second with volume and another length."""
    return [dict(columns(8), id="b"), dict(columns(6), id="a", volume=[3.0, 1.0, 4.0, 1.0, 5.0, 9.0])]


@pytest.fixture
def table(series):
    """The same as a table."""
    rows = [
        {"series_id": one["id"], "timestamp": time, **{name: one[name][i] for name in COLUMNS if name in one}}
        for one in series
        for i, time in enumerate(one["timestamps"])
    ]
    return pa.table({name: [row.get(name) for row in rows] for name in ("series_id", "timestamp", *COLUMNS[:5])})


def replaced(table, name, column):
    return table.set_column(table.column_names.index(name), name, column)


@pytest.fixture
def send(http):
    def post(body, accept="application/json", **values):
        if isinstance(body, pa.Table):
            body = written(with_settings(body, **values) if values else body)
        return http.post("/v1/forecast", raw=body, headers={"content-type": ARROW, "accept": accept})

    return post


SETTINGS = {"horizon": 4, "samples": 5, "seed": 3, "quantiles": [0.9, 0.1], "return_paths": True, "repair": "ohlc"}

# --- requests ---------------------------------------------------------------------------------------------------------


def typed(table, kind):
    times = pa.array([text.replace("Z", "") for text in table["timestamp"].to_pylist()]).cast(pa.timestamp("s"))
    return replaced(
        table, "timestamp", times.cast(kind) if kind.tz is None else pa.compute.assume_timezone(times, "UTC").cast(kind)
    )


def test_a_table_is_answered_as_the_same_json(http, send, series, table):
    expected = http.post("/v1/forecast", {"series": series, **SETTINGS})
    assert expected.status_code == 200, expected.text
    assert send(table, **SETTINGS).json() == expected.json()
    shuffled = table.take([8, 0, 1, 9, 2, 3, 4, 10, 11, 5, 6, 12, 13, 7])
    by_id = {one["id"]: one for one in send(shuffled, **SETTINGS).json()["series"]}
    assert list(by_id) == ["a", "b"]
    assert by_id == {one["id"]: one for one in expected.json()["series"]}
    encoded = replaced(table, "series_id", table["series_id"].dictionary_encode())
    assert send(encoded, **SETTINGS).json() == expected.json()
    for kind in (pa.float32(), pa.int64()):
        narrow = table
        for name in COLUMNS[:5]:
            narrow = replaced(narrow, name, narrow[name].cast(kind))
        assert send(narrow, **SETTINGS).json() == expected.json()


@pytest.mark.parametrize("unit", ["s", "ms", "us", "ns"])
def test_typed_timestamps(http, send, series, table, unit):
    expected = http.post("/v1/forecast", {"series": series, **SETTINGS}).json()
    for one in expected["series"]:
        one["timestamps"] = [text.replace("Z", "+00:00") for text in one["timestamps"]]
    assert send(typed(table, pa.timestamp(unit, "UTC")), **SETTINGS).json() == expected
    answer = send(typed(table, pa.timestamp(unit)), **SETTINGS).json()
    assert answer["series"][0]["timestamps"][0] == "2024-01-01T08:00:00"
    # The wall clock of the zone is what the model sees: 00:00 UTC is 08:00 there.
    answer = send(typed(table, pa.timestamp(unit, "Asia/Shanghai")), **SETTINGS).json()
    assert answer["series"][0]["timestamps"][0] == "2024-01-01T16:00:00+08:00"


def test_the_types_that_polars_and_pandas_write(send, table):
    views = table
    for name in ("series_id", "timestamp"):
        views = replaced(views, name, table[name].cast(pa.string_view()))
    # None in every row of a DataFrame: a column that holds nothing but nulls.
    for name in ("volume", "amount"):
        views = views.drop([name] if name in views.column_names else []).append_column(name, pa.nulls(len(table)))
    expected = send(table.drop(["volume"]), horizon=2, seed=1).json()
    assert send(views, horizon=2, seed=1).json() == expected


def test_dates(send, table):
    days = pa.array([f"2024-01-{1 + i % 8:02d}" for i in range(14)]).cast(pa.date32())
    answer = send(replaced(table, "timestamp", days), horizon=1).json()
    assert answer["series"][0]["timestamps"] == ["2024-01-09T00:00:00"]


def test_one_series_needs_no_id_and_settings_may_name_series(send, table):
    answer = send(table.slice(0, 8).drop_columns(["series_id"])).json()
    assert [one["id"] for one in answer["series"]] == ["0"]
    answer = send(table, horizon=2, series=[{"id": "a", "horizon": 5, "temperature": 0.5}]).json()
    assert [one["parameters"]["horizon"] for one in answer["series"]] == [2, 5]


# --- answers ----------------------------------------------------------------------------------------------------------


def test_the_answer_as_a_table_holds_what_json_does(http, series):
    body = {"series": series, **SETTINGS}
    expected = http.post("/v1/forecast", body).json()
    response = http.post("/v1/forecast", body, headers={"accept": f"{ARROW}, application/json;q=0.5"})
    assert response.headers["x-backend-used"] == "cpu"
    assert "compute;dur=20.00" in response.headers["server-timing"]
    table, facts = read(response)
    assert table.column_names == ["series_id", "timestamp", "kind", "level", "path", *COLUMNS]
    assert table.num_rows == 2 * 4 * (1 + 2 + 5)
    assert {**facts, "series": None} == {**expected, "series": None}
    rows = table.to_pylist()
    for one, told in zip(expected["series"], facts["series"], strict=True):
        assert told == {name: one[name] for name in ("id", "summary", "window", "parameters")}
        own = [row for row in rows if row["series_id"] == one["id"]]
        parts = [("mean", None, None, one["mean"])]
        parts += [("quantile", level, None, one["quantiles"][str(level)]) for level in (0.9, 0.1)]
        parts += [("path", None, index, path) for index, path in enumerate(one["paths"])]
        for kind, level, path, columns in parts:
            block, own = own[:4], own[4:]
            assert {(row["kind"], row["level"], row["path"]) for row in block} == {(kind, level, path)}
            assert [row["timestamp"].isoformat().replace("+00:00", "Z") for row in block] == one["timestamps"]
            for name in COLUMNS:
                np.testing.assert_allclose([row[name] for row in block], columns[name], rtol=1e-8)
        assert own == []


@pytest.mark.parametrize(
    ("suffixes", "zone"),
    [(("+05:30", "+05:30"), "+05:30"), (("-03:30", "-03:30"), "-03:30"), (("Z", "+08:00"), "UTC"), (("", ""), None)],
)
def test_the_time_zone_of_an_answer(http, columns, suffixes, zone):
    series = [columns(), columns()]
    for one, suffix in zip(series, suffixes, strict=True):
        one["timestamps"] = [text.replace("Z", suffix) for text in one["timestamps"]]
    body = {"series": series, "horizon": 1}
    table, _ = read(http.post("/v1/forecast", body, headers={"accept": ARROW}))
    assert table.schema.field("timestamp").type == pa.timestamp("us", zone)
    told = table["timestamp"].to_pylist()[::4]
    assert told == [datetime.fromisoformat(f"2024-01-01T08:00:00{suffix}") for suffix in suffixes]


@pytest.mark.parametrize(
    ("accept", "kind"),
    [
        (ARROW, ARROW),
        (f"application/json, {ARROW.upper()}", ARROW),
        (f"{ARROW}; q=0.5, */*;q=0.1", ARROW),
        (f"{ARROW};q=nonsense", ARROW),
        (f"application/json, {ARROW};q=0.5", "application/json"),
        (f"application/json, {ARROW};q=0", "application/json"),
        (f"{ARROW};q=0.000", "application/json"),
        (f"{ARROW};q=0.9, */*", "application/json"),
        ("*/*", "application/json"),
        (",;q,;", "application/json"),
    ],
)
def test_the_format_is_the_one_that_accept_prefers(http, columns, accept, kind):
    response = http.post("/v1/forecast", {"series": [columns()]}, headers={"accept": accept})
    assert (response.status_code, response.headers["content-type"]) == (200, kind)


def test_what_cannot_be_one_table(http, columns):
    naive = dict(columns(), timestamps=[text.replace("Z", "") for text in columns()["timestamps"]])
    response = http.post("/v1/forecast", {"series": [columns(), naive]}, headers={"accept": ARROW})
    assert_field(response, ("series", 1, "timestamps"), "mixed_time_zones")
    response = http.post("/v1/forecast", {"series": [columns()], "stream": True}, headers={"accept": ARROW})
    assert_field(response, ("stream",), "unknown_value")
    for one, other in ({"id": "a"}, {"id": "a"}), ({}, {"id": "0"}):
        twice = {"series": [{**columns(), **one}, {**columns(), **other}]}
        assert_field(http.post("/v1/forecast", twice, headers={"accept": ARROW}), ("series", 1, "id"), "duplicate")
        assert http.post("/v1/forecast", twice).status_code == 200


# --- refusals ---------------------------------------------------------------------------------------------------------


def assert_field(response, loc, code):
    assert response.status_code == 422, response.text
    assert response.headers["content-type"] == "application/json"
    field = response.json()["error"]["fields"][0]
    assert (tuple(field["loc"]), field["code"]) == (loc, code)


def assert_malformed(response, code="malformed_arrow"):
    assert (response.status_code, response.json()["error"]["code"]) == (400, code), response.text


def test_one_stream_and_nothing_after_it(send, table):
    assert send(written(table)).status_code == 200
    for rest in (b"x", written(table), bytes(8)):
        assert_malformed(send(written(table) + rest))


@pytest.mark.parametrize(
    ("name", "value", "place", "code"),
    [
        ("close", float("nan"), "close", "not_finite"),
        ("close", None, "close", "not_finite"),
        ("close", float("inf"), "close", "not_finite"),
        ("open", -1.0, "open", "not_positive"),
        ("high", 1.0, "high", "high_below_low"),
        ("volume", -1.0, "volume", "negative"),
        ("timestamp", "yesterday", "timestamps", "not_a_time"),
        ("timestamp", None, "timestamps", "not_a_time"),
        ("timestamp", "2024-01-01T01:00:00Z", "timestamps", "duplicate_times"),
        ("timestamp", "2024-01-01T02:00:00", "timestamps", "mixed_time_zones"),
    ],
)
def test_a_bad_value_has_the_place_that_json_has(send, table, name, value, place, code):
    values = table[name].to_pylist()
    values[8 + 2] = value
    assert_field(send(replaced(table, name, pa.array(values))), ("series", 1, place, 2), code)


def test_typed_times_that_are_refused(send, table):
    kind = pa.timestamp("us")
    good = typed(table, kind)["timestamp"].to_pylist()
    for row, value, code in ((2, None, "not_a_time"), (2, good[1], "duplicate_times"), (3, good[0], "unsorted_times")):
        bad = pa.array([*good[:row], value, *good[row + 1 :]], kind)
        assert_field(send(replaced(table, "timestamp", bad)), ("series", 0, "timestamps", row), code)
    summer = pa.array([1711843200 + 3600 * i for i in range(14)], pa.timestamp("s", "Europe/Berlin"))
    assert_field(send(replaced(table, "timestamp", summer)), ("series", 0, "timestamps", 1), "mixed_time_zones")
    far = pa.array([2**62 + i for i in range(14)], pa.timestamp("us"))
    assert_field(send(replaced(table, "timestamp", far)), ("series", 0, "timestamps", 0), "not_a_time")
    fine = pa.array([1 + i for i in range(14)], pa.timestamp("ns"))
    assert_field(send(replaced(table, "timestamp", fine)), ("timestamp",), "not_a_time")
    nowhere = pa.array(range(14), pa.timestamp("us", "Mars/Olympus"))
    assert_field(send(replaced(table, "timestamp", nowhere)), ("timestamp",), "not_a_time")


def test_columns_that_are_refused(send, table):
    assert_field(send(table.append_column("vwap", table["close"])), ("vwap",), "unknown_field")
    assert_field(send(table.append_column("close", table["close"])), ("close",), "duplicate")
    assert_field(send(table.drop_columns(["low"])), ("low",), "missing")
    texts = pa.array([str(value) for value in table["close"].to_pylist()])
    booleans = pa.array([True] * 14)
    for column in (texts, booleans, pa.nulls(14), pa.array([[1.0]] * 14), texts.dictionary_encode()):
        assert_field(send(replaced(table, "close", column)), ("close",), "not_a_number")
    assert_field(send(replaced(table, "timestamp", pa.array(range(14)))), ("timestamp",), "not_a_time")
    assert_field(send(replaced(table, "series_id", pa.array(range(14)))), ("series_id",), "not_a_string")
    assert_field(send(replaced(table, "series_id", pa.array([None, *"a" * 13]))), ("series_id", 0), "not_a_string")
    assert_field(send(replaced(table, "series_id", pa.array(["x" * 65] * 14))), ("series", 0, "id"), "too_long")
    assert_field(send(table.slice(0, 0)), ("series",), "too_few")


def test_settings_that_are_refused(send, table):
    assert_field(send(table, horizon="x"), ("horizon",), "not_an_integer")
    assert_field(send(table, temprature=1), ("temprature",), "unknown_field")
    assert_field(send(table, series={}), ("series",), "not_a_list")
    for entry in ("a", {"id": "c"}, {"id": ["a"]}, {}):
        assert_field(send(table, series=[entry]), ("series", 0, "id"), "unknown_value")
    assert_field(send(table, series=[{"id": "a"}, {"id": "a"}]), ("series", 1, "id"), "unknown_value")
    assert_field(send(table, series=[{"id": "a", "close": [1]}]), ("series", 0, "close"), "unknown_field")
    assert_field(send(table, series=[{"id": "a", "horizon": 0}]), ("series", 1, "horizon"), "out_of_range")
    assert_field(send(table.replace_schema_metadata({"kronos": "[]"})), (), "not_an_object")
    assert_malformed(send(table.replace_schema_metadata({"kronos": "{"})), "malformed_json")
    assert_malformed(send(table.replace_schema_metadata({"kronos": "[" * 10**5})), "malformed_json")


def test_limits(make_http, table):
    http = make_http(limits={"max_series": 1, "max_history": 8, "max_horizon": 4}, defaults={"pred_len": 1})

    def post(body):
        return http.post("/v1/forecast", raw=written(body), headers={"content-type": ARROW})

    assert_malformed(post(table))
    assert_field(post(table.slice(4, 8)), ("series",), "too_many")
    assert_field(post(with_settings(table.slice(0, 8), horizon=5)), ("horizon",), "horizon_over_limit")


class Pickled(pa.ExtensionType):
    """What Ray Data's types do with an untrusted stream."""

    def __init__(self):
        super().__init__(pa.float64(), "tests.pickled")

    def __arrow_ext_serialize__(self):
        return b"payload"

    @classmethod
    def __arrow_ext_deserialize__(cls, storage_type, serialized):
        raise AssertionError("an extension type was read")


def test_extension_types_are_not_even_looked_at(send, table):
    pa.register_extension_type(Pickled())
    try:
        column = pa.ExtensionArray.from_storage(Pickled(), table["close"].chunk(0))
        raw = written(replaced(table, "close", column))
        assert_malformed(send(raw))
    finally:
        pa.unregister_extension_type("tests.pickled")


@pytest.mark.parametrize("codec", ["zstd", "lz4"])
def test_compressed_streams_are_refused_before_they_are_opened(send, table, codec):
    assert_malformed(send(written(table, pa.ipc.IpcWriteOptions(compression=codec))))
    encoded = replaced(table, "series_id", table["series_id"].dictionary_encode())
    assert_malformed(send(written(encoded, pa.ipc.IpcWriteOptions(compression=codec))))


def test_one_long_name_behind_many_rows_costs_nothing(make_http, table):
    rows = 200_000
    name = pa.DictionaryArray.from_arrays(pa.array(np.zeros(rows, np.int32)), pa.array(["x" * 2**20]))
    numbers = pa.array(np.ones(rows))
    bomb = pa.table(
        {
            "series_id": name,
            "timestamp": pa.array(np.arange(rows), pa.timestamp("s")),
            **dict.fromkeys(COLUMNS[:4], numbers),
        }
    )
    response = make_http().post("/v1/forecast", raw=written(bomb), headers={"content-type": ARROW})
    assert_field(response, ("series", 0, "id"), "too_long")


def test_dictionaries_that_grow_are_refused_and_whole_ones_are_not(send, table):
    """After each of 50,000 deltas, which fit into a body, pyarrow would hold one more copy of the whole dictionary."""
    batches = [
        table.slice(row, 1).set_column(0, "series_id", pa.DictionaryArray.from_arrays(pa.array([row]), pa.array(names)))
        for row, names in ((0, ["b"]), (1, ["b", "c"]))
    ]
    for deltas, status in ((True, 400), (False, 200)):
        sink = pa.BufferOutputStream()
        options = pa.ipc.IpcWriteOptions(emit_dictionary_deltas=deltas)
        with pa.ipc.new_stream(sink, with_settings(batches[0], freq="1h").schema, options=options) as writer:
            for batch in batches:
                writer.write_table(batch)
        assert send(sink.getvalue().to_pybytes()).status_code == status


@pytest.mark.parametrize("place", ["series_id", "timestamp", "dictionary"])
def test_many_views_of_one_long_text_are_not_read(make_http, place):
    rows = 200_000
    view = struct.pack("<i4sii", 2**20, b"xxxx", 0, 0)
    views = pa.Array.from_buffers(pa.string_view(), rows, [None, pa.py_buffer(view * rows), pa.py_buffer(b"x" * 2**20)])
    columns = {
        "series_id": pa.array(["a"] * rows),
        "timestamp": pa.array(np.arange(rows), pa.timestamp("s")),
        **dict.fromkeys(COLUMNS[:4], pa.array(np.ones(rows))),
    }
    if place == "dictionary":
        columns["series_id"] = pa.DictionaryArray.from_arrays(pa.array(np.arange(rows, dtype=np.int32)), views)
    else:
        columns[place] = views
    raw = written(pa.table(columns))
    assert len(raw) < 2**24
    started = time.monotonic()
    assert_malformed(make_http().post("/v1/forecast", raw=raw, headers={"content-type": ARROW}))
    assert time.monotonic() - started < 5


def test_a_feather_file_is_told_from_a_stream(send, table):
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    response = send(sink.getvalue().to_pybytes())
    assert_malformed(response)
    assert "write the stream format" in response.json()["detail"]


def test_damaged_streams(send, table):
    raw = written(table)
    for bad in (b"", b"{}", raw[:3], raw[:11], raw[:100], raw[: len(raw) // 2], raw[8:], b"\xff" * 64, raw[:8] * 9):
        assert_malformed(send(bad))
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    assert_malformed(send(sink.getvalue().to_pybytes()))
    assert_malformed(send(written(table, pa.ipc.IpcWriteOptions(use_legacy_format=True))))
    huge = raw.replace(struct.pack("<q", 14), struct.pack("<q", 2**40))
    assert_malformed(send(huge))


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_change_of_a_few_bytes_gives_a_5xx(send, table, data):
    raw = bytearray(written(table))
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    assert send(bytes(raw)).status_code in (200, 400, 404, 413, 422)


def test_other_routes_take_json_only(http, table):
    for route in ("/v1/predict/single", "/v1/predict/batch"):
        response = http.post(route, raw=written(table), headers={"content-type": ARROW})
        assert (response.status_code, response.json()["error"]["code"]) == (415, "not_json")
