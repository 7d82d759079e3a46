"""Candles of a few symbols that nobody can forecast."""

import numpy as np
import pandas as pd

from cluster.candles.bars import bars_from_frame


def random_walks(symbols=3, bars=150, seed=0, first="2024-07-01", minutes=60):
    """Candles of symbols S0, S1, … at the same times."""
    rng = np.random.default_rng(seed)
    times = pd.date_range(first, periods=bars, freq=f"{minutes}min")
    frames = []
    for i in range(symbols):
        close = 100 * np.exp(np.cumsum(rng.normal(size=bars) * 0.01))
        opens = np.concatenate([[100.0], close[:-1]])
        frames.append(
            pd.DataFrame(
                {
                    "symbol": f"S{i}",
                    "timestamps": times,
                    "open": opens,
                    "high": np.maximum(opens, close) * 1.001,
                    "low": np.minimum(opens, close) * 0.999,
                    "close": close,
                    "volume": rng.exponential(size=bars) * 1000,
                }
            )
        )
    return bars_from_frame(pd.concat(frames, ignore_index=True))
