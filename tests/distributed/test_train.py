"""The trainer on a real Ray Train cluster of this machine's CPUs."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from safetensors.torch import load_file

from cluster.train import train
from cluster.training.config_file import load_config
from model.errors import InputError
from model.kronos import Kronos
from model.tokenizer import KronosTokenizer
from tests.tiny_training import save_tokenizer

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.timeout(600)


def write_config(folder, predictor=None, tokenizer=None, **training):
    """A tokenizer and a predictor of a few thousand weights, or the predictor alone for the tokenizer of a folder."""
    config = {
        "run": {"name": "t", "storage": str(folder / "runs"), "output": str(folder / "out")},
        "training": {"device": "cpu"} | training,
        "data": {
            "source": {
                "kind": "simulated",
                "seed": 1,
                "series": 8,
                "bars": 120,
                "validation_seed": 2,
                "validation_series": 4,
            },
            "stride": 4,
        },
        "tokenizer": {
            "network": {"d_model": 16, "n_heads": 2, "ff_dim": 32, "n_enc_layers": 2, "n_dec_layers": 2}
            | {"s1_bits": 4, "s2_bits": 4},
            "phases": [{"steps": 20, "window": 32, "batch_size": 8}],
            "optimisation": {"warmup_steps": 10},
            "validate_every": 10,
            "validation_windows": 16,
        },
        "predictor": {
            "network": {"d_model": 16, "n_heads": 2, "ff_dim": 32, "n_layers": 1, "resid_dropout_p": 0.1},
            "phases": [{"steps": 300, "window": 32, "batch_size": 8}],
            "validate_every": 25,
            "validation_windows": 16,
            "log_every": 50,
        }
        | (predictor or {}),
    }
    if tokenizer is not None:
        config["tokenizer"], config["predictor"]["tokenizer"] = None, str(tokenizer)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def resumed_at(output):
    """The steps at which the log says that training went on."""
    return [
        int(line.split("resumed at step ")[1].split(",")[0]) for line in output.splitlines() if "resumed at" in line
    ]


def train_workers(process):
    """The Ray Train workers of the trainer's own cluster."""
    children = psutil.Process(process.pid).children(recursive=True)
    return [child for child in children if "RayTrainWorker" in " ".join(child.cmdline())]


def last_step(run):
    return max((int(path.name[5:]) for path in run.glob("step_*")), default=0)


def last_weights(folder):
    """Of the last checkpoint of the predictor."""
    run = folder / "runs/t/predictor"
    last = json.loads((run / "checkpoints.json").read_text())["last"]
    return load_file(run / last / "network/model.safetensors")


@pytest.fixture
def start():
    """(config, overrides…) → the trainer as a process, which does not outlive the test."""
    started = []

    def run(config, *overrides):
        environment = os.environ | {"RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2"}
        started.append(
            subprocess.Popen(
                [sys.executable, "-m", "cluster.train", "--config", str(config), *overrides],
                cwd=ROOT,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,  # an interrupt reaches the trainer and nobody else
            )
        )
        return started[-1]

    yield run
    for process in started:
        if process.poll() is None:
            interrupt(process)


def interrupt(process):
    """Ctrl-C; the trainer then stops its Ray cluster."""
    process.send_signal(signal.SIGINT)
    try:
        return process.communicate(timeout=60)[0]
    except subprocess.TimeoutExpired:
        process.kill()
        raise


def finish(process):
    output, _ = process.communicate()
    assert process.returncode == 0, output[-4000:]
    return output


def wait_for(path, process, timeout=240):
    end = time.monotonic() + timeout
    while not list(path.parent.glob(path.name)):
        assert process.poll() is None, process.stdout.read()[-4000:]
        assert time.monotonic() < end, f"no {path} after {timeout} s"
        time.sleep(0.1)


@pytest.mark.parametrize("stages", ["predictor", pytest.param("both", marks=pytest.mark.slow)])
def test_interrupted_training_goes_on_and_ends_as_if_nothing_had_happened(tmp_path, start, tokenizer, stages):
    """One worker; Ctrl-C during the predictor; the same command again."""
    given = None if stages == "both" else tokenizer
    config = write_config(tmp_path, None, given, num_workers=1)
    process = start(config)
    wait_for(tmp_path / "runs/t/predictor/step_00000[0-9]*", process)
    interrupt(process)
    assert process.returncode != 0
    assert not (tmp_path / "out/model").exists()

    output = finish(start(config))
    assert "resumed at step" in output
    assert "Failed to query" not in output, "a private cluster has no dashboard that Ray Train could ask"
    assert "TrainingReport" not in output, "what is reported has been printed"
    losses = [json.loads(line) for line in (tmp_path / "runs/t/predictor/metrics.jsonl").read_text().splitlines()]
    losses = [line for line in losses if "validation_loss" in line]
    assert losses[-1]["step"] == 300
    assert losses[-1]["validation_loss"] < losses[0]["validation_loss"]
    KronosTokenizer.from_pretrained(tmp_path / "out/tokenizer")
    resumed = Kronos.from_pretrained(tmp_path / "out/model")

    # The same in one go, in this process.
    straight = tmp_path / "straight"
    train(load_config(write_config(straight, None, given, num_workers=0, threads=1)))
    last = load_file(straight / "runs/t/predictor/step_0000300/network/model.safetensors")
    best = min(losses, key=lambda line: line["validation_loss"])["step"]
    expected = load_file(straight / f"runs/t/predictor/step_{best:07d}/network/model.safetensors")
    assert all(torch.equal(expected[name], tensor) for name, tensor in resumed.state_dict().items())
    resumed_last = load_file(tmp_path / "runs/t/predictor/step_0000300/network/model.safetensors")
    assert all(torch.equal(last[name], tensor) for name, tensor in resumed_last.items())


LONG = {"phases": [{"steps": 500, "window": 32, "batch_size": 8}], "keep": 100}
"""Seconds of training, so that a run can be caught in the middle of it."""


@pytest.mark.verify("V10")
@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_worker_costs_the_steps_since_the_last_checkpoint(tmp_path, start, tokenizer, figure, workers):
    """SIGKILL of one worker once; max_failures 1; against a run that nobody disturbed."""
    config = write_config(tmp_path / "killed", LONG, tokenizer, num_workers=workers, threads=1, max_failures=1)
    process = start(config)
    run = tmp_path / "killed/runs/t/predictor"
    wait_for(run / "step_0000075", process)
    victims = train_workers(process)
    assert len(victims) == workers
    victims[-1].kill()
    killed_at = last_step(run)
    began = time.monotonic()
    while last_step(run) <= killed_at + 25:
        assert process.poll() is None or process.returncode == 0
        assert time.monotonic() - began < 240
        time.sleep(0.1)
    recovery = time.monotonic() - began
    [resumed] = resumed_at(finish(process))
    straight = write_config(
        tmp_path / "straight", LONG, tokenizer, num_workers=workers if workers > 1 else 0, threads=1
    )
    finish(start(straight))
    expected, found = last_weights(tmp_path / "straight"), last_weights(tmp_path / "killed")
    same = all(torch.equal(expected[name], found[name]) for name in expected)
    figure(
        f"{workers} worker(s): resumed at {resumed} after a kill past {killed_at}, {recovery:.1f} s until a new "
        f"checkpoint, weights equal: {same}",
        "at most 25 steps again; True",
    )
    assert same
    assert resumed >= killed_at


@pytest.mark.verify("V11")
@pytest.mark.slow
def test_a_killed_driver_is_started_again(tmp_path, start, tokenizer, figure):
    config = write_config(tmp_path / "killed", LONG, tokenizer, num_workers=1, threads=1)
    process = start(config)
    run = tmp_path / "killed/runs/t/predictor"
    wait_for(run / "step_0000050", process)
    process.kill()
    process.communicate()
    refused = start(config, "run.seed=3")
    output, _ = refused.communicate()
    assert refused.returncode == 2
    assert "another run.seed: choose another run.name" in output
    [resumed] = resumed_at(finish(start(config)))
    finish(start(write_config(tmp_path / "straight", LONG, tokenizer, num_workers=0, threads=1)))
    expected, found = last_weights(tmp_path / "straight"), last_weights(tmp_path / "killed")
    same = all(torch.equal(expected[name], found[name]) for name in expected)
    figure(f"driver killed after step 50: resumed at {resumed}, weights equal: {same}; other seed refused", "True")
    assert resumed >= 50
    assert same


@pytest.mark.slow
def test_sigterm_reaches_the_workers_and_the_same_command_resumes(tmp_path, start, tokenizer):
    rarely = LONG | {"validate_every": 1000, "log_every": 5}
    config = write_config(tmp_path / "ended", rarely, tokenizer, num_workers=2, threads=1)
    process = start(config)
    wait_for(tmp_path / "ended/runs/t/predictor/metrics.jsonl", process)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 143, output[-3000:]
    assert "the same command goes on" in output
    run = tmp_path / "ended/runs/t/predictor"
    stopped = last_step(run)
    assert stopped % 1000
    output = finish(start(config))
    assert resumed_at(output) == [stopped]
    finish(start(write_config(tmp_path / "straight", rarely, tokenizer, num_workers=2, threads=1)))
    expected, found = last_weights(tmp_path / "straight"), last_weights(tmp_path / "ended")
    assert all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.fixture(scope="module")
def two_cpus():
    """A cluster of two CPUs that this process is connected to."""
    import ray

    ray.init(address="local", num_cpus=2, include_dashboard=False, _node_ip_address="127.0.0.1", log_to_driver=False)
    yield
    ray.shutdown()


FEW = {
    "phases": [{"steps": 20, "window": 32, "batch_size": 8}],
    "optimisation": {"warmup_steps": 10},
    "validate_every": 20,
}
SMOOTH = {"d_model": 16, "n_heads": 2, "ff_dim": 32, "n_layers": 1}


def run_here(folder, tokenizer, **training):
    return train(load_config(write_config(folder, FEW | {"network": SMOOTH}, tokenizer, **training)))


@pytest.mark.slow
def test_an_elastic_run_takes_what_there_is_and_gives_the_weights_of_one(tmp_path, tokenizer, two_cpus):
    """[1, 8] on two CPUs: two workers, the same global batch."""
    alone = run_here(tmp_path / "one", tokenizer, num_workers=0, threads=1)
    elastic = run_here(tmp_path / "elastic", tokenizer, num_workers=[1, 8], threads=1)
    record = json.loads((tmp_path / "elastic/out/training.json").read_text())["stages"]["predictor"]
    assert (record["workers"], record["batch_sizes"]) == (2, [8])
    one, other = (load_file(made["predictor"] / "model.safetensors") for made in (alone, elastic))
    for name, tensor in one.items():
        torch.testing.assert_close(other[name], tensor, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_an_absent_gpu_is_on_record_or_an_error_and_never_a_wait(tmp_path, tokenizer, two_cpus, caplog):
    run_here(tmp_path / "cuda", tokenizer, device="cuda", num_workers=1)
    [warning] = json.loads((tmp_path / "cuda/out/training.json").read_text())["warnings"]
    assert "the cluster has 0 GPUs for 1 worker" in warning
    assert warning in caplog.text
    with pytest.raises(InputError, match="there is no GPU"):
        run_here(tmp_path / "required", tokenizer, device="cuda", require_gpu=True, num_workers=1)
    with pytest.raises(InputError, match="need 4 CPUs and the cluster has 2"):
        run_here(tmp_path / "many", tokenizer, num_workers=4)


@pytest.mark.slow
def test_a_mistake_in_a_worker_comes_back_as_itself(tmp_path, two_cpus):
    """Not as a failure of Ray's, and not after max_failures tries."""
    path = write_config(tmp_path, num_workers=1)
    config = load_config(path, ["tokenizer.phases.0.window=500"])
    with pytest.raises(InputError, match="no window of 500 bars"):
        train(config)
