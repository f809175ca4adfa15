"""Ring arithmetic against a plain list that remembers everything."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from realtide.engines.runtime import ring


@given(
    size=st.integers(1, 9),
    writes=st.lists(st.lists(st.integers(0, 9), min_size=3, max_size=3), max_size=12),
    count=st.integers(0, 9),
)
def test_window_gives_back_what_was_written_last(size: int, writes: list[list[int]], count: int) -> None:
    slots = 3
    count = min(count, size)
    cache = np.full((slots * size + 1, 1), -1)
    position = np.zeros(slots, np.int64)
    history: list[list[int]] = [[] for _ in range(slots)]
    order = np.array([2, 0, 1])  # a batch need not be in slot order
    value = 0
    for wanted in writes:
        # All slots write the same number of rows in one step; the mask leaves some out.
        step = min(max(wanted), size)
        mask = np.array([n > 4 for n in wanted])[order]
        rows = ring.slot_rows(order, ring.write_rows(position[order], step, size), size)
        rows = ring.masked_rows(rows, mask, slots * size)
        for row, taking, slot in zip(rows, mask, order, strict=True):
            for index in row:
                cache[index] = value
                if taking:
                    history[slot].append(value)
                value += 1
        position[order] = ring.advance(position[order], mask, step)
    assert position.tolist() == [len(values) for values in history]
    window = ring.slot_rows(np.arange(slots), ring.window_rows(position, count, size), size)
    valid = ring.window_valid(position, count)
    for slot, values in enumerate(history):
        got = cache[window[slot]][valid[slot], 0].tolist()
        assert got == (values[-count:] if count else [])


def test_window_that_ends_beyond_what_was_written() -> None:
    end = np.array([5, 5, 2])
    written = np.array([5, 3, 2])
    assert ring.window_valid(end, 4, written).tolist() == [
        [True, True, True, True],
        [True, True, False, False],
        [False, False, True, True],
    ]


def test_window_of_a_stream_that_was_cleared() -> None:
    end = np.array([10, 10])
    assert ring.window_valid(end, 3, start=np.array([8, 0])).tolist() == [
        [False, True, True],
        [True, True, True],
    ]
    assert ring.window_valid(end, 3, start=9).tolist() == [[False, False, True]] * 2


def test_more_than_a_ring_holds_is_refused() -> None:
    position = np.zeros(1, np.int64)
    with pytest.raises(ValueError, match=r"count must be in 0\.\.4, not 5"):
        ring.write_rows(position, 5, 4)
    with pytest.raises(ValueError, match=r"count must be in 0\.\.4, not -1"):
        ring.window_rows(position, -1, 4)
