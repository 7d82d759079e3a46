"""Runs that are tried dry: what they find, and that they leave nothing behind."""

import sys
import types
from pathlib import Path

import pytest
import yaml

from cluster.candles.bars import frame_from_bars
from cluster.candles.simulate import simulate
from cluster.train import main
from tests.tiny_training import finetune_config, save_parent, write_yaml

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def parent(tmp_path_factory):
    return save_parent(tmp_path_factory.mktemp("parent"))


def test_the_bundled_checkpoint_is_tried_dry_by_its_name(tmp_path, monkeypatch, capsys):
    """From any folder, with the configuration that is shipped."""
    monkeypatch.chdir(tmp_path)
    frame_from_bars(simulate(3, 1, 700)).to_csv("candles.csv", index=False)
    small = ["predictor.phases.0.window=32", "predictor.phases.0.batch_size=2", "training.threads=1"]
    assert main(["--config", str(ROOT / "cluster/configs/finetune.yaml"), "--dry-run", *small]) == 0
    assert "dry run: ok" in capsys.readouterr().out


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
