"""A request while it is computed. S paths, T bars of history, H to forecast, D model width."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from model.engine.attention import SequenceCache
from model.engine.sampler import SeededNoise
from model.engine.types import Request


@dataclass(eq=False)
class Lane:
    """A request's tensors.

    tokens: int64 [S, T + H, 2]. encoding: the rest of encoding the history; None once its tokens are there.
    times: summed time embeddings [T + H, D].
    cache: of the model's blocks and its cross-attention. start: first bar of the window. step: bars generated.
    shared: bars of the window that were there when it was last computed from scratch and that all paths have in common:
    of the history, or with a single path all.
    fresh: the newest bar is cached, as it is after a prefill, and context is its position, [1 or S, 1, D].
    noise: of a seeded request. decoder_memory: 1-D, fp32, of the request's range of the arena; decoder_cache: in it, of
    the tokenizer's decoder; decoder_opening: the rest of passing the history through it, None once it has.
    decoded: shares of the result, [S, n, 6].
    told: bars that on_bars has had.
    """

    request: Request
    tokens: Tensor
    times: Tensor
    decoder_memory: Tensor
    cache: SequenceCache
    mean: np.ndarray
    scale: np.ndarray
    start: int
    shared: int
    step: int = 0
    fresh: bool = False
    context: Tensor | None = None
    noise: SeededNoise | None = None
    encoding: Iterator[None] | None = None
    decoded: list[np.ndarray] = field(default_factory=list)
    decoder_cache: SequenceCache | None = None
    decoder_opening: Iterator[None] | None = None
    told: int = 0

    @property
    def end(self) -> int:
        """Bars that exist: history and generated."""
        return self.request.history + self.step

    @property
    def left(self) -> int:
        """Rows × bars of the window that are not cached."""
        own = self.end - self.start - self.shared
        return self.shared - self.cache.history_length + self.request.rows * (own - self.cache.own_length)

    @property
    def finished(self) -> bool:
        return self.step == self.request.horizon

    def begin_window(self) -> None:
        """Nothing of the window is cached. A single path shares all of it with itself: it is computed in one go."""
        self.shared = max(0, (self.end if self.request.rows == 1 else self.request.history) - self.start)
        self.cache.clear()
        self.context, self.fresh = None, False
