"""Ctrl-C in the thread that drives the engine, at any line of it: the requests of others go on and lose nothing."""

import asyncio
import random
import sys
from pathlib import Path

import numpy as np
import pytest

import model.engine
from model.engine.types import Request, State, WindowPolicy
from model.types import Sampling
from tests.tiny_engine import candles, engine, plain

FOLDER = str(Path(model.engine.__file__).parent)
BOOKS = ("scheduler.py", "kv_cache.py")
"""A few lines of Python that keep count; an interrupt within them is not made up for."""


class InterruptedAt:
    """Raises KeyboardInterrupt at the n-th line of model/engine that this thread comes to; counts them without n."""

    def __init__(self, n=None):
        self.n, self.lines = n, 0

    def __enter__(self):
        sys.settrace(self._call)
        return self

    def __exit__(self, *_):
        sys.settrace(None)

    def _call(self, frame, event, argument):
        name = frame.f_code.co_filename
        return self._line if name.startswith(FOLDER) and not name.endswith(BOOKS) else None

    def _line(self, frame, event, argument):
        if event == "line" and not self._in_books(frame):
            self.lines += 1
            if self.lines == self.n:
                sys.settrace(None)
                raise KeyboardInterrupt
        return self._line

    @staticmethod
    def _in_books(frame):
        return frame.f_code.co_name in ("_end", "_fail", "submit", "_restart", "wait")


def requests(series_of, told):
    """Of all kinds: several paths and one, a window that slides, hops or fits, told as they come or at the end."""
    return [
        Request(series_of(0, 30, 40), Sampling(samples=3, seed=1), on_bars=lambda *bars: told.append(bars)),
        Request(series_of(50, 60, 12), Sampling(samples=2, seed=2)),
        Request(series_of(90, 60, 8), Sampling(seed=3)),
        Request(series_of(20, 50, 30), Sampling(samples=2, seed=4), WindowPolicy.parse("hop:16")),
        Request(series_of(70, 9, 70), Sampling(samples=2, seed=5)),
    ]


def run_interrupted(tiny, series_of, n):
    """One caller is interrupted at line n; what the others then have, and how many lines there were."""
    running, told = engine(tiny, max_context=64, max_rows=8), []
    mine, others = Request(series_of(10, 40, 20), Sampling(samples=2, seed=9)), requests(series_of, told)
    running.submit(others[:3])
    with InterruptedAt(n) as interrupted:
        try:
            running.submit(others[3:])
            running.run([mine])
        except KeyboardInterrupt:
            pass
    running.wait(others)
    assert all(request.state is State.FINISHED for request in others), [request.error for request in others]
    running.run([Request(series_of(0, 10, 2), Sampling(seed=0))])
    assert mine.state.ended or mine.state is State.QUEUED  # not even submitted
    assert running.cache_slots()[0] == running.running_rows() == 0
    running.check_integrity()
    return others, told, interrupted.lines


@pytest.mark.parametrize("times", [6, pytest.param(100, marks=pytest.mark.slow)])
def test_an_interrupt_at_any_line_costs_nobody_else_anything(tiny, series_of, times):
    whole, told, lines = run_interrupted(tiny, series_of, None)
    for request in whole:
        if request.window.name == "exact":
            wanted = plain(tiny, request.series, request.sampling, 64)[0]
            np.testing.assert_array_equal(request.tokens, wanted)
    for n in sorted(random.Random(0).sample(range(1, lines), times)):
        others, told, _ = run_interrupted(tiny, series_of, n)
        for request, undisturbed in zip(others, whole, strict=True):
            np.testing.assert_array_equal(request.tokens, undisturbed.tokens, err_msg=f"line {n}")
        firsts = np.cumsum([0, *(values.shape[1] for _, values in told)])
        assert [first for first, _ in told] == firsts[:-1].tolist(), n
        streamed = np.concatenate([values for _, values in told], axis=1)
        np.testing.assert_allclose(streamed, candles(others[0]), rtol=1e-5, err_msg=f"line {n}")


def test_an_interrupted_caller_leaves_nothing_behind(tiny, series_of):
    def interrupt(step):
        raise KeyboardInterrupt

    running = engine(tiny)
    with pytest.raises(KeyboardInterrupt):
        running.run([Request(series_of(0, 30, 50), Sampling(seed=0), on_step=interrupt)])
    other = Request(series_of(0, 30, 5), Sampling(seed=0))
    running.run([other])
    assert other.state is State.FINISHED
    assert running.cache_slots()[0] == running.running_rows() == 0
    running.check_integrity()


@pytest.mark.parametrize("raised", [GeneratorExit, asyncio.CancelledError, ValueError])
def test_what_a_callback_raises_ends_its_own_request(tiny, series_of, raised):
    def fail(step):
        raise raised

    running = engine(tiny)
    failing = Request(series_of(0, 30, 9), Sampling(seed=0), on_step=fail)
    other = Request(series_of(0, 30, 9), Sampling(seed=0))
    running.submit([failing])
    running.run([other])
    assert (failing.state, type(failing.error), other.state) == (State.FAILED, raised, State.FINISHED)


def test_a_callback_cannot_wait_for_the_engine_that_calls_it(tiny, series_of):
    running = engine(tiny)
    request = Request(series_of(0, 30, 3), Sampling(seed=0))
    request.on_step = lambda step: running.run([Request(series_of(0, 30, 3), Sampling(seed=0))])
    running.run([request])
    assert request.state is State.FAILED
    assert "a callback cannot wait for the engine" in str(request.error)
