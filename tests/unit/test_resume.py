"""Runs in this process that are stopped, killed or damaged, and what the same command makes of them then."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cluster import train as train_module
from cluster.train import main, train
from cluster.training.checkpoints import MANIFEST_FILE
from cluster.training.config_file import parse_config
from cluster.training.worker import Worker
from tests.tiny_training import finetune_config, save_parent, write_yaml

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def parent(tmp_path_factory):
    return save_parent(tmp_path_factory.mktemp("parent"))


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
