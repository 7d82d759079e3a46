"""Scores against closed forms, and the evaluation of a forecaster whose truth is known."""

import json
import math
import sys
import types

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from cluster import evaluate
from cluster.candles.simulate import simulate
from cluster.evaluation import card_scores
from cluster.evaluation.baselines import baselines, random_walk
from cluster.evaluation.card import write_card
from cluster.evaluation.scores import (
    Normal,
    covered,
    crps_of_normal,
    crps_of_samples,
    invalid_share,
    paired_ratio,
)
from model.errors import InputError
from model.types import Paths, Window


def test_crps_of_a_normal_is_its_closed_form():
    # E over y of CRPS(N(0, σ²), y) with y from the same normal is σ/√π.
    rng = np.random.default_rng(0)
    truth = rng.normal(size=200_000) * 3
    found = crps_of_normal(np.zeros_like(truth), np.full_like(truth, 3.0), truth).mean()
    assert found == pytest.approx(3 / math.sqrt(math.pi), rel=5e-3)


@pytest.mark.parametrize("count", [2, 5, 20])
def test_fair_crps_does_not_depend_on_the_number_of_samples(count):
    rng = np.random.default_rng(1)
    forecasts = 100_000 // count
    samples, actual = rng.normal(size=(count, forecasts)), rng.normal(size=forecasts) + 0.5
    exact = crps_of_normal(np.zeros(forecasts), np.ones(forecasts), actual).mean()
    error = crps_of_samples(samples, actual)
    assert error.mean() == pytest.approx(exact, abs=4 * error.std() / math.sqrt(forecasts))


@settings(max_examples=50, deadline=None)
@given(arrays(np.float64, (6, 3), elements=st.floats(-100, 100)), arrays(np.float64, 3, elements=st.floats(-100, 100)))
def test_crps_is_the_definition_over_all_pairs(samples, actual):
    pairs = np.abs(samples[:, None] - samples[None]).sum(axis=(0, 1)) / (6 * 5)
    expected = np.abs(samples - actual).mean(axis=0) - pairs / 2
    np.testing.assert_allclose(crps_of_samples(samples, actual), expected, atol=1e-9)


def test_one_sample_has_no_fair_crps():
    with pytest.raises(InputError, match="at least 2 samples"):
        crps_of_samples(np.zeros((1, 4)), np.zeros(4))


def test_random_walk_is_calibrated_on_a_random_walk():
    rng = np.random.default_rng(2)
    scores, inside, horizon = [], [], 16
    for _ in range(1500):
        price = 100 + np.cumsum(rng.normal(size=200 + horizon))
        walk = random_walk(price[:200], horizon)
        scores.append(crps_of_normal(walk.centre, walk.std, price[200:]))
        inside.append(np.abs(price[200:] - walk.centre) <= 1.2815515655446004 * walk.std)
    expected = np.sqrt(np.arange(1, horizon + 1) / math.pi)
    np.testing.assert_allclose(np.mean(scores, axis=0), expected, rtol=0.06)
    assert np.mean(inside) == pytest.approx(0.8, abs=0.02)


@pytest.mark.parametrize("close", [[1.0], [2.0, 2.0, 2.0]])
def test_random_walk_needs_a_history_that_moves(close):
    with pytest.raises(InputError) as caught:
        random_walk(np.array(close), 3)
    assert caught.value.column == "close"


@pytest.mark.parametrize("count", [9, 20, 50])
def test_coverage_is_right_for_draws_from_the_truth(count):
    rng = np.random.default_rng(3)
    draws = rng.normal(size=(count + 1, 40_000))
    assert covered(draws[:-1], draws[-1]).mean() == pytest.approx(0.8, abs=0.01)


def test_invalid_share_counts_each_kind():
    fine = [10, 11, 9, 10.5, 1, 1]
    candles = np.array([fine, [10, 10.2, 9, 10.5, 1, 1], [10, 11, 10.1, 10.5, 1, 1], [10, 8, 9, 10, 1, 1]])
    assert invalid_share(candles) == 0.75
    assert invalid_share(np.array([fine])) == 0


def test_ratio_brackets_the_truth():
    rng = np.random.default_rng(4)
    base = rng.exponential(size=400)
    ratio = paired_ratio(base * 0.9 + rng.normal(size=400) * 0.05, base)
    assert ratio.low < 0.9 < ratio.high
    assert ratio.high - ratio.low < 0.05


class RandomWalkForecaster:
    """Stands where the predictor stands, with a forecast whose scores are known: the baseline itself."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def forecast_series(self, series, sampling):
        close = series.candles[:, 3].astype(np.float64)
        rng = np.random.default_rng([sampling.seed, len(close), int(1000 * close[-1])])
        moves = rng.normal(size=(sampling.samples, series.horizon)) * np.sqrt(np.mean(np.diff(close) ** 2))
        values = np.repeat((close[-1] + np.cumsum(moves, axis=1))[:, :, None], 6, axis=2)
        return Paths(values, np.zeros((*values.shape[:2], 2), dtype=np.int64), Window(len(close), slid=False))


@pytest.fixture(scope="module")
def tokenizer():
    from model.tokenizer import KronosTokenizer

    return KronosTokenizer(6, 16, 2, 32, 2, 2, 0.0, 0.0, 0.0, 4, 4, 0.05, 1.0, 1.1, 0.05, 4).eval()


def test_evaluation_of_the_baseline_gives_the_baseline(tokenizer):
    setting = card_scores.Setting(windows=400, history=60, horizon=12, samples=20)
    scores = card_scores.score(RandomWalkForecaster(tokenizer), "toy", simulate(8, 400, 72), setting)
    assert scores.windows == 400
    assert [h.horizon for h in scores.horizons] == [1, 12]
    for horizon in scores.horizons:
        assert horizon.ratio == pytest.approx(1, abs=0.05)
        assert horizon.coverage == pytest.approx(horizon.baseline_coverage, abs=0.08)
    assert scores.invalid == 0
    assert set(scores.close_errors) == {64}
    assert scores.close_errors[64] > 0
    assert len(scores.code_error) == 6


def test_windows_are_spread_over_all_series():
    series = simulate(8, 10, 100)
    chosen = card_scores.pick_windows(series, card_scores.Setting(windows=10, history=60, horizon=12))
    assert len({bars.symbol for bars, _ in chosen}) == 10
    assert all(start + 72 <= 100 for _, start in chosen)
    with pytest.raises(InputError, match="no series has the 201 bars"):
        card_scores.pick_windows(series, card_scores.Setting(windows=10, history=200, horizon=1))


def test_card_says_what_was_measured_and_what_is_missed(tmp_path, tokenizer):
    from model.kronos import Kronos

    tokenizer.save_pretrained(tmp_path / "tokenizer")
    Kronos(4, 4, 1, 16, 2, 32, 0.0, 0.0, 0.0, 0.0, True).save_pretrained(tmp_path / "model")
    horizon = {
        "horizon": 1,
        "crps": 0.66,
        "baseline": 0.5,
        "ratio": 1.32,
        "ratio_low": 1.1,
        "ratio_high": 1.5,
        "coverage": 0.7,
        "baseline_coverage": 0.8,
    }
    scores = {
        "name": "toy",
        "windows": 4,
        "horizons": [horizon],
        "coverage": 0.5,
        "baseline_coverage": 0.8,
        "bias": 0.1,
        "invalid": 0.25,
        "code_error": [0.1] * 6,
        "close_errors": {"64": 0.5, "128": 0.75},
        "seconds": 4.0,
    }
    numbers = {"setting": {"history": 60, "horizon": 12, "samples": 20, "seed": 0}, "sets": [scores]}
    with pytest.raises(InputError, match=r"training\.json"):
        write_card(tmp_path / "README.md", tmp_path, numbers)
    record = {
        "command": "python -m cluster.train --config toy.yaml",
        "torch": "2",
        "device": "cpu",
        "stages": {
            "tokenizer": {"weights": 1000, "steps": 5, "bars": 2_500_000, "minutes": 1.5, "validation_loss": 0.25}
        },
        "config": {
            "run": {"seed": 7},
            "training": {"num_workers": 1},
            "tokenizer": {"phases": [{"window": 32}, {"window": 96}]},
            "data": {
                "source": {
                    "kind": "simulated",
                    "seed": 1,
                    "series": 2,
                    "bars": 3,
                    "bar_minutes": [5],
                    "validation_seed": 2,
                    "validation_series": 1,
                }
            },
        },
    }
    (tmp_path / "training.json").write_text(json.dumps(record))
    write_card(tmp_path / "README.md", tmp_path, numbers)
    card = (tmp_path / "README.md").read_text()
    for text in ("Not a trading model", "toy.yaml", "| 1 | 0.660 | 0.500 | **1.320**", "**25.0%**", "2.5 M"):
        assert text in card
    assert "| error | 0.50 | 0.75 |" in card
    assert "windows of up to 96 bars" in card
    assert "CRPS 1 bars ahead is 1.320" in card
    assert "coverage 0.50 is outside" in card


def test_the_command_says_what_is_missing(tmp_path, capsys):
    assert evaluate.main(["--bundle", str(tmp_path / "absent"), "--card", str(tmp_path / "README.md")]) == 2
    assert "absent" in capsys.readouterr().err


SPLIT_BY_SHARES = {"validation_from": None, "test_from": None, "validation_share": 0.15, "test_share": 0.1}


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ({"path": "/data/a.csv", "validation_from": "2024-05-01"}, "Data: `a.csv`, validation from 2024-05-01."),
        (
            {"path": ["/data/a.csv", "/data/b.csv"], **SPLIT_BY_SHARES},
            "Data: `a.csv`, `b.csv`, 15% of the bar times for validation, 10% of the bar times for test.",
        ),
    ],
)
def test_a_card_of_bars_of_a_market_does_not_say_that_they_were_simulated(tmp_path, source, told):
    """Whatever the source looks like: one path or a list, split at times or by shares."""
    for part, config in (
        ("tokenizer", {"n_enc_layers": 2, "n_dec_layers": 2, "d_model": 16}),
        ("model", {"n_layers": 1, "d_model": 16, "n_heads": 2, "ff_dim": 32, "s1_bits": 4, "s2_bits": 4}),
    ):
        (tmp_path / part).mkdir()
        (tmp_path / part / "config.json").write_text(json.dumps(config))
        (tmp_path / part / "model.safetensors").write_bytes(b"")
    stage = {"weights": 10, "steps": 5, "bars": 100, "minutes": 1.5, "validation_loss": 0.25}
    record = {
        "command": "train",
        "torch": "2",
        "device": "cpu",
        # The tokenizer is an earlier run's: this one has no such stage.
        "stages": {"tokenizer": stage, "predictor": stage | {"parent": {"folder": "runs/before", "sha256": "0"}}},
        "config": {
            "run": {"seed": 7},
            "training": {"num_workers": 0},
            "tokenizer": None,
            "predictor": {"phases": [{"window": 32}]},
            "data": {"source": {"kind": "file", **source}},
        },
    }
    (tmp_path / "training.json").write_text(json.dumps(record))
    numbers = {"setting": {"history": 60, "horizon": 12, "samples": 20, "seed": 0}, "sets": []}
    write_card(tmp_path / "README.md", tmp_path, numbers)
    card = (tmp_path / "README.md").read_text()
    assert card.startswith(f"# {tmp_path.name}\n\nTrained on bars of a market. Finetuned from runs/before")
    assert told in card
    assert "simulated" not in card
    assert "no outside data" not in card


@pytest.mark.parametrize("name", ["windows", "history", "horizon", "samples"])
def test_settings_of_a_card_that_make_no_sense_are_refused(name):
    with pytest.raises(InputError, match=f"{name} must be at least"):
        card_scores.Setting(**{name: 0})


@pytest.mark.parametrize("name", ["garch", "ets"])
def test_extra_baselines_forecast_a_random_walk(name):
    """Where the extra is installed: a centre near the last price, a spread that grows."""
    pytest.importorskip({"garch": "arch", "ets": "statsmodels"}[name])
    close = 100 * np.exp(np.cumsum(np.random.default_rng(3).normal(size=300) * 0.01))
    found = baselines(24, [name])[name](close, 8)
    assert np.abs(found.centre / close[-1] - 1).max() < 0.05
    assert (np.diff(found.std) > 0).all()
    assert found.std[0] == pytest.approx(0.01 * close[-1], rel=0.3)
    with pytest.raises(InputError, match=f"baseline '{name}' cannot be fitted to 3 bars .*--extras"):
        baselines(24, [name])[name](np.full(3, 100.0), 8)


@pytest.mark.parametrize(
    "made",
    [
        lambda: (_ for _ in ()).throw(ValueError("too few observations")),
        lambda: Normal(np.array([1.0, np.nan]), np.ones(2)),
        lambda: Normal(np.ones(2), np.zeros(2)),
    ],
)
def test_a_baseline_that_cannot_be_fitted_says_so_before_the_model_forecasts(monkeypatch, made):
    monkeypatch.setitem(sys.modules, "arch", types.ModuleType("arch"))
    monkeypatch.setattr("cluster.evaluation.baselines.garch", lambda close, horizon: made())
    with pytest.raises(InputError, match=r"baseline 'garch' cannot be fitted to 30 bars .* leave it out of --extras"):
        baselines(5, ["garch"])["garch"](np.arange(1.0, 31.0), 2)
