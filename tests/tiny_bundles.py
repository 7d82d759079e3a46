"""What a finetune leaves behind, and a report on it, without a step of training."""

import json
import shutil

import pandas as pd
import torch

from model.kronos import Kronos

BASELINES = ("last_price", "drift", "historical_volatility", "seasonal_naive")


def finetune(parent, folder):
    """What a finetune of the parent leaves in folder/run: other weights, a record of it, real bars in a file."""
    run = folder / "run"
    network = Kronos.from_pretrained(parent / "model")
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(1.001)
    network.save_pretrained(run / "model")
    shutil.copytree(parent / "tokenizer", run / "tokenizer")
    bars = pd.DataFrame({"timestamps": pd.date_range("2024-07-01", periods=100, freq="h")})
    bars = bars.assign(open=1.0, high=1.0, low=1.0, close=1.0)
    bars.to_csv(folder / "bars.csv", index=False)
    source = {"kind": "file", "path": str(folder / "bars.csv"), "validation_share": 0.2, "test_share": 0.2}
    record = {
        "command": "python -m cluster.train --config finetune.yaml",
        "device": "cpu",
        "warnings": ["device 'cuda' was requested; using 'cpu'"],
        "stages": {"predictor": {"steps": 10, "minutes": 0.1, "validation_loss": 1.25, "method": "lora"}},
        "config": {
            "run": {"seed": 0},
            "data": {"source": source},
            "predictor": {"init_from": str(parent / "model"), "tokenizer": str(parent / "tokenizer")},
        },
    }
    (run / "training.json").write_text(json.dumps(record))
    return run


def report_of(bundle, **changes):
    """As cluster.evaluate writes it, of a model that beats everything in the test period."""
    training = json.loads((bundle / "training.json").read_text())
    comparisons = [
        {
            "against": name,
            "metric": "crps",
            "ratio": 0.9,
            "low": 0.85,
            "high": 0.95,
            "p_value": 0.01,
            "verdict": "beats",
        }
        for name in ("parent", *BASELINES)
    ]
    report = {
        "model": {"sha256": training["sha256"]},
        "parent": {"sha256": training["parent"]["sha256"]},
        "period": {"from": training["data"].get("test_from"), "to": None},
        "comparisons": comparisons,
        "verdict": "beats",
    }
    return report | changes


def save(report, path):
    path.write_text(json.dumps(report))
    return path


def weights_of(checkpoint):
    return {name: tensor.numpy().tobytes() for name, tensor in checkpoint.model.state_dict().items()}


def change_record(run_output, change):
    path = run_output / "training.json"
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))
