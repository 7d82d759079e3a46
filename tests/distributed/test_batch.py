"""Batch forecasts on a real Ray cluster of two CPUs: every symbol's numbers are its own, whatever happens around it."""

import dataclasses
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import pytest
import ray

from cluster.batch import main, run_batch
from cluster.batching.config import parse_arguments
from cluster.batching.forecaster import symbol_seed
from model.predictor import KronosPredictor
from model.registry import load_checkpoint, named_source
from model.types import COLUMNS

ROOT = Path(__file__).parents[2]
LENGTHS = {"AAA": 30, "BBB": 64, "CCC": 100, "DDD": 45, "EEE": 64, "FFF": 70, "GGG": 33, "H.H": 90}
HORIZON, SAMPLES, CONTEXT = 6, 5, 64
"""With a context of 64 bars the windows of the longer histories slide."""


@pytest.fixture(scope="module")
def cluster():
    ray.init(address="local", num_cpus=2, include_dashboard=False, _node_ip_address="127.0.0.1", log_to_driver=False)
    yield ray.get_runtime_context().gcs_address
    ray.shutdown()


@pytest.fixture(scope="module")
def model(golden):
    return str(golden)


def candles(symbol, count):
    rng = np.random.default_rng(symbol_seed(0, symbol))
    close = 100 * np.exp(rng.normal(0, 0.01, count).cumsum())
    opened = np.concatenate(([100.0], close[:-1]))
    top, bottom = np.maximum(opened, close) * 1.001, np.minimum(opened, close) * 0.999
    volume = rng.lognormal(5, 1, count)
    values = (opened, top, bottom, close, volume, volume * close)
    times = pd.date_range("2024-01-01", periods=count, freq="5min")
    return pd.DataFrame({"timestamps": times, "symbol": symbol} | dict(zip(COLUMNS, values, strict=True)))


def long_table(**others):
    frames = [candles(symbol, count) for symbol, count in LENGTHS.items()]
    frames += [frame.assign(symbol=symbol) for symbol, frame in others.items()]
    # Symbols interleave, as they do in a file that grows day by day.
    return pd.concat(frames).sort_values("timestamps", kind="stable", ignore_index=True)


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    path = tmp_path_factory.mktemp("bars") / "bars.parquet"
    long_table().to_parquet(path)
    return path


def arguments(source, output, model, **options):
    given = {"horizon": HORIZON, "samples": SAMPLES, "max_context": CONTEXT, "device": "cpu"} | options
    flags = [text for name, value in given.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    return ["--input", str(source), "--output", str(output), "--model", model, "--paths", *flags]


def forecast(source, output, model, **options):
    """Exit code, and the output in a fixed order."""
    code = main(arguments(source, output, model, **options))
    return code, pd.read_parquet(output).sort_values(["symbol", "step"], ignore_index=True)


def same(left, right):
    """Digit for digit, paths included."""
    for name in (f"{column}_paths" for column in COLUMNS):
        np.testing.assert_array_equal(np.stack(left[name].to_numpy()), np.stack(right[name].to_numpy()))
        left, right = left.drop(columns=name), right.drop(columns=name)
    pd.testing.assert_frame_equal(left, right, check_exact=True)


@pytest.fixture(scope="module")
def undisturbed(cluster, table, model, tmp_path_factory):
    """All symbols in one unit, one actor."""
    code, found = forecast(table, tmp_path_factory.mktemp("undisturbed") / "out", model, actors=1, symbols_per_part=100)
    assert code == 0
    return found


def test_the_numbers_are_the_predictors(undisturbed, table, model):
    """Bit for bit: a symbol's forecast is what KronosPredictor gives for the seed that its rows name."""
    assert len(undisturbed) == len(LENGTHS) * HORIZON
    checkpoint = load_checkpoint(named_source(model))
    predictor = KronosPredictor(checkpoint.model, checkpoint.tokenizer, "cpu", CONTEXT, throughput=True)
    bars = pd.read_parquet(table)
    for symbol, rows in undisturbed.groupby("symbol"):
        history = bars[bars["symbol"] == symbol]
        seed = int(rows["seed"].iloc[0])
        future = pd.DatetimeIndex(rows["timestamp"])
        assert future[0] == history["timestamps"].iloc[-1] + pd.Timedelta("5min")
        alone = predictor.forecast(
            history[list(COLUMNS)], history["timestamps"], future, sample_count=SAMPLES, seed=seed
        )
        for name in COLUMNS:
            np.testing.assert_array_equal(rows[f"{name}_mean"], alone.mean[name])
            np.testing.assert_array_equal(rows[f"{name}_q0.9"], alone.quantiles[0.9][name])
            paths = np.stack(rows[f"{name}_paths"].to_numpy())
            np.testing.assert_array_equal(paths.T, alone.paths[:, :, COLUMNS.index(name)])
    assert undisturbed["seed"].nunique() == len(LENGTHS)
    assert set(undisturbed["device"]) == {"cpu"}
    assert set(undisturbed["sha256"]) == {checkpoint.sha256}
    assert undisturbed["error"].isna().all()


@pytest.fixture(scope="module")
def in_parts(cluster, table, model, tmp_path_factory):
    """(input, output, forecast) of the same bars as a wide table, computed by two actors in three parts."""
    folder = tmp_path_factory.mktemp("in_parts")
    wide = pd.read_parquet(table).pivot(index="timestamps", columns="symbol").swaplevel(axis=1)
    wide.columns = [f"{symbol}.{field}" for symbol, field in wide.columns]
    wide.reset_index().to_csv(folder / "wide.csv", index=False)
    code, found = forecast(folder / "wide.csv", folder / "out", model, actors=2, symbols_per_part=3)
    assert code == 0
    assert len(list((folder / "out").glob("part-*"))) == 3
    return folder / "wide.csv", folder / "out", found


def test_two_actors_small_units_and_a_wide_table_change_nothing(undisturbed, in_parts):
    same(in_parts[2], undisturbed)


@pytest.mark.slow
def test_large_files_divided_by_symbol_give_the_same_numbers(undisturbed, table, model, tmp_path):
    config = parse_arguments(arguments(table, tmp_path / "out", model, symbols_per_part=2), None)
    assert run_batch(dataclasses.replace(config, spread_bytes=5000)).computed == len(LENGTHS)
    same(pd.read_parquet(tmp_path / "out").sort_values(["symbol", "step"], ignore_index=True), undisturbed)
    assert not (tmp_path / "out" / "_spread").exists()


@pytest.mark.slow
def test_a_symbol_alone_has_the_numbers_that_it_has_in_company(undisturbed, table, model, tmp_path):
    bars = pd.read_parquet(table)
    (tmp_path / "single").mkdir()
    for symbol in ("AAA", "H.H"):
        bars[bars["symbol"] == symbol].drop(columns="symbol").to_csv(tmp_path / f"single/{symbol}.csv", index=False)
    _, alone = forecast(tmp_path / "single", tmp_path / "out", model, symbols_per_part=1)
    same(alone, undisturbed[undisturbed["symbol"].isin(["AAA", "H.H"])].reset_index(drop=True))


def test_bad_symbols_cost_their_own_row(undisturbed, cluster, model, tmp_path, capsys):
    good = candles("good", 40)
    nan, negative = good.copy(), good.copy()
    nan.loc[5, "close"] = np.nan
    negative.loc[5, "low"] = -1.0
    table = long_table(NAN=nan, NEGATIVE=negative, SHORT=good.head(3), GAPS=good.drop(index=7))
    # After sorting, so that it stays unsorted.
    table = pd.concat([table, good.iloc[::-1].assign(symbol="UNSORTED")])
    mixed = good.assign(symbol="ZONES", timestamps=[f"{t}+08:00" if t.minute else f"{t}" for t in good["timestamps"]])
    pd.concat([table.astype({"timestamps": str}), mixed]).to_csv(tmp_path / "bars.csv", index=False)
    (tmp_path / "broken.parquet").write_bytes(b"PAR1")
    code, found = forecast(tmp_path / "b*", tmp_path / "out", model, actors=1)
    assert code == 1
    failed = found[found["error"].notna()]
    assert dict(zip(failed["symbol"], failed["error_code"], strict=True)) == {
        "NAN": "not_finite",
        "NEGATIVE": "not_positive",
        "SHORT": "too_short",
        "GAPS": "freq_ambiguous",
        "UNSORTED": "unsorted_times",
        "ZONES": "mixed_time_zones",
        "broken": "unreadable_file",
    }
    assert failed["error"].str.startswith("not_finite: column 'close', row 5 is NaN").any()
    assert failed["close_mean"].isna().all()
    # Beside rows without a step, pandas reads the steps as floats.
    same(found[found["error"].isna()].reset_index(drop=True).astype(undisturbed.dtypes), undisturbed)
    assert "8 forecast, 7 with an error" in capsys.readouterr().out
    # A file that comes later: its run's line of progress is of that run alone.
    good.to_csv(tmp_path / "bars_of_today.csv", index=False)
    forecast(tmp_path / "b*", tmp_path / "out", model, actors=1)
    told = capsys.readouterr()
    assert re.search(r"^1/1 symbols, .*, 0 with an error$", told.err, re.MULTILINE)
    assert "16 symbols in" in told.out
    assert "9 forecast, 7 with an error; 1 of them computed now" in told.out


def test_a_second_run_does_nothing_and_other_settings_are_refused(in_parts, model, capsys):
    table, output, first = in_parts
    written = {path: path.stat().st_mtime_ns for path in output.glob("part-*")}
    capsys.readouterr()
    code, second = forecast(table, output, model, symbols_per_part=3)
    assert code == 0
    assert "0 of them computed now" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in output.glob("part-*")} == written
    same(first, second)
    for name, value in {"horizon": 7, "seed": 3, "top_p": 0.5, "max_context": 32}.items():
        assert main(arguments(table, output, model, **{name: value})) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert name in error
    # Another model: the same shapes, other weights.
    assert main(arguments(table, output, "bundled")) == 2
    assert "sha256" in capsys.readouterr().err


def test_a_killed_run_goes_on_where_it_was(undisturbed, cluster, table, model, tmp_path):
    """SIGKILL of the driver between two parts; the cluster outlives it. Then the same command again."""
    output = tmp_path / "out"
    command = [sys.executable, "-m", "cluster.batch", *arguments(table, output, model, symbols_per_part=1, actors=1)]
    process = subprocess.Popen([*command, "--ray-address", cluster], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + 120
    while not list(output.glob("part-*")):
        assert process.poll() is None, process.stderr.read()[-3000:]
        assert time.monotonic() < end
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    written = {path: path.stat().st_mtime_ns for path in output.glob("part-*")}
    assert 1 <= len(written) < len(LENGTHS)

    _wait_for_free_cpus(2)
    code, resumed = forecast(table, output, model, symbols_per_part=1, actors=1)
    assert code == 0
    same(resumed, undisturbed)
    assert {path: path.stat().st_mtime_ns for path in written} == written


@pytest.mark.slow
def test_a_lost_actors_symbols_are_computed_again(undisturbed, cluster, table, model, tmp_path):
    """SIGKILL of the only actor between two parts, during one and the same run."""
    output = tmp_path / "out"
    _wait_for_free_cpus(2)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(forecast, table, output, model, symbols_per_part=1, actors=1)
        end = time.monotonic() + 120
        while not list(output.glob("part-*")):
            assert not running.done()
            assert time.monotonic() < end
            time.sleep(0.002)
        actors = [
            child for child in psutil.Process().children(recursive=True) if "MapWorker" in "".join(child.cmdline())
        ]
        assert len(actors) == 1
        actors[0].kill()
        assert len(list(output.glob("part-*"))) < len(LENGTHS)
        code, found = running.result()
    assert code == 0
    same(found, undisturbed)


def _wait_for_free_cpus(count):
    """Until Ray has noticed that the killed driver's actors are nobody's."""
    end = time.monotonic() + 60
    while ray.available_resources().get("CPU", 0) < count:
        assert time.monotonic() < end
        time.sleep(0.1)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"quantiles": "0.1,x"}, "--quantiles"),
        ({"quantiles": "1.5"}, "between 0 and 1"),
        ({"horizon": 0}, "--horizon"),
        ({"samples": 0}, "samples"),
        ({"window": "hop"}, "unknown window policy"),
        ({"freq": "month"}, "5min"),
        ({"device": "tpu"}, "unknown device"),
        ({"model": "no/such-model"}, "no"),
    ],
)
def test_bad_usage_is_an_error_before_anything_is_written(cluster, table, model, tmp_path, capsys, options, told):
    given = arguments(table, tmp_path / "out", options.pop("model", model), **options)
    assert main(given) == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
