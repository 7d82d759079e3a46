"""Where metrics go, and that no key goes with them."""

import json
import sys

import numpy as np
import pytest

from cluster.redact import REDACTED, looks_secret, redact
from cluster.training.config import LoggingConfig
from cluster.training.loggers import PACKAGES, make_loggers
from model.errors import InputError

CANARY = "canary-7f3a91c2e4"


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_json_lines_are_always_written_and_go_on_after_a_restart(tmp_path):
    for step in (1, 2):
        loggers = make_loggers(LoggingConfig(), tmp_path / "run", {})
        loggers.log(step, {"loss": np.float32(step / 4), "bars": step, "ratio": float("nan")})
        assert len(lines(tmp_path / "run")) == step  # a process that is killed has lost nothing
        loggers.close()
    assert lines(tmp_path / "run") == [{"step": s, "loss": s / 4, "bars": s, "ratio": None} for s in (1, 2)]


def test_only_numbers_are_metrics(tmp_path):
    loggers = make_loggers(LoggingConfig(), tmp_path, {})
    with pytest.raises(InputError, match="'note' is str"):
        loggers.log(1, {"note": "hello"})
    loggers.close()
    assert lines(tmp_path) == []


@pytest.mark.parametrize("name", PACKAGES)
def test_a_logger_that_is_not_installed_is_named_with_its_extra(tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, PACKAGES[name], None)
    with pytest.raises(InputError, match=rf"names {name}, .* pip install 'kronos-ray-serve\[{name}\]'") as caught:
        make_loggers(LoggingConfig(loggers=(name,)), tmp_path, {})
    assert caught.value.code == "missing_extra"


def test_nothing_is_imported_that_is_not_named(tmp_path, monkeypatch):
    for package in PACKAGES.values():
        monkeypatch.setitem(sys.modules, package, None)
    make_loggers(LoggingConfig(), tmp_path, {}).close()


@pytest.mark.parametrize(
    ("name", "value", "secret"),
    [
        ("api_key", "x", True),
        ("WANDB_API_KEY", "x", True),
        ("apikey", "x", True),
        ("clientSecret", "x", True),
        ("HF_TOKEN", "x", True),
        ("db-password", 1234, True),
        ("token_for_hub", "x", True),
        ("AWS_SECRET_ACCESS_KEY", "x", True),
        ("tokenizer", "folder", False),
        ("token_dropout_p", 0.1, False),
        ("monkey", "x", False),
        ("path", "x", False),
        ("seed", 7, False),
    ],
)
def test_names_of_secrets(name, value, secret):
    assert looks_secret(name, value) == secret


def test_redaction_goes_into_every_corner_and_leaves_the_rest():
    config = {
        "run": {"seed": 1, "note": f"key is {CANARY}!"},
        "hub": {"api_key": "short", "retries": [1, {"Password": "pw"}], "token": None},
        "predictor": {"token_dropout_p": 0.1, "tokenizer": "out/tokenizer"},
        "uri": "https://me:hidden@host/x",
        "list": [f"--key={CANARY}"],
    }
    assert redact(config, {"MY_API_KEY": CANARY, "HOME": "out/tokenizer", "X_TOKEN": "1"}) == {
        "run": {"seed": 1, "note": f"key is {REDACTED}!"},
        "hub": {"api_key": REDACTED, "retries": [1, {"Password": REDACTED}], "token": None},
        "predictor": {"token_dropout_p": 0.1, "tokenizer": "out/tokenizer"},
        "uri": f"https://{REDACTED}@host/x",
        "list": [f"--key={REDACTED}"],
    }


def secretive(monkeypatch):
    """Canaries in the environment, in keys, in values, in an address; → the configuration."""
    for name in ("WANDB_API_KEY", "MLFLOW_TRACKING_PASSWORD", "HF_TOKEN", "SOME_SECRET"):
        monkeypatch.setenv(name, f"{CANARY}-{name}")
    return {
        "run": {"name": "t", "seed": 1},
        "logging": {"api_key": f"{CANARY}-in-config", "note": f"as in {CANARY}-HF_TOKEN"},
        "data": {"source": {"kind": "file", "path": [f"s3://user:{CANARY}@bucket/x"]}},
        "access": [{"password": f"{CANARY}-nested"}],
    }


def canaries_in(folder):
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert files
    return [path for path in files if CANARY.encode() in path.read_bytes()], len(files)


@pytest.mark.verify("V21")
@pytest.mark.parametrize("name", [None, *PACKAGES])
def test_v21_no_key_is_in_anything_that_a_logger_writes(tmp_path, monkeypatch, capfd, name, figure):
    if name is not None:
        pytest.importorskip(PACKAGES[name])
    config = secretive(monkeypatch)
    loggers = make_loggers(LoggingConfig(loggers=(name,) if name else ()), tmp_path / "run", config)
    loggers.log(1, {"loss": 0.5})
    loggers.close()
    hits, files = canaries_in(tmp_path)
    printed = capfd.readouterr()
    assert hits == []
    assert CANARY not in printed.out + printed.err
    figure(f"{name or 'json lines'}: {len(hits)} of {files} files hold a canary", "must be 0")


def test_tensorboard_holds_what_was_logged(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    loggers = make_loggers(LoggingConfig(loggers=("tensorboard",)), tmp_path, {"run": {"seed": 42}})
    for step in (10, 20, 30):
        loggers.log(step, {"loss": 1 / step, "learning_rate": 1e-3})
    loggers.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert sorted(events.Tags()["scalars"]) == ["learning_rate", "loss"]
    assert [(e.step, round(e.value, 6)) for e in events.Scalars("loss")] == [(s, round(1 / s, 6)) for s in (10, 20, 30)]
    assert b'"seed": 42' in events.Tensors("config/text_summary")[0].tensor_proto.string_val[0]
    assert [line["step"] for line in lines(tmp_path)] == [10, 20, 30]


def test_mlflow_holds_what_was_logged(tmp_path):
    mlflow = pytest.importorskip("mlflow")
    loggers = make_loggers(LoggingConfig(loggers=("mlflow",), project="p"), tmp_path, {"run": {"seed": 42}})
    loggers.log(10, {"loss": 0.5})
    loggers.log(20, {"loss": 0.25})
    loggers.close()
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}")
    [run] = client.search_runs([client.get_experiment_by_name("p").experiment_id])
    assert run.data.params == {"run.seed": "42"}
    assert [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, "loss")] == [(10, 0.5), (20, 0.25)]
    assert run.info.status == "FINISHED"


def test_wandb_works_without_a_network(tmp_path):
    pytest.importorskip("wandb")
    loggers = make_loggers(LoggingConfig(loggers=("wandb",)), tmp_path, {"run": {"seed": 42}})
    loggers.log(10, {"loss": 0.5})
    loggers.close()
    [written] = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    assert b"loss" in written.read_bytes()
