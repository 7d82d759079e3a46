"""A group that sleeps because nobody asks, and how long the request that wakes it waits."""

from __future__ import annotations

import subprocess
import sys
import time
from typing import Any

import httpx

from benchmarks.load import forecast_body
from benchmarks.service import ROOT, Service, bundled_config

ASLEEP_WITHIN_S = 120.0
PATIENCE_S = 60.0

LOAD = """
import ray.serve
import serve_app.deployment
from serve_app.config import AppConfig
from serve_app.engine import EngineFactory
config = AppConfig.model_validate({args})
factory = EngineFactory(config, "cpu")
factory.prepare_process(1)
factory(config.default_model, config.models[config.default_model]).start()
"""
"""What a replica does before its first forecast, less the warm-up and all that Ray does."""


def config() -> dict[str, Any]:
    scaling = {"min_replicas": 0, "max_replicas": 2, "upscale_delay_s": 0, "downscale_delay_s": 2}
    return bundled_config(cpu={"replicas": None, "autoscaling": scaling})


def load_s() -> float:
    """Seconds of LOAD in a process of its own."""
    args = config()["applications"][0]["args"]
    started = time.monotonic()
    subprocess.run([sys.executable, "-c", LOAD.format(args=repr(args))], cwd=ROOT, check=True)
    return time.monotonic() - started


def first_answer_s(service: Service) -> float:
    """From a sleeping group to the answer. Raises TimeoutError if it does not sleep, httpx.HTTPError if it fails."""
    end = time.monotonic() + ASLEEP_WITHIN_S
    while service.replicas():
        if time.monotonic() > end:
            raise TimeoutError(f"the group does not sleep within {ASLEEP_WITHIN_S:.0f} s")
        time.sleep(0.5)
    started = time.monotonic()
    httpx.post(f"{service.url}/v1/forecast", json=forecast_body(0), timeout=PATIENCE_S).raise_for_status()
    return time.monotonic() - started
