"""Against a checkout of the public implementation itself: `pytest tests/parity --reference CHECKOUT`.

Other shapes than the golden pair has: odd sizes, fixed time tables, sliding windows, several series and samples.
"""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from model import Kronos, KronosPredictor, KronosTokenizer
from model.frames import series_from_frame
from model.types import Sampling

SHAPES = {
    "learned_times": {"n_heads": 2, "d_model": 40, "bits": 4, "learn_te": True},
    "fixed_times": {"n_heads": 4, "d_model": 64, "bits": 7, "learn_te": False},
    "mini_shape": {"n_heads": 4, "d_model": 256, "bits": 10, "learn_te": True},
}
CASES = [
    {"name": "top_p", "starts": [0, 311], "lookback": 90, "horizon": 20, "max_context": 512, "top_k": 0, "top_p": 0.9},
    {"name": "slides", "starts": [40], "lookback": 50, "horizon": 30, "max_context": 64, "top_k": 0, "top_p": 0.99},
    {"name": "top_k", "starts": [700], "lookback": 70, "horizon": 10, "max_context": 60, "top_k": 9, "top_p": 1.0},
    {"name": "unfiltered", "starts": [9], "lookback": 33, "horizon": 12, "max_context": 512, "top_k": 0, "top_p": 1.0},
]


def run_reference(shape, cases, reference, candles_csv, folder):
    """The public implementation's answers for the cases, and our networks with its weights."""
    size = SHAPES[shape]
    width = {"d_model": size["d_model"], "n_heads": size["n_heads"], "ff_dim": 2 * size["d_model"]}
    bits = {"s1_bits": size["bits"], "s2_bits": size["bits"]}
    dropout = {"ffn_dropout_p": 0.1, "attn_dropout_p": 0.0, "resid_dropout_p": 0.1}
    loss = {"beta": 0.05, "gamma0": 1.0, "gamma": 1.1, "zeta": 0.05, "group_size": 2}
    job = {
        "weights_seed": 1,
        "model": bits | width | dropout | {"n_layers": 3, "token_dropout_p": 0.1, "learn_te": size["learn_te"]},
        "tokenizer": bits | width | dropout | loss | {"d_in": 6, "n_enc_layers": 3, "n_dec_layers": 2},
        "candles": str(candles_csv),
        "cases": cases,
    }
    (folder / "job.json").write_text(json.dumps(job))
    runner = Path(__file__).with_name("reference_runner.py")
    subprocess.run([sys.executable, str(runner), str(reference), str(folder / "job.json"), str(folder)], check=True)
    pair = Kronos.from_pretrained(folder / "model"), KronosTokenizer.from_pretrained(folder / "tokenizer")
    return np.load(folder / "forecasts.npz"), pair


@pytest.mark.parametrize("shape", SHAPES)
def test_forecasts_equal_the_public_implementation(shape, reference, candles_csv, tmp_path):
    cases = [case | {"T": 0.9, "sample_count": 3, "seed": 5} for case in CASES]
    theirs, pair = run_reference(shape, cases, reference, candles_csv, tmp_path)
    bars = pd.read_csv(candles_csv, parse_dates=["timestamps"])
    for case in cases:
        predictor = KronosPredictor(*pair, device="cpu", max_context=case["max_context"])
        ends = [start + case["lookback"] for start in case["starts"]]
        histories = [bars[start:end] for start, end in zip(case["starts"], ends, strict=True)]
        futures = [bars[end : end + case["horizon"]] for end in ends]
        torch.manual_seed(case["seed"])
        ours = predictor.predict_batch(
            histories,
            [frame.timestamps for frame in histories],
            [frame.timestamps for frame in futures],
            case["horizon"],
            T=case["T"],
            top_k=case["top_k"],
            top_p=case["top_p"],
            sample_count=case["sample_count"],
            verbose=False,
        )
        np.testing.assert_allclose(np.stack(ours), theirs[case["name"]], rtol=1e-5, err_msg=f"{shape}, {case['name']}")


@pytest.mark.timeout(900)
def test_more_than_20000_tokens_equal_the_public_ones(reference, candles_csv, tmp_path):
    """Under torch.manual_seed a request through the engine draws the public implementation's tokens, each of them."""
    case = {"name": "bulk", "starts": [20], "lookback": 60, "horizon": 110, "max_context": 512, "top_k": 0}
    case |= {"top_p": 0.9, "T": 1.0, "sample_count": 100, "seed": 17}
    theirs, pair = run_reference("mini_shape", [case], reference, candles_csv, tmp_path)
    bars = pd.read_csv(candles_csv, parse_dates=["timestamps"])
    series = series_from_frame(bars[20:80], bars.timestamps[20:80], bars.timestamps[80:190])
    torch.manual_seed(17)
    ours = KronosPredictor(*pair, device="cpu").forecast_series(series, Sampling(top_p=0.9, samples=100))
    assert ours.tokens.size == 22_000
    assert len(np.unique(ours.tokens)) > 100
    np.testing.assert_array_equal(ours.tokens, theirs["tokens/bulk"])
