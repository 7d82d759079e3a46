"""The real engine of a replica, over the golden pair."""

import sys

import numpy as np
import pytest
import torch

from model.types import Sampling
from serve_app.config import AppConfig
from serve_app.deployment import KronosReplica, warm_up_series
from serve_app.engine import EngineFactory
from serve_app.live_config import LiveConfig
from serve_app.priority import FORECASTS
from tests.niceness import niceness


def config(golden, **settings):
    models = {"tiny": {"source": str(golden), "device": "cuda:0", "max_context": 64}}
    return AppConfig(models=models, default_model="tiny", **settings)


def make_engine(config, group="cpu"):
    return EngineFactory(config, group)("tiny", config.models["tiny"]).start()


def test_an_engine_has_the_settings_of_its_model(golden, predictor):
    engine = make_engine(config(golden, clip=3.5))
    assert (engine._predictor.clip, engine._predictor.max_context) == (3.5, 64)
    assert (engine.identity.id, engine.identity.repo, engine.identity.max_context) == ("tiny", "local", 64)
    assert engine.identity.parameters > 0
    assert str(golden) not in engine.identity.model_version + engine.identity.tokenizer_version
    assert (engine.device.device, engine.device.backend) == ("cpu", "cpu")
    assert "'cuda:0' was requested" in engine.device.device_warning

    engine = make_engine(config(golden))
    sampling = Sampling(samples=2, seed=3)
    ours, theirs = engine.forecast(warm_up_series(), sampling), predictor.forecast_series(warm_up_series(), sampling)
    np.testing.assert_array_equal(ours.tokens, theirs.tokens)


def test_a_compiler_that_fails_is_said_in_every_answer(golden, monkeypatch):
    def broken(*arguments, **options):
        raise RuntimeError("no compiler")

    monkeypatch.setattr("torch._inductor.compile", broken)
    engine = make_engine(config(golden, groups={"cpu": {"compile": True}}))
    assert "torch.compile is off" in engine.device.device_warning
    assert np.isfinite(engine.forecast(warm_up_series(), Sampling(seed=0)).values).all()


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_what_computes_has_the_threads_of_num_cpus_and_the_priority_of_forecasts(golden, threads):
    for num_cpus, expected in ((3.0, 3), (0.5, 1)):
        live = LiveConfig(config(golden, groups={"cpu": {"num_cpus": num_cpus}}), {})
        replica = KronosReplica("cpu", live, EngineFactory)
        assert replica._store.states()["tiny"]["state"] == "loaded"
        [engine] = replica._store.engines
        worker, thread = replica._workers._threads, engine._engine._thread
        worker.submit(engine.forecast, warm_up_series(), Sampling(seed=0)).result()
        assert thread.submit(torch.get_num_threads).result() == expected
        if sys.platform == "linux":
            assert thread.submit(niceness).result() == min(19, niceness() + FORECASTS)


def test_no_cuda_call_is_reached_in_a_cpu_group(golden, monkeypatch):
    def forbidden(*args, **kwargs):
        raise AssertionError("a CPU replica touched the GPU")

    for name in ("device_count", "get_device_properties", "current_device", "init", "synchronize"):
        monkeypatch.setattr(torch.cuda, name, forbidden)
    engine = make_engine(config(golden))
    assert np.isfinite(engine.forecast(warm_up_series(), Sampling(seed=0)).values).all()


def test_precision_is_what_was_asked_for_or_says_why_not(golden, monkeypatch):
    facts = make_engine(config(golden, groups={"cpu": {"precision": "int8"}})).device
    assert (facts.precision, facts.precision_reason) == ("int8", "as requested")
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    engine = make_engine(config(golden, groups={"cpu": {"precision": "bf16"}}))
    assert engine.device.precision == "fp32"
    assert "precision 'bf16' was requested" in engine.device.precision_reason
    assert "precision 'bf16' was requested" in engine.device.device_warning
    assert np.isfinite(engine.forecast(warm_up_series(), Sampling(seed=0)).values).all()


def test_what_an_engine_will_need(golden):
    candidate = EngineFactory(config(golden, groups={"cpu": {"cache_gb": 0.5}}), "cpu")(
        "tiny", config(golden).models["tiny"]
    )
    weights = sum((golden / part / "model.safetensors").stat().st_size for part in ("model", "tokenizer"))
    # Twice the weights, but for headers and buffers, and the cache.
    assert candidate.size == pytest.approx(2 * weights + 2**29, rel=0.01)


def test_the_budget_counts_what_compiling_keeps(golden):
    """Each compiled number of rows packs the weights anew."""

    def size(**settings):
        made = config(golden, groups={"cpu": settings})
        return EngineFactory(made, "cpu")("tiny", made.models["tiny"]).size

    assert size(compile=True) > size()
