"""The tensors of the engine: prefill, one step for many rows, sliding windows, decoding to candles.

A lane is a request while it is computed. R rows of all lanes that step together, S paths of one lane, D model width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from model.engine.attention import SequenceCache
from model.engine.kv_cache import Block
from model.engine.packing import packed
from model.engine.sampler import RowSettings, SeededNoise, draw_noise, sample_rows
from model.engine.types import EngineConfig, Request
from model.frames import normalise
from model.generate import decode
from model.kronos import Kronos
from model.layers import RotaryTables, TransformerBlock
from model.sampler import S1_HEAD, S2_HEAD
from model.tokenizer import KronosTokenizer

DECODE_CHUNK = 64
"""Bars of each path that pass the tokenizer's decoder at once, which bounds the memory of its attention scores."""

AttendLayer = Callable[[int, Tensor, Tensor, Tensor], Tensor]


class Stack:
    """A network's blocks, run over any positions with attention from a cache."""

    def __init__(self, blocks: nn.ModuleList, positions: int, device: torch.device) -> None:
        self._blocks = [cast(TransformerBlock, block) for block in blocks]
        self._tables: list[RotaryTables] = []
        if self._blocks:
            rotary = self._blocks[0].self_attn.rotary
            self._tables = [rotary.tables(torch.arange(positions, device=device))]

    @property
    def layers(self) -> int:
        return len(self._blocks)

    def run(self, x: Tensor, positions: slice | Tensor, attend: AttendLayer) -> Tensor:
        """x [R, g, D] → [R, g, D]. positions: a slice of g positions for all rows, or with g = 1 an int64 [R]."""
        for cos, sin in self._tables:
            tables = (cos[positions], sin[positions])
            if isinstance(positions, Tensor):
                tables = (tables[0][:, None, None], tables[1][:, None, None])
            for layer, block in enumerate(self._blocks):
                x = block(x, tables, partial(attend, layer))
        return x


@dataclass(eq=False)
class Lane:
    """A request's tensors.

    tokens: int64 [S, T + H, 2]. times: summed time embeddings [T + H, D]. cache: of the model's blocks and its
    cross-attention. start: first bar of the window. step: bars generated. context: the newest position, [1 or S, 1, D].
    noise: of a seeded request. decoded, decoder_cache: bars that have passed the tokenizer's decoder, and its cache.
    """

    request: Request
    tokens: Tensor
    times: Tensor
    cache: SequenceCache
    mean: np.ndarray
    scale: np.ndarray
    start: int
    step: int = 0
    context: Tensor | None = None
    noise: SeededNoise | None = None
    decoded: list[np.ndarray] = field(default_factory=list)
    decoder_cache: SequenceCache | None = None

    @property
    def end(self) -> int:
        """Bars that exist: history and generated."""
        return self.request.history + self.step

    @property
    def finished(self) -> bool:
        return self.step == self.request.horizon


class Runner:
    """Computes what the scheduler plans. Not thread-safe: one step at a time."""

    def __init__(self, model: Kronos, tokenizer: KronosTokenizer, config: EngineConfig, device: torch.device) -> None:
        self._config, self._device = config, device
        self._model = cast(Kronos, packed(model, config.precision, device))
        # Tokens decide everything after them, so the tokenizer stays fp32 whatever the model's precision.
        self._tokenizer = cast(KronosTokenizer, packed(tokenizer, "fp32", device))
        self._plain_tokenizer = tokenizer
        self._width = model.d_model
        self._decoder_width = int(tokenizer.embed.out_features)
        self._stack = Stack(self._model.transformer, config.max_context, device)
        self._decoder = Stack(self._tokenizer.decoder, config.max_context, device)
        self._cross_layer = self._stack.layers
        self._autocast = device.type != "cpu" and config.precision == "bf16"
        dtype = torch.bfloat16 if self._autocast else torch.float32
        self.arena_elements = max(1, config.cache_bytes // dtype.itemsize)
        self._memory = torch.empty(self.arena_elements, dtype=dtype, device=device)
        self._batch: tuple[list[Request], RowSettings] | None = None

    @property
    def slot_size(self) -> int:
        """Elements of the arena that one bar takes: keys and values of every layer and of the cross-attention."""
        return SequenceCache.size(self._stack.layers + 1, self._width, 1, 0, 0)

    def cache_size(self, request: Request) -> int:
        """Elements of the arena that a request needs."""
        return SequenceCache.size(self._stack.layers + 1, self._width, *self._cache_shape(request))

    def _cache_shape(self, request: Request) -> tuple[int, int, int]:
        """(bars of history, paths, own bars of a path) for SequenceCache."""
        context = self._config.max_context
        # The last bar is sampled but never fed back.
        return request.context_used(context), request.rows, max(1, min(request.horizon - 1, context))

    @torch.inference_mode()
    def open(self, request: Request, block: Block) -> Lane:
        """Encodes a request's history and lays out its cache."""
        x, mean, scale = normalise(request.series.candles, self._config.clip)
        s1, s2 = self._tokenizer.encode(torch.from_numpy(np.ascontiguousarray(x))[None].to(self._device), half=True)
        history = torch.stack((s1, s2), dim=-1)
        tokens = torch.cat((history, history.new_zeros(1, request.horizon, 2)), dim=1).repeat(request.rows, 1, 1)
        marks = torch.from_numpy(np.concatenate((request.series.marks, request.series.future_marks)))
        memory = self._memory.narrow(0, block.offset, block.size)
        seed, vocabulary = request.sampling.seed, 2 ** max(self._model.s1_bits, self._model.s2_bits)
        return Lane(
            request=request,
            tokens=tokens,
            times=self._model.time_emb(marks.to(self._device)[None])[0],
            cache=SequenceCache(memory, self._stack.layers + 1, self._width, *self._cache_shape(request)),
            mean=mean,
            scale=scale,
            start=request.history - request.context_used(self._config.max_context),
            noise=None if seed is None else SeededNoise(seed, request.rows, vocabulary, self._device),
        )

    @torch.inference_mode()
    def prefill(self, lane: Lane, bars: int) -> None:
        """Computes the next bars of the window's history."""
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._autocast):
            done = lane.cache.history_length
            lane.context = self._history_context(lane, slice(done, done + bars))[:, -1:]

    @torch.inference_mode()
    def step(self, lanes: Sequence[Lane]) -> None:
        """Samples the next bar of every lane."""
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._autocast):
            fresh = self._move_windows(lanes)
            advancing = [lane for lane in lanes if lane not in fresh]
            if advancing:
                self._advance(advancing)
            context = torch.cat([cast(Tensor, lane.context).expand(lane.request.rows, -1, -1) for lane in lanes])
            settings = self._settings(lanes)
            s1_logits = self._model.next_s1_logits(context).float()
            s1 = sample_rows(s1_logits, settings, self._noise(lanes, S1_HEAD, s1_logits.shape[1]))
            s2_logits = self._model.next_s2_logits(context, s1, partial(self._attend_cross, lanes, fresh)).float()
            s2 = sample_rows(s2_logits, settings, self._noise(lanes, S2_HEAD, s2_logits.shape[1]))
        for lane in advancing:
            lane.cache.own_length += 1
        pairs = torch.stack((s1, s2), dim=-1).split([lane.request.rows for lane in lanes])
        for lane, pair in zip(lanes, pairs, strict=True):
            lane.tokens[:, lane.end] = pair
            lane.step += 1

    def _move_windows(self, lanes: Sequence[Lane]) -> set[Lane]:
        """Recomputes the windows that became too long; returns the lanes whose newest position is cached already."""
        limit = self._config.max_context
        fresh = set()
        for lane in lanes:
            if lane.step == 0:
                fresh.add(lane)
            elif lane.end - lane.start > limit:
                self._rebuild(lane, lane.end - limit - 1 + lane.request.window.hop)
                fresh.add(lane)
        return fresh

    def _rebuild(self, lane: Lane, start: int) -> None:
        """Moves the window's start and computes all of it: the history once, the generated bars for every path."""
        history = lane.request.history
        lane.start = start
        lane.cache.clear()
        if start < history:
            self._history_context(lane, slice(0, history - start))
        first = max(history, start)
        bars = slice(first, lane.end)
        x = self._model.embedding(lane.tokens[:, bars, 0], lane.tokens[:, bars, 1]) + lane.times[bars]
        positions = slice(first - start, lane.end - start)
        context = self._model.norm(self._stack.run(x, positions, lane.cache.attend_own))
        lane.cache.write_own(self._cross_layer, *self._cross_memory(context))
        lane.cache.own_length = lane.end - first
        lane.context = context[:, -1:]

    def _history_context(self, lane: Lane, positions: slice) -> Tensor:
        """Computes and caches positions of the window's history; context [1, g, D]."""
        bars = slice(lane.start + positions.start, lane.start + positions.stop)
        x = self._model.embedding(lane.tokens[:1, bars, 0], lane.tokens[:1, bars, 1]) + lane.times[bars]
        context = self._model.norm(self._stack.run(x, positions, lane.cache.attend_history))
        lane.cache.write_history(self._cross_layer, *self._cross_memory(context))
        lane.cache.history_length = positions.stop
        return context

    def _cross_memory(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of the cross-attention [B, 4, g, d]; they depend on nothing later, so they are cached."""
        cross = self._model.dep_layer.cross_attn
        return cross.split_heads(cross.k_proj(context)), cross.split_heads(cross.v_proj(context))

    def _advance(self, lanes: Sequence[Lane]) -> None:
        """Feeds every lane's newest bar through the blocks, all rows at once."""
        newest = torch.cat([lane.tokens[:, lane.end - 1] for lane in lanes])
        times = torch.cat([lane.times[lane.end - 1].expand(lane.request.rows, -1) for lane in lanes])
        x = (self._model.embedding(newest[:, 0], newest[:, 1]) + times)[:, None]
        positions = self._per_row(lanes, [lane.end - 1 - lane.start for lane in lanes])

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return _by_lane(lanes, lambda lane, *qkv: lane.cache.attend_own(layer, *qkv), q, k, v)

        context = self._model.norm(self._stack.run(x, positions, attend))
        for lane, rows in zip(lanes, context.split([lane.request.rows for lane in lanes]), strict=True):
            lane.context = rows

    def _attend_cross(self, lanes: Sequence[Lane], fresh: set[Lane], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        def attend(lane: Lane, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if lane in fresh:
                return lane.cache.attend_seen(self._cross_layer, q)
            return lane.cache.attend_own(self._cross_layer, q, k, v)

        return _by_lane(lanes, attend, q, k, v)

    def _noise(self, lanes: Sequence[Lane], head: int, vocabulary: int) -> Tensor:
        requests, seeded = [lane.request for lane in lanes], [lane.noise for lane in lanes]
        return draw_noise(requests, seeded, [lane.step for lane in lanes], head, vocabulary, self._device)

    def _settings(self, lanes: Sequence[Lane]) -> RowSettings:
        """The lanes' sampling settings as tensors, made anew only when the batch changes."""
        requests = [lane.request for lane in lanes]
        if self._batch is None or self._batch[0] != requests:
            self._batch = (requests, RowSettings.of(requests, self._device))
        return self._batch[1]

    def _per_row(self, lanes: Sequence[Lane], values: Sequence[int]) -> Tensor:
        """One value per lane → int64 [R]."""
        repeats = torch.tensor([lane.request.rows for lane in lanes], device=self._device)
        return torch.tensor(values, device=self._device).repeat_interleave(repeats)

    @torch.inference_mode()
    def decode(self, lane: Lane) -> np.ndarray:
        """Candles of the bars generated since the last call, normalised: float32 [S, n, 6]. They are final.

        The decoder is causal and its window, the last max_context bars of history and whole horizon, is known from the
        start. A horizon longer than that has no such window and is decoded at its end.
        """
        request, limit = lane.request, self._config.max_context
        if request.horizon > limit:
            if not lane.finished:
                return np.empty((request.rows, 0, 6), np.float32)
            return decode(self._plain_tokenizer, lane.tokens, request.horizon, limit).cpu().numpy()
        start = max(0, request.history + request.horizon - limit)
        if lane.decoder_cache is None:
            lane.decoder_cache = self._open_decoder(lane, start)
        cache, pieces = lane.decoder_cache, []
        while cache.own_length < lane.step:
            first = request.history + cache.own_length
            bars = slice(first, min(lane.end, first + DECODE_CHUNK))
            positions = slice(bars.start - start, bars.stop - start)
            hidden = self._decoder.run(self._decoder_input(lane.tokens[:, bars]), positions, cache.attend_own)
            cache.own_length += bars.stop - bars.start
            pieces.append(self._tokenizer.head(hidden))
        if not pieces:
            return np.empty((request.rows, 0, 6), np.float32)
        return torch.cat(pieces, dim=1).float().cpu().numpy()

    def _open_decoder(self, lane: Lane, start: int) -> SequenceCache:
        """The decoder's cache with the history's bars in it, which all paths share."""
        request = lane.request
        shape = (self._decoder.layers, self._decoder_width, request.history - start, request.rows, request.horizon)
        cache = SequenceCache(torch.empty(SequenceCache.size(*shape), device=self._device), *shape)
        if start < request.history:
            x = self._decoder_input(lane.tokens[:1, start : request.history])
            self._decoder.run(x, slice(0, request.history - start), cache.attend_history)
            cache.history_length = request.history - start
        return cache

    def _decoder_input(self, tokens: Tensor) -> Tensor:
        quantized = self._tokenizer.tokenizer.vectors(tokens[..., 0], tokens[..., 1])
        return self._tokenizer.post_quant_embed(quantized)


def _by_lane(lanes: Sequence[Lane], attend: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of each lane's rows over its own cache, put together again."""
    rows = [lane.request.rows for lane in lanes]
    parts = zip(lanes, q.split(rows), k.split(rows), v.split(rows), strict=True)
    mixed = [attend(lane, *qkv) for lane, *qkv in parts]
    return mixed[0] if len(mixed) == 1 else torch.cat(mixed)
