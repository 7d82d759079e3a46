"""Compiled steps against the plain loop, and what happens where nothing can be compiled."""

import shutil
from functools import partial

import numpy as np
import pytest
import torch

from model.engine.types import Request, State
from model.types import Sampling
from tests.tiny_engine import engine, plain


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_steps_give_the_plain_loops_tokens(tiny, series_of):
    running = engine(tiny, compile_rows=(4,))
    assert running.warnings == ()
    calls = []
    compiled = running._runner._compiled._compiled
    for part, step in compiled.items():
        compiled[part] = partial(_counted, calls, part, step)
    shapes = [((0, 90, 30), 3), ((200, 20, 12), 1), ((400, 60, 20), 4)]
    requests = [Request(series_of(*shape), Sampling(samples=s, seed=s)) for shape, s in shapes]
    running.run(requests)
    assert set(calls) == {("advance", 4), ("s1", 4), ("s2", 4)}
    for request in requests:
        np.testing.assert_array_equal(request.tokens, plain(tiny, request.series, request.sampling, 512)[0])


def _counted(calls, part, step, *arguments):
    calls.append(part)
    return step(*arguments)


@pytest.mark.parametrize("cause", ["no compiler", "int8"])
def test_without_a_compiler_steps_run_eagerly_and_say_so(tiny, series_of, monkeypatch, caplog, cause):
    def broken(*arguments, **options):
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr("torch._inductor.compile", broken)
    running = engine(tiny, compile_rows=(1,), precision="int8" if cause == "int8" else "fp32")
    [warning] = running.warnings
    assert "torch.compile is off" in warning
    assert warning in caplog.text
    request = Request(series_of(0, 20, 6), Sampling(seed=1))
    running.run([request])
    assert request.state is State.FINISHED


def test_a_compiled_step_that_fails_later_is_computed_eagerly(tiny, series_of, monkeypatch):
    calls = []

    def compile_for_one_call(graph, inputs, options):
        def compiled(*arguments):
            calls.append(1)
            if len(calls) > 3:  # the three parts of a step are called once each while they are made
                raise RuntimeError("worked once, and failed")
            return torch.utils._pytree.tree_leaves(graph(*arguments))

        return compiled

    monkeypatch.setattr("torch._inductor.compile", compile_for_one_call)
    running = engine(tiny, compile_rows=(4,))
    assert running.warnings == ()
    request = Request(series_of(0, 20, 6), Sampling(samples=3, seed=1))
    running.run([request])
    [warning] = running.warnings
    assert "worked once" in warning
    assert len(calls) == 4
    np.testing.assert_array_equal(request.tokens, plain(tiny, request.series, request.sampling, 512)[0])
