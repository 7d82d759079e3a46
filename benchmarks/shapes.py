"""The published sizes with random weights: speed does not depend on what the weights are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from model import Kronos, KronosTokenizer
from model.frames import series_from_frame
from model.types import COLUMNS, Series

MODELS: dict[str, dict[str, Any]] = {
    "mini": {"n_layers": 4, "d_model": 256, "n_heads": 4, "ff_dim": 512},
    "small": {"n_layers": 8, "d_model": 512, "n_heads": 8, "ff_dim": 1024},
    "base": {"n_layers": 12, "d_model": 832, "n_heads": 16, "ff_dim": 2048},
}
CONTEXT = {"mini": 2048, "small": 512, "base": 512}
BITS = {"s1_bits": 10, "s2_bits": 10}
NO_DROPOUT = {"ffn_dropout_p": 0.0, "attn_dropout_p": 0.0, "resid_dropout_p": 0.0}
TOKENIZER = {
    "d_in": 6,
    "d_model": 256,
    "n_heads": 4,
    "ff_dim": 512,
    "n_enc_layers": 4,
    "n_dec_layers": 4,
    "beta": 0.05,
    "gamma0": 1.0,
    "gamma": 1.1,
    "zeta": 0.05,
    "group_size": 4,
}


def random_pair(shape: str) -> tuple[Kronos, KronosTokenizer]:
    """A model of that size and a tokenizer, the same weights in every run."""
    torch.manual_seed(0)
    model = Kronos(**BITS, **MODELS[shape], **NO_DROPOUT, token_dropout_p=0.0, learn_te=True)
    return model.eval(), KronosTokenizer(**BITS, **TOKENIZER, **NO_DROPOUT).eval()


def save_pair(shape: str, folder: Path) -> None:
    """Writes the pair's weights for another process: folder/model and folder/tokenizer."""
    model, tokenizer = random_pair(shape)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "tokenizer")


def random_series(history: int, horizon: int, seed: int) -> Series:
    """A random walk of five-minute candles."""
    candles = random_frame(history, seed)
    times = pd.date_range("2024-01-01", periods=history + horizon, freq="5min")
    return series_from_frame(candles[list(COLUMNS)], times[:history], times[history:])


def random_frame(history: int, seed: int) -> pd.DataFrame:
    """A random walk of five-minute candles: timestamps and the six columns."""
    rng = np.random.default_rng(seed)
    close = 100 * np.exp(rng.normal(0, 0.002, history).cumsum())
    open_ = np.concatenate(([100.0], close[:-1]))
    noise = np.abs(rng.normal(0, 0.001, (2, history)))
    high, low = np.maximum(open_, close) * (1 + noise[0]), np.minimum(open_, close) * (1 - noise[1])
    volume = rng.lognormal(5, 1, history)
    candles = pd.DataFrame(dict(zip(COLUMNS, (open_, high, low, close, volume, volume * close), strict=True)))
    return candles.assign(timestamps=pd.date_range("2024-01-01", periods=history, freq="5min"))
