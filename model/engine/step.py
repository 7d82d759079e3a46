"""The arithmetic of one decode step, from the newest bars to logits. The seam for what computes it."""

from __future__ import annotations

from torch import Tensor

from model.engine.stack import AttendLayer, Stack
from model.kronos import Kronos, Recall


class Step:
    """The newest bar of R rows, D model width. Eager: any number of rows."""

    def __init__(self, model: Kronos, stack: Stack) -> None:
        """model: packed. stack: of its blocks."""
        self._model, self._stack = model, stack

    def advance(self, x: Tensor, positions: Tensor, attend: AttendLayer) -> tuple[Tensor, Tensor, Tensor]:
        """x [R, 1, D] at positions [R] → context [R, 1, D]; keys and values [R, H, 1, d] for the cross-attention."""
        context = self._model.norm(self._stack.run(x, positions, attend))
        return (context, *self._model.dep_layer.memory(context))

    def s1_logits(self, context: Tensor) -> Tensor:
        """context [R, 1, D] → [R, 2^s1_bits]."""
        return self._model.next_s1_logits(context)

    def s2_logits(self, context: Tensor, s1: Tensor, recall: Recall) -> Tensor:
        """context [R, 1, D] and the chosen s1 int64 [R] → [R, 2^s2_bits].

        recall: the cross-attention of q [R, H, 1, d].
        """
        return self._model.next_s2_logits(context, s1, recall)
