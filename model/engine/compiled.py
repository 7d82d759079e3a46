"""Decode steps through torch.compile's back end, Inductor (freezing, max-autotune), for the CPU.

Compiled once per number of rows, when the engine is made: inductor times several forms of every product. Its cache on
disk makes the next start quick. Attention stays outside, as operations that the compiler does not look into.

The step is exported and handed to Inductor without Dynamo: Dynamo's guards over all weights took 0.3 ms a step, and it
makes weights inputs unless freezing is set globally, so that nothing was frozen.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from itertools import count
from typing import cast
from weakref import WeakValueDictionary

import torch
import torch._inductor
import torch.nn.functional as F
from torch import Tensor, nn

from model.engine.packing import packed
from model.engine.stack import AttendLayer, Stack
from model.engine.step import Step
from model.kronos import Kronos, Recall

OPTIONS = {
    "freezing": True,
    "max_autotune": True,
    # Only its own kernels: they are timed with weights that lie in the cache, where the libraries' look better.
    "max_autotune_gemm_backends": "CPP",
    "autotune_num_choices_displayed": 0,
}

logger = logging.getLogger(__name__)

_steps: WeakValueDictionary[int, CompiledStep] = WeakValueDictionary()
_numbers = count()

_library = torch.library.Library("kronos", "DEF")
_library.define("attend(int step, int layer, Tensor q, Tensor k, Tensor v) -> Tensor")
_library.define("recall(int step, Tensor q) -> Tensor")
# Leave compiled code for the attention of the present step, which also keeps k and v: nobody else reads them.
_library.impl("attend", lambda step, layer, q, k, v: _steps[step].attend(layer, q, k, v), "CPU")
_library.impl("recall", lambda step, q: _steps[step].recall(q), "CPU")
_library.impl("attend", lambda step, layer, q, k, v: q.new_empty(q.shape), "Meta")
_library.impl("recall", lambda step, q: q.new_empty(q.shape), "Meta")


class CompiledStep(Step):
    """A step of certain numbers of rows; others are filled up to one of them, or computed eagerly if they are too many.

    Not thread-safe: one step at a time. warning: why nothing is compiled; None if all is well.
    """

    def __init__(
        self, eager: Step, model: Kronos, positions: int, precision: str, rows: Sequence[int], device: torch.device
    ) -> None:
        """eager: what computes where this cannot. model: as loaded, not packed. positions: as for Stack.

        Compiles; what goes wrong becomes the warning.
        """
        self._eager = eager
        self._number = next(_numbers)
        _steps[self._number] = self
        self._attend: AttendLayer | None = None
        self._recall: Recall | None = None
        self._count = 0
        self._compiled: dict[tuple[str, int], Callable[..., tuple[Tensor, ...]]] = {}
        self.warning: str | None = None
        try:
            if device.type != "cpu" or precision == "int8":
                raise ValueError(f"{precision} on {device.type} is not compiled")
            plain = cast(Kronos, packed(model, precision, device, for_compiler=True))
            for rows_of_step in sorted(rows):
                self._compile(plain, positions, rows_of_step)
        except Exception as error:  # a compiler fails in a hundred ways, and none of them may stop a forecast
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self._compiled = {}
        self.warning = f"torch.compile is off: {type(error).__name__}: {str(error)[:200]}"
        logger.warning("%s", self.warning)

    @torch.no_grad()
    def _compile(self, plain: Kronos, positions: int, rows: int) -> None:
        """The three parts of a step of that many rows."""
        started = time.monotonic()
        number, ops = self._number, torch.ops.kronos
        step = Step(plain, Stack(plain.transformer, positions, torch.device("cpu")))
        x, at, s1 = torch.zeros(rows, 1, plain.d_model), *torch.zeros(2, rows, dtype=torch.int64)
        parts: dict[str, tuple[Callable[..., tuple[Tensor, ...]], tuple[Tensor, ...]]] = {
            "advance": (lambda x, at: step.advance(x, at, lambda *call: ops.attend(number, *call)), (x, at)),
            "s1": (lambda x: (step.s1_logits(x),), (x,)),
            "s2": (lambda x, s1: (step.s2_logits(x, s1, lambda q: ops.recall(number, q)),), (x, s1)),
        }
        for name, (function, inputs) in parts.items():
            graph = torch.export.export(_Part(function, plain), inputs).module()
            self._compiled[name, rows] = torch._inductor.compile(graph, list(inputs), options=OPTIONS)
            self._warm_up(name, rows, inputs)
        logger.info("compiled the step of %d rows in %.0f s", rows, time.monotonic() - started)

    def _warm_up(self, name: str, rows: int, inputs: Sequence[Tensor]) -> None:
        self._attend, self._recall, self._count = (lambda layer, q, k, v: q), (lambda q: q), rows
        self._compiled[name, rows](*inputs)

    def advance(self, x: Tensor, positions: Tensor, attend: AttendLayer) -> tuple[Tensor, Tensor, Tensor]:
        self._attend = attend
        found = self._run("advance", x, positions)
        if found is None:
            return self._eager.advance(x, positions, attend)
        context, keys, values = found
        return context, keys, values

    def s1_logits(self, context: Tensor) -> Tensor:
        found = self._run("s1", context)
        return self._eager.s1_logits(context) if found is None else found[0]

    def s2_logits(self, context: Tensor, s1: Tensor, recall: Recall) -> Tensor:
        self._recall = recall
        found = self._run("s2", context, s1)
        return self._eager.s2_logits(context, s1, recall) if found is None else found[0]

    def _run(self, name: str, *inputs: Tensor) -> tuple[Tensor, ...] | None:
        """A part's outputs for inputs of R rows; None if no step of so many rows is compiled, or it fails."""
        self._count = len(inputs[0])
        rows = next((rows for part, rows in self._compiled if part == name and rows >= self._count), None)
        if rows is None:
            return None
        if missing := rows - self._count:
            inputs = tuple(F.pad(x, (0, 0) * (x.dim() - 1) + (0, missing)) for x in inputs)
        try:
            outputs = self._compiled[name, rows](*inputs)
        except Exception as error:
            self._give_up(error)
            return None
        return tuple(output[: self._count] for output in outputs)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of the rows that count. [R, H, 1, d], as all of q, k, v."""
        count = self._count
        return self._filled(cast(AttendLayer, self._attend)(layer, q[:count], k[:count], v[:count]), q)

    def recall(self, q: Tensor) -> Tensor:
        """The cross-attention of the rows that count. [R, H, 1, d], as q."""
        return self._filled(cast(Recall, self._recall)(q[: self._count]), q)

    def _filled(self, mixed: Tensor, q: Tensor) -> Tensor:
        """The rows that fill up get their query back: an operation must not give back its input, nor a view of it."""
        return torch.cat((mixed, q[self._count :])).contiguous()


class _Part(nn.Module):
    """A function of tensors as a module, which is what is exported, with the weights that it uses."""

    def __init__(self, function: Callable[..., tuple[Tensor, ...]], weights: nn.Module) -> None:
        super().__init__()
        self._function, self._weights = function, weights

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return self._function(*inputs)
