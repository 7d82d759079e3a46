"""Tokens for rows of many requests at once: each row with its own temperature, filters and noise.

The same tokens as model.sampler.sample gives row by row, without its sort. R rows, V vocabulary entries.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model.engine.types import Request
from model.sampler import filtered, philox_noise, split_seed


@dataclass(frozen=True)
class RowSettings:
    """The sampling settings of a batch of requests, one row a path; made once per composition of the batch.

    temperature, top_p: float32 [R, 1], temperature 1 where a row is greedy. greedy: bool [R].
    key, path: of the seeded generator, int64 [R, 2] and [R].
    unseeded: rows by noise group, for torch's global generator. top_k: rows of requests that use it.
    """

    temperature: Tensor
    top_p: Tensor
    greedy: Tensor | None
    key: Tensor
    path: Tensor
    seeded: bool
    unseeded: list[Tensor]
    top_k: list[tuple[int, Tensor]]

    @classmethod
    def of(cls, requests: Sequence[Request], device: torch.device) -> RowSettings:
        temperature: list[float] = []
        top_p: list[float] = []
        greedy: list[bool] = []
        key: list[tuple[int, int]] = []
        path: list[int] = []
        groups: dict[int, list[int]] = {}
        top_k: list[tuple[int, list[int]]] = []
        for request in requests:
            sampling, first = request.sampling, len(path)
            rows = list(range(first, first + request.rows))
            temperature += [sampling.temperature or 1.0] * request.rows
            # A row with top-k has been filtered already when the race asks for top-p.
            top_p += [1.0 if sampling.top_k else sampling.top_p] * request.rows
            greedy += [sampling.temperature == 0] * request.rows
            key += [split_seed(sampling.seed or 0)] * request.rows
            path += list(range(request.rows))
            if sampling.top_k:
                top_k.append((sampling.top_k, rows))
            if sampling.seed is None:
                groups.setdefault(id(request.noise_group or request), []).extend(rows)
        return cls(
            temperature=torch.tensor(temperature, device=device).unsqueeze(1),
            top_p=torch.tensor(top_p, device=device).unsqueeze(1),
            greedy=torch.tensor(greedy, device=device) if any(greedy) else None,
            key=torch.tensor(key, device=device),
            path=torch.tensor(path, device=device),
            seeded=any(request.sampling.seed is not None for request in requests),
            unseeded=[torch.tensor(rows, device=device) for rows in groups.values()],
            top_k=[(k, torch.tensor(rows, device=device)) for k, rows in top_k],
        )


def sample_rows(logits: Tensor, settings: RowSettings, step: Tensor, head: int) -> Tensor:
    """Logits float32 [R, V] and each row's step int64 [R] → tokens int64 [R]."""
    rows, vocabulary = logits.shape
    if settings.seeded:
        noise = philox_noise(settings.key, settings.path, step, head, vocabulary)
    else:
        noise = torch.empty(rows, vocabulary, device=logits.device)
    for group in settings.unseeded:
        noise[group] = torch.empty(len(group), vocabulary, device=logits.device).exponential_()
    scaled = logits / settings.temperature
    for k, some in settings.top_k:
        scaled[some] = filtered(scaled[some], k, 1.0)
    tokens = race(scaled.softmax(-1), noise, settings.top_p)
    if settings.greedy is not None:
        tokens = torch.where(settings.greedy, logits.argmax(-1), tokens)
    return tokens


def race(probabilities: Tensor, noise: Tensor, top_p: Tensor) -> Tensor:
    """argmax(p / e) among the tokens of the nucleus, without sorting.

    A token is in the nucleus iff the mass of the tokens above it is at most top_p. So: take the winner over all tokens;
    if it is outside the nucleus strike it out and take the next. The most likely token is always inside, so this ends.
    """
    ratio = probabilities / noise
    winner = ratio.argmax(-1, keepdim=True)
    while True:
        above = torch.where(probabilities > probabilities.gather(1, winner), probabilities, 0.0).sum(-1, keepdim=True)
        outside = (above > top_p) & (top_p < 1)
        if not outside.any():
            return winner.squeeze(1)
        ratio.scatter_(1, winner, torch.where(outside, -1.0, ratio.gather(1, winner)))
        winner = ratio.argmax(-1, keepdim=True)
