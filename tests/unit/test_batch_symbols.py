"""One symbol's history: what is refused, by which name, and which times come next."""

import numpy as np
import pandas as pd
import pytest

from cluster.batching import symbols as symbols_module
from cluster.batching.files import Layout, scan
from cluster.batching.plan import Unit
from cluster.batching.symbols import HistoryRules, future_index, load_unit, symbol_history
from model.errors import InputError

NAMES = Layout()


def candles(count=40, start="2024-01-01", freq="5min", tz=None):
    close = 100 + np.sin(np.arange(count) / 5)
    times = pd.date_range(start, periods=count, freq=freq, tz=tz)
    return pd.DataFrame(
        {"timestamps": times, "open": close, "high": close + 1, "low": close - 1, "close": close, "volume": 5.0}
    )


def history(*pieces, symbol="A", **rules):
    return symbol_history(symbol, pieces, NAMES, HistoryRules(**({"horizon": 4} | rules)))


def spoil(column, row, value):
    frame = candles()
    frame[column] = frame[column].astype(object) if isinstance(value, str) else frame[column]
    frame.loc[row, column] = value
    return frame


def reverse(frame):
    return frame.iloc[::-1].reset_index(drop=True)


def text_times(frame, row, text):
    texts = frame["timestamps"].astype(str).astype(object)
    texts[row] = text
    return frame.assign(timestamps=texts)


@pytest.mark.parametrize(
    ("frame", "code"),
    [
        (spoil("close", 3, np.nan), "not_finite"),
        (spoil("close", 3, np.inf), "not_finite"),
        (spoil("close", 3, "n/a"), "not_a_number"),
        (candles().assign(close=[[100.0]] * 40), "not_a_number"),
        (spoil("low", 3, -1.0), "not_positive"),
        (spoil("open", 3, 0.0), "not_positive"),
        (spoil("volume", 3, -1.0), "negative"),
        (spoil("high", 3, 1.0), "high_below_low"),
        (reverse(candles()), "unsorted_times"),
        (pd.concat([candles(), candles().tail(1)]), "duplicate_times"),
        (text_times(candles(), 5, "yesterday"), "not_a_time"),
        (text_times(candles(), 5, "2024-01-01 00:25:00+08:00"), "mixed_time_zones"),
        (candles().assign(timestamps=range(40)), "not_a_time"),
        (candles(5), "too_short"),
        (candles(0), "no_rows"),
        (candles().drop(index=7), "freq_ambiguous"),
    ],
)
def test_a_bad_history_is_refused_by_code(frame, code):
    with pytest.raises(InputError) as caught:
        history(frame)
    assert caught.value.code == code, str(caught.value)


def test_rows_without_a_symbol_are_an_error_of_their_own():
    with pytest.raises(InputError, match="name no symbol") as caught:
        history(candles(), symbol="")
    assert caught.value.code == "missing_symbol"


def test_pieces_are_put_in_order_and_may_not_overlap():
    whole = candles(40)
    found = history(whole[25:].reset_index(drop=True), whole[:25])
    np.testing.assert_array_equal(found.series.candles, history(whole).series.candles)
    with pytest.raises(InputError) as caught:
        history(whole[:25], whole[24:].reset_index(drop=True))
    assert caught.value.code == "duplicate_times"
    with pytest.raises(InputError) as caught:
        history(whole[:25], candles(15, "2024-02-01", tz="UTC"))
    assert caught.value.code == "mixed_time_zones"


def test_only_the_history_that_is_used_is_checked():
    frame = spoil("close", 3, np.nan)
    found = history(frame, history=30)
    assert len(found.series.candles) == 30
    np.testing.assert_array_equal(found.series.candles[:, 3], frame["close"][10:].to_numpy(np.float32))


@pytest.mark.parametrize(
    ("index", "rules", "expected"),
    [
        (pd.date_range("2024-01-01", periods=3, freq="h"), {}, ["2024-01-01 03:00", "2024-01-01 04:00"]),
        (pd.date_range("2024-01-01", periods=3, freq="D"), {}, ["2024-01-04", "2024-01-05"]),
        # A gap: by size, or by the exchange's hours.
        (pd.DatetimeIndex(["2024-01-05", "2024-01-08"]), {"freq": "1d"}, ["2024-01-09", "2024-01-10"]),
        (pd.DatetimeIndex(["2024-07-02", "2024-07-03"]), {"calendar": "XNYS"}, ["2024-07-05", "2024-07-08"]),
        # New York's clocks change on 10 March 2024: hours go on in UTC, days on the wall clock.
        (
            pd.date_range("2024-03-10 00:00", periods=2, freq="h", tz="America/New_York"),
            {},
            ["2024-03-10 03:00-04:00", "2024-03-10 04:00-04:00"],
        ),
        (
            pd.date_range("2024-03-08", periods=2, freq="D", tz="America/New_York"),
            {},
            ["2024-03-10 00:00-05:00", "2024-03-11 00:00-04:00"],
        ),
        # Midnight in Tokyo: Monday's bar comes on a Sunday.
        (
            pd.bdate_range("2024-06-12", "2024-06-21", tz="Asia/Tokyo").tz_convert("UTC"),
            {"calendar": "XTKS"},
            ["2024-06-23 15:00Z", "2024-06-24 15:00Z"],
        ),
    ],
)
def test_future_times(index, rules, expected):
    future = future_index(index, HistoryRules(horizon=2, **rules))
    assert [pd.Timestamp(text) for text in expected] == list(future)
    assert str(future.tz) == str(index.tz)


def test_bars_closer_than_a_microsecond_are_refused():
    """Which is what future times are counted in: two of them would be one."""
    index = pd.date_range("2024-07-02 14:00", periods=9, freq="ns", tz="UTC")
    for calendar in (None, "24/7", "XNYS"):
        with pytest.raises(InputError, match=r"less than a microsecond apart .* give bars of") as caught:
            future_index(index, HistoryRules(horizon=2, calendar=calendar))
        assert caught.value.code == "freq_too_small"


def test_wide_and_long_tables_give_the_same_histories(tmp_path):
    """Ragged: the bars that a symbol does not have are empty cells of the wide table."""
    long = pd.concat([candles(40).assign(symbol="A"), candles(25, "2024-01-01 01:00").assign(symbol="B.X")])
    wide = long.pivot(index="timestamps", columns="symbol").swaplevel(axis=1)
    wide.columns = [f"{symbol}.{field}" for symbol, field in wide.columns]
    found = []
    for name, frame in (("long", long), ("wide", wide.reset_index())):
        for suffix in ("csv", "parquet"):
            path = tmp_path / f"{name}.{suffix}"
            frame.to_csv(path, index=False) if suffix == "csv" else frame.to_parquet(path, index=False)
            found.append(load_unit(Unit(("A", "B.X"), ((str(path), name),)), NAMES, HistoryRules(horizon=4)))
    for other in found[1:]:
        for symbol in ("A", "B.X"):
            np.testing.assert_array_equal(found[0][symbol].series.candles, other[symbol].series.candles)
            np.testing.assert_array_equal(found[0][symbol].series.marks, other[symbol].series.marks)
            assert found[0][symbol].future.equals(other[symbol].future)
    assert len(found[0]["B.X"].series.candles) == 25


@pytest.mark.parametrize("layout", ["single", "long", "wide"])
@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_names_of_columns_may_be_in_any_case(tmp_path, layout, suffix):
    plain = candles().assign(volume=7.0)
    tables = {"A": plain, "B": plain.rename(columns=lambda name: name if name in ("open", "low") else name.title())}
    found = []
    for symbol, table in tables.items():
        path = tmp_path / f"{symbol}.{suffix}"
        if layout == "long":
            table = table.assign(**{"symbol" if symbol == "A" else "SYMBOL": symbol})
        if layout == "wide":
            times = table.columns[0]
            table = table.add_prefix(f"{symbol}.").rename(columns={f"{symbol}.{times}": times})
        table.to_csv(path, index=False) if suffix == "csv" else table.to_parquet(path, index=False)
        [source] = scan([path], NAMES)
        assert (source.layout, source.symbols) == (layout, (symbol,))
        unit = Unit((symbol,), ((str(path), layout),))
        found.append(load_unit(unit, NAMES, HistoryRules(4))[symbol].series.candles)
    assert (found[0][:, 4] == 7).all()
    np.testing.assert_array_equal(*found)


def test_a_symbol_of_a_wide_table_with_a_column_in_two_cases_costs_itself_alone(tmp_path):
    wide = candles().add_prefix("A.").rename(columns={"A.timestamps": "timestamps"})
    wide = wide.join(candles().drop(columns="timestamps").add_prefix("B.")).assign(**{"B.Close": 1.0})
    wide.to_csv(tmp_path / "wide.csv", index=False)
    [source] = scan([tmp_path / "wide.csv"], NAMES)
    found = load_unit(Unit(source.symbols, ((source.path, source.layout),)), NAMES, HistoryRules(4))
    assert len(found["A"].series.candles) == 40
    assert (found["B"].code, found["B"].column) == ("duplicate_column", "close")
    assert "symbol 'B': column 'close' is there twice ('close' and 'Close')" in str(found["B"])


def test_a_parquet_file_whose_times_are_its_index(tmp_path):
    candles().set_index("timestamps").to_parquet(tmp_path / "A.parquet")
    candles().to_parquet(tmp_path / "B.parquet")
    unit = Unit(("A", "B"), tuple((str(tmp_path / f"{name}.parquet"), "single") for name in "AB"))
    found = load_unit(unit, NAMES, HistoryRules(4))
    np.testing.assert_array_equal(found["A"].series.candles, found["B"].series.candles)
    assert found["A"].future.equals(found["B"].future)


@pytest.mark.parametrize("missing", ["low", "close"])
def test_a_symbol_of_a_wide_table_that_lacks_a_price_costs_itself_alone(tmp_path, missing):
    wide = candles().add_prefix("A.").rename(columns={"A.timestamps": "timestamps"})
    wide = wide.join(candles().drop(columns=["timestamps", missing]).add_prefix("B."))
    wide.to_csv(tmp_path / "wide.csv", index=False)
    [source] = scan([tmp_path / "wide.csv"], NAMES)
    assert (source.layout, source.symbols, source.fault) == ("wide", ("A", "B"), None)
    found = load_unit(Unit(source.symbols, ((source.path, source.layout),)), NAMES, HistoryRules(4))
    assert len(found["A"].series.candles) == 40
    assert (found["B"].code, found["B"].column) == ("missing_column", missing)


def test_rows_without_a_symbol_alone_in_a_unit_say_so(tmp_path):
    candles().assign(symbol=None).to_parquet(tmp_path / "x.parquet")
    [source] = scan([tmp_path / "x.parquet"], NAMES)
    found = load_unit(Unit(source.symbols, ((source.path, source.layout),)), NAMES, HistoryRules(4))
    assert {symbol: fault.code for symbol, fault in found.items()} == {"": "missing_symbol"}


@pytest.mark.parametrize("place", ["symbol_history", "read_columns"])
def test_what_nobody_has_thought_of_costs_the_symbol_alone(tmp_path, monkeypatch, place):
    """A defect in our own code, which an actor would die of at every try, with all the symbols after it."""
    real = getattr(symbols_module, place)

    def broken(*arguments):
        if "BAD" in str(arguments[0]):
            raise ZeroDivisionError("nobody knows")
        return real(*arguments)

    monkeypatch.setattr(symbols_module, place, broken)
    for name in ("GOOD", "BAD"):
        candles().to_parquet(tmp_path / f"{name}.parquet")
    unit = Unit(("BAD", "GOOD"), tuple((str(tmp_path / f"{name}.parquet"), "single") for name in ("BAD", "GOOD")))
    found = load_unit(unit, NAMES, HistoryRules(4))
    assert len(found["GOOD"].series.candles) == 40
    assert (found["BAD"].code, str(found["BAD"])) == ("unexpected", "ZeroDivisionError: nobody knows")
