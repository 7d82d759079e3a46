"""A training run with keys in its environment leaves none of them behind."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from cluster.train import main
from cluster.training.config_file import parse_config
from model.errors import InputError

ROOT = Path(__file__).parents[2]
CANARY = "canary-5b1e77d0aa"


def write_config(folder):
    config = {
        "run": {"name": "t", "storage": str(folder / "runs"), "output": str(folder / "out")},
        "data": {"source": {"kind": "simulated", "seed": 1, "series": 4, "bars": 80, "validation_series": 2}},
        "tokenizer": {
            "network": {"d_model": 16, "n_heads": 2, "ff_dim": 32, "n_enc_layers": 2, "n_dec_layers": 2}
            | {"s1_bits": 4, "s2_bits": 4},
            "phases": [{"steps": 4, "window": 24, "batch_size": 4}],
            "optimisation": {"warmup_steps": 2},
            "validate_every": 2,
            "validation_windows": 4,
            "log_every": 1,
        },
    }
    config["data"]["source"]["validation_seed"] = 2
    config["training"] = {"num_workers": 0, "device": "cpu"}
    (folder / "finetune.yaml").write_text(yaml.safe_dump(config))
    return folder / "finetune.yaml", config


@pytest.mark.verify("V21")
def test_v21_no_key_is_in_what_a_training_run_leaves(tmp_path, capsys, caplog, figure):
    path, _ = write_config(tmp_path)
    names = ("WANDB_API_KEY", "MLFLOW_TRACKING_PASSWORD", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY")
    environment = os.environ | {name: f"{CANARY}-{name}" for name in names} | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "cluster.train", "--config", str(path)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr[-3000:]
    # A key in the configuration is refused, and the refusal does not repeat it.
    assert main(["--config", str(path), f"run.api_key={CANARY}"]) == 2
    refused = capsys.readouterr()
    assert "run.api_key is not a key" in refused.err
    printed = done.stdout + done.stderr + refused.out + refused.err + caplog.text
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    hits = [file for file in files if CANARY.encode() in file.read_bytes()]
    assert len(files) > 5
    assert hits == []
    assert CANARY not in printed
    figure(f"a training run: {len(hits)} of {len(files)} files and 0 lines of output hold a canary", "must be 0")


def test_a_password_in_the_configuration_is_refused_without_being_repeated(tmp_path):
    _, config = write_config(tmp_path)
    config["logging"] = {"mlflow_uri": f"https://me:{CANARY}@host/mlflow"}
    with pytest.raises(InputError, match=r"logging\.mlflow_uri: leave user and password out") as caught:
        parse_config(config)
    assert CANARY not in str(caught.value)
    config["logging"] = {"mlflow_uri": "https://host/mlflow"}
    parse_config(config)
