"""Each bad input of the HTTP interface is its own named field error, in single, batch, forecast and stream alike."""

import json
import tracemalloc

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

# name → (what is done to a valid series, the code, where it is found inside the series). Columns are given by name; the
# three routes have the same names for timestamps and their own for candles and future times.
PRICE_FAULTS = {
    "nan": (float("nan"), "not_finite"),
    "infinity": (float("inf"), "not_finite"),
    "minus infinity": (float("-inf"), "not_finite"),
    "string": ("101.5", "not_a_number"),
    "null": (None, "not_a_number"),
    "boolean": (True, "not_a_number"),
    "list": ([1], "not_a_number"),
    "object": ({}, "not_a_number"),
    "zero": (0, "not_positive"),
    "negative": (-1.5, "not_positive"),
    "over float32": (1e300, "out_of_range"),
    "huge integer": (10**400, "out_of_range"),
    "denormal": (1e-320, "out_of_range"),
}
TIME_FAULTS = {
    "unsorted": (["2024-01-01T05:00:00"], "unsorted_times"),
    "duplicate": (["2024-01-01T02:00:00"], "duplicate_times"),
    "mixed zones": (["2024-01-01T03:00:00+08:00"], "mixed_time_zones"),
    "number": ([1704067200], "not_a_time"),
    "null": ([None], "not_a_time"),
    "no time": (["yesterday"], "not_a_time"),
    "impossible": (["2024-02-30T00:00:00"], "not_a_time"),
    "long": (["2024-01-01T03:00:00" + " " * 100], "not_a_time"),
}
ROUTES = ("single", "batch", "forecast", "stream")
COLUMNAR = ("forecast", "stream")


def times(count, start=0):
    return [f"2024-01-01T{start + i:02d}:00:00" for i in range(count)]


def send(http, route, *, timestamps=None, prices=None, future=None, raw=None, **top):
    """A request whose one bad series is described by the arguments, last in the company of a good one."""
    timestamps = times(6) if timestamps is None else timestamps
    table = {"open": [10.0] * 6, "high": [12.0] * 6, "low": [9.0] * 6, "close": [11.0] * 6, **(prices or {})}
    future = times(2, 10) if future is None else future
    if route in COLUMNAR:
        top["stream"] = route == "stream"
        good = {"timestamps": times(6), "open": [1.0] * 6, "high": [1.0] * 6, "low": [1.0] * 6, "close": [1.0] * 6}
        bad = {"timestamps": timestamps, "future_timestamps": future, **table}
        path, body = "/v1/forecast", {"series": [dict(good, future_timestamps=times(2, 10)), bad], **top}
    else:
        rows = max(map(len, table.values()))
        candles = [{name: column[i] for name, column in table.items() if i < len(column)} for i in range(rows)]
        bad = {"candles": candles, "timestamps": timestamps, "prediction_timestamps": future, **top}
        path, body = "/v1/predict/single", bad
        if route == "batch":
            good = {
                "series_id": "good",
                "candles": [dict.fromkeys(("open", "high", "low", "close"), 1.0)] * 6,
                "timestamps": times(6),
                "prediction_timestamps": times(2, 10),
            }
            path, body = "/v1/predict/batch", {"items": [good, dict(bad, series_id="bad")]}
    return http.post(path, raw=json.dumps(body).encode())


def place(route, *inside):
    return {"single": (), "batch": ("items", 1), "forecast": ("series", 1), "stream": ("series", 1)}[route] + inside


def cell(route, column, row):
    return place(route, column, row) if route in COLUMNAR else place(route, "candles", row, column)


def future_name(route):
    return "future_timestamps" if route in COLUMNAR else "prediction_timestamps"


def assert_field(response, loc, code):
    assert response.status_code == 422, response.text
    fields = response.json()["error"]["fields"]
    assert (tuple(fields[0]["loc"]), fields[0]["code"]) == (loc, code)
    assert all(field["message"] for field in fields)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("fault", PRICE_FAULTS)
@pytest.mark.parametrize("column", ["open", "close"])
def test_a_bad_price(http, route, fault, column):
    value, code = PRICE_FAULTS[fault]
    response = send(http, route, prices={column: [11.0, 11.0, 11.0, value, 11.0, 11.0]})
    assert_field(response, cell(route, column, 3), code)
    assert len(response.json()["error"]["fields"]) == 1


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(("value", "code"), [(-1, "negative"), (float("nan"), "not_finite"), ("7", "not_a_number")])
def test_a_bad_volume(http, route, value, code):
    response = send(http, route, prices={"volume": [1, 2, value, 4, 5, 6]})
    assert_field(response, cell(route, "volume", 2), code)


@pytest.mark.parametrize("route", ROUTES)
def test_an_amount_that_would_leave_float32(http, route):
    response = send(http, route, prices={"volume": [1e17] * 6})
    assert_field(response, cell(route, "volume", 0), "out_of_range")


@pytest.mark.parametrize("route", ROUTES)
def test_high_below_low(http, route):
    response = send(http, route, prices={"high": [12.0, 8.0, 12.0, 12.0, 12.0, 12.0]})
    assert_field(response, cell(route, "high", 1), "high_below_low")


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("fault", TIME_FAULTS)
def test_bad_history_times(http, route, fault):
    (value,), code = TIME_FAULTS[fault]
    stamps = times(6)
    stamps[3] = value
    response = send(http, route, timestamps=stamps)
    row = 4 if fault == "unsorted" else 3
    assert_field(response, place(route, "timestamps", row), code)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("fault", TIME_FAULTS)
def test_bad_future_times(http, route, fault):
    (value,), code = TIME_FAULTS[fault]
    stamps = ["2024-01-01T01:00:00", "2024-01-01T02:00:00"]
    response = send(http, route, timestamps=["2024-01-01T00:00:00"] + times(5, 10), future=[*stamps, value])
    # Times that are themselves in order are held against the history; here the reading itself must fail first.
    if fault == "unsorted":
        response = send(http, route, future=["2024-01-01T12:00:00", "2024-01-01T11:00:00"])
        assert_field(response, place(route, future_name(route), 1), code)
    else:
        assert_field(response, place(route, future_name(route), 2), code)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(
    ("future", "code"),
    [
        (times(2, 3), "unsorted_times"),
        (times(2, 5), "duplicate_times"),
        ([text + "Z" for text in times(2, 10)], "mixed_time_zones"),
    ],
)
def test_future_that_does_not_follow_the_history(http, route, future, code):
    assert_field(send(http, route, future=future), place(route, future_name(route), 0), code)


@pytest.mark.parametrize("route", ROUTES)
def test_lengths_that_differ(http, route):
    response = send(http, route, timestamps=times(5))
    assert_field(response, place(route, "open" if route in COLUMNAR else "candles"), "length_mismatch")
    assert_field(send(http, route, timestamps=[]), place(route, "timestamps"), "too_few")
    assert_field(send(http, route, future=[]), place(route, future_name(route)), "too_few")


@pytest.mark.parametrize("route", ROUTES)
def test_limits_have_their_own_names(make_http, route):
    http = make_http(limits={"max_history": 6})
    response = send(http, route, timestamps=times(7), prices=dict.fromkeys(("open", "high", "low", "close"), [1.0] * 7))
    assert_field(response, place(route, "timestamps"), "history_over_limit")
    http = make_http(limits={"max_horizon": 3}, defaults={"pred_len": 1})
    assert_field(send(http, route, future=times(4, 10)), place(route, future_name(route)), "horizon_over_limit")
    http = make_http(limits={"max_cost": 1})
    response = send(http, route)
    assert response.status_code == 413
    assert response.json()["error"]["code"] == "cost_over_limit"
    assert response.json()["error"]["fields"][0]["code"] == "cost_over_limit"


def test_the_cost_of_a_batch_of_one_is_that_of_its_items(make_http, candle_items):
    http = make_http(limits={"max_cost": 1})
    response = http.post("/v1/predict/batch", {"items": [dict(candle_items(), series_id="a")]})
    assert response.status_code == 413
    assert response.json()["error"]["fields"][0]["loc"] == ["items"]


def test_an_answer_of_too_many_rows_is_refused_before_it_is_computed(make_http, fake_backend, columns):
    backend = fake_backend()
    http = make_http(backend, limits={"max_answer_rows": 20})
    body = {"series": [columns(), columns()], "horizon": 2, "samples": 3, "quantiles": [0.1, 0.5, 0.9, 1]}
    assert http.post("/v1/forecast", body).status_code == 200
    for more in (
        {"quantiles": [0.1, 0.5, 0.6, 0.9, 1]},
        {"return_paths": True},
        {"return_paths": True, "stream": True},
    ):
        response = http.post("/v1/forecast", {**body, **more})
        assert (response.status_code, response.json()["error"]["code"]) == (413, "cost_over_limit")
        assert "quantiles" in response.json()["error"]["fields"][0]["message"]
    assert len(backend.jobs) == 1


def test_horizon_by_number_over_the_limit(http, columns):
    response = http.post("/v1/forecast", {"series": [columns()], "horizon": 513})
    assert_field(response, ("horizon",), "horizon_over_limit")
    response = http.post("/v1/forecast", {"series": [dict(columns(), horizon=10**30)]})
    assert_field(response, ("series", 0, "horizon"), "horizon_over_limit")


@pytest.mark.parametrize(
    ("field", "value", "code"),
    [
        ("horizon", 0, "out_of_range"),
        ("horizon", 2.5, "not_an_integer"),
        ("horizon", "24", "not_an_integer"),
        ("horizon", True, "not_an_integer"),
        ("samples", -1, "out_of_range"),
        ("samples", 513, "samples_over_limit"),
        ("temperature", -0.1, "out_of_range"),
        ("temperature", 1e-9, "out_of_range"),
        ("temperature", float("nan"), "not_finite"),
        ("temperature", float("inf"), "not_finite"),
        ("temperature", "1", "not_a_number"),
        ("top_p", 1.5, "out_of_range"),
        ("top_k", -1, "out_of_range"),
        ("seed", -1, "out_of_range"),
        ("seed", 2**63, "out_of_range"),
        ("seed", 10**400, "out_of_range"),
        ("freq", "month", "unknown_freq"),
        ("freq", "0min", "unknown_freq"),
        ("window", "slide", "unknown_window"),
        ("window", "hop:0", "unknown_window"),
        ("window", "hop:16 ", "unknown_window"),
        ("window", 16, "not_a_string"),
        ("calendar", "NOPE", "unknown_calendar"),
        ("calendar", "../../etc/passwd", "unknown_calendar"),
    ],
)
def test_bad_settings_by_request_and_by_series(http, columns, field, value, code):
    good = columns()
    assert_field(http.post("/v1/forecast", {"series": [good], field: value}), (field,), code)
    response = http.post("/v1/forecast", {"series": [good, {**good, field: value}]})
    assert_field(response, ("series", 1, field), code)


@pytest.mark.parametrize(
    ("settings", "times", "field", "code"),
    [
        ({}, ["2024-01-02T10:00:00", "2024-01-02T10:01:00", "2024-01-02T10:07:00"], "freq", "freq_ambiguous"),
        ({"calendar": "XNYS"}, ["2024-01-06T10:00:00", "2024-01-06T10:05:00"], "calendar", "not_on_calendar"),
    ],
)
def test_a_series_whose_times_cannot_go_on_is_named_among_others(http, columns, settings, times, field, code):
    """The setting is the request's or nobody's, and the fault is that of a series."""
    good = {**columns(), "timestamps": [f"2024-01-02T{10 + i // 60}:{i % 60:02}:00" for i in range(0, 40, 5)]}
    bad = {name: column[: len(times)] for name, column in good.items()} | {"timestamps": times}
    response = http.post("/v1/forecast", {"series": [good, bad, good, bad], **settings})
    places = [(tuple(fault["loc"]), fault["code"]) for fault in response.json()["error"]["fields"]]
    assert places == [(("series", 1, field), code), (("series", 3, field), code)]


def test_what_the_request_sets_wrongly_is_one_fault(http, columns):
    response = http.post("/v1/forecast", {"series": [columns()] * 30, "freq": "month"})
    assert [fault["loc"] for fault in response.json()["error"]["fields"]] == [["freq"]]


def test_a_misspelt_calendar_is_refused_beside_explicit_times_too(http, columns):
    good = {**columns(), "future_timestamps": ["2030-01-01T00:00:00+00:00"]}
    assert http.post("/v1/forecast", {"series": [good], "calendar": "XNYS", "freq": "1h"}).status_code == 200
    assert_field(http.post("/v1/forecast", {"series": [good], "calendar": "NOPE"}), ("calendar",), "unknown_calendar")
    assert_field(http.post("/v1/forecast", {"series": [good], "freq": "month"}), ("freq",), "unknown_freq")


@pytest.mark.parametrize(
    ("body", "loc", "code"),
    [
        ({"quantiles": []}, ("quantiles",), "too_few"),
        ({"quantiles": [0.5, 0.5]}, ("quantiles",), "duplicate_quantiles"),
        ({"quantiles": [1.5]}, ("quantiles", 0), "out_of_range"),
        ({"quantiles": [float("nan")]}, ("quantiles", 0), "not_finite"),
        ({"repair": "all"}, ("repair",), "unknown_value"),
        ({"return_paths": 1}, ("return_paths",), "not_a_boolean"),
        ({"deadline_ms": 0}, ("deadline_ms",), "out_of_range"),
        ({"temprature": 1}, ("temprature",), "unknown_field"),
        ({"series": []}, ("series",), "too_few"),
        ({"series": {}}, ("series",), "not_a_list"),
        ({"series": [3]}, ("series", 0), "not_an_object"),
        ({"model": 3}, ("model",), "not_a_string"),
        ({"model": "x" * 65}, ("model",), "too_long"),
    ],
)
def test_bad_bodies(http, columns, body, loc, code):
    assert_field(http.post("/v1/forecast", {"series": [columns()], **body}), loc, code)


def test_overrides(http, candle_items):
    body = candle_items(6, 3)
    for overrides, loc, code in (
        ({"pred_len": 4}, ("overrides", "pred_len"), "length_mismatch"),
        ({"sample_count": 0}, ("overrides", "sample_count"), "out_of_range"),
        ({"temp": 1}, ("overrides", "temp"), "unknown_field"),
        ([], ("overrides",), "not_an_object"),
    ):
        assert_field(http.post("/v1/predict/single", dict(body, overrides=overrides)), loc, code)
    for overrides in (None, {}, {"pred_len": 3}, {"top_k": 5}):
        assert http.post("/v1/predict/single", dict(body, overrides=overrides)).status_code == 200


def test_batch_needs_an_id_and_items(http, candle_items):
    assert_field(http.post("/v1/predict/batch", {"items": [candle_items()]}), ("items", 0, "series_id"), "missing")
    assert_field(http.post("/v1/predict/batch", {"items": []}), ("items",), "too_few")
    response = http.post("/v1/predict/batch", {"items": [dict(candle_items(2, 1), series_id="a")] * 513})
    assert_field(response, ("items",), "too_many")


def test_missing_and_unknown_fields_of_candles(http, candle_items):
    body = candle_items(4, 1)
    del body["candles"][2]["close"]
    assert_field(http.post("/v1/predict/single", body), ("candles", 2, "close"), "missing")
    body = candle_items(4, 1)
    body["candles"][1]["vwap"] = 1
    assert_field(http.post("/v1/predict/single", body), ("candles", 1, "vwap"), "unknown_field")


def test_an_integer_with_too_many_digits_is_a_field_error(http, columns):
    raw = json.dumps({"series": [columns()], "horizon": 3, "seed": 7}).replace("107.0", "1" * 5000)
    response = http.post("/v1/forecast", raw=raw.encode())
    assert_field(response, ("series", 0, "open", 7), "not_finite")
    # Integers beside it, of the usual size, are no mistakes.
    assert {fault["loc"][0] for fault in response.json()["error"]["fields"]} == {"series"}


MANY = 50_000


@pytest.mark.parametrize(
    ("path", "raw", "loc", "code"),
    [
        ("/v1/predict/batch", '{"items": [' + ",".join(['{"a": 1}'] * MANY) + "]}", ["items"], "too_many"),
        ("/v1/forecast", '{"series": [' + ",".join(["1"] * MANY) + "]}", ["series"], "too_many"),
        ("/v1/forecast", '{"quantiles": [' + ",".join(["2"] * MANY) + "]}", ["quantiles"], "too_many"),
        ("/v1/forecast", "{" + ",".join(f'"{i}": 1' for i in range(MANY)) + "}", ["0"], "unknown_field"),
        (
            "/v1/predict/single",
            '{"overrides": {' + ",".join(f'"{i}": 1' for i in range(MANY)) + "}}",
            ["overrides", "0"],
            "unknown_field",
        ),
    ],
)
def test_a_great_many_mistakes_take_no_memory(http, path, raw, loc, code):
    """Of every byte of such a body, an error for each entry would make a kilobyte."""
    tracemalloc.start()
    response = http.post(path, raw=raw.encode())
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    fields = response.json()["error"]["fields"]
    assert response.status_code == 422
    assert (loc, code) in [(field["loc"], field["code"]) for field in fields]
    assert len(fields) <= 20
    assert peak < 50 * len(raw)


def test_brackets_take_no_memory(http):
    """A list of two bytes takes 56 and a place in another one."""
    raw = b'{"series": [' + b"[]," * 300_000 + b"[]]}"
    tracemalloc.start()
    response = http.post("/v1/forecast", raw=raw)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (response.status_code, response.json()["error"]["code"]) == (400, "malformed_json")
    assert "list or object" in response.json()["error"]["message"]
    assert peak < 5 * len(raw)


def test_brackets_in_a_text_are_none(http, columns):
    series = [dict(columns(2), id=f"{i:04d}" + "[{" * 30) for i in range(400)]
    raw = json.dumps({"series": series, "horizon": 1}).encode()
    assert raw.count(b"[") + raw.count(b"{") > len(raw) / 8
    assert http.post("/v1/forecast", raw=raw).status_code == 200


def test_answers_echo_little_of_the_input(http, columns):
    poison = "Q" * 5000
    for body in (
        {"series": [columns()], poison: 1},
        {"series": [columns()], "model": poison},
        {"series": [columns()], "freq": poison},
        {"series": [columns()], "calendar": "Q" * 64},
        {"series": [dict(columns(), timestamps=[poison])]},
        {"series": [dict(columns(), close=[poison])]},
    ):
        response = http.post("/v1/forecast", body)
        assert response.status_code in (404, 422)
        assert "Q" * 65 not in response.text
    assert "Q" * 65 not in http.get("/v1/" + poison).text


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_nothing_gives_a_5xx(http, columns, candle_items, data):
    """One value of a valid body, anywhere, becomes any JSON value."""
    route = data.draw(st.sampled_from(["/v1/forecast", "/v1/predict/single", "/v1/predict/batch"]))
    body = {
        "/v1/forecast": {"series": [columns(3)], "horizon": 2, "quantiles": [0.5], "seed": 1, "deadline_ms": 1000},
        "/v1/predict/single": candle_items(3, 1),
        "/v1/predict/batch": {"items": [dict(candle_items(3, 1), series_id="a", overrides={"top_k": 1})]},
    }[route]
    node, key = body, data.draw(st.sampled_from(sorted(body)))
    while isinstance(node[key], dict | list) and node[key] and data.draw(st.booleans()):
        node = node[key]
        key = data.draw(st.sampled_from(range(len(node)) if isinstance(node, list) else sorted(node)))
    node[key] = data.draw(JSON)
    raw = json.dumps(body).encode()
    response = http.post(route, raw=raw)
    assert response.status_code in (200, 400, 404, 408, 413, 422), response.text
    if response.status_code != 200:
        assert response.json()["error"]["code"]
