"""KronosPredictor beyond the public class: batches of any shape, seeds, long horizons, greedy, threads, errors."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pandas as pd
import pytest
import torch

from model import KronosPredictor
from model.errors import ForecastCancelledError, InputError, RequestTooLargeError
from model.frames import series_from_frame
from model.types import COLUMNS, Sampling


def window(bars, start, length, horizon):
    end = start + length
    return bars[start:end], bars.timestamps[start:end], bars.timestamps[end : end + horizon]


def test_result_frame_is_the_public_one(predictor, bars):
    history, x, y = window(bars, 0, 30, 4)
    frame = predictor.predict(history, x, y, 4, sample_count=2, verbose=False)
    assert list(frame.columns) == list(COLUMNS)
    assert list(frame.index) == list(y)
    assert (frame.dtypes == np.float32).all()


def test_every_form_of_timestamps_gives_the_same_numbers(predictor, bars):
    history, x, y = window(bars, 0, 30, 4)
    expected = predictor.predict(history, x, y, 4, seed=1, verbose=False)
    index_form = predictor.predict(history, pd.DatetimeIndex(x), pd.DatetimeIndex(y), 4, seed=1, verbose=False)
    zoned = predictor.predict(
        history, x.dt.tz_localize("Asia/Shanghai"), y.dt.tz_localize("Asia/Shanghai"), 4, seed=1, verbose=False
    )
    np.testing.assert_array_equal(index_form, expected)
    np.testing.assert_array_equal(zoned, expected)
    assert str(zoned.index.tz) == "Asia/Shanghai"


def test_batch_equals_single_for_unequal_lengths_and_horizons(predictor, bars):
    shapes = [(0, 20, 3), (100, 64, 9), (200, 7, 1), (300, 64, 5)]
    histories, xs, ys = zip(*(window(bars, *shape) for shape in shapes), strict=True)
    together = predictor.predict_batch(
        histories, xs, ys, [h for *_, h in shapes], sample_count=3, seed=11, verbose=False
    )
    for frame, history, x, y in zip(together, histories, xs, ys, strict=True):
        alone = predictor.predict(history, x, y, len(y), sample_count=3, seed=11, verbose=False)
        np.testing.assert_array_equal(frame, alone)


def test_unseeded_batch_of_unequal_series_runs_under_the_global_generator(predictor, bars):
    histories, xs, ys = zip(*(window(bars, *shape) for shape in [(0, 20, 3), (50, 33, 6)]), strict=True)
    results = []
    for _ in range(2):
        torch.manual_seed(4)
        results.append(predictor.predict_batch(histories, xs, ys, None, verbose=False))
    for first, second in zip(*results, strict=True):
        np.testing.assert_array_equal(first, second)
    assert [len(frame) for frame in results[0]] == [3, 6]


def test_many_series_each_with_its_own_settings_and_faults(tiny, bars):
    """Digit for digit what each gets alone, in the throughput mode that batches use."""
    alone, together = (KronosPredictor(*tiny, device="cpu", max_context=48, throughput=True) for _ in range(2))
    batch = []
    for number, (length, horizon) in enumerate([(20, 5), (60, 9), (48, 3), (90, 5)]):
        frame = bars[number * 100 : number * 100 + length + horizon]
        history = frame[:length]
        series = series_from_frame(history, history["timestamps"], frame["timestamps"][length:])
        batch.append((series, Sampling(samples=number + 1, seed=number)))
    too_large = (batch[0][0], Sampling(samples=10**7, seed=0))
    negative = (batch[0][0], Sampling(samples=1, top_p=-1.0, seed=0))
    found = together.forecast_many([*batch[:2], too_large, negative, *batch[2:]])
    assert isinstance(found.pop(2), RequestTooLargeError)
    assert isinstance(found.pop(2), InputError)
    for (series, sampling), paths in zip(batch, found, strict=True):
        expected = alone.forecast_series(series, sampling)
        np.testing.assert_array_equal(paths.values, expected.values)
        np.testing.assert_array_equal(paths.tokens, expected.tokens)
        assert paths.window == expected.window
    together.engine.check_integrity()


def test_first_paths_do_not_depend_on_how_many_are_drawn(predictor, bars):
    series = series_from_frame(*window(bars, 10, 40, 6))
    few = predictor.forecast_series(series, Sampling(samples=2, seed=5))
    many = predictor.forecast_series(series, Sampling(samples=9, seed=5))
    np.testing.assert_array_equal(many.tokens[:2], few.tokens)
    np.testing.assert_allclose(many.values[:2], few.values, rtol=1e-5)
    assert not np.array_equal(many.tokens[0], many.tokens[1])


def test_seeded_forecast_leaves_the_global_generator_alone(predictor, bars):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    predictor.forecast(*window(bars, 0, 20, 3), seed=1, sample_count=2)
    assert torch.equal(torch.get_rng_state(), before)


def test_greedy_temperature_equals_top_k_one(predictor, bars):
    arguments = window(bars, 30, 50, 8)
    greedy = predictor.predict(*arguments, 8, T=0, verbose=False)
    top_one = predictor.predict(*arguments, 8, T=1.0, top_k=1, verbose=False)
    np.testing.assert_array_equal(greedy, top_one)


def test_horizon_longer_than_the_context(tiny, bars):
    predictor = KronosPredictor(*tiny, device="cpu", max_context=16)
    series = series_from_frame(*window(bars, 0, 30, 45))
    result = predictor.forecast_series(series, Sampling(samples=2, seed=0))
    assert result.values.shape == (2, 45, 6)
    assert np.isfinite(result.values).all()
    assert result.window.slid
    assert result.window.context_used == 16
    # The last 16 bars are decoded as a forecast would be that ends there: from one window of tokens.
    head = predictor.forecast_series(series_from_frame(*window(bars, 0, 30, 40)), Sampling(samples=2, seed=0))
    np.testing.assert_array_equal(result.tokens[:, :40], head.tokens)


def test_window_says_whether_it_slid(tiny, bars):
    predictor = KronosPredictor(*tiny, device="cpu", max_context=32)
    for length, horizon, slid in [(10, 5, False), (30, 3, False), (30, 4, True), (40, 1, False), (40, 2, True)]:
        series = series_from_frame(*window(bars, 0, length, horizon))
        result = predictor.forecast_series(series, Sampling(seed=0))
        assert (result.window.slid, result.window.context_used) == (slid, min(length, 32))


def test_one_bar_of_history_and_constant_prices(predictor, bars):
    history, x, y = window(bars, 0, 1, 3)
    assert np.isfinite(predictor.predict(history, x, y, 3, verbose=False)).all(axis=None)
    flat = bars[:20].assign(**dict.fromkeys(COLUMNS, 5.0))
    assert np.isfinite(predictor.predict(flat, *window(bars, 0, 20, 3)[1:], 3, verbose=False)).all(axis=None)


def test_forecast_returns_paths_quantiles_mean_and_seed(predictor, bars):
    arguments = window(bars, 0, 40, 5)
    first = predictor.forecast(*arguments, sample_count=12, quantiles=(0.1, 0.5, 0.9))
    again = predictor.forecast(*arguments, sample_count=12, seed=first.seed)
    np.testing.assert_array_equal(first.paths, again.paths)
    assert first.paths.shape == (12, 5, 6)
    np.testing.assert_allclose(first.mean, first.paths.mean(axis=0))
    np.testing.assert_allclose(first.quantiles[0.5], np.median(first.paths, axis=0))
    assert (first.quantiles[0.1] <= first.quantiles[0.9]).all(axis=None)
    assert list(first.timestamps) == list(arguments[2])
    assert (first.device, first.device_warning) == ("cpu", None)


def test_four_threads_give_the_single_thread_numbers(predictor, bars):
    jobs = list(zip(range(0, 800, 50), [5, 64, 33, 120] * 4, [7, 3] * 8, strict=True))

    def run(job):
        return predictor.forecast(*window(bars, *job), sample_count=3, seed=job[0]).paths

    alone = [run(job) for job in jobs]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(run, jobs))
    for expected, actual in zip(alone, together, strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-6)


def test_dropout_never_reaches_a_forecast(tiny, bars):
    model, tokenizer = tiny
    model.train()
    tokenizer.train()
    KronosPredictor(model, tokenizer, device="cpu")
    assert not model.training
    assert not tokenizer.training


def test_cancelled_within_one_step(predictor, bars):
    series = series_from_frame(*window(bars, 0, 20, 50))
    steps = []
    with pytest.raises(ForecastCancelledError):
        predictor.forecast_series(series, Sampling(seed=0), should_stop=lambda: len(steps) == 3, on_step=steps.append)
    assert steps == [1, 2, 3]


def test_errors_of_a_batch_name_the_series(predictor, bars):
    good, bad = window(bars, 0, 20, 2), window(bars, 0, 20, 2)
    broken = bad[0].assign(close=np.nan)
    with pytest.raises(InputError, match=r"series 1: column 'close', row 0") as error:
        predictor.predict_batch([good[0], broken], [good[1], bad[1]], [good[2], bad[2]], 2, verbose=False)
    assert (error.value.series, error.value.column, error.value.row) == (1, "close", 0)
    with pytest.raises(InputError, match="give one of each"):
        predictor.predict_batch([good[0]], [], [], 2)
    with pytest.raises(InputError, match="y_timestamp has 2 times for pred_len=5"):
        predictor.predict(*good, 5)
    assert predictor.predict_batch([], [], [], 5) == []


@pytest.mark.parametrize("arguments", [{"T": -1}, {"top_p": 1.5}, {"top_k": -2}, {"sample_count": 0}, {"seed": -1}])
def test_bad_settings_raise_before_anything_runs(predictor, bars, arguments):
    with pytest.raises(InputError):
        predictor.predict(*window(bars, 0, 20, 2), 2, **arguments)


def test_absent_filters_mean_off(predictor, bars):
    arguments = window(bars, 0, 20, 4)
    off = predictor.predict(*arguments, 4, top_k=None, top_p=None, seed=2, verbose=False)
    np.testing.assert_array_equal(off, predictor.predict(*arguments, 4, top_k=0, top_p=1.0, seed=2, verbose=False))


def test_progress_bar_only_when_verbose(predictor, bars, capsys):
    arguments = window(bars, 0, 20, 4)
    predictor.predict(*arguments, 4, verbose=False)
    assert capsys.readouterr().err == ""
    predictor.predict(*arguments, 4, verbose=True)
    assert "4/4" in capsys.readouterr().err


def test_bf16_stays_near_fp32(tiny, bars):
    """Greedy paths may part; the first step's bar may not."""
    arguments = window(bars, 0, 60, 1)
    fp32 = KronosPredictor(*tiny, device="cpu").forecast(*arguments, T=0, sample_count=1)
    bf16 = KronosPredictor(*tiny, device="cpu", precision="bf16").forecast(*arguments, T=0, sample_count=1)
    spread = bars[:60][list(COLUMNS)].std().to_numpy()
    assert (np.abs(bf16.paths - fp32.paths) <= spread).all()


def test_mismatched_pair_and_bad_arguments_are_refused(tiny):
    model, tokenizer = tiny
    with pytest.raises(ValueError, match="precision"):
        KronosPredictor(model, tokenizer, device="cpu", precision="fp8")
    with pytest.raises(ValueError, match="max_context"):
        KronosPredictor(model, tokenizer, device="cpu", max_context=0)
    with pytest.raises(ValueError, match="clip"):
        KronosPredictor(model, tokenizer, device="cpu", clip=0)
