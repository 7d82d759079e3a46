"""Tokens of a request → candles, through the tokenizer's decoder with a cache of its own.

S paths, T bars of history, H to forecast. The decoder is causal, so bars that are generated can be decoded while later
ones are not there yet, and a large result in shares between which other requests step.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from model.engine.attention import SequenceCache
from model.engine.lane import Lane
from model.engine.stack import Stack
from model.engine.types import Request
from model.generate import decode
from model.tokenizer import KronosTokenizer

DECODE_CHUNK = 64
"""Bars of each path that pass the tokenizer's decoder at once, which bounds the memory of its attention scores."""
DECODE_SHARE = 2048
"""Rows × bars that pass it between two steps: 8 GFLOP with a published tokenizer."""


class ResultDecoder:
    """Decodes lanes whose bars are generated."""

    def __init__(
        self, tokenizer: KronosTokenizer, plain: KronosTokenizer, max_context: int, speed: int, device: torch.device
    ) -> None:
        """tokenizer: packed; plain: as loaded. speed: how much larger than DECODE_SHARE a share is on the device."""
        self._tokenizer, self._plain = tokenizer, plain
        self._max_context, self._share = max_context, DECODE_SHARE * speed
        self._width = int(plain.embed.out_features)
        self._stack = Stack(tokenizer.decoder, max_context, device)

    def in_shares(self, request: Request) -> bool:
        """True if bars are final before the end: the decoder's window, the last max_context bars, holds the horizon."""
        return request.horizon <= self._max_context

    def cache_size(self, request: Request) -> int:
        """Elements of fp32 that decode() needs as the lane's decoder_memory."""
        return SequenceCache.size(*self._cache_shape(request)) if self.in_shares(request) else 0

    @torch.inference_mode()
    def decode(self, lane: Lane) -> np.ndarray:
        """The next share of candles among the bars that are generated, normalised: float32 [S, n, 6]. They are final.

        The decoder's window, the last max_context bars of history and whole horizon, is known from the start. A horizon
        longer than that has no such window; its bars are decoded at the end, and in one piece.
        """
        request = lane.request
        if not self.in_shares(request):
            return decode(self._plain, lane.tokens, request.horizon, self._max_context).cpu().numpy()
        start = self._window_start(request)
        if lane.decoder_cache is None:
            lane.decoder_cache = self._open(lane)
        cache = lane.decoder_cache
        # However many wait, a share is the same: its size is part of how the numbers round.
        share = min(DECODE_CHUNK, max(1, self._share // request.rows))
        first = request.history + cache.own_length
        bars = slice(first, min(lane.end, first + share))
        positions = slice(bars.start - start, bars.stop - start)
        hidden = self._stack.run(self._input(lane.tokens[:, bars]), positions, cache.attend_own)
        cache.own_length += bars.stop - bars.start
        return self._tokenizer.head(hidden).float().cpu().numpy()

    def _open(self, lane: Lane) -> SequenceCache:
        """The decoder's cache with the history's bars in it, which all paths share."""
        request = lane.request
        start = self._window_start(request)
        shape = self._cache_shape(request)
        cache = SequenceCache(lane.decoder_memory[: SequenceCache.size(*shape)], *shape)
        if start < request.history:
            x = self._input(lane.tokens[:1, start : request.history])
            self._stack.run(x, slice(0, request.history - start), cache.attend_history)
            cache.history_length = request.history - start
        return cache

    def _window_start(self, request: Request) -> int:
        """First bar of the decoder's window."""
        return max(0, request.history + request.horizon - self._max_context)

    def _cache_shape(self, request: Request) -> tuple[int, int, int, int, int]:
        """(layers, width, bars of history, paths, bars of a path) for SequenceCache."""
        history = request.history - self._window_start(request)
        return self._stack.layers, self._width, history, request.rows, request.horizon

    def _input(self, tokens: Tensor) -> Tensor:
        quantized = self._tokenizer.tokenizer.vectors(tokens[..., 0], tokens[..., 1])
        return self._tokenizer.post_quant_embed(quantized)
