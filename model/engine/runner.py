"""The tensors of the engine: prefill, one step for many rows, sliding windows.

R rows of all lanes that step together, S paths of one lane, D model width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor

from model.engine.attention import SequenceCache, together
from model.engine.decoding import ResultDecoder, turn
from model.engine.graphs import GraphedSteps, StepInput, place
from model.engine.kv_cache import Block
from model.engine.lane import Lane
from model.engine.packing import packed
from model.engine.sampler import RowSettings, SeededNoise, draw_noise, sample_rows, sample_sorted
from model.engine.stack import Stack
from model.engine.step import Step
from model.engine.types import EngineConfig, Request
from model.errors import InputError
from model.frames import normalise
from model.kronos import Kronos
from model.sampler import S1_HEAD, S2_HEAD
from model.tokenizer import KronosTokenizer
from model.types import MARK_SIZES

if TYPE_CHECKING:
    from model.engine.compiled import CompiledStep

CHUNK_WORK = 1_000_000_000
"""Weights × rows × bars of a prefill chunk on the CPU: 2 GFLOP."""


class Runner:
    """Computes what the scheduler plans. Not thread-safe: one step at a time."""

    def __init__(self, model: Kronos, tokenizer: KronosTokenizer, config: EngineConfig, device: torch.device) -> None:
        self._config, self._device = config, device
        self._model = cast(Kronos, packed(model, config.precision, device))
        # Tokens decide everything after them, so the tokenizer stays fp32 whatever the model's precision.
        self._tokenizer = cast(KronosTokenizer, packed(tokenizer, "fp32", device))
        self._plain_blocks = model.transformer
        self._width = model.d_model
        # Between two steps a GPU may be given more to do.
        self._speed = 1 if device.type == "cpu" else 16
        self._vocabulary = 2 ** max(model.s1_bits, model.s2_bits)
        # A GPU must not wait for the host to look at its numbers.
        self._sample = sample_rows if device.type == "cpu" else sample_sorted
        self._stack = Stack(self._model.transformer, config.max_context, device)
        self._step = Step(self._model, self._stack)
        self.results = ResultDecoder(self._tokenizer, tokenizer, config.max_context, self._speed, device)
        self._cross_layer = self._stack.layers
        # On the CPU a bf16 cache is slower: its attention kernels for one query are poor.
        dtype = torch.bfloat16 if config.precision == "bf16" and device.type != "cpu" else torch.float32
        self.arena_elements = max(1, config.cache_bytes // dtype.itemsize // self._width) * self._width
        scratch = GraphedSteps.scratch(self._stack.layers, self._width)
        self._memory = torch.empty(self.arena_elements + scratch, dtype=dtype, device=device)
        self._graphs: GraphedSteps | None = None
        if config.graphs or (config.graphs is None and device.type == "cuda"):
            self._graphs = GraphedSteps(self._model, self._step, self._stack.layers, self._memory, config.max_context)
        self._compiled: CompiledStep | None = None
        if config.compile_rows:
            from model.engine.compiled import CompiledStep  # on first use: it imports the compiler, which takes seconds

            self._compiled = CompiledStep(
                self._step, model, config.max_context, config.precision, config.compile_rows, device
            )
            self._step = self._compiled
        self._batch: tuple[list[Request], RowSettings] | None = None

    @property
    def warnings(self) -> tuple[str, ...]:
        """What was asked for and does not work here: the compiler, CUDA graphs."""
        return tuple(part.warning for part in (self._compiled, self._graphs) if part is not None and part.warning)

    @property
    def prefill_chunk(self) -> int:
        """Rows × bars computed between two steps: by default what takes some 15 ms on two CPU cores."""
        if self._config.prefill_chunk is not None:
            return self._config.prefill_chunk
        weights = sum(weight.numel() for weight in self._plain_blocks.parameters())
        return max(8, CHUNK_WORK // max(1, weights)) * self._speed

    @property
    def slot_size(self) -> int:
        """Elements of the arena that one bar takes: keys and values of every layer and of the cross-attention."""
        return SequenceCache.size(self._stack.layers + 1, self._width, 1, 0, 0)

    def cache_size(self, request: Request) -> int:
        """Elements of the arena that a request needs, for the model's cache and the decoder's."""
        model, decoder = self._model_size(request), self._results_size(request)
        # A result is decoded once the model's cache is of no more use; told bar by bar, it needs both at once.
        return model + decoder if request.on_bars is not None else max(model, decoder)

    def _model_size(self, request: Request) -> int:
        return SequenceCache.size(self._stack.layers + 1, self._width, *self._cache_shape(request))

    def _results_size(self, request: Request) -> int:
        """In elements of the arena, whole slots: the decoder's own are of fp32 and of another width."""
        elements = self.results.cache_size(request) * torch.float32.itemsize // self._memory.itemsize
        return math.ceil(elements / self._width) * self._width

    def _cache_shape(self, request: Request) -> tuple[int, int, int]:
        """(bars of history, paths, own bars of a path) for SequenceCache."""
        context = self._config.max_context
        # The last bar is sampled but never fed back.
        return request.context_used(context), request.rows, max(1, min(request.horizon - 1, context))

    @torch.inference_mode()
    def open(self, request: Request, block: Block) -> Lane:
        """Checks a request's history and lays out its cache; encode() has to follow. Raises InputError."""
        with np.errstate(over="ignore", invalid="ignore"):
            x, mean, scale = normalise(request.series.candles, self._config.clip)
        if not (np.isfinite(mean).all() and np.isfinite(scale).all()):
            raise InputError(
                "the candles are not finite, or so large that a column's deviation is not: check their units",
                code="not_finite",
            )
        marks = np.concatenate((request.series.marks, request.series.future_marks))
        if ((marks < 0) | (marks >= MARK_SIZES)).any():
            # On a GPU a look-up past the end of a table would take the process with it, and everybody in it.
            raise InputError("a time mark is out of range: make them with model.frames.time_marks", code="bad_marks")
        memory = self._memory.narrow(0, block.offset, block.size)
        seed = request.sampling.seed
        context_used = request.context_used(self._config.max_context)
        bars = request.history + request.horizon
        lane = Lane(
            request=request,
            tokens=torch.zeros(request.rows, bars, 2, dtype=torch.int64, device=self._device),
            times=self._model.time_emb(torch.from_numpy(marks).to(self._device)[None])[0],
            decoder_memory=memory[len(memory) - self._results_size(request) :].view(torch.float32),
            cache=SequenceCache(
                memory[: self._model_size(request)],
                self._stack.layers + 1,
                self._width,
                *self._cache_shape(request),
            ),
            mean=mean,
            scale=scale,
            start=request.history - context_used,
            shared=context_used,
            noise=None if seed is None else SeededNoise(seed, request.rows, self._vocabulary, self._device),
        )
        lane.encoding = self._encode(
            lane.tokens[:, : request.history], torch.from_numpy(np.ascontiguousarray(x))[None].to(self._device)
        )
        return lane

    def _encode(self, tokens: Tensor, x: Tensor) -> Iterator[None]:
        """Writes the tokens of x [1, T, 6] for all paths, int64 [S, T, 2]; pauses after each block."""
        s1, s2 = yield from self._tokenizer.encode_in_shares(x)
        tokens[:] = torch.stack((s1, s2), dim=-1)

    @torch.inference_mode()
    def encode(self, lane: Lane, *, at_once: bool) -> None:
        """Encodes a share of the history, or all of it; lane.encoding is None once all is done."""
        at_once = at_once or not self.results.is_long(lane.request)
        if lane.encoding is not None and not turn(lane.encoding, at_once=at_once):
            lane.encoding = None

    @torch.inference_mode()
    def prefill(self, lane: Lane, chunk: int) -> int:
        """Computes some rows × bars of the window; returns how many are left."""
        done, rows = lane.cache.history_length, lane.request.rows
        if done < lane.shared:
            context = self._shared_context(lane, slice(done, min(lane.shared, done + chunk)))
        else:
            context = self._own_context(lane, min(lane.left // rows, max(1, chunk // rows)))
        if not lane.left:
            lane.context, lane.fresh = context[:, -1:], True
        return lane.left

    def slide(self, lane: Lane) -> int:
        """Moves the window if it has become too long; returns the rows × bars that then have to be prefilled, or 0."""
        limit = self._config.max_context
        if lane.end - lane.start <= limit:
            return 0
        lane.start = lane.end - limit - 1 + lane.request.window.hop
        lane.begin_window()
        return lane.left

    def restart(self, lane: Lane) -> int:
        """After an interrupt, which may have left anything half done: all that the tokens decide is computed again.

        Returns the rows × bars that have to be prefilled; 0 if all bars are generated.
        """
        self.results.restart(lane)
        if lane.finished:
            return 0
        if not self.slide(lane):
            lane.begin_window()
        return lane.left

    @torch.inference_mode()
    def step(self, lanes: Sequence[Lane]) -> None:
        """Samples the next bar of every lane. If it raises, no lane has got one."""
        fresh = [lane for lane in lanes if lane.fresh]
        advancing = [lane for lane in lanes if not lane.fresh]
        tokens = self._step_graphed(advancing) if advancing else None
        if advancing and tokens is None:
            self._advance(advancing)
        eager = lanes if tokens is None else fresh
        chosen = self._choose(eager) if eager else None
        if tokens is not None:
            self._append(advancing, tokens)
        if chosen is not None:
            self._append(eager, chosen)

    def _choose(self, lanes: Sequence[Lane]) -> Tensor:
        """Samples from the lanes' newest contexts; tokens int64 [R, 2]."""
        context = torch.cat([cast(Tensor, lane.context).expand(lane.request.rows, -1, -1) for lane in lanes])
        settings = self._settings(lanes)
        s1_logits = self._step.s1_logits(context)
        s1 = self._sample(s1_logits, settings, self._noise(lanes, S1_HEAD, s1_logits.shape[1]))
        s2_logits = self._step.s2_logits(context, s1, partial(self._recall, lanes))
        s2 = self._sample(s2_logits, settings, self._noise(lanes, S2_HEAD, s2_logits.shape[1]))
        return torch.stack((s1, s2), dim=-1)

    def _append(self, lanes: Sequence[Lane], tokens: Tensor) -> None:
        """Writes the lanes' next bars, int64 [R, 2]."""
        for lane, rows in zip(lanes, tokens.split([lane.request.rows for lane in lanes]), strict=True):
            lane.tokens[:, lane.end] = rows
            lane.step += 1
            lane.fresh = False

    def _step_graphed(self, lanes: Sequence[Lane]) -> Tensor | None:
        """As _advance and _choose, with fixed shapes; None where those have to do it."""
        rows = sum(lane.request.rows for lane in lanes)
        if self._graphs is None or not self._graphs.takes(rows):
            return None
        newest = torch.cat([lane.tokens[:, lane.end - 1] for lane in lanes])
        places = [
            place(lane.end - 1 - lane.start, path, lane.request.rows, lane.cache)
            for lane in lanes
            for path in range(lane.request.rows)
        ]
        settings = self._settings(lanes)
        noise = [self._noise(lanes, head, self._vocabulary) for head in (S1_HEAD, S2_HEAD)]
        step = StepInput(
            tokens=newest,
            times=self._newest_times(lanes),
            places=self._to_device(places),
            temperature=settings.temperature,
            top_p=settings.top_p,
            kept=settings.kept,
            greedy=settings.greedy,
            noise=torch.stack(noise, dim=1),
        )
        longest = max(lane.end - lane.start for lane in lanes)
        tokens = self._graphs.run(step, longest)
        if tokens is not None:
            for lane in lanes:
                lane.cache.own_length += 1
        return tokens

    def _own_context(self, lane: Lane, count: int) -> Tensor:
        """Computes and caches the next bars that the paths have generated; context [S, count, D]."""
        first = lane.start + lane.shared + lane.cache.own_length
        bars = slice(first, first + count)
        x = self._model.embedding(lane.tokens[:, bars, 0], lane.tokens[:, bars, 1]) + lane.times[bars]
        positions = slice(first - lane.start, first - lane.start + count)
        context = self._model.norm(self._stack.run(x, positions, lane.cache.attend_own))
        lane.cache.write_own(self._cross_layer, *self._model.dep_layer.memory(context))
        lane.cache.own_length += count
        return context

    def _shared_context(self, lane: Lane, positions: slice) -> Tensor:
        """Computes and caches positions of what the paths share of the window; context [1, g, D]."""
        bars = slice(lane.start + positions.start, lane.start + positions.stop)
        x = self._model.embedding(lane.tokens[:1, bars, 0], lane.tokens[:1, bars, 1]) + lane.times[bars]
        context = self._model.norm(self._stack.run(x, positions, lane.cache.attend_history))
        lane.cache.write_history(self._cross_layer, *self._model.dep_layer.memory(context))
        lane.cache.history_length = positions.stop
        return context

    def _advance(self, lanes: Sequence[Lane]) -> None:
        """Feeds every lane's newest bar through the blocks, all rows at once."""
        newest = torch.cat([lane.tokens[:, lane.end - 1] for lane in lanes])
        x = (self._model.embedding(newest[:, 0], newest[:, 1]) + self._newest_times(lanes))[:, None]
        positions = self._per_row(lanes, [lane.end - 1 - lane.start for lane in lanes])

        caches = _caches(lanes)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return _by_cache(caches, lambda cache, *qkv: cache.attend_own(layer, *qkv), q, k, v)

        context, keys, values = self._step.advance(x, positions, attend)
        counts = [cache.rows for cache in caches]
        for cache, k, v in zip(caches, keys.split(counts), values.split(counts), strict=True):
            cache.write_own(self._cross_layer, k, v)
        for lane, newest in zip(lanes, context.split([lane.request.rows for lane in lanes]), strict=True):
            lane.context = newest
            lane.cache.own_length += 1

    def _recall(self, lanes: Sequence[Lane], q: Tensor) -> Tensor:
        """The cross-attention: q [R, 4, 1, d] over all bars that its lane has cached."""
        return _by_cache(_caches(lanes), lambda cache, q: cache.attend_seen(self._cross_layer, q), q)

    def _newest_times(self, lanes: Sequence[Lane]) -> Tensor:
        """Time embeddings of the lanes' newest bars [R, D]."""
        return torch.cat([lane.times[lane.end - 1].expand(lane.request.rows, -1) for lane in lanes])

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
        rows = [lane.request.rows for lane in lanes]
        return self._to_device([value for value, count in zip(values, rows, strict=True) for _ in range(count)])

    def _to_device(self, values: Sequence[Any]) -> Tensor:
        """int64. To a GPU from pinned memory, so that the host goes on at once."""
        if self._device.type != "cuda":
            return torch.tensor(values, device=self._device)
        return torch.tensor(values).pin_memory().to(self._device, non_blocking=True)


def _caches(lanes: Sequence[Lane]) -> list[SequenceCache]:
    return together([lane.cache for lane in lanes])


def _by_cache(caches: Sequence[SequenceCache], attend: Callable[..., Tensor], *rows: Tensor) -> Tensor:
    """Attention of each cache's rows over it, put together again."""
    if len(caches) == 1:
        return attend(caches[0], *rows)
    counts = [cache.rows for cache in caches]
    return torch.cat([attend(*part) for part in zip(caches, *(t.split(counts) for t in rows), strict=True)])
