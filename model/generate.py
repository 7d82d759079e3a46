"""The plain generation loop: no cache, every window recomputed at every step.

It is kept for good as the oracle that faster paths are held against, so it is written to be read. S samples of a
series, T bars of history, H bars of horizon.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model.errors import ForecastCancelledError
from model.kronos import Kronos
from model.sampler import S1_HEAD, S2_HEAD, Noise, sample
from model.tokenizer import KronosTokenizer
from model.types import Sampling, StepCallback, StopCheck


@dataclass(frozen=True)
class Prompt:
    """One series, ready for the networks and on their device.

    x: normalised candles float32 [T, 6]. marks: time marks int64 [T + H, 5], history and horizon.
    """

    x: Tensor
    marks: Tensor

    @property
    def horizon(self) -> int:
        return self.marks.shape[0] - self.x.shape[0]


@torch.inference_mode()
def generate(
    model: Kronos,
    tokenizer: KronosTokenizer,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    noise: Noise,
    *,
    max_context: int,
    precision: str = "fp32",
    should_stop: StopCheck | None = None,
    on_step: StepCallback | None = None,
) -> list[Tensor]:
    """Samples the futures of several series in lock step: per prompt the tokens int64 [S, T + H, 2], history included.

    Lengths and horizons may differ; each prompt is computed by itself and nothing is padded. One draw of noise per step
    and head serves the rows of all prompts that still run, in their order, which is the published order of draws.
    Raises ForecastCancelledError if should_stop() is true at the start of a step.
    """
    tokens = [_start(tokenizer, prompt, sampling.samples) for prompt in prompts]
    autocast = torch.autocast(prompts[0].x.device.type, torch.bfloat16, enabled=precision == "bf16")
    for step in range(max(prompt.horizon for prompt in prompts)):
        if should_stop is not None and should_stop():
            raise ForecastCancelledError(f"stopped before bar {step + 1}")
        active = [i for i, prompt in enumerate(prompts) if step < prompt.horizon]
        with autocast:
            contexts = [_context(model, prompts[i], tokens[i], step, max_context) for i in active]
            s1_logits = torch.cat([model.next_s1_logits(context) for context in contexts])
            s1 = sample(s1_logits, sampling, noise, step, S1_HEAD).split(sampling.samples)
            s2_logits = torch.cat([model.next_s2_logits(context, s) for context, s in zip(contexts, s1, strict=True)])
            s2 = sample(s2_logits, sampling, noise, step, S2_HEAD).split(sampling.samples)
        for i, coarse, fine in zip(active, s1, s2, strict=True):
            bar = prompts[i].x.shape[0] + step
            tokens[i][:, bar, 0] = coarse
            tokens[i][:, bar, 1] = fine
        if on_step is not None:
            on_step(step + 1)
    return tokens


def _start(tokenizer: KronosTokenizer, prompt: Prompt, samples: int) -> Tensor:
    """Tokens int64 [S, T + H, 2] with the history filled in.

    All of the history is encoded, also what lies before the model's window.
    """
    s1, s2 = tokenizer.encode(prompt.x.unsqueeze(0), half=True)
    history = torch.stack((s1, s2), dim=-1)
    return torch.cat((history, history.new_zeros(1, prompt.horizon, 2)), dim=1).repeat(samples, 1, 1)


def _context(model: Kronos, prompt: Prompt, tokens: Tensor, step: int, max_context: int) -> Tensor:
    """The model's view [S, window, D] right before the step: at most the last max_context bars, positions from 0."""
    end = prompt.x.shape[0] + step
    window = slice(max(0, end - max_context), end)
    marks = prompt.marks[window].expand(tokens.shape[0], -1, -1)
    return model.context(tokens[:, window, 0], tokens[:, window, 1], marks)


@torch.inference_mode()
def decode(tokenizer: KronosTokenizer, tokens: Tensor, horizon: int, max_context: int) -> Tensor:
    """Tokens int64 [S, T + H, 2] → the last H bars, normalised, float32 [S, H, 6].

    One window of the last max_context bars, as published, if it covers the horizon. A longer horizon is decoded in
    windows that overlap by half, so that no bar but the first ones is decoded without what came before it.
    """
    total = tokens.shape[1]
    pieces: list[Tensor] = []
    end = total
    missing = horizon
    while missing > 0:
        start = max(0, end - max_context)
        window = tokens[:, start:end]
        bars = tokenizer.decode((window[..., 0], window[..., 1]), half=True)
        # The oldest window, or the only one, gives all its bars; a later one only its second half.
        keep = missing if missing <= end - start else (end - start + 1) // 2
        pieces.insert(0, bars[:, bars.shape[1] - keep :])
        end -= keep
        missing -= keep
    return torch.cat(pieces, dim=1)
