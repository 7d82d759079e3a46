"""The checkpoint that comes with the project: small enough, loadable, described, and its forecasts are not absurd."""

import json
from pathlib import Path

import numpy as np
import pytest

from cluster.evaluation.baselines import random_walk
from cluster.training.config_file import load_config, parse_config
from model import Kronos, KronosPredictor, KronosTokenizer
from model.frames import candle_array, time_marks
from model.types import Sampling, Series

ROOT = Path(__file__).parents[2]
BUNDLE = ROOT / "model/bundled"


@pytest.fixture(scope="module")
def bundled():
    return KronosPredictor(
        Kronos.from_pretrained(BUNDLE / "model"), KronosTokenizer.from_pretrained(BUNDLE / "tokenizer"), device="cpu"
    )


def test_size_and_contents():
    files = {path.relative_to(BUNDLE).as_posix() for path in BUNDLE.rglob("*") if path.is_file()}
    weights = {f"{part}/{name}" for part in ("tokenizer", "model") for name in ("config.json", "model.safetensors")}
    assert files == weights | {"README.md", "training.json"}
    assert sum(path.stat().st_size for path in BUNDLE.rglob("*") if path.is_file()) <= 8_000_000


def test_the_record_names_the_configuration_that_made_it():
    record = json.loads((BUNDLE / "training.json").read_text())
    path = record["command"].split("--config ")[1].split()[0]
    # Options that came later have their defaults in both.
    assert parse_config(record["config"]) == load_config(ROOT / path)
    assert record["command"] in (BUNDLE / "README.md").read_text()


def test_a_forecast_of_real_candles_stays_where_a_random_walk_would(bundled, bars):
    history, ahead = bars.iloc[1000:1400], bars.iloc[1400:1448]
    series = Series(candle_array(history), time_marks(history["timestamps"]), time_marks(ahead["timestamps"]))
    values = bundled.forecast_series(series, Sampling(1.0, 0, 1.0, 20, seed=7)).values
    assert values.shape == (20, 48, 6)
    assert np.isfinite(values).all()
    walk = random_walk(history["close"].to_numpy(), 48)
    surprise = (values[:, :, 3] - walk.centre) / walk.std
    assert np.abs(surprise[:, -1]).max() < 6
    assert 0.4 < surprise[:, -1].std() < 2  # neither a point nor a fog
