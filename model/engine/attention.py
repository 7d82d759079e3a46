"""Cached attention of one request: keys and values of its history once, of each path's own bars beside them.

S paths, H heads, d head width, P bars of history in the window, L bars that each path has generated in it, g new bars.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


class SequenceCache:
    """Keys and values of one stack of layers for one request, in a range of the arena.

    The history's part is shared by all paths and never copied; every path appends to a part of its own. A single path
    has nothing to share: its bars follow the history in one part, which takes fewer and larger operations. Single paths
    of several requests that have as many bars each are computed as one batch: see together().
    """

    def __init__(
        self,
        memory: Tensor,
        layers: int,
        width: int,
        history: int,
        paths: int,
        own: int,
        batch: int = 1,
        apart: int = 0,
    ) -> None:
        """memory: a 1-D view of size() elements. history, own: bars that either part can hold.

        batch: single paths of which `memory` is the first, each `apart` elements after the one before.
        """
        self._width, self._paths, self._single, self._batch = width, paths, paths == 1, batch
        self._own_capacity = 0 if self._single else own
        self._history_capacity = history + own if self._single else history
        part = self._history_capacity * width
        split = layers * 2 * part
        self._memory = memory
        self._history = memory.as_strided((layers, 2, batch, part), (2 * part, part, apart, 1))
        self._own = memory[split:].view(layers, 2, paths * self._own_capacity * width)
        self._views: dict[int, tuple[Tensor, Tensor, Tensor, Tensor]] = {}
        self.history_length = 0
        self.own_length = 0

    @staticmethod
    def size(layers: int, width: int, history: int, paths: int, own: int) -> int:
        """Elements of the arena that such a cache takes."""
        return layers * 2 * width * (history + paths * own)

    @property
    def rows(self) -> int:
        """Of a step: paths of one request, or single paths of several."""
        return self._paths * self._batch

    def place(self) -> tuple[int, ...]:
        """Where the parts lie: first element, capacity and length of the history, the same of the paths' own bars.

        First elements are counted in the arena, in units of width, of which they are multiples. A single path has only
        bars of its own.
        """
        history = self._history.storage_offset() // self._width
        if self._single:
            return history, 0, 0, history, self._history_capacity, self.history_length + self.own_length
        own = self._own.storage_offset() // self._width
        return history, self._history_capacity, self.history_length, own, self._own_capacity, self.own_length

    def _follows(self, other: SequenceCache) -> int:
        """How many elements after the other's its memory lies; 0 if the two cannot be computed together."""
        alike = self._single and other._single and self._history.shape == other._history.shape
        if not alike or (self.history_length, self.own_length) != (other.history_length, other.own_length):
            return 0
        return max(0, int(self._history.storage_offset()) - int(other._history.storage_offset()))

    @classmethod
    def _batched(cls, caches: Sequence[SequenceCache]) -> SequenceCache:
        first = caches[0]
        layers, capacity, apart = first._history.shape[0], first._history_capacity, caches[1]._follows(first)
        batch = cls(first._memory, layers, first._width, capacity, 1, 0, len(caches), apart)
        batch.history_length, batch.own_length = first.history_length, first.own_length
        return batch

    def clear(self) -> None:
        """Forgets all bars: the window has moved."""
        self.history_length = self.own_length = 0

    def _layer(self, layer: int, heads: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Keys and values of the history [1 or batch, H, bars, d] and of the paths [S, H, bars, d]."""
        if layer not in self._views:
            history = (self._batch, heads, self._history_capacity, self._width // heads)
            own = (self._paths, heads, self._own_capacity, self._width // heads)
            self._views[layer] = (
                self._history[layer, 0].view(history),
                self._history[layer, 1].view(history),
                self._own[layer, 0].view(own),
                self._own[layer, 1].view(own),
            )
        return self._views[layer]

    def write_history(self, layer: int, k: Tensor, v: Tensor) -> None:
        """k, v [1, H, g, d] of the bars after history_length, which the caller advances once all layers are written."""
        self._write_shared(layer, self.history_length, k, v)

    def write_own(self, layer: int, k: Tensor, v: Tensor) -> None:
        """k, v [S, H, g, d] of the bars after own_length, which the caller advances once all layers are written."""
        if self._single:
            self._write_shared(layer, self.history_length + self.own_length, k, v)
            return
        _, _, keys, values = self._layer(layer, k.shape[1])
        _write(keys, values, self.own_length, k, v)

    def _write_shared(self, layer: int, first: int, k: Tensor, v: Tensor) -> None:
        keys, values, _, _ = self._layer(layer, k.shape[1])
        _write(keys, values, first, k, v)

    def attend_history(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Appends k, v [1, H, g, d] to the history and lets q attend to all of it, causally; [1, H, g, d]."""
        self.write_history(layer, k, v)
        done, new, dtype = self.history_length, q.shape[2], self._history.dtype
        if done == 0:
            return F.scaled_dot_product_attention(q.to(dtype), k.to(dtype), v.to(dtype), is_causal=True).float()
        keys, values, _, _ = self._layer(layer, q.shape[1])
        return self._attend_shared(q, keys, values, done + new)

    @staticmethod
    def _attend_shared(q: Tensor, keys: Tensor, values: Tensor, bars: int) -> Tensor:
        """q [1, H, g, d] of the newest g of `bars` bars attends to keys and values [1, H, …, d] of them, causally."""
        seen = causal(q.shape[2], bars, q.device) if q.shape[2] > 1 else None
        keys, values = keys.narrow(2, 0, bars), values.narrow(2, 0, bars)
        return F.scaled_dot_product_attention(q.to(keys.dtype), keys, values, attn_mask=seen).float()

    def attend_own(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Appends k, v [S, H, g, d] to the paths' own bars; q attends to the history and, causally, to those."""
        self.write_own(layer, k, v)
        return self._attend(layer, q, self.own_length + k.shape[2])

    def attend_seen(self, layer: int, q: Tensor) -> Tensor:
        """q [S, H, 1, d] attends to what is cached; nothing is appended."""
        return self._attend(layer, q, self.own_length)

    def _attend(self, layer: int, q: Tensor, own: int) -> Tensor:
        """One softmax over the history and the first `own` bars of each path. q [S, H, g, d] → [S, H, g, d]."""
        paths, heads, new, width = q.shape
        keys, values, own_keys, own_values = self._layer(layer, heads)
        dtype = keys.dtype
        if self._single:
            return self._attend_shared(q, keys, values, self.history_length + own)
        q = (q * (1 / math.sqrt(width))).to(dtype)
        bars, parts = self.history_length, []
        if bars:
            # All paths ask the same keys: one matrix product per head serves them together.
            by_head = q.transpose(0, 1).reshape(heads, paths * new, width)
            parts.append((by_head @ keys[0, :, :bars].transpose(1, 2)).float())
        if own:
            own_scores = (q @ own_keys[:, :, :own].transpose(2, 3)).float()
            if new > 1:
                own_scores = own_scores.masked_fill(~causal(new, own, q.device), -torch.inf)
            parts.append(own_scores.transpose(0, 1).reshape(heads, paths * new, own))
        weights = (parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)).softmax(-1).to(dtype)
        mixed = []
        if bars:
            shared = (weights[..., :bars] @ values[0, :, :bars]).float()
            mixed.append(shared.view(heads, paths, new, width).transpose(0, 1))
        if own:
            by_path = weights[..., bars:].reshape(heads, paths, new, own).transpose(0, 1)
            mixed.append((by_path @ own_values[:, :, :own]).float())
        return mixed[0] if len(mixed) == 1 else mixed[0] + mixed[1]


def together(caches: Sequence[SequenceCache]) -> list[SequenceCache]:
    """The caches of a step in their order, neighbours that one operation can serve as one.

    It holds for the step at hand: what is written through it is theirs, and the lengths stay each one's own.
    """
    runs: list[list[SequenceCache]] = []
    for cache in caches:
        apart = cache._follows(runs[-1][-1]) if runs else 0
        if apart and (len(runs[-1]) == 1 or apart == runs[-1][1]._follows(runs[-1][0])):
            runs[-1].append(cache)
        else:
            runs.append([cache])
    return [run[0] if len(run) == 1 else SequenceCache._batched(run) for run in runs]


def _write(keys: Tensor, values: Tensor, first: int, k: Tensor, v: Tensor) -> None:
    """k, v [S, H, g, d] into keys and values [S, H, …, d], from bar `first` on."""
    keys.narrow(2, first, k.shape[2]).copy_(k)
    values.narrow(2, first, v.shape[2]).copy_(v)


def causal(new: int, bars: int, device: torch.device) -> Tensor:
    """bool [new, bars]: what each of the last `new` bars sees."""
    return torch.ones(new, bars, dtype=torch.bool, device=device).tril(bars - new)
