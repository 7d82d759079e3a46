"""The allocator of cache slots: nothing lost, nothing given twice."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.engine.kv_cache import Arena, CacheIntegrityError


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(1, 40)), max_size=60))
def test_arena_never_loses_or_doubles_a_range(actions):
    arena, held = Arena(100), []
    for action, size in actions:
        if action and (block := arena.allocate(size)):
            held.append(block)
        elif not action and held:
            arena.release(held.pop(size % len(held)))
        arena.check_integrity(held)
        assert arena.used + arena.free == 100
    for block in held:
        arena.release(block)
    assert arena.allocate(100) is not None


def test_arena_catches_leaks_and_double_frees():
    arena = Arena(10)
    block = arena.allocate(4)
    with pytest.raises(CacheIntegrityError, match="belong to a request"):
        arena.check_integrity([])
    arena.release(block)
    with pytest.raises(CacheIntegrityError, match="not in use"):
        arena.release(block)
    with pytest.raises(ValueError, match="positive"):
        arena.allocate(0)
