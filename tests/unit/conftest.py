"""The service's routes without Ray: a backend that answers at once, and a client that calls the app in-process.
And a bundle, as a finetune leaves it.
"""

import asyncio
import json
import logging
import shutil

import httpx
import numpy as np
import pytest

from model.types import Paths, Window
from serve_app.config import AppConfig
from serve_app.ingress import create_app
from serve_app.jobs import Answered, Bars, DeviceFacts, Done, Identity, ReplicaView
from serve_app.logs import LOGGER_NAME, JsonFormatter

DEVICE = DeviceFacts(
    device="cpu",
    device_type="cpu",
    device_name="a processor",
    precision="fp32",
    precision_reason="exact",
    gpu_available=False,
    cuda_available=False,
    mps_available=False,
)
IDENTITY = Identity(
    id="kronos-bundled",
    repo="bundled",
    revision=None,
    sha256="0" * 64,
    parameters=1000,
    max_context=512,
    model_version="bundled-model+0",
    tokenizer_version="bundled-tokenizer+0",
)
LOADED = {
    "state": "loaded",
    "repo": "bundled",
    "revision": None,
    "sha256": "0" * 64,
    "parameters": 1000,
    "max_context": 512,
    "model_version": "bundled-model+0",
}


def fake_paths(task):
    """Path s is s/1000 above the last bar and rises 1e-4 a bar; the seed moves it all, so that a test sees the seed."""
    samples, horizon = task.sampling.samples, task.series.horizon
    last = task.series.candles[-1].astype(np.float64)
    up = 1 + np.arange(samples)[:, None, None] / 1000 + (task.sampling.seed % 1000) / 1e6
    values = np.broadcast_to(last * up, (samples, horizon, 6)) * (1 + np.arange(horizon)[:, None] / 1e4)
    return Paths(
        values,
        np.zeros((samples, horizon, 2), np.int64),
        Window(min(len(task.series.candles), 512), False, task.window),
    )


class FakeBackend:
    """Answers with fake_paths. `error` is raised instead; `delay_s` passes first; `jobs` holds what was asked."""

    def __init__(self, *, error=None, fail_after=0, delay_s=0.0, loaded=True, device_warning=None):
        self.error, self.delay_s, self.loaded, self.device_warning = error, delay_s, loaded, device_warning
        self.fail_after, self.crowded, self.small_jobs = fail_after, None, None
        self.jobs, self.preferred, self.cancelled, self.closed = [], [], 0, 0
        self.asleep, self.failures = False, {}

    def refuse_if_crowded(self):
        if self.crowded is not None:
            raise self.crowded

    def places(self):
        return self.small_jobs

    async def forecast(self, job, prefer):
        self.jobs.append(job)
        self.preferred.append(prefer)
        await self._sleep()
        if self.error is not None:
            raise self.error
        return self._answered(job, prefer)

    async def stream(self, job, prefer):
        """Two bars of every task at a time, after delay_s each; `error` comes after fail_after events."""
        self.jobs.append(job)
        self.preferred.append(prefer)
        answered = self._answered(job, prefer)
        horizon, sent = max(task.series.horizon for task in job.tasks), 0
        try:
            for first in range(0, horizon, 2):
                await self._sleep()
                for index, paths in enumerate(answered.done.paths):
                    if self.error is not None and sent >= self.fail_after:
                        raise self.error
                    values = paths.values[:, first : first + 2]
                    if values.shape[1]:
                        yield Bars(index, first, values, DEVICE.backend, 1.0)
                        sent += 1
            yield answered
        finally:
            self.closed += 1

    async def _sleep(self):
        try:
            await asyncio.sleep(self.delay_s)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise

    def _answered(self, job, prefer):
        done = Done(tuple(fake_paths(task) for task in job.tasks), IDENTITY, DEVICE, "replica", 1.0, 0.5, 20.0)
        warnings = () if prefer in (None, "cpu") else (f"the {prefer} group is not here",)
        return Answered(done, "cpu", warnings)

    def load_failures(self):
        return self.failures

    def replicas(self):
        if self.asleep:
            return []
        models = {"kronos-bundled": LOADED if self.loaded else {"state": "loading"}}
        return [ReplicaView("abc", "cpu", "node", 17, DEVICE, queued=1, running_rows=2, models=models)]

    def groups(self):
        return ["cpu"]


class InProcess:
    """Calls an ASGI app; every call runs in an event loop of its own."""

    def __init__(self, app):
        self.app = app

    def request(self, method, path, **kwargs):
        async def go():
            transport = httpx.ASGITransport(app=self.app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
                return await client.request(method, path, **kwargs)

        return asyncio.run(go())

    def get(self, path, **kwargs):
        return self.request("GET", path, **kwargs)

    def post(self, path, body=None, *, raw=None, headers=None):
        content = raw if raw is not None else json.dumps(body)
        return self.request(
            "POST", path, content=content, headers={"content-type": "application/json", **(headers or {})}
        )


@pytest.fixture
def fake_backend():
    """FakeBackend, to be made with a test's own settings."""
    return FakeBackend


@pytest.fixture
def make_http():
    """(backend, args of AppConfig) → a client of the app over it."""

    def make(backend=None, warnings=(), **config):
        return InProcess(create_app(backend or FakeBackend(), AppConfig(**config), warnings))

    return make


@pytest.fixture
def http(make_http):
    return make_http()


@pytest.fixture
def columns():
    """bars → the columns of one valid series of hourly bars, as JSON values."""

    def make(bars=8):
        close = [100.0 + i for i in range(bars)]
        return {
            "timestamps": [f"2024-01-{1 + i // 24:02d}T{i % 24:02d}:00:00Z" for i in range(bars)],
            "open": close,
            "high": [price + 1 for price in close],
            "low": [price - 1 for price in close],
            "close": close,
        }

    return make


@pytest.fixture
def candle_items():
    """(bars, horizon) → a valid body of /v1/predict/single."""

    def make(bars=8, horizon=3):
        candles = [{"open": 100.0 + i, "high": 102.0 + i, "low": 99.0 + i, "close": 101.0 + i} for i in range(bars)]
        return {
            "candles": candles,
            "timestamps": [f"2024-01-01 {i:02d}:00:00" for i in range(bars)],
            "prediction_timestamps": [f"2024-01-01 {bars + i:02d}:00:00" for i in range(horizon)],
        }

    return make


@pytest.fixture
def log_lines():
    """What the service logs at INFO and above while a test runs, read back from JSON."""
    found = []

    class Keep(logging.Handler):
        def emit(self, record):
            found.append(json.loads(JsonFormatter().format(record)))

    logger, keep = logging.getLogger(LOGGER_NAME), Keep()
    level = logger.level
    logger.addHandler(keep)
    logger.setLevel(logging.INFO)
    yield found
    logger.removeHandler(keep)
    logger.setLevel(level)


@pytest.fixture(scope="session")
def exported(golden, tmp_path_factory):
    """A bundle made of a finetune. Not to be changed."""
    from cluster.export import export
    from tests.tiny_bundles import finetune

    folder = tmp_path_factory.mktemp("exported")
    export(finetune(golden, folder), folder / "candidates" / "mine")
    return folder / "candidates" / "mine"


@pytest.fixture
def bundle(exported, tmp_path):
    """A bundle of one's own: candidates/mine."""
    shutil.copytree(exported, tmp_path / "candidates" / "mine")
    return tmp_path / "candidates" / "mine"
