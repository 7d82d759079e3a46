"""python -m cluster.data check: everything that is wrong, in one go, with its place."""

import json

import numpy as np
import pandas as pd
import pytest

from cluster.candles.bars import read_bars
from cluster.candles.check import check
from cluster.candles.check_series import CheckOptions
from cluster.data import main
from model.errors import InputError


def good(bars=400, seed=0, **columns):
    rng = np.random.default_rng(seed)
    close = 100 * np.exp(np.cumsum(rng.normal(size=bars) * 0.01))
    opened = np.concatenate([[100.0], close[:-1]])
    return pd.DataFrame(
        {
            "timestamps": pd.date_range("2024-01-01", periods=bars, freq="h"),
            "open": opened,
            "high": np.maximum(opened, close) * 1.001,
            "low": np.minimum(opened, close) * 0.999,
            "close": close,
            "volume": rng.integers(1, 100, bars).astype(float),
            **columns,
        }
    )


def write(frame, path):
    frame.to_csv(path, index=False) if path.suffix == ".csv" else frame.to_parquet(path)
    return path


def run(capsys, *arguments):
    """(exit status, what was printed, the report as JSON)."""
    status = main(["check", *map(str, arguments)])
    return status, capsys.readouterr()


def found(report, level="fault"):
    return {f.code: f for f in report.findings if f.level == level}


def test_good_data_has_no_fault_and_no_warning(tmp_path, capsys):
    path = write(good(), tmp_path / "A.csv")
    status, printed = run(capsys, path, "--window", 50, "--validation-share", 0.2, "--test-share", 0.2)
    assert status == 0
    assert "0 faults" in printed.out
    assert "0 warnings" in printed.out
    assert "train: 191 windows" in printed.out
    assert "validation from 2024-01-11 00:00:00: 80 windows" in printed.out
    assert "test from 2024-01-14 08:00:00: 80 windows" in printed.out


def plant(frame):
    """One fault of each kind in one symbol; returns the frame and code → rows."""
    frame = frame.astype({"volume": float})
    frame.loc[10, "high"] = frame.loc[10, "low"] - 1
    frame.loc[20, "high"] = frame.loc[20, ["open", "close"]].max() - 0.05
    frame.loc[30, "low"] = frame.loc[30, ["open", "close"]].min() + 0.05
    frame.loc[40, "close"] = np.nan
    frame.loc[41, "volume"] = np.inf
    frame.loc[50, ["open", "high", "low", "close"]] = [0.0, 1.0, 0.0, 1.0]
    frame.loc[60, "volume"] = -5.0
    frame.loc[70, "timestamps"] = frame.loc[69, "timestamps"]
    frame.loc[80, "timestamps"], frame.loc[81, "timestamps"] = frame.loc[81, "timestamps"], frame.loc[80, "timestamps"]
    frame.loc[90, "timestamps"] = pd.NaT
    frame.loc[300:, ["open", "high", "low", "close"]] *= 3.0
    frame.loc[200:229, ["open", "high", "low", "close"]] = frame.loc[199, "close"]
    frame.loc[210:215, "volume"] = 0.0
    frame = frame.drop(index=range(150, 155)).reset_index(drop=True)
    moved = {
        "high_below_low": [10],
        "high_too_low": [20],
        "low_too_high": [30],
        "not_finite": [40, 41],
        "not_positive": [50],
        "negative": [60],
        "duplicate_times": [70],
        "unsorted_times": [81],
        "not_a_time": [90],
    }
    return frame, moved


@pytest.mark.verify("V20")
@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_v20_every_planted_fault_is_listed_in_one_go(tmp_path, capsys, suffix, figure):
    frame, expected = plant(good(symbol="B"))
    path = write(pd.concat([good(symbol="A"), frame], ignore_index=True), tmp_path / f"bars{suffix}")
    json_path, markdown = tmp_path / "report.json", tmp_path / "report.md"
    status, printed = run(capsys, path, "--json", json_path, "--markdown", markdown)
    assert status == 1
    report = json.loads(json_path.read_text())
    listed = {}
    for entry in report["faults"]:
        listed.setdefault(entry["code"], []).extend(entry["rows"])
        assert entry["file"] == str(path)
        assert entry["symbol"] == "B" or entry["code"] == "not_a_time"
        assert entry["remedy"]
        assert entry["code"] in printed.out
        assert entry["code"] in markdown.read_text()
    shift = 400  # rows of the file, not of the symbol
    planted = {(code, shift + row) for code, rows in expected.items() for row in rows}
    seen = {(code, row) for code, rows in listed.items() for row in rows}
    assert planted <= seen
    # The rows that are missing, and the places that bars without a usable time leave open.
    gap = next(e for e in report["faults"] if e["code"] == "gap" and e["rows"] == [shift + 150])
    assert gap["message"].startswith("5 bars are missing")
    warnings = {entry["code"]: entry for entry in report["warnings"]}
    assert shift + 295 in warnings["jump"]["rows"]
    assert {shift + r for r in range(194, 224)} <= set(warnings["stagnant"]["rows"])
    assert warnings["zero_volume"]["rows"] == [shift + r for r in range(205, 211)]
    bad, clean = report["symbols"][1], report["symbols"][0]
    assert (bad["duplicates"], bad["unsorted"], bad["zero_volume"]) == (1, 1, 6)
    assert not any(clean[name] for name in ("gaps", "duplicates", "unsorted", "bad_candles", "jumps", "stagnant_bars"))
    figure(
        f"{suffix}: {len(planted & seen)} of {len(planted)} planted faults listed with their rows, and the gap", "all"
    )


def test_time_zones(tmp_path):
    mixed = good(40)
    mixed["timestamps"] = [
        f"{t:%Y-%m-%dT%H:%M:%S}" + ("+08:00" if i % 10 else "Z") for i, t in enumerate(mixed["timestamps"])
    ]
    half = good(40)
    half["timestamps"] = [f"{t:%Y-%m-%d %H:%M:%S}" + ("Z" if i == 7 else "") for i, t in enumerate(half["timestamps"])]
    aware = good(40)
    aware["timestamps"] = aware["timestamps"].dt.tz_localize("America/New_York")
    paths = [
        write(mixed, tmp_path / "mixed.csv"),
        write(half, tmp_path / "half.csv"),
        write(aware, tmp_path / "aware.parquet"),
        write(good(40), tmp_path / "naive.csv"),
    ]
    report = check(paths)
    faults = [f for f in report.findings if f.code == "mixed_time_zones"]
    by_file = {f.file.rsplit("/", 1)[1]: f.rows for f in faults if f.rows}
    assert by_file == {"mixed.csv": [0, 10, 20, 30], "half.csv": [7]}
    assert {f.symbol for f in faults if not f.rows} == {"half", "naive"}  # the others have one
    assert {s.symbol: s.zone for s in report.symbols} == {
        "mixed": "+08:00",
        "half": None,
        "aware": "America/New_York",
        "naive": None,
    }
    # What the strict reader refuses is a fault here.
    for path in paths[:2]:
        with pytest.raises(InputError) as caught:
            read_bars(path)
        assert caught.value.code == "mixed_time_zones"


def test_daylight_saving_in_texts_is_two_offsets(tmp_path):
    frame = good(24 * 20)
    local = pd.date_range("2024-03-01", periods=len(frame), freq="h", tz="America/New_York")
    frame["timestamps"] = [t.isoformat() for t in local]
    [fault] = check([write(frame, tmp_path / "dst.csv")]).of_level("fault")
    assert fault.code == "mixed_time_zones"
    assert "UTC" in fault.remedy


@pytest.mark.parametrize(
    ("change", "code", "column"),
    [
        (lambda f: f.drop(columns="close"), "missing_column", "close"),
        (lambda f: f.rename(columns={"timestamps": "date"}), "missing_column", "timestamps"),
        (lambda f: f.iloc[:0], "no_rows", None),
        (lambda f: f.assign(close=["abc"] + f["close"].astype(str).tolist()[1:]), "not_a_number", "close"),
        (lambda f: f.assign(timestamps=range(len(f))), "not_a_time", "timestamps"),
        (lambda f: f.assign(timestamps="yesterday"), "not_a_time", "timestamps"),
        (lambda f: f.assign(symbol=["A"] * 10 + [None] + ["A"] * (len(f) - 11)), "missing_symbol", None),
    ],
)
def test_tables_that_are_not_bars(tmp_path, change, code, column):
    report = check([write(change(good(60)), tmp_path / "bars.csv"), write(good(60), tmp_path / "fine.csv")])
    assert report.exit_code == 1
    fault = found(report)[code]
    assert fault.column == column
    assert "fine" in [symbol.symbol for symbol in report.symbols]


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
@pytest.mark.parametrize("zone", ["", "Z"])
def test_a_year_that_nobody_means_is_a_fault_of_its_row(tmp_path, capsys, suffix, zone):
    """0024 for 2024: in nanoseconds it would be another time, without a word."""
    frame = good(40)
    texts = frame["timestamps"].dt.strftime("%Y-%m-%dT%H:%M:%S") + zone
    texts[0] = texts[0].replace("2024", "0024")
    if suffix == ".parquet":
        texts = pd.to_datetime(texts, format="ISO8601")
    path = write(frame.assign(timestamps=texts), tmp_path / f"A{suffix}")
    report = check([path])
    assert found(report)["not_a_time"].rows == [0]
    assert report.symbols[0].first.startswith("2024-01-01 01:00:00")
    assert run(capsys, path)[0] == 1
    with pytest.raises(InputError, match="not between the years 1678 and 2261") as caught:
        read_bars(path)
    assert (caught.value.code, caught.value.row) == ("not_a_time", 0)


def test_a_csv_with_a_column_twice(tmp_path, capsys):
    rows = good(40).to_csv(index=False).splitlines()
    path = tmp_path / "A.csv"
    path.write_text("\n".join([rows[0] + ",close", *(row + ",1.0" for row in rows[1:])]))
    status, printed = run(capsys, path)
    assert status == 1
    assert "duplicate_column" in printed.out
    assert "'close' is there twice" in printed.out


def test_names_of_columns_may_be_in_any_case_but_in_one(tmp_path):
    """As the strict reader has it: what it reads has no fault, what it refuses has."""
    report = check([write(good(60).rename(columns=str.title), tmp_path / "A.csv")])
    assert [(one.symbol, one.bars) for one in report.symbols] == [("A", 60)]
    assert report.of_level("fault") == []
    assert "no_volume" not in found(report, "warning")
    table = good(60).assign(Volume=1.0, CLOSE=1.0)
    report = check([write(table, tmp_path / "B.csv")])
    assert [(fault.code, fault.column) for fault in report.of_level("fault")] == [
        ("duplicate_column", "close"),
        ("duplicate_column", "volume"),
    ]
    with pytest.raises(InputError, match="'close' is there twice"):
        read_bars(tmp_path / "B.csv")


def test_what_cannot_be_read_does_not_stop_the_rest(tmp_path, capsys):
    (tmp_path / "broken.parquet").write_bytes(b"not parquet")
    frame, _ = plant(good())
    path = write(frame, tmp_path / "B.csv")
    status, printed = run(capsys, tmp_path / "absent.csv", tmp_path / "broken.parquet", path)
    assert status == 2
    assert "absent.csv" in printed.out
    assert "broken.parquet" in printed.out
    assert "duplicate_times" in printed.out


@pytest.mark.parametrize("seed", range(40))
def test_what_the_strict_reader_refuses_is_a_fault_here(tmp_path, seed):
    rng = np.random.default_rng(seed)
    frame = good(80, symbol="A").astype({"volume": float, "timestamps": object, "close": object, "symbol": object})
    values = {
        "timestamps": [pd.NaT, frame.loc[40, "timestamps"], "noon", "2024-01-02T00:00:00Z"],
        "close": [np.nan, np.inf, 1e60, "abc"],
        "volume": [np.nan, np.inf],
        "symbol": [None],
    }
    for _ in range(rng.integers(1, 4)):
        column = rng.choice(list(values))
        frame.loc[rng.integers(80), column] = values[column][rng.integers(len(values[column]))]
    path = write(frame, tmp_path / "bars.csv")
    codes = {fault.code for fault in check([path]).of_level("fault")}
    if codes <= {"gap"}:
        read_bars(path)
        return
    with pytest.raises(InputError) as caught:
        read_bars(path)
    assert caught.value.code in codes


@pytest.mark.parametrize("symbol", [["A"], {"name": "A"}])
def test_a_symbol_column_of_lists_is_a_fault_of_its_file(tmp_path, symbol):
    path = write(good(20).assign(symbol=[symbol] * 20), tmp_path / "bars.parquet")
    report = check([path, write(good(60), tmp_path / "fine.csv")])
    fault = found(report)["not_a_symbol"]
    assert (fault.file, fault.column) == (str(path), "symbol")
    assert [one.symbol for one in report.symbols] == ["fine"]
    with pytest.raises(InputError, match=r"bars\.parquet: column 'symbol', row 0 holds lists .* as text") as caught:
        read_bars(path)
    assert caught.value.code == "not_a_symbol"


def test_no_bar_has_a_symbol(tmp_path):
    report = check([write(good(20, symbol=""), tmp_path / "bars.csv")])
    assert len(found(report)["missing_symbol"].rows) == 20
    assert report.symbols == []


def test_a_symbol_in_two_files(tmp_path):
    report = check([write(good(60, symbol="X"), tmp_path / name) for name in ("a.csv", "b.csv")])
    assert found(report)["duplicate_symbol"].file.endswith("b.csv")


def test_series_that_are_too_short(tmp_path, capsys):
    short = write(good(30), tmp_path / "short.csv")
    status, printed = run(capsys, short, "--window", 64)
    assert status == 1
    assert "too_short" in printed.out
    long = write(good(300), tmp_path / "long.csv")
    status, printed = run(capsys, short, long, "--window", 64, "--validation-from", "2024-01-10")
    assert status == 0
    assert "no_window: 1 of 2 symbols have no window of 64 bars in train: short" in printed.out
    status, printed = run(capsys, long, "--window", 64, "--validation-from", "2025-01-10")
    assert status == 1


def test_gaps_are_warnings_once_training_is_told_what_to_do(tmp_path):
    frame = good(300).drop(index=range(100, 104)).reset_index(drop=True)
    path = write(frame, tmp_path / "A.csv")
    assert found(check([path]))["gap"].rows == [100]
    report = check([path], CheckOptions(max_gap_bars=3, window=20))
    assert report.exit_code == 0
    assert found(report, "warning")["gap"].rows == [100]
    assert report.splits["all"]["windows"] == 277 - 19


def test_moves_over_nights_are_measured_by_nights(tmp_path):
    """A night of 20 times a bar's move is a night; the same move inside a session is a jump."""
    days = pd.bdate_range("2024-01-01", periods=60)
    times = [t for day in days for t in pd.date_range(f"{day.date()} 09:30", f"{day.date()} 15:55", freq="5min")]
    rng = np.random.default_rng(0)
    moves = rng.normal(size=len(times)) * 0.001
    moves[:: len(times) // 60] *= 20
    frame = good(len(times)).assign(timestamps=times)
    for inside in (0.0, 0.02):
        moves[1000] += inside
        close = 100 * np.exp(np.cumsum(moves))
        opened = close * np.exp(-moves)
        frame = frame.assign(open=opened, close=close, high=np.maximum(opened, close), low=np.minimum(opened, close))
        report = check([write(frame, tmp_path / "A.csv")])
        assert [f.rows for f in report.findings if f.code == "jump"] == ([[1000]] if inside else [])


def test_windows_that_the_filter_leaves_out_are_counted(tmp_path, capsys):
    frame = good(400)
    frame.loc[100:129, "volume"] = 0.0
    frame.loc[350:379, "volume"] = 0.0
    path = write(frame, tmp_path / "A.csv")
    status, printed = run(capsys, path, "--window", 20, "--filter", "--validation-share", 0.25)
    assert status == 0
    assert "train: 232 windows; left out: 0 jump, 49 illiquid, 0 stagnant" in printed.out
    assert "100 windows\n" in printed.out  # validation is scored on all that happened
    assert "left out: 0 jump, 98 illiquid" in run(capsys, path, "--window", 20, "--filter")[1].out


def test_the_expected_bar_size(tmp_path, capsys):
    path = write(good(100), tmp_path / "A.csv")
    assert run(capsys, path, "--bar", "1h")[0] == 0
    status, printed = run(capsys, path, "--bar", "5min")
    assert status == 1
    assert "bar_size" in printed.out


def test_real_candles_have_no_fault(candles_csv, capsys):
    status, printed = run(capsys, candles_csv, "--window", 512, "--validation-share", 0.15, "--test-share", 0.15)
    assert status == 0, printed.out
    assert "2,500" in printed.out
    assert "5min" in printed.out
    assert "gaps inside sessions: 0, 0 bars missing" in printed.out
    assert "no faults: 104" in printed.out


@pytest.mark.parametrize(
    "arguments",
    [
        ["--window", "2"],
        ["--bar", "soon"],
        ["--bar", "300"],
        ["--window", "10", "--test-share", "0.2"],
        ["--window", "10", "--validation-share", "0.6", "--test-share", "0.6"],
        ["--window", "10", "--validation-share", "0.2", "--test-from", "2024-01-02"],
        ["--window", "10", "--stride", "0"],
        ["--window", "10", "--validation-from", "soon"],
        ["--window", "10", "--embargo-bars", "5"],
        ["--validation-share", "0.2"],
        ["--filter"],
    ],
)
def test_options_that_make_no_sense(tmp_path, capsys, arguments):
    path = write(good(60), tmp_path / "A.csv")
    status, printed = run(capsys, path, *arguments)
    assert status == 2
    assert printed.err.startswith("error: ")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--validation-share", "1.2"], "--validation-share 1.2: Input should be less than 1"),
        (["--validation-share", "0.2", "--embargo-bars", "-1"], "--embargo-bars -1: "),
        (["--validation-from", "soon"], "--validation-from soon: "),
        (["--validation-from", "2024"], "--validation-from 2024: must be a date or time such as 2024-07-01"),
        (["--validation-share", "0.6", "--test-share", "0.6"], "validation_share and test_share leave nothing"),
        (["--bar", "soon"], "--bar 'soon' must be a length of time"),
    ],
)
def test_an_option_at_fault_is_named(tmp_path, capsys, arguments, named):
    path = write(good(60), tmp_path / "A.csv")
    status, printed = run(capsys, path, "--window", 10, *arguments)
    assert status == 2
    assert printed.err.startswith(f"error: {named}")


def test_memory_and_totals(tmp_path):
    report = check([write(good(100), tmp_path / "A.csv"), write(good(50), tmp_path / "B.csv")], CheckOptions(window=10))
    totals = report.totals()
    assert (totals["rows"], totals["bars"], totals["symbols"]) == (150, 150, 2)
    assert totals["windows"] == {"all": 91 + 41}
    series = read_bars([tmp_path / "A.csv", tmp_path / "B.csv"])
    held = sum(array.nbytes for bars in series for array in (bars.times, bars.candles, bars.marks))
    assert totals["memory_bytes"] == held + 28 * 132
