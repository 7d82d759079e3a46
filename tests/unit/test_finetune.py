"""Whole runs in this process: resumed, stopped, stopped early, finetuned, tried dry; what they leave behind."""

import json
import os
import shutil
import signal
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from cluster import train as train_module
from cluster.bundles.bundle import pair_sha256
from cluster.candles.bars import frame_from_bars
from cluster.candles.simulate import simulate
from cluster.export import export
from cluster.train import main, train
from cluster.training.checkpoints import MANIFEST_FILE
from cluster.training.config_file import parse_config
from cluster.training.worker import Worker
from model.kronos import Kronos
from model.registry import CheckpointSource, load_checkpoint, network_source, sha256_of
from model.tokenizer import KronosTokenizer
from tests.tiny_training import save_predictor, save_tokenizer, tiny_config

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def parent(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parent")
    save_tokenizer(folder / "tokenizer")
    save_predictor(folder / "model", dropout=0.2)
    return folder


def finetune_config(parent, folder, **options):
    return tiny_config(
        "predictor", folder=folder, init_from=parent / "model", tokenizer=parent / "tokenizer", **options
    )


def write_yaml(config, folder):
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    return path


def command_line(config):
    """The trainer in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "cluster.train", "--config", str(config)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )


def records(folder):
    """The metric log without its clocks."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("seconds", "bars_per_second")} for line in lines]


def last_state(folder):
    """Every tensor of the last checkpoint: weights or adapters, and the optimizer's."""
    last = folder / json.loads((folder / "checkpoints.json").read_text())["last"]
    found = {}
    for path in last.rglob("*.safetensors"):
        found |= load_file(path)
    state = torch.load(last / "state.pt", weights_only=True)
    for number, moments in state["optimizer"]["state"].items():
        found |= {f"optimizer.{number}.{name}": value for name, value in moments.items()}
    counters = {k: v for k, v in state.items() if k not in ("optimizer", "seconds")}
    return found, counters | {"rates": [group["lr"] for group in state["optimizer"]["param_groups"]]}


class Died(BaseException):
    """Stands for a process that is gone without a word."""


def die_at(step, monkeypatch):
    real = Worker.train_step

    def train_step(self):
        if self.step == step:
            raise Died
        return real(self)

    monkeypatch.setattr(Worker, "train_step", train_step)


@pytest.mark.verify("V2")
@pytest.mark.parametrize("method", ["lora", pytest.param("full", marks=pytest.mark.slow)])
def test_resumed_in_a_new_process_equals_uninterrupted(parent, tmp_path, figure, method):
    """60 steps, and 30 + 30 of which 7 are made twice: the first process dies at step 37."""
    options = {
        "steps": 60,
        "method": method,
        "validate_every": 15,
        "log_every": 5,
        "s2_conditioning": "mixed",
        "training": {"micro_batch_size": 4},
    }
    straight, broken = (finetune_config(parent, tmp_path / name, **options) for name in ("straight", "broken"))
    train(straight)
    with pytest.MonkeyPatch.context() as patch:
        die_at(37, patch)
        with pytest.raises(Died):
            train(broken)
    result = command_line(write_yaml(broken, tmp_path / "broken"))
    assert result.returncode == 0, result.stderr[-2000:]
    assert "resumed at step 30" in result.stdout

    folders = [tmp_path / name / "runs/t/predictor" for name in ("straight", "broken")]
    (expected, counters), (found, found_counters) = (last_state(folder) for folder in folders)
    assert expected.keys() == found.keys()
    difference = max(float((expected[name] - found[name]).abs().max()) for name in expected)
    logs_equal = records(folders[0]) == records(folders[1])
    figure(f"{method}: largest difference of weights and moments {difference}, logs equal: {logs_equal}", "0, True")
    assert difference == 0
    assert counters == found_counters
    assert logs_equal
    exported = [load_file(tmp_path / name / "out/model/model.safetensors") for name in ("straight", "broken")]
    assert all(torch.equal(exported[0][name], exported[1][name]) for name in exported[0])


def test_sigterm_saves_at_the_next_step_and_the_same_command_resumes(parent, tmp_path):
    config = finetune_config(parent, tmp_path, steps=100_000, validate_every=1000)
    path = write_yaml(config, tmp_path)
    process = subprocess.Popen(
        [sys.executable, "-m", "cluster.train", "--config", str(path), "predictor.log_every=5"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    for line in process.stdout:
        if "step 15/" in line:
            break
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 143, errors[-2000:]
    assert "the same command goes on" in errors
    folder = tmp_path / "runs/t/predictor"
    [checkpoint] = folder.glob("step_*")
    step = int(checkpoint.name[5:])
    assert step >= 15
    assert step % 1000
    assert not (tmp_path / "out/model").exists()

    settings = config.model_dump(mode="json")
    settings["predictor"]["log_every"] = 5
    with pytest.MonkeyPatch.context() as patch:
        die_at(step + 5, patch)
        with pytest.raises(Died):
            train(parse_config(settings))
    assert [line["step"] for line in records(folder)][-1] >= step


@pytest.mark.verify("V18")
def test_early_stopping_best_last_and_the_log(parent, tmp_path, monkeypatch, figure):
    """Scripted validation losses; patience 2, min_delta 0.1: 1.95 is no improvement on 2.0."""
    losses = iter([3.0, 2.0, 1.95, 2.5, 0.1, 0.1])
    monkeypatch.setattr(Worker, "validate", lambda self: {"validation_loss": next(losses)})
    rule = {"patience": 2, "min_delta": 0.1}
    config = finetune_config(parent, tmp_path, steps=60, validate_every=10, keep=1, early_stopping=rule)
    train(config)
    folder = tmp_path / "runs/t/predictor"
    kept = sorted(path.name for path in folder.glob("step_*"))
    assert kept == ["step_0000030", "step_0000040"]
    record = json.loads((tmp_path / "out/training.json").read_text())["stages"]["predictor"]
    assert (record["steps"], record["stopped_early"], record["best_step"]) == (40, True, 30)
    assert record["validation_loss"] == 1.95
    best = load_file(folder / "step_0000030/network/model.safetensors")
    exported = load_file(tmp_path / "out/model/model.safetensors")
    assert all(torch.equal(best[name], exported[name]) for name in best)
    figure("losses 3, 2, 1.95, 2.5 with patience 2, min_delta 0.1: ended at step 40, best 30, last 40", "these")
    train(config)  # it has ended: nothing more is trained, no loss is asked for
    assert list(losses) == [0.1, 0.1]


@pytest.mark.verify("V18")
def test_an_empty_validation_is_an_error(parent, tmp_path, figure, capsys):
    config = finetune_config(parent, tmp_path).model_dump(mode="json")
    config["data"]["source"]["bars"] = 20
    assert main(["--config", str(write_yaml(parse_config(config), tmp_path))]) == 2
    message = capsys.readouterr().err
    figure(f"no validation window: {message.strip()[:60]}…", "an error, not 0.0000")
    assert message.startswith("error: ")
    assert "has no window of 25 bars" in message


@pytest.mark.verify("V12")
@pytest.mark.parametrize("damage", ["flip", "truncate"])
def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(parent, tmp_path, figure, damage, caplog):
    config = finetune_config(parent, tmp_path, steps=40, validate_every=10, keep=4)
    with pytest.MonkeyPatch.context() as patch:
        die_at(35, patch)
        with pytest.raises(Died):
            train(config)
    folder = tmp_path / "runs/t/predictor"
    path = folder / "step_0000030/network/model.safetensors"
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(bytes(content) if damage == "flip" else bytes(content)[:-50])
    train(config)
    assert "checkpoint step_0000030 is refused: network/model.safetensors" in caplog.text
    record = json.loads((tmp_path / "out/training.json").read_text())
    assert any("step_0000030 is refused" in warning for warning in record["warnings"])
    straight = finetune_config(parent, tmp_path / "straight", steps=40, validate_every=10, keep=4)
    train(straight)
    (found, _), (expected, _) = last_state(folder), last_state(tmp_path / "straight/runs/t/predictor")
    same = all(torch.equal(expected[name], found[name]) for name in expected)
    figure(f"{damage} in step 30: resumed at 20, ends at the weights of an unbroken run: {same}", "True")
    assert same


def test_a_run_without_a_good_checkpoint_starts_over_and_says_so(parent, tmp_path, caplog):
    config = finetune_config(parent, tmp_path, steps=10, validate_every=10)
    train(config)
    (tmp_path / "runs/t/predictor/step_0000010" / MANIFEST_FILE).write_text("{}")
    train(config)
    assert "no checkpoint is good; training starts at step 0" in caplog.text
    assert json.loads((tmp_path / "runs/t/predictor/checkpoints.json").read_text())["last"] == "step_0000010"


def test_the_same_name_with_another_configuration_is_refused(parent, tmp_path, capsys):
    train(finetune_config(parent, tmp_path, steps=4))
    other = write_yaml(finetune_config(parent, tmp_path, steps=4, seed=1), tmp_path)
    assert main(["--config", str(other)]) == 2
    assert "another run.seed: choose another run.name" in capsys.readouterr().err


def test_a_start_that_failed_is_corrected_under_the_same_name(parent, tmp_path, capsys):
    """Nothing was trained, so that there is nothing another configuration could be mixed up with."""
    long = [{"steps": 4, "window": 500, "batch_size": "auto"}]
    wrong = write_yaml(finetune_config(parent, tmp_path, phases=long), tmp_path / "wrong")
    assert main(["--config", str(wrong)]) == 2
    assert "has no window of 501 bars" in capsys.readouterr().err
    hot = finetune_config(parent, tmp_path, steps=4, optimisation={"learning_rate": 1e30, "max_skipped": 0})
    assert main(["--config", str(write_yaml(hot, tmp_path))]) == 2
    assert "lower" in capsys.readouterr().err
    right = write_yaml(finetune_config(parent, tmp_path, steps=4), tmp_path)
    assert main(["--config", str(right)]) == 0
    assert main(["--config", str(wrong)]) == 2, "now there is something"
    assert "choose another run.name" in capsys.readouterr().err


def test_a_process_that_was_killed_before_its_first_checkpoint_leaves_its_name_free(parent, tmp_path, capsys):
    """SIGKILL lets nobody clear up; what is still running is not disturbed, nor is what has a checkpoint."""
    folder = tmp_path / "runs/t/predictor"
    first = write_yaml(finetune_config(parent, tmp_path, steps=100_000, validate_every=50_000), tmp_path / "first")
    right = write_yaml(finetune_config(parent, tmp_path, steps=4), tmp_path)
    process = subprocess.Popen(
        [sys.executable, "-m", "cluster.train", "--config", str(first), "predictor.log_every=5"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert any("step 5/" in line for line in process.stdout)
    assert main(["--config", str(right)]) == 2
    assert "another process is training in" in capsys.readouterr().err
    process.kill()
    process.communicate(timeout=60)
    assert (folder / "config.yaml").is_file()
    assert main(["--config", str(right)]) == 0
    assert {line["step"] for line in records(folder)} == {4}
    assert main(["--config", str(first)]) == 2
    assert "choose another run.name" in capsys.readouterr().err


def test_what_a_finetune_leaves_behind(parent, tmp_path, monkeypatch, caplog):
    """A bundle with both networks; parent, data, method, device and what was given up, on record."""
    monkeypatch.setattr("model.device.cuda_available", lambda: False)
    lora = {"rank": 2, "targets": ["q", "v"]}
    training = {"device": "cuda", "threads": 1, "max_failures": 3}
    config = finetune_config(parent, tmp_path, steps=6, method="lora", lora=lora, training=training)
    train(config, command="the command")
    out = tmp_path / "out"
    assert Kronos.from_pretrained(out / "model").s1_bits == 4
    for name in ("config.json", "model.safetensors"):
        assert (out / "tokenizer" / name).read_bytes() == (parent / "tokenizer" / name).read_bytes()
    record = json.loads((out / "training.json").read_text())
    first, second = record["warnings"]
    assert "device 'cuda' was requested" in first
    assert "training.max_failures=3 is without effect" in second
    assert second in caplog.text
    assert (record["device"], record["command"]) == ("cpu", "the command")
    entry = record["stages"]["predictor"]
    assert entry["method"] == "lora"
    assert entry["parent"]["folder"] == (parent / "model").as_posix()
    assert len(entry["parent"]["sha256"]) == len(record["data_sha256"]) == 64
    assert 0 < entry["trained_weights"] < entry["weights"]
    assert entry["bars"] == 6 * 8 * 25
    assert set(entry["metrics"]) == {"validation_loss", "validation_s1", "validation_s2"}
    [adapters] = (tmp_path / "runs/t/predictor").glob("step_*/adapters.safetensors")
    assert len(load_file(adapters)) == 2 * 2 * 2
    assert not list((tmp_path / "runs").rglob("model.safetensors"))


def test_a_required_gpu_that_is_absent_ends_the_run(parent, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("model.device.cuda_available", lambda: False)
    monkeypatch.setattr("model.device.mps_available", lambda: False)
    config = write_yaml(finetune_config(parent, tmp_path, training={"device": "auto", "require_gpu": True}), tmp_path)
    assert main(["--config", str(config)]) == 2
    assert "training.require_gpu" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


@pytest.fixture
def kronos_small(parent, tmp_path, monkeypatch):
    """The parent as the Hub's cache holds kronos-small; the Hub itself cannot be reached."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    for part in ("model", "tokenizer"):
        repository, revision = network_source("kronos-small", part)
        shutil.copytree(
            parent / part, tmp_path / "hub" / f"models--{repository.replace('/', '--')}" / "snapshots" / revision
        )
    return "kronos-small"


@pytest.mark.parametrize("form", ["alias", "bundle", "two_folders"])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_parent_is_named_as_any_model_is(parent, tmp_path, kronos_small, form, method):
    """The weights decide, not the way in which they are named."""
    named = {
        "alias": {"init_from": kronos_small},
        "bundle": {"init_from": parent},
        "two_folders": {"init_from": parent / "model", "tokenizer": parent / "tokenizer"},
    }[form]
    config = tiny_config("predictor", folder=tmp_path, steps=4, method=method, **{"tokenizer": None} | named)
    train(config)
    train(config)  # resumed: it is the same run
    record = json.loads((tmp_path / "out/training.json").read_text())
    inputs = record["stages"]["predictor"]["inputs"]
    assert inputs["init_from"] == sha256_of(parent / "model" / "model.safetensors")
    assert inputs["tokenizer"] == sha256_of(parent / "tokenizer" / "model.safetensors")
    assert record["stages"]["predictor"]["parent"]["sha256"] == inputs["init_from"]
    shutil.rmtree(tmp_path / "out" / "tokenizer")
    export(tmp_path / "out", tmp_path / "mine")
    exported = json.loads((tmp_path / "mine/training.json").read_text())
    name = "kronos-small" if form == "alias" else parent.name
    assert exported["parent"] == {"name": name, "sha256": pair_sha256(parent / "model", parent / "tokenizer")}
    assert load_checkpoint(CheckpointSource("mine", str(tmp_path / "mine"))).tokenizer.s1_bits == 4


def test_both_networks_of_a_name_are_finetuned(parent, tmp_path, kronos_small):
    config = tiny_config("tokenizer", folder=tmp_path, steps=2, init_from=kronos_small).model_dump(mode="json")
    predictor = tiny_config("predictor", steps=2, init_from=kronos_small).model_dump(mode="json")["predictor"]
    train(parse_config(config | {"predictor": predictor | {"tokenizer": None}}))
    stages = json.loads((tmp_path / "out/training.json").read_text())["stages"]
    for stage, part in (("tokenizer", "tokenizer"), ("predictor", "model")):
        assert stages[stage]["parent"] == {
            "folder": kronos_small,
            "sha256": sha256_of(parent / part / "model.safetensors"),
        }
    export(tmp_path / "out", tmp_path / "mine")
    record = json.loads((tmp_path / "mine/training.json").read_text())
    assert record["parent"]["sha256"] == pair_sha256(parent / "model", parent / "tokenizer")


def test_the_bundled_checkpoint_is_tried_dry_by_its_name(tmp_path, monkeypatch, capsys):
    """From any folder, with the configuration that is shipped."""
    monkeypatch.chdir(tmp_path)
    frame_from_bars(simulate(3, 1, 700)).to_csv("candles.csv", index=False)
    small = ["predictor.phases.0.window=32", "predictor.phases.0.batch_size=2", "training.threads=1"]
    assert main(["--config", str(ROOT / "cluster/configs/finetune.yaml"), "--dry-run", *small]) == 0
    assert "dry run: ok" in capsys.readouterr().out


def test_a_tokenizer_finetune_reports_how_many_codes_have_changed(parent, tmp_path, caplog):
    for depth, changes in ((3, False), (5, True)):
        folder = tmp_path / str(depth)
        config = tiny_config("tokenizer", folder=folder, steps=30, init_from=parent / "tokenizer", depth=depth)
        train(config)
        drift = json.loads((folder / "out/training.json").read_text())["stages"]["tokenizer"]["code_drift"]
        assert (drift["percent"] > 0) == changes, "up to depth 3 the encoder is frozen"
        assert drift["percent"] >= drift["s1_percent"]
        assert KronosTokenizer.from_pretrained(folder / "out/tokenizer").s1_bits == 4
    assert "have another code than the parent's" in caplog.text


@pytest.mark.verify("V20")
@pytest.mark.parametrize("method", ["lora", "full"])
def test_dry_run(parent, tmp_path, figure, method, capsys, caplog):
    phases = [{"steps": 100_000, "window": 24, "batch_size": 64}]
    ray_only = {"num_workers": 64, "ray_address": "nowhere:1", "max_failures": 3}
    config = finetune_config(parent, tmp_path, phases=phases, method=method, training=ray_only)
    path = write_yaml(config, tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert main(["--config", str(path), "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "reloaded: the weights are the same" in lines
    assert any(line.startswith("forecast 4 bars from 64") for line in lines)
    assert lines[-1].startswith("dry run: ok")
    assert "without effect" not in caplog.text
    assert sorted(tmp_path.rglob("*")) == before
    figure(f"{method}: {lines[-1]}", "under 20 s, no file left")


def test_a_dry_run_counts_each_split_once_and_leaves_no_cache(parent, tmp_path, capsys, caplog):
    frame_from_bars(simulate(3, 1, 200)).to_csv(tmp_path / "bars.csv", index=False)
    config = finetune_config(parent, tmp_path).model_dump(mode="json", exclude_unset=True)
    shares = {"validation_share": 0.2, "test_share": 0.1}
    config["data"]["source"] = {"kind": "file", "path": str(tmp_path / "bars.csv"), "cache": str(tmp_path / "cache")}
    config["data"]["source"] |= shares
    config["training"]["max_failures"] = 1
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    assert main(["--config", str(path), "--dry-run"]) == 0
    assert "data: 1 symbols, train 140 bars, validation 40 bars, test 20 bars\n" in capsys.readouterr().out
    assert sorted(file.name for file in tmp_path.iterdir()) == ["bars.csv", "config.yaml"]
    assert "training.max_failures=1 is without effect" in caplog.text
    assert "ray_address" not in caplog.text


@pytest.mark.verify("V20")
def test_a_dry_run_finds_what_the_run_would(parent, tmp_path, figure, capsys):
    faults = {
        "data.source={kind: file, path: /nowhere.csv, validation_from: 2024-01-01}": "/nowhere.csv",
        "predictor.phases.0.windw=24": "nearest known one is 'window'",
        "predictor.phases.0.window=500": "has no window of 501 bars",
        "predictor.init_from=/nowhere": "/nowhere",
        "training.precision=int8": "training.precision",
    }
    path = str(write_yaml(finetune_config(parent, tmp_path), tmp_path))
    for override, named in faults.items():
        assert main(["--config", path, "--dry-run", override]) == 2, override
        assert named in capsys.readouterr().err
    figure(f"{len(faults)} faults in a dry run: each exits 2 and is named", "all")


def test_a_dry_run_tries_every_phase_and_logs_nowhere(parent, tmp_path, monkeypatch, capsys):
    """The largest batch is not the longest window; and a trial is no run to show to a tracking server."""
    phases = [{"steps": 9, "window": 24, "batch_size": 64}, {"steps": 9, "window": 500, "batch_size": 1}]
    path = str(write_yaml(finetune_config(parent, tmp_path, phases=phases), tmp_path))
    assert main(["--config", path, "--dry-run"]) == 2
    assert "has no window of 501 bars" in capsys.readouterr().err
    path = str(write_yaml(finetune_config(parent, tmp_path), tmp_path))
    monkeypatch.setitem(sys.modules, "wandb", types.ModuleType("wandb"))  # which could start no run
    assert main(["--config", path, "--dry-run", "logging.loggers=[wandb]"]) == 0
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert main(["--config", path, "--dry-run", "logging.loggers=[wandb]"]) == 2
    assert "kronos-ray-serve[wandb]" in capsys.readouterr().err


def test_memory_that_ends_in_the_last_validation_names_the_size_to_try(parent, tmp_path, monkeypatch, capsys):
    def validate(self):
        raise RuntimeError("CUDA out of memory")

    monkeypatch.setattr(Worker, "validate", validate)
    assert main(["--config", str(write_yaml(finetune_config(parent, tmp_path, steps=2), tmp_path))]) == 2
    assert "set training.micro_batch_size=4" in capsys.readouterr().err


def test_the_record_is_of_what_lies_beside_it(parent, tmp_path):
    """Stages of an earlier run in the same folder go, but for the tokenizer that is used from there; splits stay."""
    bars = simulate(3, 1, 200, bar_minutes=(60,))
    frame_from_bars(bars).to_csv(tmp_path / "bars.csv", index=False)
    source = {"kind": "file", "path": str(tmp_path / "bars.csv"), "validation_share": 0.3, "test_share": 0.2}

    def run(stage, name, **options):
        raw = tiny_config(stage, folder=tmp_path, steps=2, **options).model_dump(mode="json")
        raw["run"]["name"], raw["data"]["source"] = name, source
        train(parse_config(raw))
        return json.loads((tmp_path / "out/training.json").read_text())

    assert list(run("tokenizer", "a")["stages"]) == ["tokenizer"]
    record = run("predictor", "b", tokenizer=tmp_path / "out/tokenizer")
    assert list(record["stages"]) == ["tokenizer", "predictor"]
    times = bars[0].times.astype("datetime64[s]")
    assert record["splits"] == {"validation_from": str(times[100]), "test_from": str(times[160])}
    del source["test_share"]
    without_test = {"validation_from": str(times[140]), "last_bar": str(times[199])}
    assert run("tokenizer", "e")["splits"] == without_test
    assert list(run("predictor", "c", tokenizer=parent / "tokenizer")["stages"]) == ["predictor"]
    assert list(run("tokenizer", "d")["stages"]) == ["tokenizer"]


@pytest.mark.verify("V21")
def test_keys_of_the_environment_are_nowhere_in_the_run(parent, tmp_path, monkeypatch, capsys, caplog, figure):
    canary = "canary-5f2c9e"
    keys = {
        name: f"{canary}-{name}" for name in ("WANDB_API_KEY", "MLFLOW_TRACKING_PASSWORD", "HF_TOKEN", "COMET_API_KEY")
    }
    for name, key in keys.items():
        monkeypatch.setenv(name, key)
    caplog.set_level("INFO")
    assert main(["--config", str(write_yaml(finetune_config(parent, tmp_path, steps=4), tmp_path))]) == 0
    printed = capsys.readouterr()
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    hits = [path for path in files if canary.encode() in path.read_bytes()]
    assert canary not in printed.out + printed.err + caplog.text
    figure(f"{len(keys)} keys in the environment: {len(hits)} hits in {len(files)} files and the output", "0")
    assert hits == []


@pytest.mark.verify("V23")
@pytest.mark.slow
def test_the_published_small_shape_trains(tmp_path, figure):
    """8 layers of width 512, random weights, 2 windows of 64 bars, 3 steps: no claim of skill."""
    import resource

    shape = {"n_layers": 8, "d_model": 512, "n_heads": 8, "ff_dim": 1024}
    save_tokenizer(tmp_path / "tokenizer")
    config = tiny_config(
        "predictor",
        folder=tmp_path,
        network=shape,
        tokenizer=tmp_path / "tokenizer",
        phases=[{"steps": 3, "window": 64, "batch_size": 2}],
    )
    made = train_module.train(config)
    loss = json.loads((tmp_path / "out/training.json").read_text())["stages"]["predictor"]["validation_loss"]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    figure(f"Kronos-small shape: loss {loss:.3f} after 3 steps, peak {peak:.1f} GiB of this process", "finite")
    assert 0 < loss < 100
    assert Kronos.from_pretrained(made["predictor"]).d_model == 512


def test_a_checkpoint_that_would_run_code_is_not_opened(parent, tmp_path):
    class Harmful:
        def __reduce__(self):
            return (print, ("ran",))

    config = finetune_config(parent, tmp_path, steps=4)
    worker = Worker(config, "predictor", parent / "tokenizer", torch.device("cpu"))
    worker.save(tmp_path)
    torch.save({"step": Harmful()}, tmp_path / "state.pt")
    with pytest.raises(Exception, match=r"[Ww]eights.only"):
        worker.restore(tmp_path)


def test_stop_before_the_first_step_is_a_stop(parent, tmp_path, monkeypatch):
    """SIGTERM while the data is read: nothing is trained, nothing is lost, the exit says so."""
    real = train_module.inputs_of

    def interrupted(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        return real(*arguments)

    monkeypatch.setattr(train_module, "inputs_of", interrupted)
    before = signal.getsignal(signal.SIGTERM)  # of Ray, if an earlier test of this process has started it
    with pytest.raises(train_module.Stopped):
        train(finetune_config(parent, tmp_path))
    assert signal.getsignal(signal.SIGTERM) == before
