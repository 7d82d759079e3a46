"""Walk-forward forecasts on Ray actors: the same numbers as in one process."""

import numpy as np
import pytest
import ray

from cluster.candles.simulate import simulate
from cluster.evaluation.forecasting import ModelChoice, forecast_all
from cluster.evaluation.walk_forward import WalkForward, pick_windows
from model.errors import CheckpointNotFoundError, InputError


@pytest.fixture(scope="module")
def choice(tmp_path_factory, golden):
    folder = tmp_path_factory.mktemp("bundle")
    for part in ("model", "tokenizer"):
        (folder / part).symlink_to(golden / part)
    return ModelChoice(str(folder), device="cpu")


@pytest.fixture(scope="module", autouse=True)
def _cluster():
    """One for all tests: forecasts join the cluster that this process is connected to."""
    ray.init(address="local", num_cpus=2, include_dashboard=False, _node_ip_address="127.0.0.1", log_to_driver=False)
    yield
    ray.shutdown()


SETTING = WalkForward(history=40, horizon=6, samples=32, every=6, seed=3)


def closes(choice, windows, workers, warn=lambda text: None):
    told = []
    parts = list(forecast_all(choice, windows, SETTING, workers=workers, on_done=told.append, warn=warn))
    assert [part.first for part in parts] == [8 * i for i in range(len(parts))]
    assert told[-1] == len(windows)
    return np.concatenate([part.closes for part in parts])


@pytest.mark.parametrize("workers", [3, pytest.param(1, marks=pytest.mark.slow)])
def test_any_number_of_workers_gives_the_same_numbers(choice, workers):
    """Also fewer than were asked for, on other devices than were asked for: both are said."""
    windows = pick_windows(simulate(5, 3, 130, bar_minutes=(60,)), SETTING).chosen
    here = closes(choice, windows, 0)
    assert here.shape == (len(windows), 32, 6)
    said = []
    asked = ModelChoice(choice.model, device="cuda")
    np.testing.assert_array_equal(closes(asked, windows, workers, said.append), here)
    assert "'cuda' with 1 GPU(s)" in said[0]
    assert ["3 actors were requested and 2 fit" in text for text in said[1:]] == [True] * (workers > 2)


def test_what_cannot_run_is_said_and_nothing_waits(choice):
    windows = pick_windows(simulate(5, 3, 130, bar_minutes=(60,)), SETTING).chosen
    with pytest.raises(InputError, match=r"needs 64 CPU\(s\) .* no node has more than 2 .*--threads"):
        list(forecast_all(ModelChoice(choice.model, device="cpu", threads=64), windows, SETTING, workers=2))
    with pytest.raises((CheckpointNotFoundError, InputError)):
        list(forecast_all(ModelChoice("nowhere", device="cpu"), windows, SETTING, workers=1))
