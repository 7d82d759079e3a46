"""A decode step of fixed shapes and addresses, which CUDA captures once per bucket and replays.

What changes from step to step (lengths, addresses, settings, noise) lies in buffers that are filled before a replay.
Attention gathers keys and values by computed addresses, up to the bucket's number of bars, and masks what is beyond.
R rows, W bars, D model width, V vocabulary entries. The same step runs uncaptured on any device: so it is tested.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor

from model.engine.attention import SequenceCache
from model.engine.sampler import RowSettings, sample_sorted
from model.engine.step import Step
from model.kronos import Kronos

ROW_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
"""A step of more rows runs eagerly: there the launches no longer count."""
BAR_BUCKET = 128
"""Window lengths are rounded up to multiples of this."""

logger = logging.getLogger(__name__)

_recording = threading.Lock()
"""Held while a graph is recorded: torch allows one recording at a time in a process, and engines may be several."""


@dataclass(frozen=True)
class StepInput:
    """What a step of R rows reads.

    tokens int64 [R, 2] and times [R, D]: of the newest bar. places int64 [R, 9]: see place().
    temperature, top_p float32 [R, 1]; kept int64 [R, 1]; greedy bool [R]; noise float32 [R, 2, V], by head.
    """

    tokens: Tensor
    times: Tensor
    places: Tensor
    temperature: Tensor
    top_p: Tensor
    kept: Tensor
    greedy: Tensor
    noise: Tensor


def place(position: int, path: int, paths: int, cache: SequenceCache) -> tuple[int, ...]:
    """A row of StepInput.places: its position in the window, which of its lane's paths it is, and where they lie."""
    return (position, path, paths, *cache.place())


class GatheredAttention:
    """Attention of R rows over their caches in the arena, W bars each."""

    def __init__(self, memory: Tensor, places: Tensor, bars: int, width: int) -> None:
        """memory: 1-D, a multiple of width. places: as in StepInput."""
        self._memory, self._width = memory, width
        columns = [column[:, None, None] for column in places.unbind(1)]
        _, self._path, self._paths, self._history, self._history_capacity, history_length = columns[:6]
        self._own, self._own_capacity, self._own_length = columns[6:]
        bar = torch.arange(bars, device=memory.device)[None, None]
        last = history_length + self._own_length
        self._seen = (bar <= last)[:, :, None]
        # What is masked must still be finite: it reads the newest bar, not memory that nobody has written.
        bar = torch.minimum(bar, last)
        self._in_history = bar < history_length
        self._history_bar, self._own_bar = bar, bar - history_length
        self._addresses: dict[int, tuple[Tensor, Tensor]] = {}

    def step(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Writes k, v [R, H, 1, d] of the newest bar and lets q attend to all bars; [R, H, 1, d]."""
        self.write(layer, k, v)
        return self.attend(layer, q)

    def write(self, layer: int, k: Tensor, v: Tensor) -> None:
        """k, v [R, H, 1, d] of the newest bar."""
        heads = k.shape[1]
        first, stride = self._own_addresses(heads, self._own_length)
        for part, new in enumerate((k, v)):
            address = first + (2 * layer + part) * stride
            self._vectors(heads).index_copy_(0, address.flatten(), new.flatten(0, 2).to(self._memory.dtype))

    def attend(self, layer: int, q: Tensor) -> Tensor:
        """q [R, H, 1, d] over everything that is cached, the newest bar included; [R, H, 1, d]."""
        heads = q.shape[1]
        if heads not in self._addresses:
            own, own_stride = self._own_addresses(heads, self._own_bar)
            history = self._history * heads + _heads(heads, q) * self._history_capacity + self._history_bar
            self._addresses[heads] = (
                torch.where(self._in_history, history, own),
                torch.where(self._in_history, self._history_capacity * heads, own_stride),
            )
        first, stride = self._addresses[heads]
        keys, values = (self._vectors(heads)[first + (2 * layer + part) * stride] for part in (0, 1))
        return F.scaled_dot_product_attention(q.to(keys.dtype), keys, values, attn_mask=self._seen).float()

    def _own_addresses(self, heads: int, bar: Tensor) -> tuple[Tensor, Tensor]:
        """Addresses of bars of the paths' own parts in layer 0, and the distance from one layer's part to the next."""
        row = self._path * heads + _heads(heads, bar)
        return self._own * heads + row * self._own_capacity + bar, self._paths * self._own_capacity * heads

    def _vectors(self, heads: int) -> Tensor:
        return self._memory.view(-1, self._width // heads)


def _heads(heads: int, like: Tensor) -> Tensor:
    return torch.arange(heads, device=like.device)[None, :, None]


class GraphedSteps:
    """Steps of lanes whose newest bar is not cached yet, one captured graph per bucket of rows and bars.

    If a capture fails, warning says so and every later step is left to the caller.
    """

    def __init__(self, model: Kronos, step: Step, layers: int, memory: Tensor, max_context: int) -> None:
        """layers: of the model's blocks.

        memory: the arena, and after it scratch() elements, to which rows that only fill a bucket write.
        """
        self._model, self._step, self._layers = model, step, layers
        self._memory, self._max_context = memory, max_context
        self._recorder = _Recorder(memory.device) if memory.device.type == "cuda" else None
        self._buckets: dict[tuple[int, int], _Bucket] = {}
        scratch = (memory.numel() - self.scratch(layers, model.d_model)) // model.d_model
        self.warning: str | None = None
        self._idle = torch.tensor([0, 0, 1, scratch, 0, 0, scratch, 1, 0], device=memory.device)

    @staticmethod
    def scratch(layers: int, width: int) -> int:
        """Elements for one bar of one path."""
        return SequenceCache.size(layers + 1, width, 0, 1, 1)

    def takes(self, rows: int) -> bool:
        """False if the caller has to compute a step of so many rows: they are too many, or there are no graphs here."""
        return self.warning is None and rows <= ROW_BUCKETS[-1]

    def run(self, step: StepInput, longest: int) -> Tensor | None:
        """The next tokens, int64 [R, 2], of a step that takes() takes; None if no graph could be captured of it.

        longest: bars of the longest window, the newest included.
        """
        rows = next(bucket for bucket in ROW_BUCKETS if bucket >= len(step.tokens))
        bars = min(-(-longest // BAR_BUCKET) * BAR_BUCKET, self._max_context)
        bucket = self._buckets.get((rows, bars))
        if bucket is not None:
            return bucket.run(step)
        bucket = _Bucket(lambda buffers: self._compute(buffers, bars), rows, self._idle, self._recorder)
        try:
            tokens = bucket.run(step)
        except RuntimeError as error:
            if self._recorder is None:
                raise
            self.warning = f"CUDA graphs are off: capturing one raised {type(error).__name__}"
            logger.warning("%s: %s", self.warning, str(error))
            return None
        self._buckets[rows, bars] = bucket
        return tokens

    def _compute(self, step: StepInput, bars: int) -> Tensor:
        model, cross_layer = self._model, self._layers
        attention = GatheredAttention(self._memory, step.places, bars, model.d_model)
        x = (model.embedding(step.tokens[:, 0], step.tokens[:, 1]) + step.times)[:, None]
        context, keys, values = self._step.advance(x, step.places[:, 0], attention.step)
        attention.write(cross_layer, keys, values)
        settings = RowSettings(step.temperature, step.top_p, step.kept, step.greedy)
        s1_logits = self._step.s1_logits(context)
        s1 = sample_sorted(s1_logits, settings, step.noise[:, 0, : s1_logits.shape[1]])
        s2_logits = self._step.s2_logits(context, s1, lambda q: attention.attend(cross_layer, q))
        s2 = sample_sorted(s2_logits, settings, step.noise[:, 1, : s2_logits.shape[1]])
        return torch.stack((s1, s2), dim=-1)


class _Recorder:
    """Captures the graphs of one engine. They share a pool of memory, because one of them runs at a time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        # Of this device and this engine. torch's own stream for captures belongs to the device that came first: on any
        # other a graph stays empty, and its replays give the same tokens for ever.
        self._stream = torch.cuda.Stream(device)

    def record(self, compute: Callable[[], Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        """A graph of what compute() does, and the tensor that each replay fills."""
        present = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(present)
        try:
            # Whatever fails, this context is left: torch.cuda.graph stays on its stream if a capture cannot end.
            with _recording, torch.cuda.stream(self._stream):
                # Kernels are loaded and workspaces made on first use, which must not happen while recording.
                for _ in range(2):
                    compute()
                graph = torch.cuda.CUDAGraph()
                # Another thread may be loading a model meanwhile.
                mode = "thread_local"
                with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode=mode):
                    tokens = compute()
        finally:
            present.wait_stream(self._stream)
        return graph, tokens


class _Bucket:
    """Buffers of one shape, and the graph over them."""

    def __init__(
        self, compute: Callable[[StepInput], Tensor], rows: int, idle: Tensor, recorder: _Recorder | None
    ) -> None:
        """idle: places of a row that only fills the bucket. recorder: None captures no graph."""
        self._compute, self._rows, self._idle, self._recorder = compute, rows, idle, recorder
        self._buffers: StepInput | None = None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._tokens = torch.empty(0)

    def run(self, step: StepInput) -> Tensor:
        """Fills the buffers, computes, and returns the tokens of the rows that count."""
        count = len(step.tokens)
        if self._buffers is None:
            self._buffers = StepInput(*(self._buffer(getattr(step, field.name)) for field in fields(step)))
        buffers = self._buffers
        for field in fields(step):
            getattr(buffers, field.name)[:count] = getattr(step, field.name)
        buffers.places[count:] = self._idle
        if self._recorder is None:
            return self._compute(buffers)[:count]
        if self._graph is None:
            self._graph, self._tokens = self._recorder.record(lambda: self._compute(buffers))
        self._graph.replay()
        # A copy: the next replay writes to the same memory.
        return self._tokens[:count].clone()

    def _buffer(self, like: Tensor) -> Tensor:
        # Ones are harmless as temperature, noise and token alike.
        return torch.ones((self._rows, *like.shape[1:]), dtype=like.dtype, device=like.device)
