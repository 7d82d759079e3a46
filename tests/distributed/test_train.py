"""The trainer on a real Ray Train cluster of this machine's CPUs."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from model.kronos import Kronos
from model.tokenizer import KronosTokenizer

ROOT = Path(__file__).parents[2]


def write_config(folder, **run):
    """A tokenizer and a predictor of a few thousand weights."""
    config = {
        "run": {"name": "t", "storage": str(folder / "runs"), "output": str(folder / "out"), "device": "cpu"} | run,
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
            "validate_every": 10,
            "validation_windows": 16,
        },
        "predictor": {
            "network": {"d_model": 16, "n_heads": 2, "ff_dim": 32, "n_layers": 1, "resid_dropout_p": 0.1},
            "phases": [{"steps": 300, "window": 32, "batch_size": 8}],
            "validate_every": 25,
            "validation_windows": 16,
            "log_every": 50,
        },
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


@pytest.fixture
def start():
    """(config, overrides…) → the trainer as a process, which does not outlive the test."""
    started = []

    def run(config, *overrides):
        environment = os.environ | {"RAY_AUTH_MODE": "disabled", "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2"}
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


def wait_for(path, process, timeout=120):
    end = time.monotonic() + timeout
    while not list(path.parent.glob(path.name)):
        assert process.poll() is None, process.stdout.read()[-4000:]
        assert time.monotonic() < end, f"no {path} after {timeout} s"
        time.sleep(0.1)


def test_interrupted_training_goes_on_and_ends_as_if_nothing_had_happened(tmp_path, start):
    """One worker, tokenizer and predictor; Ctrl-C during the predictor; the same command again."""
    config = write_config(tmp_path, num_workers=1)
    process = start(config)
    wait_for(tmp_path / "runs/t/predictor/step_00000[0-9]*", process)
    interrupt(process)
    assert process.returncode != 0
    assert not (tmp_path / "out/model").exists()

    output = finish(start(config))
    assert "resumed at step" in output
    losses = [json.loads(line) for line in (tmp_path / "runs/t/predictor/metrics.jsonl").read_text().splitlines()]
    losses = [line for line in losses if "validation_loss" in line]
    assert losses[-1]["step"] == 300
    assert losses[-1]["validation_loss"] < losses[0]["validation_loss"]
    KronosTokenizer.from_pretrained(tmp_path / "out/tokenizer")
    resumed = Kronos.from_pretrained(tmp_path / "out/model")

    # The same in one go, in the trainer's own process.
    straight = tmp_path / "straight"
    straight.mkdir()
    finish(start(write_config(straight, num_workers=0, threads=1)))
    last = load_file(straight / "runs/t/predictor/step_0000300/network/model.safetensors")
    best = min(losses, key=lambda line: line["validation_loss"])["step"]
    expected = load_file(straight / f"runs/t/predictor/step_{best:07d}/network/model.safetensors")
    assert all(torch.equal(expected[name], tensor) for name, tensor in resumed.state_dict().items())
    resumed_last = load_file(tmp_path / "runs/t/predictor/step_0000300/network/model.safetensors")
    assert all(torch.equal(last[name], tensor) for name, tensor in resumed_last.items())


@pytest.mark.slow
def test_two_workers_give_the_weights_of_one(tmp_path, start):
    """gloo and DDP against a bare module: the same batches, the same gradients."""
    made = []
    for workers in (1, 2):
        folder = tmp_path / str(workers)
        folder.mkdir()
        config = write_config(folder, num_workers=workers, threads=1)
        few = ["predictor.phases.0.steps=20", "predictor.validate_every=20", "predictor.network.resid_dropout_p=0"]
        # One tokenizer for both, so that only the predictor is compared: the tokenizer's entropy term is a statistic of
        # each worker's own batch.
        few += [] if workers == 1 else [f"predictor.tokenizer={made[0]}/tokenizer", "tokenizer=null"]
        finish(start(config, *few))
        made.append(folder / "out")
    one, two = (load_file(folder / "model/model.safetensors") for folder in made)
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-3, atol=1e-4)
