"""The real engine of a replica, over the golden pair."""

import numpy as np
import pytest
import torch

from model.types import Sampling
from serve_app.config import AppConfig
from serve_app.deployment import KronosReplica, warm_up_series
from serve_app.engine import EngineFactory


def config(golden, **settings):
    models = {"tiny": {"source": str(golden), "device": "cuda:0", "max_context": 64}}
    return AppConfig(models=models, default_model="tiny", **settings)


def test_an_engine_has_the_settings_of_its_model(golden, predictor):
    engine = EngineFactory(config(golden, clip=3.5))("tiny", "cpu")
    assert (engine._predictor.clip, engine._predictor.max_context) == (3.5, 64)
    assert (engine.identity.id, engine.identity.repo, engine.identity.max_context) == ("tiny", "local", 64)
    assert engine.identity.parameters > 0
    assert str(golden) not in engine.identity.model_version + engine.identity.tokenizer_version
    assert (engine.device.device, engine.device.backend) == ("cpu", "cpu")
    assert "'cuda:0' was requested" in engine.device.device_warning

    engine = EngineFactory(config(golden))("tiny", "cpu")
    sampling = Sampling(samples=2, seed=3)
    ours, theirs = engine.forecast(warm_up_series(), sampling), predictor.forecast_series(warm_up_series(), sampling)
    np.testing.assert_array_equal(ours.tokens, theirs.tokens)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_threads_follow_num_cpus(golden, threads):
    for num_cpus, expected in ((3.0, 3), (0.5, 1)):
        replica = KronosReplica("cpu", config(golden, groups={"cpu": {"num_cpus": num_cpus}}), EngineFactory)
        assert torch.get_num_threads() == expected
        assert replica._store.states(["tiny"])["tiny"]["state"] == "loaded"


def test_no_cuda_call_is_reached_in_a_cpu_group(golden, monkeypatch):
    def forbidden(*args, **kwargs):
        raise AssertionError("a CPU replica touched the GPU")

    for name in ("device_count", "get_device_properties", "current_device", "init", "synchronize"):
        monkeypatch.setattr(torch.cuda, name, forbidden)
    engine = EngineFactory(config(golden))("tiny", "cpu")
    assert np.isfinite(engine.forecast(warm_up_series(), Sampling(seed=0)).values).all()
