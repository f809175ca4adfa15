"""Position arithmetic of ring caches, batched over slots (ours).

A ring of `size` rows holds the last `size` positions of an endless sequence: position p lies in row p %
size. The rings of all slots lie one after the other in an array of [slots * size + 1, width] rows; the last
row is the *dump row*, to which a batched step directs the writes of slots that do not take part (the
execution mask).

Positions are int64 and count from 0. All functions take arrays [M] of positions, one for each slot of a
batch.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]


def write_rows(position: Ints, count: int, size: int) -> Ints:
    """Ring rows [M, count] where positions position .. position+count-1 are written.

    Args:
        position: [M], the first position to write in each ring.
        count: how many, at most `size` (more would overwrite each other within one write).
        size: rows of one ring.

    Raises:
        ValueError: count is not in 0..size.
    """
    if not 0 <= count <= size:
        raise ValueError(f"count must be in 0..{size}, not {count}")
    return (position[:, None] + np.arange(count)) % size


def window_rows(end: Ints, count: int, size: int) -> Ints:
    """Ring rows [M, count] of the positions end-count .. end-1, oldest first.

    Positions before 0 give rows too (of data that was never written): mask them with `window_valid`.

    Args:
        end: [M], one past the newest position of each window.
        count: length of the window, at most `size`.
        size: rows of one ring.

    Raises:
        ValueError: count is not in 0..size.
    """
    if not 0 <= count <= size:
        raise ValueError(f"count must be in 0..{size}, not {count}")
    return (end[:, None] - count + np.arange(count)) % size


def window_valid(end: Ints, count: int, written: Ints | None = None, start: Ints | int = 0) -> Bools:
    """Which entries [M, count] of the window end-count .. end-1 hold data.

    Args:
        end: [M], as in `window_rows`.
        count: length of the window.
        written: [M], one past the newest position written (`end` where absent: the window ends at the
            newest).
        start: first position that counts, for example where a stream was cleared.
    """
    position = end[:, None] - count + np.arange(count)
    newest = end if written is None else written
    valid: Bools = (position >= np.maximum(start, 0).reshape(-1, 1)) & (position < newest[:, None])
    return valid


def slot_rows(slots: Ints, rows: Ints, size: int) -> Ints:
    """Rows [M, n] of the array that holds all slots' rings, for ring rows [M, n] of the given slots [M]."""
    return slots[:, None] * size + rows


def masked_rows(rows: Ints, mask: Bools, dump: int) -> Ints:
    """`rows` [M, n] where the execution mask [M] is true, the dump row elsewhere."""
    return np.where(mask[:, None], rows, np.int64(dump))


def advance(position: Ints, mask: Bools, count: Any) -> Ints:
    """Positions [M] after `count` (a number or [M]) more writes where the execution mask [M] is true."""
    return position + np.where(mask, count, 0).astype(np.int64)
