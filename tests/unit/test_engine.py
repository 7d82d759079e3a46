"""The engine against the plain loop, and against itself: alone or in company, early or late, whole or streamed."""

import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.engine import decoding, graphs
from model.engine.attention import SequenceCache
from model.engine.scheduler import BYPASS_LIMIT
from model.engine.types import Request, State, WindowPolicy
from model.errors import QueueFullError, RequestTooLargeError
from model.types import Sampling
from tests.tiny_engine import candles, engine, plain

requests_of_any_shape = st.lists(
    st.tuples(
        st.integers(0, 900),
        st.integers(1, 110),
        st.integers(1, 50),
        st.builds(
            Sampling,
            temperature=st.sampled_from([0.0, 0.6, 1.0, 1.4]),
            top_k=st.sampled_from([0, 0, 1, 7]),
            top_p=st.sampled_from([0.5, 0.9, 1.0]),
            samples=st.integers(1, 5),
            seed=st.integers(0, 2**64 - 1),
        ),
    ),
    min_size=1,
    max_size=6,
)


given_any_company = given(
    shapes=requests_of_any_shape, max_context=st.sampled_from([24, 64, 512]), max_rows=st.sampled_from([4, 64])
)


def check_any_company(tiny, series_of, shapes, max_context, max_rows):
    """Also where windows slide, requests wait for rows, and histories are prefilled in chunks."""
    running = engine(tiny, max_context=max_context, max_rows=max_rows)
    requests = [Request(series_of(*shape), sampling) for *shape, sampling in shapes]
    running.run(requests)
    running.check_integrity()
    assert running.cache_slots()[0] == 0
    for request in requests:
        tokens, values = plain(tiny, request.series, request.sampling, max_context)
        assert request.state is State.FINISHED
        np.testing.assert_array_equal(request.tokens, tokens)
        np.testing.assert_allclose(candles(request), values, rtol=1e-3, atol=1e-3)


def check_fixed_shapes(tiny, series_of, shapes, max_context, max_rows):
    """What CUDA captures, run uncaptured: gathered attention, rows that only fill up, the sampler that sorts."""
    running = engine(tiny, max_context=max_context, max_rows=max_rows, graphs=True)
    requests = [Request(series_of(*shape), sampling) for *shape, sampling in shapes]
    running.run(requests)
    running.check_integrity()
    for request in requests:
        assert request.state is State.FINISHED
        np.testing.assert_array_equal(request.tokens, plain(tiny, request.series, request.sampling, max_context)[0])


@settings(max_examples=8, deadline=None)
@given_any_company
def test_any_company_gives_the_plain_loops_tokens(tiny, series_of, **company):
    check_any_company(tiny, series_of, **company)


@settings(max_examples=8, deadline=None)
@given_any_company
def test_steps_of_fixed_shapes_give_the_plain_loops_tokens(tiny, series_of, **company):
    check_fixed_shapes(tiny, series_of, **company)


@pytest.mark.slow
@pytest.mark.parametrize("check", [check_any_company, check_fixed_shapes])
@settings(max_examples=60, deadline=None)
@given_any_company
def test_much_company_gives_the_plain_loops_tokens(tiny, series_of, check, **company):
    check(tiny, series_of, **company)


def test_fixed_shapes_never_read_memory_that_nobody_wrote(tiny, series_of):
    running = engine(tiny, graphs=True)
    running._runner._memory.fill_(torch.nan)
    request = Request(series_of(0, 20, 30), Sampling(samples=3, seed=1))
    running.run([request])
    np.testing.assert_array_equal(request.tokens, plain(tiny, request.series, request.sampling, 512)[0])


def test_more_rows_than_the_largest_bucket(tiny, series_of, monkeypatch):
    monkeypatch.setattr(graphs, "ROW_BUCKETS", (1, 2))
    request = Request(series_of(0, 20, 6), Sampling(samples=3, seed=1))
    engine(tiny, graphs=True).run([request])
    np.testing.assert_array_equal(request.tokens, plain(tiny, request.series, request.sampling, 512)[0])


@pytest.mark.parametrize("max_context", [512, 40])
def test_public_order_of_unseeded_draws(tiny, series_of, max_context):
    series, sampling = series_of(3, 35, 20), Sampling(samples=4, top_p=0.9)
    torch.manual_seed(8)
    tokens, _ = plain(tiny, series, sampling, max_context)
    torch.manual_seed(8)
    request = Request(series, sampling)
    engine(tiny, max_context=max_context).run([request])
    np.testing.assert_array_equal(request.tokens, tokens)


def test_late_joiner_gets_the_early_joiners_numbers(tiny, series_of):
    shapes = [((0, 90, 30), 3), ((200, 20, 12), 5), ((400, 60, 5), 1)]

    def run(delays):
        running = engine(tiny)
        requests = [Request(series_of(*shape), Sampling(samples=s, seed=s)) for shape, s in shapes]
        for turn in range(60):
            for request, delay in zip(requests, delays, strict=True):
                if delay == turn:
                    running.submit([request])
            running.step()
        running.wait(requests)
        return requests

    early, late = run([0, 0, 0]), run([0, 9, 25])
    for first, second in zip(early, late, strict=True):
        np.testing.assert_array_equal(first.tokens, second.tokens)


@pytest.mark.parametrize("max_context", [512, 64, 30])
def test_stream_equals_whole(tiny, series_of, max_context):
    pieces = []
    request = Request(
        series_of(0, 50, 25), Sampling(samples=3, seed=1), on_bars=lambda first, bars: pieces.append((first, bars))
    )
    engine(tiny, max_context=max_context).run([request])
    assert [first for first, _ in pieces] == list(range(25))
    # Told bar by bar, they went through the decoder one at a time: equal but for float32 rounding.
    error = np.abs(np.concatenate([bars for _, bars in pieces], axis=1) - candles(request)).max(axis=(0, 1))
    assert (error <= 1e-6 * np.abs(candles(request)).max(axis=(0, 1))).all()
    whole = Request(request.series, request.sampling)
    engine(tiny, max_context=max_context).run([whole])
    np.testing.assert_array_equal(candles(request), candles(whole))
    _, values = plain(tiny, request.series, request.sampling, max_context)
    np.testing.assert_allclose(candles(request), values, rtol=1e-3, atol=1e-3)


def test_hop_and_fit_are_exact_until_the_window_is_full(tiny, series_of):
    exact, hop, fit = (
        Request(series_of(0, 50, 30), Sampling(samples=2, seed=2), WindowPolicy.parse(policy))
        for policy in ("exact", "hop:8", "fit")
    )
    engine(tiny, max_context=64).run([exact, hop, fit])
    np.testing.assert_array_equal(hop.tokens[:, :15], exact.tokens[:, :15])
    assert fit.context_used(64) == 64 - 29
    # fit is the plain loop over a history whose first bars the model cannot see.
    roomy = Request(series_of(0, 50, 30), Sampling(samples=2, seed=2), WindowPolicy.parse("hop:1"))
    engine(tiny, max_context=64).run([roomy])
    np.testing.assert_array_equal(roomy.tokens, exact.tokens)


@pytest.mark.parametrize("text", ["", "hop", "hop:0", "hop:-1", "hop:x", "rolling", "exact "])
def test_unknown_window_policy_lists_what_is_accepted(text):
    with pytest.raises(ValueError, match="accepted: exact, fit, hop:K"):
        WindowPolicy.parse(text)


def test_poison_ends_its_own_request_only(tiny, series_of):
    def explode(step):
        if step == 3:
            raise RuntimeError("poison")

    good = [Request(series_of(100 * i, 30, 8), Sampling(samples=2, seed=i)) for i in range(3)]
    bad = Request(series_of(0, 30, 8), Sampling(seed=9), on_step=explode)
    broken = Request(series_of(0, 30, 8), Sampling(seed=9), should_stop=lambda: 1 / 0)
    running = engine(tiny)
    running.run([good[0], bad, good[1], broken, good[2]])
    assert (bad.state, str(bad.error)) == (State.FAILED, "poison")
    assert (broken.state, type(broken.error)) == (State.FAILED, ZeroDivisionError)
    for request in good:
        np.testing.assert_array_equal(request.tokens, plain(tiny, request.series, request.sampling, 512)[0])
    running.check_integrity()
    assert running.cache_slots()[0] == 0


def test_a_failing_step_ends_only_the_lane_that_causes_it(tiny, series_of, monkeypatch):
    running = engine(tiny)
    requests = [Request(series_of(100 * i, 30, 6), Sampling(samples=2, seed=i)) for i in range(3)]
    step = running._runner.step

    def failing(lanes):
        if any(lane.request is requests[1] and lane.step == 2 for lane in lanes):
            raise RuntimeError("bad row")
        step(lanes)

    monkeypatch.setattr(running._runner, "step", failing)
    running.run(requests)
    assert [request.state for request in requests] == [State.FINISHED, State.FAILED, State.FINISHED]
    for request in (requests[0], requests[2]):
        np.testing.assert_array_equal(request.tokens, plain(tiny, request.series, request.sampling, 512)[0])


def test_a_step_that_fails_after_windows_have_moved_is_taken_again(tiny, series_of, monkeypatch):
    """The lanes beside the cause have recomputed their windows by then, here past the end of the history."""
    running = engine(tiny, max_context=20)
    requests = [Request(series_of(100 * i, 12, 45), Sampling(samples=2, seed=i)) for i in range(3)]
    noise = running._runner._noise

    def failing(lanes, head, vocabulary):
        if any(lane.request is requests[1] and lane.step == 38 for lane in lanes):
            raise RuntimeError("bad row")
        return noise(lanes, head, vocabulary)

    monkeypatch.setattr(running._runner, "_noise", failing)
    running.run(requests)
    assert [request.state for request in requests] == [State.FINISHED, State.FAILED, State.FINISHED]
    for request in (requests[0], requests[2]):
        np.testing.assert_array_equal(request.tokens, plain(tiny, request.series, request.sampling, 20)[0])


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


def test_threads_share_one_engine(tiny, series_of):
    running = engine(tiny)
    jobs = [Request(series_of(30 * i, 20 + i, 5 + i % 7), Sampling(samples=1 + i % 3, seed=i)) for i in range(24)]
    threads = [threading.Thread(target=lambda part=jobs[i::4]: [running.run([r]) for r in part]) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for request in jobs:
        assert request.state is State.FINISHED
        np.testing.assert_array_equal(request.tokens, plain(tiny, request.series, request.sampling, 512)[0])
    running.check_integrity()


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


def test_a_joiner_that_fails_costs_the_rows_of_fixed_shapes_nothing(tiny, series_of, monkeypatch):
    """Its first bar is sampled apart from theirs; when that raises, theirs must not have been taken yet."""
    running, steps = engine(tiny, graphs=True), []
    early = Request(series_of(0, 30, 12), Sampling(samples=2, seed=1), on_step=steps.append)
    joiner = Request(series_of(100, 30, 12), Sampling(samples=2, seed=2))
    noise = running._runner._noise

    def failing(lanes, head, vocabulary):
        if any(lane.request is joiner for lane in lanes):
            raise RuntimeError("bad row")
        return noise(lanes, head, vocabulary)

    monkeypatch.setattr(running._runner, "_noise", failing)
    running.submit([early])
    for _ in range(5):
        running.step()
    running.submit([joiner])
    running.wait([early, joiner])
    assert (early.state, joiner.state) == (State.FINISHED, State.FAILED)
    assert steps == list(range(1, 13))
    np.testing.assert_array_equal(early.tokens, plain(tiny, early.series, early.sampling, 512)[0])


def test_a_time_mark_that_no_calendar_has_is_named_before_a_device_sees_it(tiny, series_of):
    requests = [Request(series_of(0, 30, 4), Sampling(seed=0)) for _ in range(3)]
    requests[0].series.future_marks[1, 4] = 13
    requests[1].series.marks[0, 2] = -1
    engine(tiny).run(requests)
    assert [request.state for request in requests] == [State.FAILED, State.FAILED, State.FINISHED]
    assert {request.error.code for request in requests[:2]} == {"bad_marks"}


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


def test_companions_of_several_calls_step_together(tiny, series_of):
    """As the threads of one HTTP request do: each calls for itself, and names what they have in common."""
    running, group = engine(tiny), object()
    requests = [Request(series_of(i, 40 * i + 20, 6), Sampling(seed=i), companions=group) for i in range(4)]
    for request in requests[1:]:
        running.submit([request])
    running.run(requests[:1])
    running.wait(requests)
    assert running.stats().steps == 6


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


def test_single_paths_with_as_many_bars_are_computed_as_one_batch(tiny, series_of, monkeypatch):
    """Whoever leaves, slides or has more paths between them: each has the plain loop's tokens."""
    sizes = []
    batched = SequenceCache._batched

    def counted(caches):
        sizes.append(len(caches))
        return batched(caches)

    monkeypatch.setattr(SequenceCache, "_batched", counted)
    running = engine(tiny, max_context=48)
    shapes = [(40 * i, 30, 40) for i in range(6)]  # their windows slide, all in the same step
    requests = [Request(series_of(*shape), Sampling(seed=i)) for i, shape in enumerate(shapes)]
    requests[2] = Request(series_of(*shapes[2]), Sampling(samples=2, seed=2))
    steps = []
    requests[4].on_step = steps.append
    requests[4].should_stop = lambda: len(steps) >= 7
    running.run(requests)
    running.check_integrity()
    assert requests[4].state is State.CANCELLED
    # Two before the one with two paths, three after it, until one of these left a gap.
    assert set(sizes) == {2, 3}
    for request in requests[:4] + requests[5:]:
        np.testing.assert_array_equal(request.tokens, plain(tiny, request.series, request.sampling, 48)[0])


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


def test_candles_that_are_not_finite_are_refused(tiny, series_of):
    """Also volumes whose deviation is not, in float32: they gave NaN."""
    for column, value in ((3, np.nan), (0, np.inf), (4, 3e19)):
        series = series_of(0, 30, 2)
        spoiled = series.candles.copy()
        spoiled[7, column] = value
        bad = Request(replace(series, candles=spoiled), Sampling(seed=0))
        running = engine(tiny)
        running.run([bad])
        assert (bad.state, bad.error.code) == (State.FAILED, "not_finite")
        running.check_integrity()
