"""On a CUDA machine: the engine there against the plain loop on the CPU. Skipped, with the reason, anywhere else."""

import numpy as np
import pytest
import torch

from model import Kronos, KronosPredictor, KronosTokenizer, resolve_device
from model.device import device_info

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
