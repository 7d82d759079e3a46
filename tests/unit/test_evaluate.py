"""Walk-forward evaluation: which windows, the report, the alarms (V9), the command."""

import json
import re
import sys
import types
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from cluster import calibration
from cluster import evaluate as command
from cluster.candles.bars import SymbolBars, frame_from_bars
from cluster.evaluation import baselines as baseline_module
from cluster.evaluation import comparison as comparison_module
from cluster.evaluation import report
from cluster.evaluation.charts import line_chart
from cluster.evaluation.comparison import evaluate
from cluster.evaluation.forecasting import ModelChoice
from cluster.evaluation.leakage import alarms, future_in_inputs, shuffled_labels
from cluster.evaluation.metrics import Table
from cluster.evaluation.walk_forward import WalkForward, pick_windows
from model.calibration import CALIBRATION_FILE, Calibration
from model.errors import InputError
from model.registry import CheckpointSource, load_checkpoint
from tests.random_walks import random_walks

SETTING = WalkForward(history=40, horizon=6, samples=4, every=6, seed=3)


@pytest.fixture(scope="module")
def found(golden_bundle):
    return evaluate(ModelChoice(str(golden_bundle), device="cpu"), random_walks(), SETTING)


def cut(bars, keep):
    return SymbolBars(bars.symbol, bars.times[keep], bars.candles[keep], bars.marks[keep])


def test_windows_share_origins_and_stay_in_the_period():
    series = random_walks(bars=100)
    begins, ends = series[0].times[60], series[0].times[91]
    setting = WalkForward(begins, ends, history=40, horizon=6, samples=4, every=4)
    windows = pick_windows(series, setting).chosen
    assert sorted({w.cut for w in windows}) == [60, 64, 68, 72, 76, 80, 84]
    assert len(windows) == 3 * 7
    for window in windows:
        assert begins <= window.bars.times[window.cut]
        assert window.bars.times[window.cut + 5] < ends
        assert window.known(setting).shape == (40, 6)
        assert window.actual(setting)[0] == window.bars.candles[window.cut, 3]
    assert windows[0].season == 24


def test_a_symbol_without_a_bar_at_the_origin_is_left_out_there():
    series = random_walks(symbols=2, bars=100)
    keep = np.ones(100, bool)
    keep[59] = False
    picked = pick_windows([series[0], cut(series[1], keep)], WalkForward(series[0].times[60], None, 40, 6, 4, 4))
    assert {w.bars.symbol for w in picked.chosen if w.origin == series[0].times[59]} == {"S0"}
    assert picked.left_out["no bar at the origin"] == 1
    later = {w.origin for w in picked.chosen if w.bars.symbol == "S1"}
    assert later < {w.origin for w in picked.chosen if w.bars.symbol == "S0"}


def test_a_history_that_never_moves_is_left_out():
    series = random_walks(symbols=2, bars=100)
    still = SymbolBars("still", series[0].times, np.full((100, 6), 7, np.float32), series[0].marks)
    picked = pick_windows([series[1], still], SETTING)
    assert {w.bars.symbol for w in picked.chosen} == {"S1"}
    assert picked.left_out["the close never moves, or always alike, in the history"] > 0


def test_a_price_that_is_not_positive_costs_the_windows_that_hold_it():
    """In a history, its logarithm would spoil the baselines without a word, and the verdict with them."""
    series = random_walks(symbols=2, bars=100)
    candles = series[1].candles.copy()
    candles[70, 2] = 0.0  # the low
    spoilt = replace(series[1], candles=candles)
    setting = replace(SETTING, every=4)
    picked = pick_windows([series[0], spoilt], setting)
    assert picked.left_out["a price of the history is not positive"] > 0
    assert picked.left_out["a price of the horizon is not positive"] > 0
    cuts = {bars.symbol: {w.cut for w in picked.chosen if w.bars.symbol == bars.symbol} for bars in series}
    assert cuts["S1"] == {cut for cut in cuts["S0"] if not cut - 40 <= 70 < cut + 6}
    assert cuts["S1"]
    with pytest.raises(InputError, match=r"a price of the history is not positive: \d.*correct or drop the bars"):
        pick_windows([replace(series[0], candles=-series[0].candles)], setting)


@pytest.mark.parametrize("main", [command.main, calibration.main])
def test_files_with_a_price_that_is_not_positive_are_refused(tmp_path, capsys, golden_bundle, main):
    """As those with NaN are, which the same reader refuses: it is said where, and nothing is written."""
    frame = frame_from_bars(random_walks())
    frame.loc[200, "close"] = -1.0
    frame.to_csv(tmp_path / "bars.csv", index=False)
    head = ["fit"] if main is calibration.main else []
    out = tmp_path / ("out.json" if head else "out")
    options = ["--model", str(golden_bundle), "--data", str(tmp_path / "bars.csv"), "--history", "40", "--horizon", "6"]
    assert main([*head, *options, "--out", str(out)]) == 2
    told = capsys.readouterr().err
    assert re.search(
        r"bars\.csv, symbol S1: column 'close', row 50 \(2024-.*\) is -1: .*drop the bar .*row 200 of", told
    )
    assert not out.exists()


def test_no_window_is_an_error_that_says_what_there_is():
    series = random_walks(bars=45)
    with pytest.raises(
        InputError, match=r"40 bars of history .* 6 in it; the longest series, 'S0', has 45 bars from 2024"
    ):
        pick_windows(series, SETTING)
    with pytest.raises(InputError, match="no window in the period from 2030"):
        pick_windows(random_walks(), WalkForward(np.datetime64("2030-01-01"), None, 40, 6, 4, 6))


@pytest.mark.parametrize("change", [{"history": 2}, {"horizon": 0}, {"samples": 1}, {"every": 0}, {"window": "slide"}])
def test_settings_are_checked(change):
    with pytest.raises(ValueError, match=r"must be at least|unknown window"):
        WalkForward(**change)


def test_the_report_holds_what_was_promised(found, golden_bundle):
    summary = found.summary
    assert summary["model"]["sha256"] == load_checkpoint(CheckpointSource("x", str(golden_bundle))).sha256
    assert list(summary["metrics"]) == ["model", "last_price", "drift", "historical_volatility", "seasonal_naive"]
    assert [c["against"] for c in summary["comparisons"]] == list(summary["metrics"])[1:]
    for against in summary["comparisons"]:
        assert against["metric"] == "crps"
        assert against["verdict"] in ("beats", "ties", "loses")
    model = summary["metrics"]["model"]
    assert model["ic"]["kind"] == "cross-sectional"
    assert model["ic"]["lag"] >= 1
    for name in ("crps", "wql", "mase", "mae"):
        assert model[name] > 0
        low, high = model["intervals"][name]
        assert low <= model[name] <= high
    assert set(model["coverage"]) == {"0.5", "0.8", "0.9"}
    assert len(model["crps_by_step"]) == 6
    assert summary["verdict_line"].startswith(f"verdict: {summary['verdict']} |")
    assert summary["data"]["forecasts"] == len(found.windows) == 3 * 18
    json.dumps(summary, allow_nan=False)


def test_numbers_do_not_depend_on_what_else_is_forecast(found, golden_bundle):
    """A seed per symbol and origin: one symbol alone is forecast as among others."""
    alone = evaluate(ModelChoice(str(golden_bundle), device="cpu"), random_walks()[:1], SETTING)
    places = [i for i, w in enumerate(found.windows) if w.bars.symbol == "S0"]
    among = np.stack([found.scored["model"].crps[i] for i in places])
    np.testing.assert_allclose(np.stack(alone.scored["model"].crps), among, rtol=1e-4)
    assert alone.summary["metrics"]["model"]["ic"]["kind"] == "over time"


def test_warnings_are_about_the_period(golden_bundle):
    early = evaluate(ModelChoice(str(golden_bundle), device="cpu"), random_walks(1, 80, first="2024-06-20"), SETTING)
    assert any("before 2024-07-01" in text for text in early.summary["warnings"])
    assert any("origins only" in text for text in early.summary["warnings"])


def test_no_warning_about_published_weights_afterwards(found):
    assert not any("2024-07-01" in text for text in found.summary["warnings"])


def test_a_parent_is_compared_and_calibration_is_reported(tmp_path, golden_bundle, golden):
    """The parent is the model itself, so that they tie; the calibration's coverage stands beside the raw one."""
    for part in ("model", "tokenizer"):
        (tmp_path / part).symlink_to(golden / part)
    sha256 = load_checkpoint(CheckpointSource("x", str(golden_bundle))).sha256
    entry = {"symbol": None, "bar_seconds": None, "n": 40, "first_bars": [1], "factors": [3.0]}
    entry |= {"raw_coverage": {"0.8": 0.3}, "calibrated_coverage": {"0.8": 0.8}}
    sampling = {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
    fitted_on = {"from": "2024-07-01", "to": "2024-07-02", "horizon": 6, "sampling": sampling}
    document = {"version": 1, "method": "scale", "model_sha256": sha256, "fitted_on": fitted_on, "entries": [entry]}
    (tmp_path / CALIBRATION_FILE).write_text(json.dumps(document))
    parent = ModelChoice(str(golden_bundle), device="cpu")
    found = evaluate(ModelChoice(str(tmp_path), device="cpu"), random_walks(2, 90), SETTING, parent=parent)
    comparison = found.summary["comparisons"][0]
    assert (comparison["against"], comparison["ratio"], comparison["verdict"]) == ("parent", 1.0, "ties")
    coverages = found.summary["calibration"]
    assert coverages["calibrated_coverage"]["0.8"] > coverages["raw_coverage"]["0.8"]


def extra_that_fails(monkeypatch, fails):
    """An installed GARCH that its package fits as the random walk, or not at all where fails(close)."""

    def garch(close, horizon):
        if fails(close):
            raise ValueError("the optimiser did not converge")
        return baseline_module.random_walk(close, horizon)

    monkeypatch.setitem(sys.modules, "arch", types.ModuleType("arch"))
    monkeypatch.setattr(baseline_module, "garch", garch)


def test_a_misfit_of_an_extra_costs_that_forecast_of_it_alone(monkeypatch, tmp_path, golden_bundle, found):
    """Paired on the forecasts that both have; the rest of the report is as without it; the count is in all of it."""
    series = random_walks()
    odd = {float(series[0].candles[cut - 1, 3]) for cut in (40, 52, 76)}
    extra_that_fails(monkeypatch, lambda close: close[-1] in odd)
    with_extra = evaluate(ModelChoice(str(golden_bundle), device="cpu"), series, SETTING, extras=["garch"])
    summary = with_extra.summary
    assert summary["data"]["not_fitted"] == {"garch": 3}
    comparison = summary["comparisons"][-1]
    assert (comparison["against"], comparison["forecasts"], comparison["left_out"]) == ("garch", 51, 3)
    kept = [i for i, w in enumerate(with_extra.windows) if float(w.bars.candles[w.cut - 1, 3]) not in odd]
    mine, theirs = (
        np.stack([with_extra.scored[name].crps[i] for i in kept]).mean() for name in ("model", "historical_volatility")
    )
    assert comparison["ratio"] == pytest.approx(mine / theirs)
    assert summary["metrics"]["garch"]["crps"] == pytest.approx(theirs)
    assert summary["metrics"]["model"] == found.summary["metrics"]["model"]
    assert summary["comparisons"][:-1] == found.summary["comparisons"]
    [warning] = [text for text in summary["warnings"] if "GARCH" in text]
    assert "not be fitted to 3 of 54 forecasts and is compared on the other 51; the first was S0 at 2024-" in warning
    assert "the optimiser did not converge" in warning
    assert "GARCH(1,1) where it could be fitted, 51 of 54 forecasts" in summary["verdict_line"]
    report.write(tmp_path, with_extra)
    assert "GARCH(1,1) (3 left out)" in (tmp_path / "report.html").read_text()
    rows = pd.read_csv(tmp_path / "forecasts.csv").groupby("forecaster").size()
    assert (rows["garch"], rows["model"]) == (51, 54)


@pytest.mark.parametrize(
    ("values", "ticks"),
    [([0.4184, 3.26], ["1", "2", "3"]), ([-0.001, 0.002], ["-0.001", "0", "0.001", "0.002"]), ([7.0, 7.0], None)],
)
def test_axes_have_round_numbers(values, ticks):
    found = re.findall(r'text-anchor="end">([^<]+)</text>', line_chart("t", [1, 2], {"a": values}, x_names=("", "")))
    assert found == ticks if ticks else len(found) >= 2


def test_an_extra_that_fits_nothing_is_left_out_and_said(monkeypatch, golden_bundle):
    extra_that_fails(monkeypatch, lambda close: True)
    summary = evaluate(ModelChoice(str(golden_bundle), device="cpu"), random_walks(), SETTING, extras=["garch"]).summary
    assert "garch" not in summary["metrics"]
    assert "garch" not in {comparison["against"] for comparison in summary["comparisons"]}
    assert summary["data"]["not_fitted"] == {"garch": 54}
    assert any("54 of 54 forecasts and is left out of comparisons and verdict" in text for text in summary["warnings"])


# --- V9 ---------------------------------------------------------------------------------------------------------------


@pytest.mark.verify("V9")
@pytest.mark.parametrize("plant", ["next return", "next close", "close five bars later"])
def test_a_planted_future_feature_raises_the_alarm(figure, plant):
    honest = random_walks(bars=400)
    planted = []
    for bars in honest:
        candles, close = bars.candles.copy(), bars.candles[:, 3].astype(float)
        if plant == "next return":
            candles[:-1, 4] = 10 + 100 * np.diff(np.log(close))
        else:
            lead = 1 if plant == "next close" else 5
            candles[:-lead, 4] = close[lead:]
        planted.append(SymbolBars(bars.symbol, bars.times, candles, bars.marks))
    assert future_in_inputs(honest) == []
    found = future_in_inputs(planted)
    assert {one["column"] for one in found} == {"volume"}
    assert {one["symbol"] for one in found} == {"S0", "S1", "S2"}
    assert all(one["lead"] == (5 if "five" in plant else 1) for one in found)
    text = alarms(found, None, {"passed": True})[0]
    assert "volume foretells the return" in text
    figure(f"planted {plant}: alarm at rank IC {min(one['rank_ic'] for one in found):.2f}", "honest series: none")


@pytest.mark.verify("V9")
@pytest.mark.parametrize("symbols", [1, 8])
def test_shuffled_labels_have_no_skill(figure, symbols):
    """A forecast that knows the future: high IC on true returns, none on returns that were dealt out anew."""
    series = random_walks(symbols, 600)
    windows = pick_windows(series, SETTING).chosen
    truth = comparison_module._truth(windows, SETTING)
    table = Table(truth)
    oracle = truth.returns
    _, terms = table.coefficient_series(oracle, truth.returns)
    assert terms.mean() == pytest.approx(1)
    values = [shuffled_labels(table, oracle, seed=seed) for seed in range(20)]
    worst = max(abs(value["rank_ic"]) for value in values)
    figure(f"shuffled labels, {len(oracle)} forecasts: largest |IC| of 20 {worst:.3f}", f"< {values[0]['bound']:.3f}")
    assert sum(value["passed"] for value in values) >= 19
    ic = {"mean": 0.98, "t": 30.0}
    assert "rank IC is +0.98" in alarms([], ic, values[0])[0]
    assert alarms([], {"mean": 0.03, "t": 1.4}, {"passed": True}) == []


def test_a_calibration_of_other_sampling_is_not_evaluated():
    fitted_on = {"sampling": {"temperature": 1.0, "top_k": 0, "top_p": 1.0}}
    fitted, said = Calibration("scale", "", fitted_on, ()), []
    assert comparison_module._calibration(fitted, SETTING, said) is fitted
    assert comparison_module._calibration(None, SETTING, said) is None
    assert said == []
    assert comparison_module._calibration(fitted, replace(SETTING, temperature=0.6), said) is None
    assert "is not evaluated" in said[0]
