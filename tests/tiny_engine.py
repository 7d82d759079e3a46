"""An engine over the tiny networks, and the plain loop that it is held against."""

import numpy as np
import torch

from model.engine.engine import Engine
from model.engine.types import EngineConfig
from model.frames import normalise
from model.generate import Prompt, decode, generate
from model.sampler import global_noise, seeded_noise

CPU = torch.device("cpu")


def plain(tiny, series, sampling, max_context):
    """The oracle: tokens [S, H, 2] and candles [S, H, 6] of the plain loop."""
    x, mean, scale = normalise(series.candles, 5)
    marks = torch.from_numpy(np.concatenate((series.marks, series.future_marks)))
    noise = global_noise(CPU) if sampling.seed is None else seeded_noise(sampling.seed, CPU)
    prompt = Prompt(torch.from_numpy(np.ascontiguousarray(x)), marks)
    [tokens] = generate(*tiny, [prompt], sampling, noise, max_context=max_context)
    values = decode(tiny[1], tokens, series.horizon, max_context).numpy() * scale + mean
    return tokens[:, len(x) :].numpy(), values


def engine(tiny, **config):
    return Engine(*tiny, EngineConfig(**{"cache_bytes": 2**23, "prefill_chunk": 40} | config))


def candles(request):
    return request.normalised * request.scale + request.mean
