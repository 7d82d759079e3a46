"""An engine with a thread of its own: that thread makes all steps, and how long it lives."""

import gc
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from model.engine.types import Request, State
from model.types import Sampling
from serve_app.priority import AT_ONCE, LOADING, LoadingThreads, lower_by
from tests.niceness import niceness
from tests.tiny_engine import engine, plain

ROOT = Path(__file__).parents[2]

linux = pytest.mark.skipif(sys.platform != "linux", reason="priorities are a process's elsewhere")


@pytest.fixture
def running(tiny):
    return engine(tiny, own_thread=True, max_context=64)


def request(series_of, seed=0, horizon=4, **options):
    return Request(series_of(seed, 20 + seed, horizon), Sampling(samples=1 + seed % 3, seed=seed), **options)


def seen_in_steps(running, series_of, ask, threads=1, calls=1):
    """What ask() says during steps of requests from so many threads, and which threads those were."""
    seen = set()

    def call(seed):
        mine = request(series_of, seed, on_step=lambda step: seen.add(ask()))
        running.run([mine])
        assert mine.state is State.FINISHED, mine.error
        return threading.get_ident()

    with ThreadPoolExecutor(threads) as pool:
        callers = set(pool.map(call, range(calls)))
    return seen, callers


def test_one_thread_makes_the_steps_of_all_callers(running, series_of):
    seen, callers = seen_in_steps(running, series_of, threading.get_ident, threads=4, calls=24)
    assert len(seen) == 1
    assert not seen & callers
    assert seen_in_steps(running, series_of, threading.get_ident)[0] == seen


def test_the_numbers_are_those_of_the_plain_loop(tiny, running, series_of):
    requests = [request(series_of, seed, 5 + seed % 7) for seed in range(16)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda mine: running.run([mine]), requests))
    for mine in requests:
        np.testing.assert_array_equal(mine.tokens, plain(tiny, mine.series, mine.sampling, 64)[0])
    assert running.cache_slots()[0] == running.running_rows() == 0
    running.check_integrity()


def test_a_short_wait_ends_before_a_long_one_that_began_first(running, series_of):
    with ThreadPoolExecutor(1) as pool:
        started = threading.Event()
        long = request(series_of, 1, 3000, on_step=lambda step: started.set(), should_stop=lambda: short.state.ended)
        short = request(series_of, 2, 3)
        waiting = pool.submit(running.run, [long])
        assert started.wait(20)
        running.run([short])
        waiting.result(20)
    assert (short.state, long.state) == (State.FINISHED, State.CANCELLED)


def test_it_computes_only_while_somebody_waits(running, series_of):
    seen_in_steps(running, series_of, threading.get_ident)
    unawaited = request(series_of)
    running.submit([unawaited])
    time.sleep(0.2)
    assert unawaited.state is State.QUEUED
    running.wait([unawaited])
    assert unawaited.state is State.FINISHED


@linux
def test_a_released_thread_is_followed_by_one_with_the_priority_of_who_waits(running, series_of):
    with ThreadPoolExecutor(1, initializer=lower_by, initargs=(3,)) as low:
        low.submit(running.run, [request(series_of)]).result()
    assert seen_in_steps(running, series_of, niceness)[0] == {min(19, niceness() + 3)}
    running.release_thread()
    assert seen_in_steps(running, series_of, niceness)[0] == {niceness()}


def test_released_in_the_middle_of_a_forecast_it_loses_nothing(running, series_of):
    requests = [request(series_of, seed, 9) for seed in range(3)]
    requests[0].on_step = lambda step: running.release_thread()
    running.run(requests)
    assert all(mine.state is State.FINISHED for mine in requests)
    assert len(seen_in_steps(running, series_of, threading.get_ident, threads=4, calls=12)[0]) == 1


def test_it_ends_with_its_engine(tiny, series_of):
    running, threads = engine(tiny, own_thread=True), []
    mine = request(series_of)
    mine.on_step = lambda step: threads.append(threading.current_thread())
    running.run([mine])
    gone = weakref.ref(running)
    del running, mine
    gc.collect()
    assert gone() is None
    threads[0].join(10)
    assert not threads[0].is_alive()


@pytest.fixture
def interrupts():
    """SIGINT raises KeyboardInterrupt also where the suite runs in the background and inherits that it is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.skipif(sys.platform == "win32", reason="signals a thread")
def test_ctrl_c_ends_one_wait_at_once(tiny, running, series_of, interrupts):
    def interrupt(step):
        if step == 5:
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    mine, other = request(series_of, 1, 3000, on_step=interrupt), request(series_of, 2, 40)
    running.submit([other])
    with pytest.raises(KeyboardInterrupt):
        running.run([mine])
    running.wait([other])
    np.testing.assert_array_equal(other.tokens, plain(tiny, other.series, other.sampling, 64)[0])
    running.run([request(series_of)])
    assert mine.state is State.CANCELLED
    assert running.cache_slots()[0] == running.running_rows() == 0


def test_an_error_of_the_engine_itself_reaches_who_waits_and_costs_nobody_a_number(
    tiny, running, series_of, monkeypatch
):
    mine, plan = request(series_of, 1, 9), running._scheduler.plan

    def fail_once():
        if mine.state is State.RUNNING:
            monkeypatch.undo()
            raise MemoryError("no room for a plan")
        return plan()

    monkeypatch.setattr(running._scheduler, "plan", fail_once)
    with pytest.raises(MemoryError, match="no room"):
        running.run([mine])
    # Nobody else waits, and yet it is not left to lie there.
    assert mine.state is State.CANCELLED
    assert running.cache_slots()[0] == running.running_rows() == running.stalled_s() == 0
    other = request(series_of, 2, 9)
    running.run([other])
    np.testing.assert_array_equal(other.tokens, plain(tiny, other.series, other.sampling, 64)[0])


def test_a_long_wait_keeps_nothing_of_those_that_ended_meanwhile(running, series_of):
    ended, started = threading.Event(), threading.Event()
    with ThreadPoolExecutor(1) as pool:
        long = request(series_of, 1, 30000, on_step=lambda step: started.set(), should_stop=ended.is_set)
        waiting = pool.submit(running.run, [long])
        assert started.wait(20)
        short = request(series_of, 2, 3)
        running.run([short])
        gone = weakref.ref(short)
        del short
        end = time.monotonic() + 20
        while gone() is not None and time.monotonic() < end:  # a step or two
            time.sleep(0.01)
        assert not long.state.ended
        ended.set()
        assert gone() is None
        waiting.result(20)


FORK = """
import os, sys
import numpy as np
from benchmarks.shapes import random_series
from model import KronosPredictor
from model.registry import BUNDLED, load_checkpoint
from model.types import Sampling
checkpoint = load_checkpoint(BUNDLED)
predictor = KronosPredictor(checkpoint.model, checkpoint.tokenizer, device="cpu", own_thread=True)
ask = lambda: predictor.forecast_series(random_series(40, 4, 0), Sampling(seed=0)).values
wanted = ask()
child = os.fork()
if not child:
    os._exit(0 if np.array_equal(ask(), wanted) else 1)
_, status = os.waitpid(child, 0)
sys.exit(os.waitstatus_to_exitcode(status) or not np.array_equal(ask(), wanted))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_forked_process_makes_its_own():
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    assert subprocess.run([sys.executable, "-c", FORK], cwd=ROOT, env=environ, timeout=60).returncode == 0


def test_a_callback_cannot_wait_for_the_engine_that_calls_it(running, series_of):
    mine = request(series_of, on_step=lambda step: running.run([request(series_of)]))
    running.run([mine])
    assert "a callback cannot wait for the engine" in str(mine.error)


def test_loading_threads_end_with_their_calls():
    """One that stayed would keep a pool of OpenMP's, and slow down the engine's."""
    loading, began, places = LoadingThreads(), [], threading.Semaphore(0)

    def call(number):
        began.append(number)
        places.acquire()
        return threading.current_thread(), niceness() if sys.platform == "linux" else None

    futures = [loading.submit(call, number) for number in range(2 * AT_ONCE)]
    time.sleep(0.3)
    assert len(began) == AT_ONCE
    places.release(2 * AT_ONCE)
    for future in futures:
        thread, nice = future.result(10)
        thread.join(10)
        assert not thread.is_alive()
        if sys.platform == "linux":
            assert nice == min(19, niceness() + LOADING)


def test_what_goes_wrong_in_a_loading_thread_is_its_callers(monkeypatch):
    with pytest.raises(ZeroDivisionError):
        LoadingThreads().submit(lambda: 1 / 0).result(10)

    def refused(*arguments):
        raise PermissionError("a sandbox")

    monkeypatch.setattr("serve_app.priority.lower_by", refused)
    with pytest.raises(PermissionError, match="a sandbox"):
        LoadingThreads().submit(int).result(10)
