"""Where series come from: many paths, patterns, Qlib's binary layout, a cache that workers share."""

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet
import pytest

from cluster.batching.files import Layout, scan
from cluster.batching.plan import Unit
from cluster.batching.symbols import HistoryRules, load_unit
from cluster.candles.bars import find_files, read_bars
from cluster.candles.check import check
from cluster.candles.data_config import FileSource, QlibSource, SimulatedSource
from cluster.candles.qlib import read_qlib
from cluster.candles.sources import describe_source, read_source
from cluster.data import load_splits
from cluster.evaluation.trading_data import read_prices
from cluster.training.config_file import parse_config
from model.errors import InputError
from model.types import COLUMNS


def frame(bars=30, start="2024-01-01", seed=0, **columns):
    close = 100 + np.cumsum(np.random.default_rng(seed).normal(size=bars))
    made = {"timestamps": pd.date_range(start, periods=bars, freq="h"), "open": close, "high": close + 1}
    return pd.DataFrame({**made, "low": close - 1, "close": close, "volume": 1.0, **columns})


@pytest.fixture
def folder(tmp_path):
    for name in ("AAA", "BBB"):
        frame().to_csv(tmp_path / f"{name}.csv", index=False)
    (tmp_path / "deep").mkdir()
    frame().to_parquet(tmp_path / "deep" / "CCC.parquet")
    (tmp_path / "notes.txt").write_text("no bars")
    return tmp_path


@pytest.mark.parametrize(
    ("paths", "found"),
    [
        (["AAA.csv"], ["AAA"]),
        (["."], ["AAA", "BBB"]),
        (["*.csv"], ["AAA", "BBB"]),
        (["B*"], ["BBB"]),
        (["**/*.parquet"], ["CCC"]),
        (["deep", "BBB.csv", "*.csv"], ["CCC", "BBB", "AAA"]),
    ],
)
def test_files_folders_patterns_and_lists(folder, paths, found):
    given = [folder / path for path in paths]
    assert [file.stem for file in find_files(given)] == found
    assert [bars.symbol for bars in read_bars(given)] == found
    config = {
        "run": {"name": "x", "output": "out"},
        "data": {"source": {"kind": "file", "path": [str(p) for p in given], "validation_share": 0.3}},
        "tokenizer": {"phases": [{"steps": 101, "window": 16, "batch_size": 2}]},
    }
    assert [b.symbol for b in load_splits(parse_config(config).data)["train"].series] == found


@pytest.mark.parametrize(
    ("path", "code"), [("*.pq", "no_rows"), ("nothing", "no_such_file"), ("notes.txt/x", "no_such_file")]
)
def test_paths_that_find_nothing_are_named(folder, path, code):
    with pytest.raises(InputError, match=path.replace("*", r"\*")) as caught:
        find_files([folder / "AAA.csv", folder / path])
    assert caught.value.code == code


def test_symbols_keep_their_leading_zeros(tmp_path):
    frame(symbol="000001").to_csv(tmp_path / "bars.csv", index=False)
    assert [bars.symbol for bars in read_bars(tmp_path / "bars.csv")] == ["000001"]


def test_symbols_that_pandas_takes_for_nothing_are_names(tmp_path):
    names = ["NA", "NULL", "None", "nan", "000001"]
    pd.concat([frame(symbol=name) for name in names]).to_csv(tmp_path / "x.csv", index=False)
    assert [bars.symbol for bars in read_bars(tmp_path / "x.csv")] == names
    spoiled = frame(symbol="NA").astype({"symbol": object})
    spoiled.loc[3, "symbol"] = ""
    spoiled.to_csv(tmp_path / "x.csv", index=False)
    with pytest.raises(InputError, match="row 3 is missing") as caught:
        read_bars(tmp_path / "x.csv")
    assert caught.value.code == "missing_symbol"


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
@pytest.mark.parametrize("names", [{"volume": "Volume"}, str.title, str.upper])
def test_names_of_columns_may_be_in_any_case(tmp_path, suffix, names):
    """Also beside lower-case prices; symbols keep their zeros, and NA is a name."""
    plain = pd.concat([frame(symbol="000001"), frame(symbol="NA", seed=1)], ignore_index=True)
    for name, table in (("plain", plain), ("other", plain.rename(columns=names))):
        path = tmp_path / f"{name}.{suffix}"
        table.to_csv(path, index=False) if suffix == "csv" else table.to_parquet(path)
    expected, found = (read_bars(tmp_path / f"{name}.{suffix}") for name in ("plain", "other"))
    assert [bars.symbol for bars in found] == ["000001", "NA"]
    for one, other in zip(expected, found, strict=True):
        assert one.candles[:, 4].all()
        for part in ("times", "candles", "marks"):
            np.testing.assert_array_equal(getattr(one, part), getattr(other, part))


def write_symbols(path, symbols, kind):
    """frame(2) of each symbol, which are bytes of this pyarrow type."""
    table = pa.Table.from_pandas(pd.concat([frame(2) for _ in symbols]), preserve_index=False)
    values = pa.array([symbol for symbol in symbols for _ in range(2)])
    values = values.dictionary_encode() if kind is None else values.cast(kind)
    pyarrow.parquet.write_table(table.append_column("Symbol", values), path)
    return path


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary(), pa.binary(3), None])
def test_symbols_that_are_bytes_are_the_text_that_they_spell(tmp_path, kind):
    """b'000' was the name of a symbol."""
    path = write_symbols(tmp_path / "x.parquet", ["Öl".encode(), b"000"], kind)
    assert [bars.symbol for bars in read_bars(path)] == ["Öl", "000"]
    assert [own.symbol for own in check([path]).symbols] == ["Öl", "000"]
    prices = read_prices([path])
    assert [(own.symbol, len(own.opens)) for own in prices] == [("Öl", 2), ("000", 2)]
    [source] = scan([path], Layout())
    assert source.symbols == ("Öl", "000")


def test_symbols_that_are_bytes_of_something_else_are_refused(tmp_path):
    path = write_symbols(tmp_path / "x.parquet", [b"A", b"\xff\xfe"], pa.binary())
    told = f"{path}: column 'Symbol' holds bytes that are not UTF-8: write each symbol as text"
    with pytest.raises(InputError) as caught:
        read_bars(path)
    frame(40).to_csv(tmp_path / "fine.csv", index=False)
    _, source = scan([tmp_path / "fine.csv", path], Layout())
    unit = Unit(("x",), ((source.path, source.layout),))
    [fault] = check([path]).of_level("fault")
    in_batch = load_unit(unit, Layout(), HistoryRules(4))["x"]
    for error in (caught.value, source.fault, in_batch):
        assert (str(error), error.code, error.column) == (told, "not_a_symbol", "Symbol")
    assert (fault.message, fault.code) == (told, "not_a_symbol")


@pytest.mark.parametrize("column", ["timestamps", "symbol", "volume"])
def test_two_columns_that_differ_in_case_are_refused(tmp_path, column):
    table = frame(symbol="A")
    table[column.upper()] = table[column]
    table.to_csv(tmp_path / "x.csv", index=False)
    table.to_parquet(tmp_path / "x.parquet")
    for name in ("x.csv", "x.parquet"):
        with pytest.raises(InputError, match=rf"{name}: column '{column}' is there twice \('{column}' and") as caught:
            read_bars(tmp_path / name)
        assert (caught.value.code, caught.value.column) == ("duplicate_column", column)


@pytest.mark.parametrize("index", [["timestamps"], ["symbol", "timestamps"]])
def test_columns_that_pandas_wrote_as_its_index_are_columns(tmp_path, index):
    frame(symbol="A").set_index(index).to_parquet(tmp_path / "x.parquet")
    frame(symbol="A").to_parquet(tmp_path / "plain.parquet")
    found, plain = (read_bars(tmp_path / name)[0] for name in ("x.parquet", "plain.parquet"))
    assert found.symbol == plain.symbol == "A"
    for part in ("times", "candles", "marks"):
        np.testing.assert_array_equal(getattr(found, part), getattr(plain, part))


@pytest.mark.parametrize("column", ["timestamps", "symbol", "close"])
def test_a_csv_with_a_column_twice_is_refused(tmp_path, column):
    rows = frame(symbol="A").to_csv(index=False).splitlines()
    (tmp_path / "x.csv").write_text("\n".join([f"{rows[0]},{column}", *(f"{row},7" for row in rows[1:])]))
    with pytest.raises(InputError, match=f"'{column}' is there twice") as caught:
        read_bars(tmp_path / "x.csv")
    assert (caught.value.code, caught.value.column) == ("duplicate_column", column)


def test_the_key_that_names_the_time_column_is_one(tmp_path):
    """What the error of a missing time column says to set is set."""
    frame().rename(columns={"timestamps": "when"}).to_csv(tmp_path / "x.csv", index=False)
    config = {
        "run": {"name": "x", "output": "out"},
        "data": {"source": {"kind": "file", "path": str(tmp_path / "x.csv"), "validation_share": 0.3}},
        "tokenizer": {"phases": [{"steps": 101, "window": 16, "batch_size": 2}]},
    }
    with pytest.raises(InputError, match=r"--time-column; .* data\.source\.time_column\)"):
        load_splits(parse_config(config).data)
    config["data"]["source"]["time_column"] = "when"
    assert len(load_splits(parse_config(config).data)["train"].series[0]) == 21


def test_times_with_and_without_a_zone_do_not_mix(tmp_path):
    frame().to_parquet(tmp_path / "naive.parquet")
    aware = frame()
    aware["timestamps"] = aware["timestamps"].dt.tz_localize("Asia/Tokyo")
    aware.to_parquet(tmp_path / "aware.parquet")
    assert read_bars(tmp_path / "aware.parquet")[0].zone == "Asia/Tokyo"
    with pytest.raises(InputError, match=r"'aware' have a time zone and those of 'naive' have none") as caught:
        read_bars(tmp_path)
    assert caught.value.code == "mixed_time_zones"


def file_source(path, **options):
    return FileSource(kind="file", path=path, validation_share=0.2, **options)


def test_a_cache_gives_the_same_series_and_notices_a_change(folder, tmp_path):
    cached = file_source(folder, cache=tmp_path / "cache")
    plain = read_source(file_source(folder))
    for _ in range(2):  # made, then found
        series = read_source(cached)
        assert [b.symbol for b in series] == ["AAA", "BBB"]
        for a, b in zip(series, plain, strict=True):
            assert isinstance(a.candles, np.memmap)
            assert a.candles.tobytes() == b.candles.tobytes()
            assert (a.times == b.times).all()
            assert (a.marks == b.marks).all()
    assert len(list((tmp_path / "cache").iterdir())) == 1
    frame(seed=9).to_csv(folder / "AAA.csv", index=False)
    assert read_source(cached)[0].candles.tobytes() != plain[0].candles.tobytes()
    for damaged in (tmp_path / "cache").glob("*/candles.npy"):
        damaged.write_bytes(b"half a file")
    with pytest.raises(InputError, match="is damaged"):
        read_source(cached)


def test_a_cache_that_was_read_by_other_rules_is_not_taken(folder, tmp_path, monkeypatch):
    """Else bars whose Volume an older version did not see would stay without one."""
    cached = file_source(folder, cache=tmp_path / "cache")
    monkeypatch.setattr("cluster.candles.sources.CACHE_RULES", 1)
    read_source(cached)
    monkeypatch.undo()
    read_source(cached)
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_the_hash_of_the_data_is_of_names_and_contents(folder):
    before = describe_source(file_source(folder))
    assert [entry["name"] for entry in before["files"]] == ["AAA.csv", "BBB.csv"]
    assert describe_source(file_source([folder / "AAA.csv", folder / "BBB.csv"])) == before
    frame(seed=9).to_csv(folder / "AAA.csv", index=False)
    assert describe_source(file_source(folder))["sha256"] != before["sha256"]
    one, two = (describe_source(SimulatedSource(kind="simulated", seed=seed, validation_seed=9)) for seed in (1, 2))
    assert one["sha256"] != two["sha256"]


# --- Qlib ---------------------------------------------------------------------------------------------------------


def write_qlib(root, symbols, freq="day", calendar=None, spans=None):
    """The layout as Qlib's dump_bin writes it. symbols: name → (start position, {field: values})."""
    calendar = pd.bdate_range("2024-01-01", periods=40) if calendar is None else calendar
    for part in ("calendars", "instruments"):
        (root / part).mkdir(parents=True)
    shown = "%Y-%m-%d" if freq == "day" else "%Y-%m-%d %H:%M:%S"
    (root / "calendars" / f"{freq}.txt").write_text("\n".join(calendar.strftime(shown)) + "\n")
    lines = []
    for name, (start, fields) in symbols.items():
        place = root / "features" / name.lower()
        place.mkdir(parents=True)
        length = len(next(iter(fields.values())))
        for field, values in fields.items():
            np.concatenate([[start], values]).astype("<f4").tofile(place / f"{field}.{freq}.bin")
        default = [(f"{calendar[start]:%Y-%m-%d}", f"{calendar[start + length - 1]:%Y-%m-%d}")]
        lines += [f"{name}\t{first}\t{last}" for first, last in (spans or {}).get(name, default)]
    (root / "instruments" / "all.txt").write_text("\n".join(lines) + "\n")
    return calendar


def qlib_fields(bars, seed=0, **more):
    made = frame(bars, seed=seed)
    return {name: made[name].to_numpy(np.float32) for name in ("open", "high", "low", "close", "volume")} | more


def test_a_qlib_folder(tmp_path):
    suspended = qlib_fields(20, seed=2)
    for name in suspended:
        suspended[name] = np.where(np.isin(np.arange(20), [4, 5]), np.nan, suspended[name])
    symbols = {"SH600000": (0, qlib_fields(40, seed=1)), "SZ000001": (10, suspended)}
    calendar = write_qlib(tmp_path, symbols)
    whole, partial = read_qlib(tmp_path)
    assert (whole.symbol, partial.symbol) == ("SH600000", "SZ000001")
    assert (whole.times == calendar.to_numpy()).all()
    for place, name in enumerate(COLUMNS[:5]):
        assert whole.candles[:, place].tobytes() == symbols["SH600000"][1][name].tobytes()
    np.testing.assert_allclose(whole.candles[:, 5], whole.candles[:, 4] * whole.candles[:, :4].mean(axis=1), rtol=1e-6)
    assert (partial.times == calendar[10:30].delete([4, 5]).to_numpy()).all()


def test_qlib_spans_markets_and_minutes(tmp_path):
    minutes = pd.date_range("2024-01-02 09:31", periods=240, freq="min").append(
        pd.date_range("2024-01-03 09:31", periods=240, freq="min")
    )
    spans = {"A": [("2024-01-02", "2024-01-02")], "B": [("2024-01-02", "2024-01-02"), ("2024-01-03", "2024-01-03")]}
    amount = np.full(480, 7.0)
    symbols = {"A": (0, qlib_fields(480)), "B": (0, qlib_fields(480, amount=amount))}
    write_qlib(tmp_path, symbols, freq="1min", calendar=minutes, spans=spans)
    (tmp_path / "instruments" / "half.txt").write_text("B\t2024-01-03\t2024-01-03\n")
    assert [len(bars) for bars in read_qlib(tmp_path, freq="1min")] == [240, 480]
    [half] = read_qlib(tmp_path, freq="1min", market="half")
    assert len(half) == 240
    assert (half.candles[:, 5] == 7).all()
    source = QlibSource(kind="qlib", path=tmp_path, freq="1min", validation_share=0.5)
    assert [len(bars) for bars in read_source(source)] == [240, 480]
    assert len(describe_source(source)["files"]) == 2 + 11


def test_a_qlib_source_in_a_configuration(tmp_path):
    write_qlib(tmp_path, {"A": (0, qlib_fields(40))})
    raw = {
        "run": {"name": "x", "output": "out"},
        "data": {"source": {"kind": "qlib", "path": str(tmp_path), "validation_from": "2024-02-01"}},
        "tokenizer": {"phases": [{"steps": 101, "window": 16, "batch_size": 2}]},
    }
    splits = load_splits(parse_config(raw).data)
    assert [len(split.series[0]) for split in splits.values()] == [23, 40]
    raw["data"]["source"]["markt"] = "all"
    with pytest.raises(InputError, match=r"data\.source\.markt is not a key; the nearest known one is 'market'"):
        parse_config(raw)


@pytest.mark.parametrize(
    ("spoil", "message", "code"),
    [
        (lambda root: (root / "calendars/day.txt").unlink(), "set data.source.freq", "no_such_file"),
        (lambda root: (root / "instruments/all.txt").rename(root / "instruments/x.txt"), "there is x", "no_such_file"),
        (lambda root: (root / "instruments/all.txt").write_text("A 2024\n"), "line 1", "unreadable_file"),
        (lambda root: (root / "features/a/close.day.bin").unlink(), "the field close", "missing_column"),
        (lambda root: (root / "features/a/low.day.bin").write_bytes(b""), "do not fit", "unreadable_file"),
        (lambda root: np.full(9, 39, "<f4").tofile(root / "features/a/low.day.bin"), "do not fit", "unreadable_file"),
        (lambda root: (root / "instruments/all.txt").write_text("A\t1999-01-01\t1999-02-01\n"), "has a bar", "no_rows"),
    ],
)
def test_a_qlib_folder_that_is_not_one(tmp_path, spoil, message, code):
    write_qlib(tmp_path, {"A": (0, qlib_fields(40))})
    spoil(tmp_path)
    with pytest.raises(InputError, match=message) as caught:
        read_qlib(tmp_path)
    assert caught.value.code == code
