"""`calibrate: true` from the HTTP body to the answer, over a real replica without Ray."""

import json
import shutil

import numpy as np
import pyarrow as pa
import pytest

from cluster.calibration import save
from model.calibration import CALIBRATION_FILE, load_calibration
from model.registry import CheckpointSource, load_checkpoint
from serve_app.bar_stream import origin
from serve_app.bodies import ARROW
from serve_app.config import AppConfig
from serve_app.deployment import KronosReplica
from serve_app.engine import EngineFactory
from serve_app.ingress import create_app
from serve_app.jobs import Answered, Chunk
from serve_app.live_config import LiveConfig
from serve_app.routing import _done


class OneReplica:
    """A backend of one replica in this process."""

    device_warning = None

    def __init__(self, config):
        self.replica = KronosReplica("cpu", LiveConfig(config, {}), EngineFactory)

    def refuse_if_crowded(self):
        pass

    async def forecast(self, job, prefer):
        return Answered(_done(await anext(self.replica.forecast(job))), "cpu")

    async def stream(self, job, prefer):
        async for item in self.replica.forecast(job, bars=True):
            if isinstance(item, Chunk):
                for bars in item.bars:
                    yield bars
            else:
                yield Answered(_done(item), "cpu")

    def replicas(self):
        return []

    def load_failures(self):
        return {}

    def groups(self):
        return ["cpu"]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory, golden):
    folder = tmp_path_factory.mktemp("root") / "mine"
    for part in ("model", "tokenizer"):
        shutil.copytree(golden / part, folder / part)
    sha256 = load_checkpoint(CheckpointSource("x", str(folder))).sha256
    entry = {"symbol": None, "bar_seconds": None, "n": 50, "first_bars": [1, 2], "factors": [2.0, 3.0]}
    entry |= {"raw_coverage": {"0.8": 0.4}, "calibrated_coverage": {"0.8": 0.79}}
    own = {**entry, "symbol": "one", "bar_seconds": 3600, "factors": [1.5, 0.5], "n": 40}
    fitted_on = {"from": "2024-07-01T00:00:00", "to": "2024-08-01T00:00:00", "horizon": 2}
    fitted_on |= {"sampling": {"temperature": 1.0, "top_k": 0, "top_p": 1.0}}
    document = {"version": 1, "method": "scale", "model_sha256": sha256, "fitted_on": fitted_on}
    save(folder / CALIBRATION_FILE, {**document, "entries": [entry, own]})
    return folder


@pytest.fixture(scope="module")
def backend_and_config(bundle, golden):
    models = {name: {"source": str(path), "max_context": 64} for name, path in (("mine", bundle), ("bare", golden))}
    config = AppConfig(models=models, default_model="mine")
    return OneReplica(config), config


@pytest.fixture
def http(backend_and_config, make_http):
    backend, config = backend_and_config
    client = make_http()
    client.app = create_app(backend, config)
    return client


@pytest.fixture
def request_body(columns):
    series = [dict(columns(24), id=name) for name in ("one", "other")]
    settings = {"horizon": 4, "samples": 9, "seed": 5, "temperature": 1.0, "top_p": 1.0, "return_paths": True}
    return {"series": series, **settings}


def closes(series):
    return np.array([path["close"] for path in series["paths"]])


def test_calibrated_paths_are_those_of_the_entry_and_agree_with_the_rest(http, request_body):
    raw = http.post("/v1/forecast", request_body).json()
    answer = http.post("/v1/forecast", {**request_body, "calibrate": True}).json()
    assert all("calibration" not in series for series in raw["series"])
    for series, plain, factors, entry in zip(
        answer["series"], raw["series"], ([1.5, 0.5, 0.5, 0.5], [2.0, 3.0, 3.0, 3.0]), ("symbol", "pooled"), strict=True
    ):
        middle = np.median(closes(plain), axis=0)
        np.testing.assert_allclose(closes(series), middle + factors * (closes(plain) - middle), rtol=1e-7)
        assert series["calibration"]["entry"] == entry
        assert series["calibration"]["method"] == "scale"
        assert series["calibration"]["fitted_on"]["horizon"] == 2
        assert series["calibration"]["raw_coverage"] == {"0.8": 0.4}
        assert series["calibration"]["calibrated_coverage"] == {"0.8": 0.79}
        paths = closes(series)
        np.testing.assert_allclose(series["quantiles"]["0.9"]["close"], np.quantile(paths, 0.9, axis=0), rtol=1e-7)
        last = series["summary"]["last_close"]
        assert series["summary"]["upside_probability"] == pytest.approx((paths[:, -1] > last).mean())
        assert series["summary"]["expected_return"] == pytest.approx((paths[:, -1] / last).mean() - 1, abs=1e-7)
    assert answer["series"][0]["calibration"]["symbol"] == "one"
    assert answer["series"][1]["calibration"]["symbol"] is None


def test_a_stream_tells_calibrated_bars(http, request_body):
    asked = {**request_body, "calibrate": True}
    text = http.post("/v1/forecast", {**asked, "stream": True}).text
    *bars, last = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: ")]
    assert last == http.post("/v1/forecast", asked).json()
    for index, series in enumerate(last["series"]):
        told = [value for data in bars if data["series"] == index for value in data["quantiles"]["0.9"]["close"]]
        np.testing.assert_allclose(told, series["quantiles"]["0.9"]["close"], rtol=1e-5)


def test_a_table_is_calibrated_too(http, request_body):
    asked = {**request_body, "calibrate": True}
    headers = {"accept": ARROW}
    table = pa.ipc.open_stream(http.post("/v1/forecast", asked, headers=headers).content).read_all()
    about = json.loads(table.schema.metadata[b"kronos"])
    assert [series["calibration"]["entry"] for series in about["series"]] == ["symbol", "pooled"]
    frame = table.to_pandas()
    mean = frame[(frame["kind"] == "mean") & (frame["series_id"] == "one")]["close"]
    expected = http.post("/v1/forecast", asked).json()["series"][0]["mean"]["close"]
    np.testing.assert_allclose(mean, expected, rtol=1e-7)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "bare"}, "model 'bare' has no calibration: leave calibrate out, or fit one"),
        ({"temperature": 0.6}, "is for forecasts with temperature 1, top_k 0 and top_p 1: ask for these"),
        ({"top_p": 0.9}, "is for forecasts with temperature 1"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_cannot_be_calibrated_is_refused(http, request_body, change, message, stream):
    response = http.post("/v1/forecast", {**request_body, "calibrate": True, "stream": stream, **change})
    assert response.status_code == 409
    assert response.json()["error"]["code"] == "not_calibrated"
    assert message in response.json()["error"]["message"]
    assert http.post("/v1/forecast", {**request_body, **change}).status_code == 200


def test_calibrate_must_be_a_boolean(http, request_body):
    response = http.post("/v1/forecast", {**request_body, "calibrate": "yes"})
    assert response.status_code == 422
    assert response.json()["error"]["fields"][0]["loc"] == ["calibrate"]


def test_a_calibration_of_other_weights_makes_the_model_unavailable(tmp_path, bundle, golden, make_http, request_body):
    folder = tmp_path / "broken"
    shutil.copytree(bundle, folder)
    document = json.loads((folder / CALIBRATION_FILE).read_text())
    (folder / CALIBRATION_FILE).write_text(json.dumps({**document, "model_sha256": "0" * 64}))
    config = AppConfig(models={"broken": {"source": str(folder)}}, default_model="broken")
    client = make_http()
    client.app = create_app(OneReplica(config), config)
    response = client.post("/v1/forecast", request_body)
    assert response.status_code == 503
    assert "was fitted for other weights" in response.json()["error"]["message"]


def test_streams_do_not_go_on_with_another_calibration(bundle):
    config = AppConfig(models={"mine": {"source": str(bundle)}}, default_model="mine")
    engine = EngineFactory(config, "cpu")("mine", config.models["mine"]).rehearse()
    before = origin(engine)
    assert before.endswith(load_calibration(bundle, engine.identity.sha256).digest)
    engine.calibration = None
    assert origin(engine) != before
