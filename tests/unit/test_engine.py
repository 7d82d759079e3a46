"""The engine against the plain loop, and against itself: alone or in company, early or late, whole or streamed."""

import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.engine import graphs
from model.engine.attention import SequenceCache
from model.engine.types import Request, State, WindowPolicy
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
