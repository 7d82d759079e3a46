"""Tokens for rows of many requests at once: each row with its own temperature, filters and noise.

The same tokens as model.sampler.sample gives row by row, without its sort. R rows, V vocabulary entries.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model.engine.types import Request
from model.sampler import filtered, philox_noise


@dataclass(frozen=True)
class RowSettings:
    """The sampling settings of a batch of requests, one row a path; made once per composition of the batch.

    temperature, top_p: float32 [R, 1], temperature 1 where a row is greedy, top_p infinite where it
    bounds nothing: it is 1, or top-k is on.
    kept: int64 [R, 1], the k of top-k; 0 where it is off. greedy: bool [R].
    top_k_rows: rows of requests that use top-k, by request. any_greedy: whether a row is; both known to the host.
    """

    temperature: Tensor
    top_p: Tensor
    kept: Tensor
    greedy: Tensor
    top_k_rows: tuple[tuple[int, Tensor], ...] = ()
    any_greedy: bool = True

    @classmethod
    def of(cls, requests: Sequence[Request], device: torch.device) -> RowSettings:
        temperature: list[float] = []
        top_p: list[float] = []
        greedy: list[bool] = []
        top_k: list[tuple[int, list[int]]] = []
        kept: list[int] = []
        for request in requests:
            sampling, first = request.sampling, len(greedy)
            temperature += [sampling.temperature or 1.0] * request.rows
            # A row with top-k has been filtered already when the race asks for top-p.
            top_p += [math.inf if sampling.top_k or sampling.top_p >= 1 else sampling.top_p] * request.rows
            greedy += [sampling.temperature == 0] * request.rows
            kept += [sampling.top_k] * request.rows
            if sampling.top_k:
                top_k.append((sampling.top_k, list(range(first, first + request.rows))))
        return cls(
            temperature=torch.tensor(temperature, device=device).unsqueeze(1),
            top_p=torch.tensor(top_p, device=device).unsqueeze(1),
            kept=torch.tensor(kept, device=device).unsqueeze(1),
            greedy=torch.tensor(greedy, device=device),
            top_k_rows=tuple((k, torch.tensor(rows, device=device)) for k, rows in top_k),
            any_greedy=any(greedy),
        )


class SeededNoise:
    """A seeded request's noise, made for many steps at once: the generator is counter-based, so any order will do."""

    STEPS = 16
    ROWS = 1024
    """Rows × steps that are made at once; of each, its makers need a megabyte for a moment."""

    def __init__(self, seed: int, rows: int, vocabulary: int, device: torch.device) -> None:
        """vocabulary: the larger of both heads'; the noise of an entry does not depend on how many there are."""
        self._seed, self._rows, self._vocabulary, self._device = seed, rows, vocabulary, device
        self._steps = max(1, min(self.STEPS, self.ROWS // rows))
        self._made = (-self._steps, torch.empty(0))

    def draw(self, step: int, head: int, vocabulary: int) -> Tensor:
        """Exp(1) noise float32 [S, vocabulary]."""
        first, noise = self._made
        if not first <= step < first + self._steps:
            first = step - step % self._steps
            positions = torch.arange(2 * first, 2 * (first + self._steps), device=self._device).unsqueeze(1)
            paths = torch.arange(self._rows, device=self._device).split(self.ROWS)
            parts = [philox_noise(self._seed, some, positions, self._vocabulary) for some in paths]
            noise = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
            self._made = (first, noise)
        return noise[2 * (step - first) + head, :, :vocabulary]


def draw_noise(
    requests: Sequence[Request],
    seeded: Sequence[SeededNoise | None],
    steps: Sequence[int],
    head: int,
    vocabulary: int,
    device: torch.device,
) -> Tensor:
    """Exp(1) noise float32 [R, V] of a batch: each seeded request's own, and one draw per group of unseeded ones."""
    groups: dict[int, list[int]] = {}
    parts: list[Tensor | None] = [None] * len(requests)
    for i, (request, source) in enumerate(zip(requests, seeded, strict=True)):
        if source is not None:
            parts[i] = source.draw(steps[i], head, vocabulary)
        else:
            groups.setdefault(id(request.noise_group or request), []).append(i)
    for members in groups.values():
        rows = [requests[i].rows for i in members]
        group = torch.empty(sum(rows), vocabulary, device=device).exponential_()
        for i, part in zip(members, group.split(rows), strict=True):
            parts[i] = part
    drawn = [part for part in parts if part is not None]
    return drawn[0] if len(drawn) == 1 else torch.cat(drawn)


def sample_rows(logits: Tensor, settings: RowSettings, noise: Tensor) -> Tensor:
    """Logits and Exp(1) noise, both float32 [R, V] → tokens int64 [R]."""
    scaled = logits / settings.temperature
    for k, some in settings.top_k_rows:
        scaled[some] = filtered(scaled[some], k, 1.0)
    tokens = race(scaled.softmax(-1), noise, settings.top_p)
    if settings.any_greedy:
        tokens = torch.where(settings.greedy, logits.argmax(-1), tokens)
    return tokens


def sample_sorted(logits: Tensor, settings: RowSettings, noise: Tensor) -> Tensor:
    """sample_rows for a GPU: with a sort, and without the loop whose end the host would have to see.

    The mass before a token is summed in another order, so a token at the very edge of the nucleus may fall otherwise.
    """
    ordered, order = (logits / settings.temperature).sort(dim=-1, descending=True)
    last = ordered.gather(1, (settings.kept - 1).clamp(0, logits.shape[1] - 1))
    probabilities = ordered.softmax(-1)
    outside = probabilities.cumsum(-1) - probabilities > settings.top_p
    outside |= (ordered < last) & (settings.kept > 0)
    ratio = torch.where(outside, -1.0, probabilities / noise.gather(1, order))
    drawn = order.gather(1, ratio.argmax(-1, keepdim=True)).squeeze(1)
    return torch.where(settings.greedy, logits.argmax(-1), drawn)


def race(probabilities: Tensor, noise: Tensor, top_p: Tensor) -> Tensor:
    """argmax(p / e) among the tokens of the nucleus, without sorting.

    A token is in the nucleus iff the mass of the tokens above it is at most top_p. So: take the winner over all tokens;
    if it is outside the nucleus so is all that is no more likely, strike that out and take the next. Each round halves
    what is left, on average, and the most likely token is always inside.
    """
    ratio = probabilities / noise
    while True:
        winner = ratio.argmax(-1, keepdim=True)
        likelihood = probabilities.gather(1, winner)
        above = torch.where(probabilities > likelihood, probabilities, 0.0).sum(-1, keepdim=True)
        outside = above > top_p
        if not outside.any():
            return winner.squeeze(1)
        ratio.masked_fill_(outside & (probabilities <= likelihood), -1.0)
