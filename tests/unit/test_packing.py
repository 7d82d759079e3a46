"""Packed layers: the same numbers as plain ones, whatever the rows beside them, and what other precisions change."""

import numpy as np
import pytest
import torch

from model.device import precision_obstacle
from model.engine import packing
from model.engine.types import Request
from model.types import Sampling
from tests.tiny_engine import CPU, engine, plain


def test_weights_that_are_read_from_memory_give_the_plain_loops_tokens(tiny, series_of, monkeypatch):
    """Products of one and two rows, which large networks compute from weights that are not packed."""
    monkeypatch.setattr(packing, "STREAMED_WEIGHTS", 0)
    running = engine(tiny, max_context=64)
    requests = [Request(series_of(100 * s, 50, 30), Sampling(samples=s, seed=s)) for s in (1, 2, 3)]
    for request in requests:
        running.run([request])
        np.testing.assert_array_equal(request.tokens, plain(tiny, request.series, request.sampling, 64)[0])


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 24), (2, 24), (1, 1, 24), (2, 1, 24), (1, 2, 24), (3, 24)])
def test_few_rows_are_the_layers(shape, bias):
    torch.manual_seed(0)
    linear = torch.nn.Linear(24, 40, bias=bias)
    x = torch.randn(shape)
    with torch.inference_mode():
        found = packing.PackedLinear(linear, torch.float32, streamed=True)(x)
        torch.testing.assert_close(found, linear(x))
        assert found.is_contiguous()


def test_int8_rows_do_not_feel_their_neighbours(tiny, series_of):
    alone, company = (engine(tiny, precision="int8") for _ in range(2))
    request, same = (Request(series_of(0, 60, 30), Sampling(samples=2, seed=1)) for _ in range(2))
    alone.run([request])
    company.run([same, Request(series_of(300, 60, 40), Sampling(samples=3, seed=2, temperature=1.4))])
    np.testing.assert_array_equal(same.tokens, request.tokens)


def test_a_row_of_int8_is_computed_by_itself():
    torch.manual_seed(0)
    linear, x = torch.nn.Linear(32, 24), torch.randn(6, 1, 32) * torch.tensor([1e-3, 1, 10, 1e4, 0, 1]).view(6, 1, 1)
    quantised = packing.Int8Linear(linear)
    whole = quantised(x)
    assert torch.equal(whole, torch.cat([quantised(row[None]) for row in x]))
    error = (whole - linear(x)).abs().amax(-1)
    assert (error <= 0.06 * x.abs().amax(-1) + 1e-6).all()


@pytest.mark.parametrize(("precision", "agreement"), [("bf16", 0.9), ("int8", 0.8)])
def test_reduced_precision_mostly_agrees(tiny, series_of, precision, agreement):
    """First greedy tokens of many windows: later ones follow from the first that differs."""
    shapes = [(start, 60, 1) for start in range(0, 1600, 25)]
    exact, reduced = ([Request(series_of(*s), Sampling(temperature=0, seed=0)) for s in shapes] for _ in range(2))
    obstacle = precision_obstacle(precision, CPU)
    if obstacle is not None:
        with pytest.raises(ValueError, match="bfloat16"):
            engine(tiny, precision=precision)
        pytest.skip(obstacle)
    engine(tiny).run(exact)
    engine(tiny, precision=precision).run(reduced)
    same = np.mean([np.array_equal(a.tokens, b.tokens) for a, b in zip(exact, reduced, strict=True)])
    assert same >= agreement
