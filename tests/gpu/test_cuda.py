"""On a CUDA machine: the engine there against the plain loop on the CPU. Skipped, with the reason, anywhere else."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from model import Kronos, KronosPredictor, KronosTokenizer, resolve_device
from model.device import device_info
from model.engine.engine import Engine
from model.engine.types import EngineConfig, Request
from model.frames import series_from_frame
from model.types import Sampling

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA device"),
]


def load_pair(golden):
    """A pair of its own: a predictor moves its networks to its device."""
    return Kronos.from_pretrained(golden / "model"), KronosTokenizer.from_pretrained(golden / "tokenizer")


@pytest.fixture
def window(bars):
    return bars[:90], bars.timestamps[:90], bars.timestamps[90:110]


def test_auto_takes_the_gpu_and_says_so():
    device, warning = resolve_device("auto")
    assert device == torch.device("cuda:0")
    assert warning is None
    info = device_info(device)
    assert info.precision in ("bf16", "fp32")
    assert info.memory_total_bytes > 0


def test_fp32_greedy_equals_the_cpu(golden, window):
    def forecast(device):
        predictor = KronosPredictor(*load_pair(golden), device=device, precision="fp32")
        return predictor.forecast(*window, T=0, sample_count=1).paths

    np.testing.assert_allclose(forecast("cuda"), forecast("cpu"), rtol=1e-3)


def test_seeded_paths_repeat(golden, window):
    predictor = KronosPredictor(*load_pair(golden), device="cuda")
    first, second = (predictor.forecast(*window, sample_count=4, seed=3).paths for _ in range(2))
    np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("graphs", [True, False])
def test_engine_tokens_in_fp32_equal_the_cpus(golden, bars, graphs):
    """Captured and eager, for requests of several shapes at once; a rounding may move a few tokens, not most."""

    def tokens(device, **config):
        model, tokenizer = load_pair(golden)
        engine = Engine(
            model.to(device).eval(), tokenizer.to(device).eval(), EngineConfig(cache_bytes=2**26, **config), device
        )
        requests = [
            Request(
                series_from_frame(
                    bars[start : start + 80], bars.timestamps[start : start + 80], bars.timestamps[start + 80 :][:20]
                ),
                Sampling(samples=samples, seed=start, top_p=0.9),
            )
            for start, samples in ((0, 1), (100, 5), (200, 3))
        ]
        engine.run(requests)
        engine.check_integrity()
        assert engine.warnings == ()
        return np.concatenate([request.tokens.reshape(-1) for request in requests])

    captured = tokens(torch.device("cuda:0"), graphs=graphs)
    assert (captured == tokens(torch.device("cpu"))).mean() > 0.95


def test_captured_steps_in_bf16(golden, window):
    predictor = KronosPredictor(*load_pair(golden), device="cuda", precision="bf16")
    paths = predictor.forecast(*window, sample_count=8, seed=3).paths
    assert predictor.engine.warnings == ()
    assert np.isfinite(paths).all()


def captured_tokens(golden, bars, device):
    model, tokenizer = load_pair(golden)
    engine = Engine(model.to(device).eval(), tokenizer.to(device).eval(), EngineConfig(cache_bytes=2**26), device)
    series = series_from_frame(bars[:80], bars.timestamps[:80], bars.timestamps[80:][:20])
    requests = [Request(series, Sampling(samples=samples, seed=samples)) for samples in (1, 3, 9)]
    engine.run(requests)
    assert engine.warnings == ()
    return [request.tokens for request in requests]


def test_engines_of_several_threads_capture_at_the_same_time(golden, bars):
    device = torch.device("cuda:0")
    expected = captured_tokens(golden, bars, device)
    with ThreadPoolExecutor(3) as pool:
        for tokens in pool.map(lambda _: captured_tokens(golden, bars, device), range(3)):
            for actual, wanted in zip(tokens, expected, strict=True):
                np.testing.assert_array_equal(actual, wanted)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="this machine has no second CUDA device")
def test_graphs_are_captured_on_the_engines_own_device(golden, bars):
    first, second = (captured_tokens(golden, bars, torch.device("cuda", index)) for index in range(2))
    for tokens, expected in zip(second, first, strict=True):
        assert len(np.unique(tokens[0], axis=0)) > 1
        assert (tokens == expected).mean() > 0.95
