"""Many small requests through one engine, some cancelled, some invalid: memory stays flat, no cache range is lost."""

import gc
import logging
import mmap
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest

from model.engine.engine import Engine
from model.engine.kv_cache import CacheIntegrityError
from model.engine.types import EngineConfig, Request, State
from model.frames import series_from_frame
from model.types import Sampling

ROOT = Path(__file__).parents[2]
GROWTH_LIMIT = 16 * 2**20
BATCH = 40


def soak(engine, bars, count, *, leak=None):
    """Runs count requests, a tenth cancelled and a tenth invalid; returns bytes of growth after the first third.

    leak: called with every request that has ended.
    """
    process = psutil.Process(os.getpid())
    rng = np.random.default_rng(0)
    before = 0
    for first in range(0, count, BATCH):
        requests = []
        for i in range(first, first + BATCH):
            start, length, horizon = int(rng.integers(0, 1500)), int(rng.integers(1, 24)), int(rng.integers(1, 6))
            end = start + length
            times = bars.timestamps
            series = series_from_frame(bars[start:end], times[start:end], times[end : end + horizon])
            request = Request(series, Sampling(samples=int(rng.integers(1, 4)), seed=i))
            if i % 10 == 3:
                asked = []
                request.should_stop = lambda asked=asked: asked.append(1) or len(asked) > 2
            elif i % 10 == 7:
                # A month that no calendar has: it fails in the middle of the engine, past all validation.
                series.future_marks[:, 4] = 99
            requests.append(request)
        engine.run(requests)
        for i, request in enumerate(requests):
            expected = {3: {State.CANCELLED, State.FINISHED}, 7: {State.FAILED}}.get(i % 10, {State.FINISHED})
            assert request.state in expected
            if leak is not None:
                leak(request)
        engine.check_integrity()
        assert engine.cache_slots()[0] == engine.running_rows() == engine.queued_work() == 0
        if before == 0 and first >= count // 3:
            gc.collect()
            before = process.memory_info().rss
    gc.collect()
    return process.memory_info().rss - before


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("count", [400, pytest.param(20_000, marks=pytest.mark.slow)])
def test_memory_stays_flat(tiny, bars, count, caplog):
    # pytest keeps every line that is logged, and the failing tenth logs one each.
    caplog.set_level(logging.CRITICAL, logger="model.engine.engine")
    engine = Engine(*tiny, EngineConfig(cache_bytes=2**22))
    growth = soak(engine, bars, count)
    print(f"{count} requests: {growth / 2**20:.1f} MiB of growth")
    assert growth <= GROWTH_LIMIT


RAGGED_WAVES = """
import ctypes, sys
from concurrent.futures import ThreadPoolExecutor
import numpy as np, psutil, torch
sys.path.insert(0, "benchmarks")
from shapes import random_series
from model.predictor import KronosPredictor
from model.registry import CheckpointSource, load_checkpoint
from model.types import Sampling
torch.set_num_threads(1)
checkpoint = load_checkpoint(CheckpointSource(id="bundled", model="bundled"))
predictor = KronosPredictor(checkpoint.model, checkpoint.tokenizer, device="cpu", cache_bytes=2**27)
rng = np.random.default_rng(0)

def ask(i):
    history, horizon, samples = int(rng.integers(16, 400)), int(rng.integers(1, 20)), int(rng.integers(1, 9))
    predictor.forecast_series(random_series(history, horizon, i), Sampling(samples=samples, seed=i))

pool = ThreadPoolExecutor(8)
for wave in range(3):
    list(pool.map(ask, range(40)))
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    print(psutil.Process().memory_info().rss >> 20)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="malloc_trim is glibc's")
def test_requests_of_all_shapes_from_many_threads_leave_little_behind():
    """torch caches a product's form per shape and thread; unbounded, each wave added 200 MiB here."""
    run = subprocess.run([sys.executable, "-c", RAGGED_WAVES], cwd=ROOT, capture_output=True, text=True, check=True)
    first, *_, last = (int(line) for line in run.stdout.split())
    print(f"{first} MiB after 40 requests, {last} MiB after 120")
    assert last - first < 100


def test_the_same_check_catches_a_leak(tiny, bars):
    engine = Engine(*tiny, EngineConfig(cache_bytes=2**22))
    kept = []

    def leak(request):
        # Pages of its own: an array might lie in what the tests before it have given back to the heap.
        pages = mmap.mmap(-1, 2**18)
        pages.write(bytes(2**18))
        kept.append(pages)

    assert soak(engine, bars, 240, leak=leak) > GROWTH_LIMIT


def test_the_same_check_catches_a_lost_range(tiny, bars):
    engine = Engine(*tiny, EngineConfig(cache_bytes=2**22))
    release, lost = engine._arena.release, []
    engine._arena.release = lambda block: lost.append(block) if not lost else release(block)
    with pytest.raises(CacheIntegrityError):
        soak(engine, bars, 400)
