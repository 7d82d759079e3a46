"""The trainer on a CUDA machine: the gradient of the CPU, mixed precision that learns, a size that fits."""

import time

import pytest
import torch

from cluster.training.memory import settle_batch_sizes
from cluster.training.worker import Worker
from tests.tiny_training import CPU, gradients, largest_relative, save_tokenizer, tiny_config

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA device"),
]


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def on_gpu(tokenizer_folder, **options):
    config = tiny_config("predictor", **options)
    return Worker(config, "predictor", tokenizer_folder, torch.device("cuda:0"))


@pytest.mark.verify("V24")
def test_one_step_has_the_gradient_of_the_cpu(tokenizer_folder, figure):
    found = []
    for worker in (Worker(tiny_config("predictor"), "predictor", tokenizer_folder, CPU), on_gpu(tokenizer_folder)):
        worker.add_gradients(worker._stream(0)[0].batch(0))
        found.append(gradients(worker).cpu())
    difference = largest_relative(found[1], found[0])
    figure(f"fp32, one step: largest gradient difference from the CPU {difference:.1e}", "at most 1e-3")
    assert difference <= 1e-3


@pytest.mark.verify("V24")
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_hundred_steps_in_mixed_precision(tokenizer_folder, figure, precision):
    worker = on_gpu(tokenizer_folder, steps=100, training={"precision": precision})
    assert worker.precision.name == precision
    before = worker.validate()["validation_loss"]
    began, bars = time.monotonic(), 0
    for _ in range(100):
        bars += worker.train_step()[1]
    seconds = time.monotonic() - began
    after = worker.validate()["validation_loss"]
    figure(f"{precision}: loss {before:.3f} → {after:.3f} in 100 steps, {2 * bars / seconds:,.0f} tokens/s", "falls")
    assert after < 0.95 * before
    assert worker.skipped < 10


def test_auto_finds_a_size_that_fits(tokenizer_folder, tmp_path):
    worker = on_gpu(tokenizer_folder, phases=[{"steps": 1, "window": 24, "batch_size": "auto"}])
    settle_batch_sizes(worker, tmp_path)
    assert worker.batch_sizes[0] >= 1
    worker.train_step()
