"""Who is admitted, who waits for whom, who is refused, and what a cancelled request leaves."""

import threading

import numpy as np
import pytest

from model.engine import decoding
from model.engine.scheduler import BYPASS_LIMIT
from model.engine.types import Request, State
from model.errors import QueueFullError, RequestTooLargeError
from model.types import Sampling
from tests.tiny_engine import candles, engine, plain


def test_cancelled_rows_leave_within_one_step(tiny, series_of):
    stop = threading.Event()
    request = Request(series_of(0, 30, 200), Sampling(samples=4, seed=0), should_stop=stop.is_set)
    waiting = Request(series_of(0, 30, 9), Sampling(samples=62, seed=0), should_stop=stop.is_set)
    running = engine(tiny)
    running.submit([request, waiting])
    for _ in range(10):
        running.step()
    assert (request.state, waiting.state) == (State.RUNNING, State.QUEUED)
    assert running.running_rows() == 4
    stop.set()
    running.step()
    assert (request.state, waiting.state) == (State.CANCELLED, State.CANCELLED)
    assert running.running_rows() == running.queued_work() == running.cache_slots()[0] == 0
    running.check_integrity()


def test_full_queue_and_too_large_requests_are_refused_whole(tiny, series_of):
    running = engine(tiny, max_queued_work=100)
    fitting = [Request(series_of(0, 30, 10), Sampling(samples=6, seed=i)) for i in range(3)]
    running.submit(fitting[:1])
    with pytest.raises(QueueFullError, match="60 rows"):
        running.submit(fitting[1:])
    assert running.queued_work() == 60
    idle = engine(tiny, max_queued_work=100)
    idle.run(fitting[1:])
    assert all(request.state is State.FINISHED for request in fitting[1:])
    small = engine(tiny, cache_bytes=2**16)
    with pytest.raises(RequestTooLargeError, match="fewer paths"):
        small.run([Request(series_of(0, 100, 50), Sampling(samples=50, seed=0))])
    small.run([(request := Request(series_of(0, 5, 2), Sampling(seed=0)))])
    assert request.state is State.FINISHED


@pytest.mark.parametrize("streamed", [False, True])
def test_the_cache_holds_all_that_a_request_remembers(tiny, series_of, streamed):
    """To the last slot: the decoder's keys and values too, beside the model's if bars are told before the end."""
    whole = Request(series_of(0, 40, 20), Sampling(samples=3, seed=0))
    engine(tiny).run([whole])
    told = []
    on_bars = (lambda first, bars: told.append(bars)) if streamed else None
    request = Request(series_of(0, 40, 20), Sampling(samples=3, seed=0), on_bars=on_bars)
    needed = 4 * engine(tiny)._runner.cache_size(request)
    assert (needed > 4 * engine(tiny)._runner.cache_size(whole)) is streamed
    with pytest.raises(RequestTooLargeError):
        engine(tiny, cache_bytes=needed - 1).run([request])
    exact = engine(tiny, cache_bytes=needed)
    exact.run([request])
    assert np.array_equal(request.normalised, whole.normalised)
    assert sum(bars.shape[1] for bars in told) == (20 if streamed else 0)
    exact.check_integrity()


def test_short_requests_are_not_held_up_by_a_long_one(tiny, series_of):
    running = engine(tiny)
    long = Request(series_of(0, 110, 200), Sampling(samples=8, seed=0))
    running.submit([long])
    for _ in range(5):
        running.step()
    short = Request(series_of(0, 20, 4), Sampling(seed=1))
    running.submit([short])
    turns = 0
    while not short.state.ended:
        running.step()
        turns += 1
    assert turns <= 6
    assert not long.state.ended


def test_companions_step_together_and_hold_up_nobody_else(tiny, series_of):
    """Six histories of a call: as many steps as bars. A stranger, and who reads bars as they come, wait for none."""
    running = engine(tiny)
    running.run([Request(series_of(i, 40 * i + 20, 6), Sampling(seed=i)) for i in range(6)])
    assert running.stats().steps == 6
    seen: list[str] = []
    long = [Request(series_of(i, 400, 2), Sampling(seed=i), on_step=lambda step: seen.append("long")) for i in (1, 2)]
    reader = Request(series_of(0, 20, 6), Sampling(seed=0), on_bars=lambda first, bars: seen.append("reader"))
    stranger = Request(series_of(0, 20, 6), Sampling(seed=0), on_step=lambda step: seen.append("stranger"))
    running.submit([stranger])
    running.run([*long, reader])
    running.wait([stranger])
    assert set(seen[:12]) == {"stranger", "reader"}
    assert seen[12:] == ["long"] * 4
    running.check_integrity()


def test_companions_of_several_calls_step_together(tiny, series_of):
    """As the threads of one HTTP request do: each calls for itself, and names what they have in common."""
    running, group = engine(tiny), object()
    requests = [Request(series_of(i, 40 * i + 20, 6), Sampling(seed=i), companions=group) for i in range(4)]
    for request in requests[1:]:
        running.submit([request])
    running.run(requests[:1])
    running.wait(requests)
    assert running.stats().steps == 6


def test_a_large_request_that_waits_is_overtaken_so_often_and_no_more(tiny, series_of):
    """By requests, not by steps: those that fit do not wait for it just because it has waited long."""
    running = engine(tiny, max_rows=8)
    long = Request(series_of(0, 20, 400), Sampling(samples=2, seed=0))
    large = Request(series_of(0, 20, 2), Sampling(samples=7, seed=0))
    running.submit([long, large])
    for _ in range(BYPASS_LIMIT + 5):
        running.step()
    for overtaken in range(BYPASS_LIMIT + 1):
        small = Request(series_of(0, 5, 1), Sampling(seed=0))
        running.submit([small])
        running.step()
        assert (small.state is State.QUEUED) == (overtaken == BYPASS_LIMIT)
        while small.state not in (State.QUEUED, State.FINISHED):
            running.step()
    assert (long.state, large.state) == (State.RUNNING, State.QUEUED)


def test_decoding_a_large_result_leaves_the_others_their_steps(tiny, series_of, monkeypatch):
    monkeypatch.setattr(decoding, "DECODE_SHARE", 20)
    running, steps = engine(tiny), []
    other = Request(series_of(0, 20, 200), Sampling(seed=0), on_step=steps.append)
    large, dropped = (Request(series_of(0, 30, 30), Sampling(samples=5, seed=1)) for _ in range(2))
    running.submit([other, large])
    while large.state is not State.DECODING:
        running.step()
    before = len(steps)
    running.wait([large])
    # Four bars of five paths at a time; the first share was taken with the last step.
    assert len(steps) - before == 7
    alone = Request(large.series, large.sampling)
    engine(tiny).run([alone])
    np.testing.assert_array_equal(candles(large), candles(alone))
    np.testing.assert_allclose(candles(large), plain(tiny, large.series, large.sampling, 512)[1], rtol=1e-3, atol=1e-3)

    stop = threading.Event()
    dropped.should_stop = stop.is_set
    running.submit([dropped])
    while dropped.state is not State.DECODING:
        running.step()
    stop.set()
    running.step()
    assert dropped.state is State.CANCELLED
    assert running.running_rows() == 1
    running.check_integrity()


@pytest.mark.parametrize("samples", [1, 3])
def test_a_long_history_passes_the_tokenizer_block_by_block_between_the_steps_of_others(tiny, series_of, samples):
    running, steps, told = engine(tiny), [], []
    running._runner.results.history_share = 20
    early = Request(series_of(0, 15, 60), Sampling(seed=1), on_step=steps.append)
    running.submit([early])
    while not steps:
        running.step()
    blocks, before = len(tiny[1].encoder), len(steps)
    late = Request(
        series_of(100, 80, 9), Sampling(samples=samples, seed=2), on_step=lambda step: told.append(len(steps))
    )
    running.run([late])
    assert told[0] - before >= blocks
    running.wait([early])
    for request in (early, late):
        tokens, values = plain(tiny, request.series, request.sampling, 512)
        np.testing.assert_array_equal(request.tokens, tokens)
        np.testing.assert_array_less(np.abs(candles(request) - values) / request.scale, 1e-4)
