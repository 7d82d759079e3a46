"""Where keys and values lie: contiguous ranges of one preallocated arena. Knows sizes and places, not tensors."""

from __future__ import annotations

from bisect import insort
from dataclasses import dataclass

from model.errors import KronosError


class CacheIntegrityError(KronosError):
    """The arena's books do not add up: a range was lost, freed twice or given away twice."""


@dataclass(frozen=True)
class Block:
    """A range of the arena, in elements."""

    offset: int
    size: int


class Arena:
    """First-fit allocator of ranges within a fixed capacity; neighbouring free ranges are merged."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._free = [(0, capacity)] if capacity else []
        self._used: dict[int, int] = {}

    @property
    def used(self) -> int:
        return sum(self._used.values())

    @property
    def free(self) -> int:
        return self.capacity - self.used

    def allocate(self, size: int) -> Block | None:
        """A free range of that size, or None if there is none at present. Raises ValueError if size is not positive."""
        if size < 1:
            raise ValueError(f"a block needs a positive size, not {size}")
        for i, (offset, length) in enumerate(self._free):
            if length >= size:
                if length == size:
                    del self._free[i]
                else:
                    self._free[i] = (offset + size, length - size)
                self._used[offset] = size
                return Block(offset, size)
        return None

    def release(self, block: Block) -> None:
        """Gives a range back. Raises CacheIntegrityError if it is not in use."""
        if self._used.get(block.offset) != block.size:
            raise CacheIntegrityError(f"{block} is not in use")
        del self._used[block.offset]
        insort(self._free, (block.offset, block.size))
        merged: list[tuple[int, int]] = []
        for offset, length in self._free:
            if merged and sum(merged[-1]) == offset:
                merged[-1] = (merged[-1][0], merged[-1][1] + length)
            else:
                merged.append((offset, length))
        self._free = merged

    def check_integrity(self, expected: list[Block]) -> None:
        """Raises CacheIntegrityError unless exactly the expected blocks are in use and the rest is free, once."""
        if {(block.offset, block.size) for block in expected} != set(self._used.items()):
            raise CacheIntegrityError(
                f"{len(self._used)} ranges are in use ({self.used} elements), {len(expected)} belong to a request"
            )
        end = 0
        for offset, length in sorted([*self._free, *self._used.items()]):
            if offset != end:
                raise CacheIntegrityError(f"elements {end} to {offset} are lost or given away twice")
            end = offset + length
        if end != self.capacity:
            raise CacheIntegrityError(f"the ranges end at {end}, the arena at {self.capacity}")
