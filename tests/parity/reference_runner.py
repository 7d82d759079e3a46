"""Runs a checkout of the public implementation and writes what it computes.

    python tests/parity/reference_runner.py CHECKOUT JOB.json OUT_FOLDER

It is a process of its own, because the public package is called `model` too. JOB.json holds the constructor arguments
of a random pair, the candles' CSV and forecast settings; OUT_FOLDER receives the weights as safetensors with
config.json, and forecasts.npz: per case the frames, and as tokens/CASE the sampled tokens [rows, horizon, 2].
"""

import json
import sys
from pathlib import Path


def main(checkout: str, job_file: str, out_folder: str) -> None:
    sys.path[0] = checkout
    import numpy as np
    import pandas as pd
    import torch
    from safetensors.torch import save_file

    from model import Kronos, KronosPredictor, KronosTokenizer  # the public one: sys.path starts at the checkout

    job, out = json.loads(Path(job_file).read_text()), Path(out_folder)
    torch.manual_seed(job["weights_seed"])
    networks = {"model": Kronos(**job["model"]), "tokenizer": KronosTokenizer(**job["tokenizer"])}
    for name, network in networks.items():
        network.eval()
        (out / name).mkdir(parents=True, exist_ok=True)
        (out / name / "config.json").write_text(json.dumps(job[name]))
        save_file(
            {key: value.contiguous() for key, value in network.state_dict().items()}, out / name / "model.safetensors"
        )

    decoded = []
    decode = networks["tokenizer"].decode

    def recording_decode(tokens, half=False):
        """The last step of a forecast: what it is given are the window's tokens, history first."""
        decoded.append(torch.stack(list(tokens), dim=-1).numpy())
        return decode(tokens, half=half)

    networks["tokenizer"].decode = recording_decode
    bars = pd.read_csv(job["candles"], parse_dates=["timestamps"])
    forecasts = {}
    for case in job["cases"]:
        predictor = KronosPredictor(
            networks["model"], networks["tokenizer"], device="cpu", max_context=case["max_context"]
        )
        histories = [bars.iloc[s : s + case["lookback"]].reset_index(drop=True) for s in case["starts"]]
        futures = [
            bars.iloc[s + case["lookback"] : s + case["lookback"] + case["horizon"]].reset_index(drop=True)
            for s in case["starts"]
        ]
        torch.manual_seed(case["seed"])
        frames = predictor.predict_batch(
            [frame[["open", "high", "low", "close", "volume", "amount"]] for frame in histories],
            [frame.timestamps for frame in histories],
            [frame.timestamps for frame in futures],
            case["horizon"],
            T=case["T"],
            top_k=case["top_k"],
            top_p=case["top_p"],
            sample_count=case["sample_count"],
            verbose=False,
        )
        forecasts[case["name"]] = np.stack([frame.to_numpy() for frame in frames])
        forecasts[f"tokens/{case['name']}"] = decoded.pop()[:, -case["horizon"] :]
    np.savez(out / "forecasts.npz", **forecasts)


if __name__ == "__main__":
    main(*sys.argv[1:])
