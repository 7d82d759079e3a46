"""Which files there are, how they are laid out, and how symbols are divided into units."""

import numpy as np
import pandas as pd
import pytest

from cluster.batching.config import check, parse_arguments
from cluster.batching.files import Layout, Source, find_files, layout_of, scan, wide_columns
from cluster.batching.plan import Unit, partition, plan_spread, plan_units, spread_file
from cluster.batching.symbols import HistoryRules, load_unit
from model.errors import InputError

NAMES = Layout()


def candles(count, start="2024-01-01", seed=0):
    rng = np.random.default_rng(seed)
    close = 100 + rng.normal(0, 1, count).cumsum()
    times = pd.date_range(start, periods=count, freq="5min")
    return pd.DataFrame(
        {"timestamps": times, "open": close, "high": close + 1, "low": close - 1, "close": close, "volume": 1.0}
    )


def test_files_folders_and_globs_are_found_once_each(tmp_path):
    (tmp_path / "a").mkdir()
    for name in ("a/x.csv", "a/y.parquet", "z.csv", "note.txt"):
        (tmp_path / name).touch()
    found = find_files([str(tmp_path / "a"), str(tmp_path / "*.csv"), str(tmp_path / "a/x.csv")])
    assert [file.name for file in found] == ["x.csv", "y.parquet", "z.csv"]
    for nothing in ("absent", "*.json", "note.txt"):
        with pytest.raises(InputError, match=nothing.replace("*", r"\*")):
            find_files([str(tmp_path / nothing)])


def test_a_symbol_column_of_lists_costs_its_file(tmp_path):
    candles(20).assign(symbol="A").to_parquet(tmp_path / "good.parquet")
    candles(20).assign(symbol=[["A"]] * 20).to_parquet(tmp_path / "lists.parquet")
    good, lists = scan([tmp_path / "good.parquet", tmp_path / "lists.parquet"], NAMES)
    assert good.symbols == ("A",)
    assert (lists.fault.code, lists.fault.column) == ("not_a_symbol", "symbol")
    assert "lists.parquet: column 'symbol' holds list<" in str(lists.fault)
    [unit] = plan_units([lists], None, [], 8)
    assert str(load_unit(unit, NAMES, HistoryRules(horizon=4))["lists"]) == str(lists.fault)


def test_a_file_whose_name_holds_a_pattern_is_itself(tmp_path):
    (tmp_path / "BTC[1h].csv").touch()
    assert [file.name for file in find_files([str(tmp_path / "BTC[1h].csv")])] == ["BTC[1h].csv"]


@pytest.mark.parametrize(
    ("columns", "layout"),
    [
        (["timestamps", "open", "high", "low", "close"], "single"),
        (["timestamps", "symbol", "open", "high", "low", "close", "volume"], "long"),
        (["timestamps", "BRK.B.open", "BRK.B.high", "BRK.B.low", "BRK.B.close"], "wide"),
        (["Timestamps", "Open", "High", "Low", "Close"], "single"),
        (["timestamps", "Symbol", "open", "high", "low", "close"], "long"),
        (["TIMESTAMPS", "A.Open", "A.HIGH", "A.low", "A.Close"], "wide"),
    ],
)
def test_layouts(columns, layout):
    assert layout_of(columns, NAMES, "f") == layout


@pytest.mark.parametrize(
    ("columns", "column", "told"),
    [
        (["date", "open", "high", "low", "close"], "timestamps", "--time-column"),
        (["timestamps", "open", "high", "close"], "low", "low"),
        (["timestamps", "A.open", "A.high", "A.low"], "A.close", "SYMBOL.close"),
        (["timestamps", "A.Open", "A.High", "A.Low"], "A.close", "SYMBOL.close"),
        (["timestamps", "AAPL", "MSFT"], "close", "one price a symbol is not enough"),
    ],
)
def test_tables_without_candles_say_what_is_missing(columns, column, told):
    with pytest.raises(InputError, match=told) as caught:
        layout_of(columns, NAMES, "f")
    assert (caught.value.code, caught.value.column) == ("missing_column", column)


def test_a_column_that_is_there_in_two_cases_costs_its_file(tmp_path):
    candles(20).to_csv(tmp_path / "good.csv", index=False)
    candles(20).assign(Volume=1.0).to_csv(tmp_path / "two.csv", index=False)
    good, two = scan([tmp_path / "good.csv", tmp_path / "two.csv"], NAMES)
    assert good.fault is None
    assert (two.fault.code, two.fault.column) == ("duplicate_column", "volume")
    assert "two.csv: column 'volume' is there twice ('volume' and 'Volume')" in str(two.fault)


def test_symbols_of_a_wide_table_may_hold_dots():
    found = wide_columns(["timestamps", "BRK.B.open", "BRK.B.close", "A.open"], NAMES)
    assert found == {"BRK.B": {"open": "BRK.B.open", "close": "BRK.B.close"}, "A": {"open": "A.open"}}


def test_scan_keeps_leading_zeros_and_a_broken_file_costs_itself(tmp_path):
    candles(3).assign(symbol="000001").to_csv(tmp_path / "long.csv", index=False)
    candles(3).assign(symbol=600000).to_parquet(tmp_path / "numbers.parquet")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 no")
    sources = {source.path.rpartition("/")[2]: source for source in scan(find_files([str(tmp_path)]), NAMES)}
    assert sources["long.csv"].symbols == ("000001",)
    assert sources["numbers.parquet"].symbols == ("600000",)
    assert sources["broken.parquet"].fault.code == "unreadable_file"
    assert sources["broken.parquet"].symbols == ("broken",)


@pytest.mark.parametrize("values", [[True, False], [1.0, 2.5], [b"A", b"B"], pd.Categorical(["A", "B"])])
def test_symbols_of_any_type_are_found_again_by_their_text(tmp_path, values):
    """The scan names them, a filter finds them: both must read a value as the same text."""
    symbols = pd.Series(values).repeat(20).reset_index(drop=True)
    table = pd.concat([candles(20), candles(20)], ignore_index=True)
    table.assign(symbol=symbols).to_parquet(tmp_path / "long.parquet")
    sources = scan(find_files([str(tmp_path)]), NAMES)
    [unit] = plan_units(sources, None, (), 2)
    found = load_unit(unit, NAMES, HistoryRules(horizon=2))
    assert len(found) == 2
    assert not [history for history in found.values() if isinstance(history, InputError)]


def test_nothing_readable_is_an_error(tmp_path):
    candles(3).rename(columns={"timestamps": "when"}).to_csv(tmp_path / "a.csv", index=False)
    with pytest.raises(InputError, match="--time-column"):
        scan(find_files([str(tmp_path)]), NAMES)
    candles(0).assign(symbol="A").to_parquet(tmp_path / "a.parquet")
    (tmp_path / "a.csv").unlink()
    with pytest.raises(InputError, match="no rows"):
        scan(find_files([str(tmp_path)]), NAMES)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--calendar", "XNYZ", r"--calendar: unknown calendar 'XNYZ': .*XNYS"),
        ("--freq", "often", "--freq: must be a number and one of s, min"),
    ],
)
def test_a_calendar_or_a_bar_that_does_not_exist_is_refused_before_anything_starts(option, value, message):
    """Else every symbol of a long run would end with the same error, in an output that keeps the wrong name."""
    given = ["--input", "x", "--output", "y", "--horizon", "4"]
    check(parse_arguments([*given, "--calendar", "24/7", "--freq", "5min"], None))
    with pytest.raises(InputError, match=message):
        check(parse_arguments([*given, option, value], None))


def test_every_symbol_is_in_one_unit_with_all_of_its_files():
    sources = [
        Source("a", "long", ("X", "Y"), 10),
        Source("b", "long", ("Y", "Z"), 10),
        *(Source(f"s{i}", "single", (f"s{i}",), 1) for i in range(7)),
    ]
    units = plan_units(sources, None, skip={"s3"}, size=4)
    placed = [symbol for unit in units for symbol in unit.symbols]
    assert sorted(placed) == sorted({"X", "Y", "Z", *(f"s{i}" for i in range(7))} - {"s3"})
    assert all(len(unit.symbols) <= 4 for unit in units)
    with_y = next(unit for unit in units if "Y" in unit.symbols)
    assert {("a", "long"), ("b", "long")} <= set(with_y.files)
    assert [Unit.parse(unit.text()) for unit in units] == units


def test_only_files_too_large_to_be_read_again_and_again_are_spread(tmp_path):
    small, large = Source("small", "long", ("A",), 10), Source("large", "long", ("B", "C"), 1000)
    assert plan_spread([small], tmp_path, limit=100) is None
    spread = plan_spread([small, large], tmp_path, limit=100)
    assert spread.files == {"large"}
    assert spread.partitions == 10
    # Many small files that together hold one symbol.
    days = [Source(f"day{i}", "long", ("A", "B"), 30) for i in range(5)]
    assert plan_spread(days, tmp_path, limit=100).files == {f"day{i}" for i in range(5)}


def test_the_partition_of_a_symbol_depends_on_its_name_alone():
    assert [partition(symbol, 7) for symbol in ("AAPL", "MSFT", "")] == [partition(s, 7) for s in ("AAPL", "MSFT", "")]
    assert len({partition(f"S{i}", 16) for i in range(500)}) == 16


@pytest.mark.parametrize("names", [{}, {"symbol": "Symbol", "close": "CLOSE"}])
@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_histories_over_several_files_are_the_same_spread_or_not(tmp_path, suffix, names):
    """Every file holds a stretch of every symbol; one symbol has a text among its prices."""
    whole = pd.concat([candles(60, seed=i).assign(symbol=f"S{i}") for i in range(6)])
    if suffix == "csv":
        whole["close"] = whole["close"].astype(object)
        whole.loc[(whole["symbol"] == "S5") & (whole.index == 10), "close"] = "n/a"
    whole = whole.sort_values("timestamps", kind="stable")
    for number, piece in enumerate(np.array_split(np.arange(len(whole)), 3)):
        path = tmp_path / f"{3 - number}.{suffix}"  # the names do not say which comes first
        frame = whole.iloc[piece].rename(columns=names if number else {})  # one file has its own way to write them
        frame.to_csv(path, index=False) if suffix == "csv" else frame.to_parquet(path)
    sources = scan(find_files([str(tmp_path)]), NAMES)
    rules = HistoryRules(horizon=3)
    direct, parted = {}, {}
    for unit in plan_units(sources, None, (), 2):
        direct |= load_unit(unit, NAMES, rules)
    spread = plan_spread(sources, tmp_path / "_spread", limit=2000)
    assert spread.partitions > 1
    for number, path in enumerate(sorted(spread.files)):
        spread_file(path, number, spread, NAMES)
        spread_file(path, number, spread, NAMES)  # a second try changes nothing
    for unit in plan_units(sources, spread, (), 2):
        assert all(layout == "spread" for _, layout in unit.files)
        parted |= load_unit(unit, NAMES, rules)
    assert direct.keys() == parted.keys() == {f"S{i}" for i in range(6)}
    for symbol, history in direct.items():
        if isinstance(history, InputError):
            assert (symbol, history.code, parted[symbol].code) == ("S5", "not_a_number", "not_a_number")
            continue
        assert len(history.series.candles) == 60
        np.testing.assert_array_equal(history.series.candles, parted[symbol].series.candles)
        assert history.future.equals(parted[symbol].future)
