"""The workers of a run as one of them sees the others: sums, agreements, the choice of one for all."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")


@dataclass(frozen=True)
class Group:
    """rank: from 0. Alone (size 1) nothing is sent."""

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def sums(self, *values: float) -> list[float]:
        """Each value's sum over the workers, in fp64."""
        return self._reduce(values, dist.ReduceOp.SUM) if self.size > 1 else list(values)

    def least(self, value: int) -> int:
        return int(self._reduce((value,), dist.ReduceOp.MIN)[0]) if self.size > 1 else value

    def _reduce(self, values: tuple[float, ...], operation: dist.ReduceOp.RedOpType) -> list[float]:
        # MPS has no fp64, and no group either.
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor, operation)
        return tensor.tolist()

    def from_first(self, value: T) -> T:
        """Rank 0's value, on every worker; the others' is not looked at."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]
