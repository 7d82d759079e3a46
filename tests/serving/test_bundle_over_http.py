"""A bundle that is exported beside a running server is served by it, and forecasts what it forecasts here."""

import json
import shutil

import httpx
import numpy as np
import pytest
import torch

from cluster.export import export
from model.frames import candle_array, time_marks
from model.kronos import Kronos
from model.predictor import KronosPredictor
from model.registry import CheckpointSource, load_checkpoint
from model.types import COLUMNS, Sampling, Series
from serve_app.client import KronosClient


@pytest.fixture
def served(ray_serve, golden, tmp_path, wait):
    """(URL, models_root) of an application that serves whatever lies in a folder."""
    from serve_app.app import build_app
    from serve_app.config import AppConfig

    root = tmp_path / "models"
    root.mkdir()
    config = AppConfig(
        models={"tiny": {"source": str(golden)}},
        default_model="tiny",
        models_root=str(root),
        groups={"gpu": {"mode": "off"}, "cpu": {"num_cpus": 0.5, "cache_gb": 0.1}},
    )
    serve, url = ray_serve
    serve.run(build_app(config), name="bundles", route_prefix="/bundles")
    wait(lambda: httpx.get(f"{url}/bundles/v1/readyz").status_code == 200, 60)
    yield f"{url}/bundles", root
    serve.delete("bundles", _blocking=False)


def run_output(golden, folder, factor):
    """What a training run leaves: a network of its own, the golden tokenizer, a record."""
    network = Kronos.from_pretrained(golden / "model")
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(factor)
    network.save_pretrained(folder / "model")
    shutil.copytree(golden / "tokenizer", folder / "tokenizer")
    (folder / "training.json").write_text(json.dumps({"command": "none", "device": "cpu", "stages": {}}))
    return folder


def offline(bundle, bars, horizon, sampling):
    """float64 [S, H, 6]: the forecast of the folder itself, in this process."""
    made = load_checkpoint(CheckpointSource(id="x", model=str(bundle)))
    history, future = bars[:-horizon], bars[-horizon:]
    series = Series(candle_array(history), time_marks(history["timestamps"]), time_marks(future["timestamps"]))
    return (
        KronosPredictor(made.model, made.tokenizer, device="cpu", precision="fp32")
        .forecast_series(series, sampling)
        .values
    )


def over_http(client, model, bars, horizon, sampling):
    """The same paths from the server, as Arrow: JSON rounds to nine digits."""
    future = [f"{time:%Y-%m-%d %H:%M:%S}" for time in bars["timestamps"][-horizon:]]
    history = bars[:-horizon].rename(columns={"timestamps": "timestamp"})
    settings = {"temperature": sampling.temperature, "top_p": sampling.top_p, "samples": sampling.samples}
    answer = client.forecast_frame(
        history, model=model, seed=sampling.seed, future_timestamps=future, return_paths=True, **settings
    )
    paths = answer[answer["kind"] == "path"].sort_values(["path", "timestamp"])
    return paths[list(COLUMNS)].to_numpy(np.float64).reshape(sampling.samples, horizon, len(COLUMNS))


@pytest.mark.verify("V22")
def test_v22_an_exported_bundle_forecasts_over_http_what_it_forecasts_offline(
    served, golden, bars, tmp_path, wait, figure
):
    url, root = served
    horizon, sampling = 12, Sampling(temperature=1.0, top_p=0.95, samples=5, seed=11)
    known = bars[:140]
    with KronosClient(url) as client:
        pids = [replica["pid"] for replica in client.replicas()]
        assert [model["id"] for model in client.models()] == ["tiny"]
        shas, differences = [], []
        for number, factor in enumerate((1.01, 0.97)):
            made = export(run_output(golden, tmp_path / f"run{number}", factor), root / "mine", replace=number > 0)
            wait(lambda: "mine" in [model["id"] for model in client.models()], 20)

            def served_sha():
                client.forecast_frame(
                    known.rename(columns={"timestamps": "timestamp"}), model="mine", horizon=1, freq="5min"
                )
                return next(model["sha256"] for model in client.models() if model["id"] == "mine")

            wait(lambda made=made, served_sha=served_sha: served_sha() == made.sha256, 60)
            theirs, ours = (
                over_http(client, "mine", known, horizon, sampling),
                offline(root / "mine", known, horizon, sampling),
            )
            differences.append(np.abs(theirs - ours).max())
            assert theirs.tobytes() == ours.tobytes()
            shas.append(made.sha256)
        assert shas[0] != shas[1]
        assert [replica["pid"] for replica in client.replicas()] == pids  # nothing was restarted
    figure(
        f"bundle exported beside a running server, then replaced: {sampling.samples} paths × {horizon} bars × 6, "
        f"largest difference to offline {max(differences)}",
        "must be 0, bit for bit",
    )
