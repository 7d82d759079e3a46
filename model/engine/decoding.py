"""Tokens of a request → candles, through the tokenizer's decoder with a cache of its own.

S paths, T bars of history, H to forecast. The decoder is causal, so bars that are generated can be decoded while later
ones are not there yet, and a large result in shares between which other requests step.
"""

from __future__ import annotations

from collections.abc import Iterator

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
HISTORY_SHARE = 512
"""Bars of history that pass the tokenizer at once; of a longer one, one of its blocks at a time."""


class ResultDecoder:
    """Decodes lanes whose bars are generated."""

    def __init__(
        self, tokenizer: KronosTokenizer, plain: KronosTokenizer, max_context: int, speed: int, device: torch.device
    ) -> None:
        """tokenizer: packed; plain: as loaded. speed: how much larger than DECODE_SHARE a share is on the device."""
        self._tokenizer, self._plain = tokenizer, plain
        self._max_context, self._share = max_context, DECODE_SHARE * speed
        self.history_share = HISTORY_SHARE * speed
        self._width = int(plain.embed.out_features)
        self._stack = Stack(tokenizer.decoder, max_context, device)

    def in_shares(self, request: Request) -> bool:
        """True if bars are final before the end: the decoder's window, the last max_context bars, holds the horizon."""
        return request.horizon <= self._max_context

    def is_long(self, request: Request) -> bool:
        """True if the history passes the tokenizer block by block, in shares between which other requests step."""
        return request.history > self.history_share

    def cache_size(self, request: Request) -> int:
        """Elements of fp32 that decode() needs as the lane's decoder_memory."""
        return SequenceCache.size(*self._cache_shape(request)) if self.in_shares(request) else 0

    @torch.inference_mode()
    def decode(self, lane: Lane) -> np.ndarray:
        """The next share of candles among the bars that are generated, normalised: float32 [S, n, 6]. They are final.

        n is 0 while a long history is still on its way through the decoder.

        The decoder's window, the last max_context bars of history and whole horizon, is known from the start. A horizon
        longer than that has no such window; its bars are decoded at the end, and in one piece.
        """
        request = lane.request
        if not self.in_shares(request):
            return decode(self._plain, lane.tokens, request.horizon, self._max_context).cpu().numpy()
        start = self._window_start(request)
        if lane.decoder_cache is None:
            shape = self._cache_shape(request)
            lane.decoder_cache = SequenceCache(lane.decoder_memory[: SequenceCache.size(*shape)], *shape)
            lane.decoder_opening = self._open(lane.tokens[:1, start : request.history], lane.decoder_cache)
        cache = lane.decoder_cache
        if lane.decoder_opening is not None:
            if turn(lane.decoder_opening, at_once=not self.is_long(request)):
                return np.empty((request.rows, 0, len(lane.mean)), np.float32)
            lane.decoder_opening = None
        # However many wait, a share is the same: its size is part of how the numbers round.
        share = min(DECODE_CHUNK, max(1, self._share // request.rows))
        first = request.history + cache.own_length
        bars = slice(first, min(lane.end, first + share))
        positions = slice(bars.start - start, bars.stop - start)
        hidden = self._stack.run(self._input(lane.tokens[:, bars]), positions, cache.attend_own)
        cache.own_length += bars.stop - bars.start
        return self._tokenizer.head(hidden).float().cpu().numpy()

    def _open(self, tokens: Tensor, cache: SequenceCache) -> Iterator[None]:
        """Puts the history's bars, int64 [1, g, 2], which all paths share, into the cache; pauses after each block."""
        bars = tokens.shape[1]
        if bars:
            x = self._input(tokens)
            for layer in range(self._stack.layers):
                x = self._stack.run(x, slice(0, bars), cache.attend_history, slice(layer, layer + 1))
                yield
        cache.history_length = bars

    def restart(self, lane: Lane) -> None:
        """Takes back what an interrupt may have left half done; bars that were told or kept stay."""
        if lane.decoder_opening is not None:
            lane.decoder_cache = lane.decoder_opening = None
        elif lane.decoder_cache is not None:
            kept = sum(piece.shape[1] for piece in lane.decoded)
            lane.decoder_cache.own_length = kept if lane.finished else lane.told

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


def turn(work: Iterator[None], *, at_once: bool) -> bool:
    """Does the next share of the work, or all that is left at once; True if there may be more."""
    return any(not at_once for _ in work)
