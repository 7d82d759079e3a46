"""The shipped configuration under `serve run`: start, answer, stop.

In every run of the suite test_reconfigure.py starts and stops another file so, and test_readme.py the shipped one.
"""

import time
from pathlib import Path

import httpx
import pytest
import yaml

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_serve_run_starts_answers_and_stops(golden, free_port, serve_run, tmp_path):
    """The shipped file, on another port and over the tests' checkpoint: the shell's KRONOS_ variables reach it."""
    data = yaml.safe_load((ROOT / "serve_config.yaml").read_text())
    port = data["http_options"]["port"] = free_port()
    path = tmp_path / "serve_config.yaml"
    path.write_text(yaml.safe_dump(data))
    variables = {"KRONOS_MODEL_PATH": str(golden), "KRONOS_MAX_REQUEST_SIZE_MB": "3", "KRONOS_MAX_CONTEX": "1"}
    started = time.monotonic()
    with serve_run(path, port, variables, tmp_path / "log"):
        print(f"ready after {time.monotonic() - started:.1f} s")
        url = f"http://127.0.0.1:{port}"
        info = httpx.get(f"{url}/v1/info").json()
        assert info["default_model"] == "kronos-local"
        assert info["limits"]["max_request_mb"] == 3
        assert any("KRONOS_MAX_CONTEX, did you mean" in warning for warning in info["warnings"])
        assert any("Ray was started without" in warning for warning in info["warnings"])
        states = {model["id"]: model["state"] for model in httpx.get(f"{url}/v1/models").json()["models"]}
        assert states["kronos-local"] == "loaded"
        assert states["kronos-small"] == "idle"
