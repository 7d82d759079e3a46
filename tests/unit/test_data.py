"""Windows: read with named errors, cut by calendar time, scaled with the past alone, each once an epoch."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.candles.bars import SymbolBars, bars_from_frame, frame_from_bars, read_bars
from cluster.candles.check import check
from cluster.candles.simulate import simulate
from cluster.data import (
    SplitBars,
    WindowSet,
    WindowStream,
    describe_splits,
    fixed_subset,
    load_splits,
    split_by_time,
)
from cluster.training.config_file import parse_config
from model.errors import InputError
from model.frames import normalise, time_marks


def candle_frame(rows=40, start="2024-01-01", seed=0):
    rng = np.random.default_rng(seed)
    close = 100 + np.cumsum(rng.normal(size=rows))
    opened = close + rng.normal(size=rows) * 0.1
    return pd.DataFrame(
        {
            "timestamps": pd.date_range(start, periods=rows, freq="h"),
            "open": opened,
            "high": np.maximum(opened, close) + 0.1,
            "low": np.minimum(opened, close) - 0.1,
            "close": close,
            "volume": rng.integers(1, 100, rows).astype(float),
        }
    )


def series_of(rows=100, symbols=3):
    return [
        SymbolBars(bars.symbol, bars.times, bars.candles, bars.marks)
        for i in range(symbols)
        for bars in bars_from_frame(candle_frame(rows, seed=i).assign(symbol=f"S{i}"))
    ]


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_long_format_round_trip(tmp_path, suffix):
    frame = pd.concat(
        [candle_frame(seed=1).assign(symbol="A"), candle_frame(seed=2).assign(symbol="B")], ignore_index=True
    )
    interleaved = frame.sort_values(["timestamps", "symbol"]).reset_index(drop=True)
    path = tmp_path / f"bars{suffix}"
    if suffix == ".csv":
        interleaved.to_csv(path, index=False)
    else:
        interleaved.to_parquet(path, index=False)
    first, second = read_bars(path)
    assert (first.symbol, second.symbol) == ("A", "B")
    np.testing.assert_allclose(second.candles[:, 3], candle_frame(seed=2)["close"], rtol=1e-6)
    np.testing.assert_array_equal(first.marks, time_marks(candle_frame()["timestamps"]))
    # No amount in the file: volume times the mean price.
    np.testing.assert_allclose(first.candles[:, 5], first.candles[:, 4] * first.candles[:, :4].mean(axis=1), rtol=1e-5)
    again = bars_from_frame(frame_from_bars([first, second]))
    assert [b.candles.tobytes() for b in again] == [first.candles.tobytes(), second.candles.tobytes()]


def test_folder_of_single_symbol_files(tmp_path):
    candle_frame(seed=1).to_csv(tmp_path / "AAA.csv", index=False)
    candle_frame(seed=2).to_parquet(tmp_path / "BBB.parquet", index=False)
    assert [bars.symbol for bars in read_bars(tmp_path)] == ["AAA", "BBB"]


def test_time_zone_gives_local_marks_and_utc_order(tmp_path):
    frame = candle_frame()
    frame["timestamps"] = frame["timestamps"].dt.tz_localize("Asia/Tokyo")
    (bars,) = bars_from_frame(frame)
    assert bars.marks[0, 1] == 0
    assert bars.times[0] == np.datetime64("2023-12-31T15:00")


def drop_column(name):
    return lambda frame: frame.drop(columns=name)


def put(row, column, value):
    def change(frame):
        frame = frame.copy()
        frame.loc[row, column] = value
        return frame

    return change


BAD_FRAMES = {
    "no close": (drop_column("close"), "missing_column", "close", None),
    "no times": (drop_column("timestamps"), "missing_column", "timestamps", None),
    "NaN": (put(45, "high", np.nan), "not_finite", "high", 45),
    "inf": (put(7, "volume", np.inf), "not_finite", "volume", 7),
    "zero": (put(4, "open", 0.0), "not_positive", "open", 4),
    "negative": (put(52, "close", -1.5), "not_positive", "close", 52),
    "zero in float32": (put(6, "low", 1e-50), "not_positive", "low", 6),
    "NaT": (put(3, "timestamps", pd.NaT), "not_a_time", "timestamps", 3),
    "unsorted": (put(50, "timestamps", pd.Timestamp("2020-01-01")), "unsorted_times", "timestamps", 50),
    "duplicate": (put(51, "timestamps", pd.Timestamp("2024-01-01 10:00")), "duplicate_times", "timestamps", 51),
    "no symbol": (put(9, "symbol", None), "missing_symbol", "symbol", 9),
    "empty": (lambda frame: frame.iloc[:0], "no_rows", None, None),
}


@pytest.mark.parametrize("name", BAD_FRAMES)
def test_bad_input_is_named(tmp_path, name):
    change, code, column, row = BAD_FRAMES[name]
    frame = pd.concat([candle_frame().assign(symbol="A"), candle_frame().assign(symbol="B")], ignore_index=True)
    path = tmp_path / "bad.csv"
    change(frame).to_csv(path, index=False)
    with pytest.raises(InputError) as caught:
        read_bars(path)
    assert (caught.value.code, caught.value.column, caught.value.row) == (code, column, row)
    assert "bad.csv" in str(caught.value)
    assert row is None or row < 40 or "symbol B" in str(caught.value) or code == "missing_symbol"
    if code == "not_positive":
        time = pd.Timestamp("2024-01-01") + pd.Timedelta(hours=row % 40)
        assert f"({time})" in str(caught.value)
        assert "correct it or drop the bar" in str(caught.value)
        assert row in [place for fault in check([path]).of_level("fault") if fault.code == code for place in fault.rows]


def test_a_volume_of_zero_is_no_fault():
    """Nor is the amount that is made of it."""
    (bars,) = bars_from_frame(candle_frame().assign(volume=0.0))
    assert not bars.candles[:, 4].any()


@pytest.mark.parametrize(
    ("make", "code"),
    [
        (lambda folder: folder / "absent.csv", "no_such_file"),
        (lambda folder: folder, "no_rows"),
        (lambda folder: write(folder / "bars.pkl", b"\x80"), "unknown_format"),
        (lambda folder: write(folder / "bars.parquet", b"not parquet"), "unreadable_file"),
        (lambda folder: write(folder / "bars.csv", b""), "unreadable_file"),
    ],
)
def test_unreadable_sources_are_named(tmp_path, make, code):
    with pytest.raises(InputError) as caught:
        read_bars(make(tmp_path))
    assert caught.value.code == code


def write(path, content):
    path.write_bytes(content)
    return path


def test_a_symbol_in_two_files_is_refused(tmp_path):
    for name in ("a.csv", "b.csv"):
        candle_frame().assign(symbol="X").to_csv(tmp_path / name, index=False)
    with pytest.raises(InputError, match=r"'X' is in another file"):
        read_bars(tmp_path)


def test_splits_cut_all_symbols_at_the_same_moment():
    early = bars_from_frame(candle_frame(80, "2024-01-01").assign(symbol="early"))
    late = bars_from_frame(candle_frame(80, "2024-01-02").assign(symbol="late"))
    cut, test = np.datetime64("2024-01-03"), np.datetime64("2024-01-04")
    splits = split_by_time([*early, *late], [cut, test])
    assert list(splits) == ["train", "validation", "test"]
    for split, begin, end in (("train", None, cut), ("validation", cut, test), ("test", test, None)):
        windows = WindowSet(splits[split], 10, min_context=4)
        last = [splits[split].series[o].times[s + 9] for o, s in zip(windows.owner, windows.start, strict=True)]
        assert begin is None or min(last) >= begin
        assert end is None or max(last) < end
    # Every bar from the tenth of its series on ends exactly one window of one split.
    total = sum(len(WindowSet(split, 10, min_context=4)) for split in splits.values())
    assert total == 2 * (80 - 9)


@pytest.mark.parametrize("boundaries", [[], ["2024-01-02", "2024-01-01"], ["2024-01-02", "2024-01-02"]])
def test_bad_boundaries_are_refused(boundaries):
    with pytest.raises(InputError, match="rising order"):
        split_by_time(series_of(), [np.datetime64(b) for b in boundaries])


def test_bars_after_a_split_never_reach_it():
    cut = np.datetime64("2024-01-03")
    plain = series_of()
    changed = [
        SymbolBars(b.symbol, b.times, np.where((b.times >= cut)[:, None], b.candles * 7, b.candles), b.marks)
        for b in plain
    ]
    batches = []
    for series in (plain, changed):
        windows = WindowSet(split_by_time(series, [cut])["train"], 16, min_context=4)
        everything = np.arange(len(windows))
        batches.append(windows.batch(everything, windows.contexts(0, 0)))
    assert batches[0].x.tobytes() == batches[1].x.tobytes()
    assert batches[0].marks.tobytes() == batches[1].marks.tobytes()


@settings(max_examples=30, deadline=None)
@given(context=st.integers(4, 15), seed=st.integers(0, 1000))
def test_statistics_come_from_the_context_only(context, seed):
    bars = simulate(seed, 1, 16)[0]
    future = bars.candles.copy()
    future[context:] *= 3
    other = SymbolBars(bars.symbol, bars.times, future, bars.marks)
    first, second = (
        WindowSet(SplitBars("train", [b]), 16, min_context=4).batch(np.array([0]), np.array([context]))
        for b in (bars, other)
    )
    assert first.x[0, :context].tobytes() == second.x[0, :context].tobytes()
    expected, _, _ = normalise(bars.candles[:context], 5.0)
    np.testing.assert_array_equal(first.x[0, :context], expected)
    assert np.abs(second.x).max() <= 5
    assert first.scored[0].tolist() == [i >= context for i in range(16)]


def test_bars_of_an_earlier_split_are_context_and_never_scored():
    cut = np.datetime64("2024-01-03")  # row 48
    windows = WindowSet(split_by_time(series_of(symbols=1), [cut])["validation"], 20, min_context=4)
    assert windows.start[0] == 48 - 19
    batch = windows.batch(np.array([0, 10]), np.array([4, 4]))
    assert batch.scored[0].tolist() == [False] * 19 + [True]
    assert batch.scored[1].sum() == 11
    inside = WindowSet(split_by_time(series_of(symbols=1), [cut])["validation"], 20, min_context=4, reach_back=False)
    assert inside.start[0] == 48


def test_windows_that_do_not_fit_are_refused():
    with pytest.raises(InputError, match="longest series has 100") as caught:
        WindowSet(SplitBars("train", series_of()), 101)
    assert caught.value.code == "too_short"
    cut = split_by_time(series_of(), [np.datetime64("2024-01-03")], embargo_bars=60)  # row 48 of 100
    with pytest.raises(InputError, match="longest series has 100, of which 0 may be scored after the embargo of 60;"):
        WindowSet(cut["validation"], 20, min_context=4)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("batch_size", [4, 7])
def test_every_window_once_an_epoch_for_any_number_of_workers(world_size, batch_size):
    windows = WindowSet(SplitBars("train", series_of()), 20, stride=2, min_context=4)
    stream = WindowStream(windows, seed=5, batch_size=batch_size)
    steps = -(-2 * len(windows) // batch_size)
    places = [place for step in range(steps) for place in stream.ids(step)][: 2 * len(windows)]
    assert sorted(places) == [(epoch, place) for epoch in (0, 1) for place in range(len(windows))]
    for step in (0, 3, steps - 1):
        whole = WindowStream(windows, 5, batch_size).batch(step)
        shares = [WindowStream(windows, 5, batch_size).batch(step, rank, world_size) for rank in range(world_size)]
        for rank, share in enumerate(shares):
            assert share.x.tobytes() == np.ascontiguousarray(whole.x[rank::world_size]).tobytes()
            assert share.context.tolist() == whole.context[rank::world_size].tolist()


def test_an_epoch_holds_each_window_and_the_next_one_is_shuffled_anew():
    windows = WindowSet(SplitBars("train", series_of(symbols=1)), 20, min_context=4)
    stream = WindowStream(windows, seed=5, batch_size=len(windows))
    first, second = stream.batch(0), stream.batch(1)
    whole = windows.batch(np.arange(len(windows)), np.full(len(windows), 19))
    for batch in (first, second):
        assert sorted(map(bytes, batch.marks)) == sorted(map(bytes, whole.marks))
    assert first.marks.tobytes() != second.marks.tobytes()
    assert (first.context != second.context).any()
    assert WindowStream(windows, 5, len(windows)).batch(0).x.tobytes() == first.x.tobytes()
    assert WindowStream(windows, 6, len(windows)).batch(0).x.tobytes() != first.x.tobytes()


def test_context_lengths_stay_in_range():
    windows = WindowSet(SplitBars("train", series_of()), 20, min_context=5)
    lengths = np.concatenate([windows.contexts(1, epoch) for epoch in range(20)])
    assert set(lengths) == set(range(5, 20))


def test_validation_windows_are_fixed_and_distinct():
    windows = WindowSet(SplitBars("validation", series_of()), 20, min_context=4)
    batches = fixed_subset(windows, 50, seed=1, batch_size=8)
    assert [len(ids) for ids, _ in batches] == [8] * 6 + [2]
    assert len(set(np.concatenate([ids for ids, _ in batches]))) == 50
    again = fixed_subset(windows, 50, seed=1, batch_size=8)
    assert all((a[0] == b[0]).all() and (a[1] == b[1]).all() for a, b in zip(batches, again, strict=True))


def test_sources_of_the_configuration(tmp_path):
    path = tmp_path / "bars.csv"
    candle_frame(100).to_csv(path, index=False)
    stage = {"phases": [{"steps": 101, "window": 16, "batch_size": 2}]}

    def splits(source):
        config = parse_config({"run": {"name": "x", "output": "out"}, "data": {"source": source}, "tokenizer": stage})
        return load_splits(config.data)

    file = splits({"kind": "file", "path": str(path), "validation_from": "2024-01-03", "test_from": "2024-01-04"})
    assert {name: len(split.series[0]) for name, split in file.items()} == {"train": 48, "validation": 72, "test": 100}
    simulated = splits(
        {"kind": "simulated", "seed": 1, "series": 3, "bars": 20, "validation_seed": 2, "validation_series": 2}
    )
    assert {name: len(split.series) for name, split in simulated.items()} == {"train": 3, "validation": 2}
    assert not np.array_equal(simulated["train"].series[0].candles, simulated["validation"].series[0].candles)


def parse_data(**data):
    """A data section, checked as part of a whole configuration."""
    stage = {"phases": [{"steps": 101, "window": 16, "batch_size": 2}]}
    return parse_config({"run": {"name": "x", "output": "out"}, "data": data, "tokenizer": stage}).data


def file_source(path, **options):
    return {"kind": "file", "path": path if isinstance(path, list) else str(path)} | options


def test_shares_of_the_calendar(tmp_path):
    """The first 70 % train, the last 15 % test, at the same moments for a symbol that begins later."""
    candle_frame(1000).to_csv(tmp_path / "old.csv", index=False)
    candle_frame(1000)[900:].to_csv(tmp_path / "young.csv", index=False)
    data = parse_data(source=file_source(tmp_path, validation_share=0.15, test_share=0.15))
    splits = load_splits(data)
    assert {name: [len(b) for b in split.series] for name, split in splits.items()} == {
        "train": [700, 0],
        "validation": [850, 0],
        "test": [1000, 100],
    }
    start = np.datetime64("2024-01-01")
    assert splits["test"].begins == splits["validation"].ends == start + np.timedelta64(850, "h")
    assert describe_splits(data) == {
        "validation_from": str(splits["validation"].begins.astype("datetime64[s]")),
        "test_from": str(splits["test"].begins.astype("datetime64[s]")),
    }
    assert list(load_splits(parse_data(source=file_source(tmp_path, validation_share=0.2)))) == ["train", "validation"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"give validation_from .* or validation_share"),
        ({"test_share": 0.1}, r"give validation_from .* or validation_share"),
        ({"validation_share": 0.6, "test_share": 0.5}, "nothing to train on"),
        ({"validation_share": 0.2, "test_from": "2024-01-02"}, "not a mixture"),
        ({"validation_share": 1.5}, r"data\.source\.validation_share: .* less than 1"),
        ({"validation_from": "2024-01-02", "embargo_bars": -1}, r"data\.source\.embargo_bars"),
        ({"validation_from": "2024-01-02", "embargo": 1}, "the nearest known one is 'embargo_bars'"),
    ],
)
def test_splits_that_make_no_sense_are_refused(tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        parse_data(source=file_source(tmp_path, **options))


def test_shares_that_leave_a_split_empty_are_refused(tmp_path):
    candle_frame(5).to_csv(tmp_path / "bars.csv", index=False)
    with pytest.raises(InputError, match="5 bar times cannot be split into shares"):
        load_splits(parse_data(source=file_source(tmp_path, validation_share=0.05)))


def test_a_boundary_with_a_time_zone_is_read_in_utc(tmp_path):
    frame = candle_frame(100)
    frame["timestamps"] = frame["timestamps"].dt.tz_localize("UTC")
    frame.to_parquet(tmp_path / "bars.parquet")
    data = parse_data(source=file_source(tmp_path, validation_from="2024-01-03T09:00:00+09:00"))
    assert len(load_splits(data)["train"].series[0]) == 48


@pytest.mark.parametrize("embargo", [0, 5])
def test_embargoed_bars_are_scored_by_nobody(embargo):
    cut, test = np.datetime64("2024-01-03"), np.datetime64("2024-01-04")  # rows 48 and 72
    splits = split_by_time(series_of(symbols=1), [cut, test], embargo_bars=embargo)
    scored = {}
    for name, split in splits.items():
        windows = WindowSet(split, 12, min_context=4)
        batch = windows.batch(np.arange(len(windows)), np.full(len(windows), 4))
        rows = windows.start[:, None] + np.arange(12)
        scored[name] = set(rows[batch.scored].tolist())
        own = {"train": (0, 48), "validation": (48 + embargo, 72), "test": (72 + embargo, 100)}[name]
        last = windows.start + 11
        assert last.min() >= max(own[0], 11)
        assert last.max() < own[1]
    assert scored["train"] == set(range(4, 48))
    assert scored["validation"] == set(range(48 + embargo, 72))
    assert scored["test"] == set(range(72 + embargo, 100))


def test_purged_windows_lie_in_one_split():
    cut = np.datetime64("2024-01-03")
    [symbol] = series_of(symbols=1)
    purged = WindowSet(
        split_by_time([symbol], [cut], embargo_bars=3, reach_back=False)["validation"], 12, min_context=4
    )
    assert purged.start.min() == 48 + 3


def test_only_training_is_filtered_and_all_splits_mind_gaps(tmp_path):
    frame = candle_frame(300)
    frame.loc[100:129, "volume"] = 0.0
    frame.loc[200:229, "volume"] = 0.0
    frame.drop(index=range(250, 255)).to_csv(tmp_path / "bars.csv", index=False)
    source = file_source(tmp_path / "bars.csv", validation_from="2024-01-07")  # row 144
    plain, ruled = (load_splits(parse_data(source=source, **more)) for more in ({}, {"filter": {}, "max_gap_bars": 2}))
    count = {
        name: [len(WindowSet(splits[name], 10, min_context=4)) for splits in (plain, ruled)]
        for name in ("train", "validation")
    }
    assert count["train"] == [135, 135 - 39]
    assert count["validation"] == [151, 151 - 9]


@pytest.mark.verify("V8")
def test_v8_every_window_once_an_epoch_for_any_workers_and_any_change_of_them(figure):
    """Counted are the windows that workers get, told by their bars' times, not the numbers that the stream gives."""
    series = [
        b for i in range(4) for b in bars_from_frame(candle_frame(60, f"2024-0{i + 1}-01").assign(symbol=f"S{i}"))
    ]
    windows = WindowSet(SplitBars("train", series), 16, min_context=4)
    n, epochs, batch_size = len(windows), 3, 8
    assert n % batch_size != 0  # batches straddle epochs
    whole = windows.batch(np.arange(n), np.full(n, 15))
    number_of = {marks.tobytes(): i for i, marks in enumerate(whole.marks)}
    assert len(number_of) == n
    steps = n * epochs // batch_size
    orders = {}
    plans = {"1": [1], "2": [2], "4": [4], "elastic 1 → 4 → 2 → 3": [1, 4, 2, 3]}
    for label, plan in plans.items():
        seen = []
        for step in range(steps):
            # A new worker joins: nobody keeps anything from before.
            world = plan[step * len(plan) // steps]
            batches = [WindowStream(windows, 5, batch_size).batch(step, rank, world) for rank in range(world)]
            shares = [[number_of[marks.tobytes()] for marks in batch.marks] for batch in batches]
            seen += [shares[place % world][place // world] for place in range(batch_size)]
        orders[label] = seen
        for epoch in range(epochs - 1):
            assert sorted(seen[epoch * n : (epoch + 1) * n]) == list(range(n)), (label, epoch)
    assert all(order == orders["1"] for order in orders.values())
    repeated = max(n - len(set(order[e * n : (e + 1) * n])) for order in orders.values() for e in range(epochs - 1))
    figure(
        f"{n} windows × {epochs - 1} epochs, workers {', '.join(plans)}: {repeated} missing or repeated, "
        f"{len({tuple(o) for o in orders.values()})} global order",
        "0 missing or repeated, 1 order",
    )


@pytest.mark.verify("V9")
def test_v9_nothing_after_a_split_reaches_training_and_no_horizon_its_statistics(tmp_path, figure):
    """Every bar after the boundary changes, in the file; then every bar after a context does."""
    frame = pd.concat([candle_frame(300, seed=i).assign(symbol=f"S{i}") for i in range(3)], ignore_index=True)
    cut = pd.Timestamp("2024-01-09")
    changed = frame.copy()
    later = changed["timestamps"] >= cut
    rng = np.random.default_rng(1)
    changed.loc[later, ["open", "high", "low", "close", "volume"]] = rng.uniform(1, 900, (int(later.sum()), 5))
    batches, splits = [], []
    for number, one in enumerate((frame, changed)):
        one.to_csv(tmp_path / f"{number}.csv", index=False)
        data = parse_data(
            source=file_source(tmp_path / f"{number}.csv", validation_from=str(cut)),
            filter={"jump": 0.5},
            max_gap_bars=3,
        )
        splits.append(load_splits(data))
        windows = WindowSet(splits[-1]["train"], 24, min_context=6)
        stream = WindowStream(windows, seed=3, batch_size=16)
        batches.append([stream.batch(step) for step in range(2 * len(windows) // 16)])
    fields = ("x", "marks", "context", "scored")
    differing = sum(
        getattr(a, name).tobytes() != getattr(b, name).tobytes()
        for a, b in zip(*batches, strict=True)
        for name in fields
    )
    assert differing == 0
    # The change is real: validation, which lies after the boundary, sees it.
    first, second = (WindowSet(s["validation"], 24, min_context=6) for s in splits)
    every = np.arange(len(first))
    assert (
        first.batch(every, np.full(len(every), 6)).x.tobytes()
        != second.batch(every, np.full(len(every), 6)).x.tobytes()
    )

    other = 0
    for context in range(6, 24):
        [bars] = series_of(24, symbols=1)
        future = bars.candles.copy()
        future[context:] = rng.uniform(1, 900, future[context:].shape)
        x = [
            WindowSet(SplitBars("train", [SymbolBars("S", bars.times, candles, bars.marks)]), 24, min_context=6)
            .batch(np.array([0]), np.array([context]))
            .x[0, :context]
            for candles in (bars.candles, future)
        ]
        other += x[0].tobytes() != x[1].tobytes()
    assert other == 0
    figure(
        f"{len(batches[0])} train batches with all {int(later.sum())} later bars changed: {differing} arrays differ; "
        f"18 horizons changed: {other} contexts differ",
        "0 and 0, byte for byte",
    )
