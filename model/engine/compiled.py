"""The blocks of a decode step through torch.compile (freezing, max-autotune), for the CPU.

Compiled once per number of rows, when the engine is made, because a compilation takes up to a minute: inductor times
several forms of every product. Its cache on disk makes the next start quick. Attention stays outside, as an operation
that the compiler does not look into.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from itertools import count
from typing import Any, cast
from weakref import WeakValueDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.engine.packing import packed
from model.engine.stack import AttendLayer, Stack
from model.kronos import Kronos

OPTIONS: dict[str, str | int | bool | Callable] = {
    "freezing": True,
    "max_autotune": True,
    "max_autotune_gemm_backends": "CPP,ATEN",
}
Step = Callable[[Tensor, Tensor], Tensor]

logger = logging.getLogger(__name__)

_stacks: WeakValueDictionary[int, CompiledStack] = WeakValueDictionary()
_numbers = count()


@torch.library.custom_op("kronos::attend", mutates_args=())
def _attend(stack: int, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Leaves compiled code for the attention of the present step, which also keeps k and v: nobody else reads them."""
    return _stacks[stack].attend(layer, q, k, v)


@_attend.register_fake
def _(stack: int, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.empty(q.shape)


class CompiledStack:
    """A model's blocks for steps of certain numbers of rows. Not thread-safe: one step at a time.

    warning: why nothing is compiled; None if all is well.
    """

    def __init__(
        self, model: Kronos, positions: int, precision: str, rows: Sequence[int], device: torch.device
    ) -> None:
        """model: as loaded, not packed. positions: as for Stack. Compiles; what goes wrong becomes the warning."""
        self._number = next(_numbers)
        _stacks[self._number] = self
        self._width = model.d_model
        self._attend: AttendLayer | None = None
        self._count = 0
        self._steps: dict[int, Step] = {}
        self.warning: str | None = None
        try:
            if device.type != "cpu" or precision == "int8":
                raise ValueError(f"{precision} on {device.type} is not compiled")
            blocks = cast(nn.ModuleList, packed(model.transformer, precision, device, for_compiler=True))
            self._stack = Stack(blocks, positions, device)
            self._steps = {count: self._compiled(count) for count in sorted(rows)}
        except Exception as error:  # a compiler fails in a hundred ways, and none of them may stop a forecast
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self._steps = {}
        self.warning = f"torch.compile is off: {type(error).__name__}: {str(error)[:200]}"
        logger.warning("%s", self.warning)

    def _compiled(self, rows: int) -> Step:
        """The step for that many rows, compiled by a first call."""
        started = time.monotonic()
        number = self._number

        def step(x: Tensor, positions: Tensor) -> Tensor:
            return self._stack.run(x, positions, lambda *call: torch.ops.kronos.attend(number, *call))

        # Isolated: the limit on recompilations counts per function, and all numbers of rows share this one.
        settings: dict[str, Any] = {"fullgraph": True, "dynamic": False, "isolate_recompiles": True}
        compiled: Step = torch.compile(step, options=OPTIONS, **settings)
        self._attend, self._count = (lambda layer, q, k, v: q), rows
        with torch.inference_mode():
            compiled(torch.zeros(rows, 1, self._width), torch.zeros(rows, dtype=torch.int64))
        logger.info("compiled the step of %d rows in %.0f s", rows, time.monotonic() - started)
        return compiled

    def run(self, x: Tensor, positions: Tensor, attend: AttendLayer) -> Tensor | None:
        """As Stack.run for x [R, 1, D] and positions [R]; None if no step of so many rows is compiled, or it fails."""
        count = len(x)
        rows = next((rows for rows in self._steps if rows >= count), None)
        if rows is None:
            return None
        self._attend, self._count = attend, count
        if rows > count:
            x = F.pad(x, (0, 0, 0, 0, 0, rows - count))
            positions = F.pad(positions, (0, rows - count))
        try:
            return self._steps[rows](x, positions)[:count]
        except Exception as error:  # such as a compilation anew, in settings of torch that were not there at the start
            self._give_up(error)
            return None

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of the rows that count; the rows that fill up get their query back. [R, H, 1, d]."""
        count = self._count
        mixed = cast(AttendLayer, self._attend)(layer, q[:count], k[:count], v[:count])
        # An operation must not give back its input, nor a view of it.
        return torch.cat((mixed, q[count:])).contiguous()
