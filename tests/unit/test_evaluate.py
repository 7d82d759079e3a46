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
from cluster.candles.bars import SymbolBars, bars_from_frame, frame_from_bars, read_bars
from cluster.evaluation import baselines as baseline_module
from cluster.evaluation import card_scores, report
from cluster.evaluation import comparison as comparison_module
from cluster.evaluation.charts import line_chart
from cluster.evaluation.comparison import evaluate
from cluster.evaluation.forecasting import ModelChoice
from cluster.evaluation.leakage import alarms, future_in_inputs, shuffled_labels
from cluster.evaluation.metrics import Table
from cluster.evaluation.walk_forward import WalkForward, pick_windows
from model.calibration import CALIBRATION_FILE, Calibration, load_calibration
from model.errors import InputError
from model.registry import CheckpointSource, load_checkpoint


def random_walks(symbols=3, bars=150, seed=0, first="2024-07-01", minutes=60):
    """Candles of symbols S0, S1, … at the same times."""
    rng = np.random.default_rng(seed)
    times = pd.date_range(first, periods=bars, freq=f"{minutes}min")
    frames = []
    for i in range(symbols):
        close = 100 * np.exp(np.cumsum(rng.normal(size=bars) * 0.01))
        opens = np.concatenate([[100.0], close[:-1]])
        frames.append(
            pd.DataFrame(
                {
                    "symbol": f"S{i}",
                    "timestamps": times,
                    "open": opens,
                    "high": np.maximum(opens, close) * 1.001,
                    "low": np.minimum(opens, close) * 0.999,
                    "close": close,
                    "volume": rng.exponential(size=bars) * 1000,
                }
            )
        )
    return bars_from_frame(pd.concat(frames, ignore_index=True))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory, golden):
    """The golden networks as a bundle: random weights, 6 + 6 bits."""
    folder = tmp_path_factory.mktemp("bundle")
    for part in ("model", "tokenizer"):
        (folder / part).symlink_to(golden / part)
    return folder


SETTING = WalkForward(history=40, horizon=6, samples=4, every=6, seed=3)


@pytest.fixture(scope="module")
def found(bundle):
    return evaluate(ModelChoice(str(bundle), device="cpu"), random_walks(), SETTING)


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
def test_files_with_a_price_that_is_not_positive_are_refused(tmp_path, capsys, bundle, main):
    """As those with NaN are, which the same reader refuses: it is said where, and nothing is written."""
    frame = frame_from_bars(random_walks())
    frame.loc[200, "close"] = -1.0
    frame.to_csv(tmp_path / "bars.csv", index=False)
    head = ["fit"] if main is calibration.main else []
    out = tmp_path / ("out.json" if head else "out")
    options = ["--model", str(bundle), "--data", str(tmp_path / "bars.csv"), "--history", "40", "--horizon", "6"]
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


def test_the_report_holds_what_was_promised(found, bundle):
    summary = found.summary
    assert summary["model"]["sha256"] == load_checkpoint(CheckpointSource("x", str(bundle))).sha256
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


def test_numbers_do_not_depend_on_what_else_is_forecast(found, bundle):
    """A seed per symbol and origin: one symbol alone is forecast as among others."""
    alone = evaluate(ModelChoice(str(bundle), device="cpu"), random_walks()[:1], SETTING)
    places = [i for i, w in enumerate(found.windows) if w.bars.symbol == "S0"]
    among = np.stack([found.scored["model"].crps[i] for i in places])
    np.testing.assert_allclose(np.stack(alone.scored["model"].crps), among, rtol=1e-4)
    assert alone.summary["metrics"]["model"]["ic"]["kind"] == "over time"


def test_warnings_are_about_the_period(bundle):
    early = evaluate(ModelChoice(str(bundle), device="cpu"), random_walks(1, 80, first="2024-06-20"), SETTING)
    assert any("before 2024-07-01" in text for text in early.summary["warnings"])
    assert any("origins only" in text for text in early.summary["warnings"])


def test_no_warning_about_published_weights_afterwards(found):
    assert not any("2024-07-01" in text for text in found.summary["warnings"])


def test_a_parent_is_compared_and_calibration_is_reported(tmp_path, bundle, golden):
    """The parent is the model itself, so that they tie; the calibration's coverage stands beside the raw one."""
    for part in ("model", "tokenizer"):
        (tmp_path / part).symlink_to(golden / part)
    sha256 = load_checkpoint(CheckpointSource("x", str(bundle))).sha256
    entry = {"symbol": None, "bar_seconds": None, "n": 40, "first_bars": [1], "factors": [3.0]}
    entry |= {"raw_coverage": {"0.8": 0.3}, "calibrated_coverage": {"0.8": 0.8}}
    sampling = {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
    fitted_on = {"from": "2024-07-01", "to": "2024-07-02", "horizon": 6, "sampling": sampling}
    document = {"version": 1, "method": "scale", "model_sha256": sha256, "fitted_on": fitted_on, "entries": [entry]}
    (tmp_path / CALIBRATION_FILE).write_text(json.dumps(document))
    parent = ModelChoice(str(bundle), device="cpu")
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


def test_a_misfit_of_an_extra_costs_that_forecast_of_it_alone(monkeypatch, tmp_path, bundle, found):
    """Paired on the forecasts that both have; the rest of the report is as without it; the count is in all of it."""
    series = random_walks()
    odd = {float(series[0].candles[cut - 1, 3]) for cut in (40, 52, 76)}
    extra_that_fails(monkeypatch, lambda close: close[-1] in odd)
    with_extra = evaluate(ModelChoice(str(bundle), device="cpu"), series, SETTING, extras=["garch"])
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


def test_an_extra_that_fits_nothing_is_left_out_and_said(monkeypatch, bundle):
    extra_that_fails(monkeypatch, lambda close: True)
    summary = evaluate(ModelChoice(str(bundle), device="cpu"), random_walks(), SETTING, extras=["garch"]).summary
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


# --- the command ------------------------------------------------------------------------------------------------------


def arguments(bundle, data, out, *more):
    given = ["--model", bundle, "--data", data, "--out", out, "--history", 40, "--horizon", 6, "--samples", 4]
    return [str(part) for part in [*given, "--device", "cpu", *more]]


def test_the_command_writes_a_report_that_needs_nothing_else(tmp_path, bundle, capsys):
    for bars in random_walks(3, 120):
        frame_from_bars([bars]).to_csv(tmp_path / f"{bars.symbol}.csv", index=False)
    out = tmp_path / "report"
    more = ["--from", "2024-07-03", "--to", "2024-07-05T12:00", "--top-k", "1", "--cost-bps", "10"]
    assert command.main(arguments(bundle, tmp_path / "S*.csv", out, *more)) == 0
    shown = capsys.readouterr()
    assert "verdict: " in shown.out
    assert "54/" not in shown.err
    report = json.loads((out / "report.json").read_text())
    assert report["period"]["from"] == "2024-07-03T00:00:00"
    assert report["data"]["symbols"] == ["S0", "S1", "S2"]
    assert report["backtest"]["rules"]["open_cost_bps"] == 10
    page = (out / "report.html").read_text()
    # A phone shows it at its own width: charts fit, tables scroll in themselves.
    assert '<meta name="viewport" content="width=device-width' in page
    colours = re.findall(r'fill="(#\w+)"/><text [^>]*>historical volatility<', page)
    assert len(colours) == 3
    assert len(set(colours)) == 1
    assert all(int(width) <= 358 for width in re.findall(r'<svg [^>]*width="(\d+)"', page))
    assert page.count("<svg") >= 5
    assert not re.search(r"https?://|src=|href=|@import|url\(", page)
    assert report["verdict_line"].split("|")[0].strip() in page
    rows = pd.read_csv(out / "forecasts.csv")
    assert len(rows) == 5 * report["data"]["forecasts"]
    mine = rows[rows["forecaster"] == "model"]
    assert mine["crps"].mean() == pytest.approx(report["metrics"]["model"]["crps"])
    signals = pd.read_csv(out / "signals.csv")
    assert list(signals.columns) == ["symbol", "timestamps", "signal"]
    assert len(signals) == report["data"]["forecasts"]
    assert (out / "backtest/equity.csv").is_file()


@pytest.mark.parametrize(
    ("frame", "more", "message"),
    [
        (lambda f: f.rename(columns={"timestamps": "when"}), [], "'timestamps' is missing.*--time-column"),
        (lambda f: f.drop(columns="close"), [], "'close' is missing"),
        (lambda f: f.rename(columns={"close": " Close"}), [], "'close' is missing.*; rename ' Close'"),
        (lambda f: f.assign(Close=f["close"]), [], "'close' is there twice .'close' and 'Close'.: keep one"),
        (lambda f: f, ["--from", "2031-01-01"], "no window in the period"),
        (lambda f: f, ["--from", "soon"], "--from 'soon' is not a date"),
        (lambda f: f, ["--from", "07/01/2024"], "--from '07/01/2024' is not a date"),
        (lambda f: f, ["--from", "2024-07-05", "--to", "2024-07-04"], "is empty"),
        (lambda f: f.head(30), [], "no window"),
        (lambda f: f, ["--top-k", "0"], "top-k must be at least 1"),
        (lambda f: f, ["--cost-bps", "10"], "options of the backtest are given without --top-k"),
        (lambda f: f, ["--season", "0"], "season must be at least 1"),
        (lambda f: f, ["--workers", "-1"], "--workers must be at least 0"),
        (lambda f: f, ["--threads", "0"], "--threads must be at least 1"),
        (lambda f: f, ["--top-p", "1.5"], "top_p=1.5 must lie between 0 and 1"),
        (lambda f: f, ["--parent-tokenizer", "x"], "without --parent"),
        (lambda f: f, ["--card", "x"], "leave --data out"),
    ],
)
def test_the_command_names_what_is_wrong(tmp_path, bundle, capsys, frame, more, message):
    frame(frame_from_bars(random_walks(1, 120))).to_csv(tmp_path / "bars.csv", index=False)
    assert command.main(arguments(bundle, tmp_path / "bars.csv", tmp_path / "out", *more)) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert re.search(message, said)
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_traded_or_written_is_said_before_the_forecasts(tmp_path, bundle, capsys):
    """Which may take hours, and would be lost."""
    frame = frame_from_bars(random_walks(1, 120))
    frame.to_csv(tmp_path / "bars.csv", index=False)
    (tmp_path / "file").touch()
    assert command.main(arguments(bundle, tmp_path / "bars.csv", tmp_path / "file/out")) == 2
    assert capsys.readouterr().err.startswith("error: --out")
    frame.loc[3, ["open", "low"]] = 0.0
    frame.to_csv(tmp_path / "bars.csv", index=False)
    assert command.main(arguments(bundle, tmp_path / "bars.csv", tmp_path / "out", "--top-k", "1")) == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path / 'bars.csv'}, symbol S0")  # no progress before it


def test_an_earlier_report_is_replaced_only_on_request_and_as_a_whole(tmp_path, bundle, capsys, monkeypatch):
    frame_from_bars(random_walks(1, 120)).to_csv(tmp_path / "bars.csv", index=False)
    out = tmp_path / "out"
    given = arguments(bundle, tmp_path / "bars.csv", out)
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    assert command.main([*given, "--top-k", "1"]) == 0, "the folder holds no report"
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(command, "read_bars", None)  # it is said before the data is looked at
        assert command.main(given) == 2
    said = capsys.readouterr().err
    assert (
        said == f"error: --out {out} holds an earlier report (report.json): name another folder, or give --overwrite\n"
    )
    assert command.main([*given, "--overwrite", "--from", "2031-01-01"]) == 2
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before, "nothing came of it"
    assert command.main([*given, "--overwrite", "--seed", "1"]) == 0
    assert json.loads((out / "report.json").read_text())["setting"]["seed"] == 1
    assert {path.name for path in out.rglob("*")} == {*report.FILES, "notes.txt"}


def test_a_report_that_came_meanwhile_is_left_alone(tmp_path, bundle, capsys, monkeypatch):
    frame_from_bars(random_walks(1, 120)).to_csv(tmp_path / "bars.csv", index=False)
    out = tmp_path / "out"

    def slowly(*given, **options):
        found = evaluate(*given, **options)
        (out / "report.json").parent.mkdir(exist_ok=True)
        (out / "report.json").write_text("somebody else's")
        return found

    monkeypatch.setattr(command, "evaluate", slowly)
    assert command.main(arguments(bundle, tmp_path / "bars.csv", out)) == 0
    assert (out / "report.json").read_text() == "somebody else's"
    (own,) = out.glob("report-*")
    assert {path.name for path in own.iterdir()} == set(report.FILES)
    assert f"this one is in {own}" in capsys.readouterr().err


def test_a_bundle_is_calibrated_on_the_bars_that_are_named(tmp_path, golden, capsys):
    """fit → calibration.json in the bundle → an evaluation that reports both coverages."""
    for part in ("model", "tokenizer"):
        (tmp_path / "bundle" / part).parent.mkdir(exist_ok=True)
        (tmp_path / "bundle" / part).symlink_to(golden / part)
    frame_from_bars(random_walks(3, 190)).to_csv(tmp_path / "bars.csv", index=False)
    given = arguments(tmp_path / "bundle", tmp_path / "bars.csv", tmp_path / "out")
    fit = [part for part in given if part not in ("--out", str(tmp_path / "out"))]
    assert calibration.main(["fit", *fit, "--to", "2024-07-06", "--method", "conformal"]) == 0
    said = capsys.readouterr()
    assert "pooled: 39 forecasts, raw coverage 50%" in said.out
    sha256 = load_checkpoint(CheckpointSource("x", str(tmp_path / "bundle"))).sha256
    fitted = load_calibration(tmp_path / "bundle", sha256)
    assert {entry.name for entry in fitted.entries} == {"pooled", "bar_size"}  # too few for symbols of their own
    assert fitted.fitted_on["symbols"] == ["S0", "S1", "S2"]
    assert fitted.fitted_on["to"] < "2024-07-06"
    assert command.main([*given, "--from", "2024-07-06"]) == 0
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert set(report["calibration"]) == {"raw_coverage", "calibrated_coverage"}
    assert "calibrated" in report["metrics"]
    assert calibration.main(["fit", *fit, "--from", "2024-07-08"]) == 2
    assert "are too few to calibrate on" in capsys.readouterr().err


def test_a_calibration_of_other_sampling_is_not_evaluated():
    fitted_on = {"sampling": {"temperature": 1.0, "top_k": 0, "top_p": 1.0}}
    fitted, said = Calibration("scale", "", fitted_on, ()), []
    assert comparison_module._calibration(fitted, SETTING, said) is fitted
    assert comparison_module._calibration(None, SETTING, said) is None
    assert said == []
    assert comparison_module._calibration(fitted, replace(SETTING, temperature=0.6), said) is None
    assert "is not evaluated" in said[0]


def test_a_model_card_is_still_measured(tmp_path, bundle, capsys):
    numbers = tmp_path / "numbers.json"
    small = ["--windows", "2", "--history", "40", "--horizon", "4", "--samples", "3", "--device", "cpu"]
    assert command.main(["--bundle", str(bundle), "--scores", str(numbers), *small]) == 0
    found = json.loads(numbers.read_text())
    assert [one["name"] for one in found["sets"]] == ["simulated, held out"]
    assert found["sets"][0]["windows"] == 2


def test_a_model_card_that_cannot_be_written_is_refused_before_the_forecasts(tmp_path, bundle, capsys, monkeypatch):
    monkeypatch.setattr(card_scores, "score", None)
    for options, message in (
        (["--card", str(tmp_path)], "cannot be written"),
        (["--scores", str(tmp_path / "no" / "scores.json")], "cannot be written"),
        (["--card", str(tmp_path / "card.md")], "holds no training.json"),
        (["--candles", "gone.csv"], "gone.csv"),
    ):
        assert command.main(["--bundle", str(bundle), *options]) == 2
        assert message in capsys.readouterr().err


def test_missing_files_are_named(tmp_path, capsys):
    assert command.main(["--data", str(tmp_path / "*.parquet"), "--out", str(tmp_path)]) == 2
    assert "matches no .csv or .parquet file" in capsys.readouterr().err
    assert command.main([]) == 2
    assert "--data is missing" in capsys.readouterr().err
    for name in ("a.csv", "b.csv"):
        frame_from_bars(random_walks(1, 9)).to_csv(tmp_path / name, index=False)
    with pytest.raises(InputError, match="in another file too"):
        read_bars([tmp_path])
