"""V15: every metric and test against a closed form, or a truth that is known because it was planted."""

import math
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.evaluation.baselines import baselines, drift, last_price, random_walk, seasonal_naive
from cluster.evaluation.metrics import Scored, Table, Truth, overall_verdict
from cluster.evaluation.scores import Draws, Normal, Point, crps_of_normal, pinball
from cluster.evaluation.significance import (
    block_length,
    block_rows,
    bootstrap,
    correlation,
    diebold_mariano,
    ks_uniform,
    mean_test,
    newey_west_variance,
    rank_correlation,
    ranks,
    student_t_p_value,
    wilson,
)
from model.errors import InputError


def walks(n, history, horizon, seed, sigma=1.0):
    """[n, history + horizon] random walks around 100."""
    moves = np.random.default_rng(seed).normal(size=(n, history + horizon)) * sigma
    return 100 + np.cumsum(moves, axis=1)


def truth_of(prices, history, *, symbols=1, overlap=1):
    """Every row a forecast; `symbols` of them share an origin."""
    known, n = prices[:, :history], len(prices)
    moves = np.diff(known, axis=1)
    return Truth(
        actual=prices[:, history:],
        last=known[:, -1],
        unit=np.sqrt((moves**2).mean(axis=1)),
        mase_scale=np.abs(moves).mean(axis=1),
        origin=np.arange(n) // symbols,
        symbol=np.array([f"S{i % symbols}" for i in range(n)]),
        overlap=overlap,
    )


def scored_of(truth, forecasts):
    scored = Scored()
    for number, forecast in enumerate(forecasts):
        scored.add(forecast, truth, number, np.random.default_rng([7, number]))
    return scored


@pytest.mark.verify("V15")
def test_crps_of_a_random_walk_forecast_is_its_closed_form(figure):
    """E[CRPS] of N(last, σ²h) on a random walk is σ√h/√π."""
    sigma, horizon, n = 2.0, 16, 40_000
    prices = walks(n, 1, horizon, 0, sigma)
    forecast = Normal(prices[:, :1], sigma * np.sqrt(np.arange(1, horizon + 1)))
    found = forecast.crps(prices[:, 1:])
    expected = sigma * np.sqrt(np.arange(1, horizon + 1) / math.pi)
    error = (found.mean(axis=0) - expected) / (found.std(axis=0) / math.sqrt(n))
    figure(f"CRPS of a random walk: {np.abs(error).max():.2f} standard errors from σ√h/√π", "≤ 3.5 over 16 horizons")
    assert np.abs(error).max() <= 3.5
    exact = crps_of_normal(np.zeros(1), np.ones(1), np.zeros(1))[0]
    assert exact == pytest.approx((math.sqrt(2) - 1) / math.sqrt(math.pi), abs=1e-12)


@pytest.mark.verify("V15")
@pytest.mark.parametrize("samples", [4, 20])
def test_pit_and_coverage_of_draws_from_the_truth(figure, samples):
    rng = np.random.default_rng(1)
    n, horizon = 4000, 3
    draws, actual = rng.normal(size=(n, samples, horizon)), rng.normal(size=(n, horizon))
    pit = np.stack([Draws(d).pit(a, rng) for d, a in zip(draws, actual, strict=True)])
    distance, p_value = ks_uniform(pit[:, -1])
    figure(f"PIT of {samples} draws from the truth: KS {distance:.4f}, p = {p_value:.2f}", "p > 0.001")
    assert p_value > 0.001
    if samples == 20:
        inside = np.stack([Draws(d).covered(a) for d, a in zip(draws, actual, strict=True)]).mean(axis=(0, 2))
        # 0.9 of 20 draws: the outermost order statistics lie at 1/21 and 20/21, just inside 0.05 and 0.95.
        np.testing.assert_allclose(inside[:2], [0.5, 0.8], atol=0.012)


def test_pit_of_a_normal_and_of_ties():
    rng = np.random.default_rng(2)
    assert Normal(np.zeros(2), np.ones(2)).pit(np.array([0.0, 1.0]), rng) == pytest.approx([0.5, 0.8413447], abs=1e-7)
    tied = Draws(np.ones((9, 1)))
    values = np.array([tied.pit(np.ones(1), rng)[0] for _ in range(2000)])
    assert ks_uniform(values)[1] > 0.001  # a price on a tie may be anywhere in its step
    assert Point(np.ones(2)).pit(np.ones(2), rng) is None


@pytest.mark.verify("V15")
def test_mase_of_the_last_price_is_1_one_bar_ahead(figure):
    prices = walks(4000, 400, 1, 3)
    truth = truth_of(prices, 400)
    scored = scored_of(truth, [last_price(row[:400], 1) for row in prices])
    ratios = np.stack(scored.error)[:, 0] / truth.mase_scale
    error = (ratios.mean() - 1) / (ratios.std() / math.sqrt(len(ratios)))
    figure(f"MASE of the last price: {ratios.mean():.4f}, {error:+.2f} standard errors from 1", "within 3.5")
    assert abs(error) <= 3.5
    metrics = Table(truth).metrics(scored)
    assert metrics["mase"] == pytest.approx(ratios.mean())
    assert metrics["crps"] * 1 == pytest.approx((np.stack(scored.error)[:, 0] / truth.unit).mean())
    assert metrics["ic"] is None
    assert metrics["coverage"] is None


def test_weighted_quantile_loss_is_its_definition():
    actual, path = np.array([[101.0, 98.0]]), np.array([100.0, 100.0])
    prices = np.concatenate([np.array([[99.0, 100.0, 100.0]]), actual], axis=1)
    truth = truth_of(prices, 3)
    metrics = Table(truth).metrics(scored_of(truth, [Point(path)]))
    # ρ_p = p·1 for the first bar, (1 − p)·2 for the second; mean over p = 0.1 … 0.9 is 0.5 and 1.
    assert metrics["wql"] == pytest.approx(2 * (0.5 + 1.0) / 199)
    assert metrics["wql_by_level"]["0.9"] == pytest.approx(2 * (0.9 + 0.2) / 199)
    assert metrics["mae"] == pytest.approx(1.5)
    np.testing.assert_allclose(pinball(np.array([[1.0]]), [0.3], np.array([3.0])), [[0.6]])


@pytest.mark.verify("V15")
@pytest.mark.parametrize("symbols", [1, 20])
def test_information_coefficient_of_a_planted_signal(figure, symbols):
    """Signal and return share a part: their correlation is planted; overlapping or not, the t says it is there."""
    rng, n, planted = np.random.default_rng(4), 4000, 0.3
    signal = rng.normal(size=n)
    returns = 0.01 * (planted * signal + math.sqrt(1 - planted**2) * rng.normal(size=n))
    last = np.full(n, 100.0)
    prices = np.stack([last - 1, last + 1, last, last * (1 + returns)], axis=1)
    truth = truth_of(prices, 3, symbols=symbols)
    metrics = Table(truth).metrics(scored_of(truth, [Point(np.array([100 * (1 + 0.01 * s)])) for s in signal]))
    entry = metrics["ic"]
    assert entry["kind"] == ("over time" if symbols == 1 else "cross-sectional")
    error = math.sqrt((1 - planted**2) / n)
    figure(f"IC of a planted signal, {entry['kind']}: {entry['mean']:.3f} for {planted}", "within 4 standard errors")
    assert entry["mean"] == pytest.approx(planted, abs=4 * error + 1e-3)
    assert entry["t"] > 10
    # Spearman's of normals is 6/π·asin(ρ/2); over few symbols a little less.
    assert metrics["rank_ic"]["mean"] == pytest.approx(6 / math.pi * math.asin(planted / 2), abs=4 * error + 0.012)
    low, high = metrics["intervals"]["ic"]
    assert low < planted < high
    assert metrics["hit_rate"]["value"] == pytest.approx(0.5 + math.asin(planted) / math.pi, abs=0.035)


def test_volatility_of_the_truth_has_no_error():
    prices = walks(50, 30, 8, 5)
    truth = truth_of(prices, 30)
    metrics = Table(truth).metrics(scored_of(truth, [Point(row[30:]) for row in prices]))
    assert metrics["volatility"]["mae"] == pytest.approx(0, abs=1e-12)
    assert metrics["volatility"]["r2"] == pytest.approx(1)
    assert metrics["crps"] == metrics["mae"] == 0


# --- tests and intervals ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("t", "degrees", "p"),
    [(0, 5, 1.0), (1, 1, 0.5), (2.570582, 5, 0.05), (2.228139, 10, 0.05), (3.169273, 10, 0.01), (1.959964, 1e9, 0.05)],
)
def test_student_t_against_tables(t, degrees, p):
    assert student_t_p_value(t, degrees) == pytest.approx(p, abs=2e-6)
    assert student_t_p_value(-t, degrees) == student_t_p_value(t, degrees)


def test_wilson_against_its_formula():
    low, high = wilson(8, 10)
    assert (low, high) == pytest.approx((0.4901625, 0.9433178), abs=1e-6)
    assert wilson(0, 10)[0] == pytest.approx(0, abs=1e-12)
    assert wilson(10, 10)[1] == pytest.approx(1)


def test_newey_west_grows_with_the_overlap():
    rng = np.random.default_rng(6)
    noise = rng.normal(size=20_000)
    overlapping = np.convolve(noise, np.ones(10), "valid")
    assert newey_west_variance(noise, 10) == pytest.approx(1 / len(noise), rel=0.1)
    # The mean of a sum of 10 neighbours has 100 times the variance of the noise's mean.
    assert newey_west_variance(overlapping, 60) == pytest.approx(100 / len(overlapping), rel=0.12)
    assert mean_test(np.ones(5), 2) == (1.0, None, None, 5, 2)


def test_diebold_mariano_of_independent_losses_is_the_paired_t_test():
    rng = np.random.default_rng(7)
    a, b = rng.exponential(size=50), rng.exponential(size=50) + 0.4
    found = diebold_mariano(a, b, 1)
    d = a - b
    t = d.mean() / (d.std(ddof=0) / math.sqrt(50)) * math.sqrt(49 / 50)
    assert found.statistic == pytest.approx(t)
    assert found.p_value == pytest.approx(student_t_p_value(t, 49))
    assert diebold_mariano(a, a, 1).p_value is None
    assert diebold_mariano(a * (1 + 1e-15), a, 1).p_value is None
    assert diebold_mariano(a[:3], b[:3], 1).p_value is None


@pytest.mark.parametrize("steps", [1, 6])
def test_diebold_mariano_keeps_its_level(steps):
    """Equal forecasters whose losses overlap: about 5 % of tests reject."""
    rng, rejected, runs = np.random.default_rng(8), 0, 600
    for _ in range(runs):
        d = np.convolve(rng.normal(size=200 + steps - 1), np.ones(steps), "valid")
        rejected += (diebold_mariano(d + 9, np.full(200, 9.0), steps).p_value or 1) < 0.05
    assert 0.02 <= rejected / runs <= 0.1


def test_block_bootstrap_covers_the_mean_of_an_overlapping_series():
    rng, hits = np.random.default_rng(9), 0
    for run in range(200):
        series = np.convolve(rng.normal(size=305), np.ones(6), "valid")
        rows = block_rows(len(series), block_length(len(series), 6), 300, run)
        low, high = bootstrap(rows, lambda r, s=series: s[r].mean(axis=1))
        hits += low <= 0 <= high
    assert 0.86 <= hits / 200 <= 0.99


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(-5, 5), min_size=2, max_size=30))
def test_ranks_share_ties(values):
    values = np.array(values, dtype=float)
    expected = [(values < v).sum() + ((values == v).sum() + 1) / 2 for v in values]
    np.testing.assert_allclose(ranks(values), expected)


def test_correlations():
    a = np.array([1.0, 2, 3, 4])
    assert correlation(a, 3 - 2 * a) == pytest.approx(-1)
    assert rank_correlation(a, np.exp(a)) == pytest.approx(1)
    assert math.isnan(correlation(a, np.ones(4)))
    assert math.isnan(correlation(a[:1], a[:1]))


def test_kolmogorov_smirnov():
    even = (np.arange(100) + 0.5) / 100
    assert ks_uniform(even) == (pytest.approx(0.005), pytest.approx(1.0))
    distance, p_value = ks_uniform(even**2)
    assert distance == pytest.approx(0.25, abs=0.01)
    assert p_value < 1e-4


# --- baselines and verdicts -------------------------------------------------------------------------------------------


def test_baselines_are_their_formulas():
    close = np.array([10.0, 11, 13, 12, 14])
    assert last_price(close, 2).path.tolist() == [14, 14]
    walk = random_walk(close, 3)
    np.testing.assert_allclose(walk.std, math.sqrt((1 + 4 + 1 + 4) / 4) * np.sqrt([1, 2, 3]))
    sloped = drift(close, 2)
    np.testing.assert_allclose(sloped.centre, [15, 16])
    spread = math.sqrt((0 + 1 + 4 + 1) / 3)
    np.testing.assert_allclose(sloped.std, [spread * math.sqrt(1 + 1 / 4), spread * math.sqrt(2 * (1 + 2 / 4))])
    season = seasonal_naive(2)(close, 3)
    assert season.centre.tolist() == [12, 14, 12]
    one = math.sqrt((9 + 1 + 1) / 3)
    np.testing.assert_allclose(season.std, [one, one, one * math.sqrt(2)])


def test_baselines_refuse_what_they_cannot_do():
    with pytest.raises(InputError, match="5 bars needs 7 bars"):
        seasonal_naive(5)(np.arange(6.0), 1)
    with pytest.raises(InputError, match="never moves"):
        seasonal_naive(2)(np.full(9, 5.0), 1)
    exact = seasonal_naive(3)(np.tile([100.0, 101.0, 103.0], 4), 4)  # nothing but rounding is left of its spread
    np.testing.assert_array_equal(exact.centre, [100, 101, 103, 100])
    assert (exact.std > 0).all()
    assert exact.crps(exact.centre).max() < 1e-5
    with pytest.raises(InputError, match="always moves alike"):
        drift(np.arange(1.0, 9), 2)
    with pytest.raises(InputError, match="never moves"):
        random_walk(np.ones(9), 2)
    with pytest.raises(InputError, match="choose from garch, ets"):
        baselines(5, ["arima"])


@pytest.mark.parametrize(("name", "package"), [("garch", "arch"), ("ets", "statsmodels")])
def test_extras_forecast_or_name_the_extra(name, package):
    close = walks(1, 300, 1, 10)[0]
    try:
        __import__(package)
    except ImportError:
        with pytest.raises(InputError, match=rf"{package}: pip install 'kronos-ray-serve\[baselines\]'"):
            baselines(5, [name])
        return
    forecast = baselines(5, [name])[name](close, 12)
    walk = random_walk(close, 12)
    assert np.abs(forecast.centre - walk.centre).max() < 3 * walk.std[-1]
    assert (np.diff(forecast.std) > 0).all()
    assert 0.4 < forecast.std[-1] / walk.std[-1] < 2.5


def test_a_better_forecaster_beats_and_a_worse_one_loses():
    prices = walks(300, 60, 6, 11)
    truth = truth_of(prices, 60)
    rng = np.random.default_rng(12)
    near = scored_of(truth, [Normal(row[60:] + rng.normal(size=6) * 0.2, np.full(6, 0.2)) for row in prices])
    walk = scored_of(truth, [random_walk(row[:60], 6) for row in prices])
    wild = scored_of(truth, [Normal(random_walk(row[:60], 6).centre, np.full(6, 30.0)) for row in prices])
    table = Table(truth)
    won, lost, same = (table.compare(one, walk, "historical_volatility") for one in (near, wild, walk))
    assert (won["verdict"], lost["verdict"], same["verdict"]) == ("beats", "loses", "ties")
    assert won["low"] < won["ratio"] < won["high"] < 1 < lost["low"]
    assert won["p_value"] < 1e-6
    assert same["ratio"] == 1
    assert overall_verdict([won, won]) == "beats"
    assert overall_verdict([won, same]) == "ties"
    assert overall_verdict([won, lost]) == "loses"


def test_normal_quantiles():
    found = Normal(np.array([1.0]), np.array([2.0])).quantiles([0.1, 0.5])
    np.testing.assert_allclose(found[:, 0], [1 + 2 * NormalDist().inv_cdf(0.1), 1])
