"""A network's blocks, run over any positions, with attention from wherever the engine keeps it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from model.layers import RotaryTables, TransformerBlock

AttendLayer = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""(layer, q, k, v), each [R, H, g, d] → [R, H, g, d]."""


class Stack:
    """R rows of g positions, D model width."""

    def __init__(self, blocks: nn.ModuleList, positions: int, device: torch.device) -> None:
        """positions: how many there can be."""
        self._blocks = [cast(TransformerBlock, block) for block in blocks]
        self._tables: list[RotaryTables] = []
        if self._blocks:
            rotary = self._blocks[0].self_attn.rotary
            self._tables = [rotary.tables(torch.arange(positions, device=device))]

    @property
    def layers(self) -> int:
        return len(self._blocks)

    def run(self, x: Tensor, positions: slice | Tensor, attend: AttendLayer, layers: slice = slice(None)) -> Tensor:
        """x [R, g, D] → [R, g, D]. positions: a slice of g positions for all rows, or with g = 1 an int64 [R].

        layers: which of them, for what passes through in several turns.
        """
        for cos, sin in self._tables:
            tables = (cos[positions], sin[positions])
            if isinstance(positions, Tensor):
                tables = (tables[0][:, None, None], tables[1][:, None, None])
            for layer in range(self.layers)[layers]:
                x = self._blocks[layer](x, tables, partial(attend, layer))
        return x
