"""Slots: who holds which (`SlotPool`), and the rows of state arrays that belong to one (`SlotState`) (ours).

A slot is an index into preallocated state. The pool guarantees that a slot is handed back exactly once
however often and whenever its lease is closed; the state knows how to zero, export and import a slot's
rows.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType

import numpy as np

from realtide.engines.engine import CheckpointMismatch, SlotsExhausted
from realtide.engines.runtime.program import Array


class SlotLease:
    """The right to use one slot, until `free`. Made by `SlotPool.take`."""

    __slots__ = ("__weakref__", "_pool", "slot")

    def __init__(self, pool: SlotPool, slot: int) -> None:
        self._pool: SlotPool | None = pool
        self.slot = slot

    @property
    def held(self) -> bool:
        """False once the slot was handed back."""
        return self._pool is not None

    def free(self) -> None:
        """Hand the slot back. Further calls do nothing."""
        pool, self._pool = self._pool, None
        if pool is not None:
            pool._give_back(self.slot)

    def __enter__(self) -> SlotLease:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.free()

    def __del__(self) -> None:
        pool, self._pool = self._pool, None
        if pool is not None:
            pool._leaked(self.slot)


class SlotPool:
    """Hands out slots 0..n-1. Used by one thread.

    A lease that is dropped without `free` gives its slot back when it is collected, and is counted.

    Args:
        slots: number of slots, at least 1.
    """

    def __init__(self, slots: int) -> None:
        if slots < 1:
            raise ValueError(f"slots must be at least 1, not {slots}")
        self._slots = slots
        # A stack: the slot freed last is taken first, so that idle slots' memory is never touched.
        self._free = list(range(slots - 1, -1, -1))
        self._taken_total = 0
        self._leaked_total = 0

    @property
    def slots(self) -> int:
        """Number of slots in all."""
        return self._slots

    @property
    def free_slots(self) -> int:
        """Slots that nobody holds."""
        return len(self._free)

    @property
    def taken_total(self) -> int:
        """How often a slot was taken."""
        return self._taken_total

    @property
    def leaked_total(self) -> int:
        """Leases that were dropped without `free` (a bug; their slots were recovered)."""
        return self._leaked_total

    def take(self) -> SlotLease:
        """Take a free slot. Its state is whatever the last holder left.

        Raises:
            SlotsExhausted: all slots are held.
        """
        if not self._free:
            raise SlotsExhausted(f"all {self._slots} slots are in use")
        self._taken_total += 1
        return SlotLease(self, self._free.pop())

    def _give_back(self, slot: int) -> None:
        self._free.append(slot)

    def _leaked(self, slot: int) -> None:
        self._leaked_total += 1
        self._free.append(slot)


_MAGIC = b"RTss"
_VERSION = 1
_PREFIX = struct.Struct("<4sHII")  # magic, version, header bytes, crc32 of header and body


@dataclass(frozen=True, slots=True)
class _Part:
    name: str
    array: Array  # [slots * rows (+ 1), ...]
    rows: int


class SlotState:
    """State arrays whose rows belong to slots.

    Array ``x`` has shape [slots * rows, ...] or [slots * rows + 1, ...]: slot s owns rows s*rows to
    (s+1)*rows - 1, and the last row, if there is one more, belongs to nobody (a place where a batched step
    writes what it has to throw away). With rows = 1 that is plain per-slot state [slots, ...].

    Args:
        arrays: the arrays by name; they are shared, not copied.
        rows_per_slot: rows of one slot by array name; 1 where a name is absent.
        slots: number of slots.

    Raises:
        ValueError: an array does not have the rows that its `rows_per_slot` asks for, or a name is unknown.
    """

    def __init__(self, arrays: Mapping[str, Array], rows_per_slot: Mapping[str, int], slots: int) -> None:
        unknown = sorted(set(rows_per_slot) - set(arrays))
        if unknown:
            raise ValueError(f"rows_per_slot names {unknown[0]!r}, which is no state array")
        parts = []
        for name, array in arrays.items():
            rows = rows_per_slot.get(name, 1)
            if rows < 1 or array.ndim < 1 or len(array) not in (slots * rows, slots * rows + 1):
                raise ValueError(
                    f"state {name!r} of shape {list(array.shape)} does not hold {slots} slots of {rows} rows"
                )
            parts.append(_Part(name, array, rows))
        self._parts = tuple(parts)
        self._slots = slots

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays, committed or not."""
        return sum(part.array.nbytes for part in self._parts)

    @property
    def slot_nbytes(self) -> int:
        """Bytes that one slot owns; an export is at most this plus a header of a few hundred bytes."""
        return sum(part.array[: part.rows].nbytes for part in self._parts)

    def rows(self, name: str, slot: int) -> Array:
        """The rows [rows, ...] of one slot in one array, as a view. Raises KeyError, IndexError."""
        for part in self._parts:
            if part.name == name:
                return self._view(part, slot)
        raise KeyError(name)

    def zero(self, slot: int) -> None:
        """Zero all rows of a slot. Raises IndexError."""
        for part in self._parts:
            _clear(self._view(part, slot))

    def export(self, slot: int) -> bytes:
        """Serialize the rows of a slot: versioned, self-describing, checksummed, without trailing zero rows.

        Raises:
            IndexError: there is no such slot.
        """
        header = []
        body = []
        for part in self._parts:
            view = self._view(part, slot)
            used = _used_rows(view)
            header.append([part.name, _portable(view.dtype).str, list(view.shape), used])
            body.append(view[:used].astype(_portable(view.dtype), copy=False).tobytes())
        head = json.dumps(header, separators=(",", ":")).encode()
        payload = head + b"".join(body)
        return _PREFIX.pack(_MAGIC, _VERSION, len(head), zlib.crc32(payload)) + payload

    def load(self, slot: int, data: bytes) -> None:
        """Overwrite all rows of a slot with an export of the same layout. Nothing is written if that fails.

        Raises:
            IndexError: there is no such slot.
            CheckpointMismatch: `data` is damaged, of another version, or of arrays with other names, dtypes
                or shapes.
        """
        header, at = _read_header(data)
        # Check everything before the first write: a refused checkpoint must leave the slot as it was.
        if len(self._parts) != len(header):
            raise CheckpointMismatch(
                f"checkpoint has {len(header)} state arrays, this model {len(self._parts)}"
            )
        blocks = []
        for part, (name, dtype, shape, used) in zip(self._parts, header, strict=True):
            want = f"{part.name!r} {_portable(part.array.dtype).str} {list(self._view(part, slot).shape)}"
            have = f"{name!r} {dtype} {shape}"
            if want != have:
                raise CheckpointMismatch(f"checkpoint has state {have} where this model has {want}")
            count = used * int(np.prod(shape[1:], dtype=np.int64))
            size = count * np.dtype(dtype).itemsize
            if not 0 <= used <= shape[0] or at + size > len(data):
                raise CheckpointMismatch(f"checkpoint is damaged: state {name!r} has the wrong length")
            blocks.append(np.frombuffer(data, dtype, count, at).reshape(used, *shape[1:]))
            at += size
        if at != len(data):
            raise CheckpointMismatch("checkpoint is damaged: it is longer than its header says")
        for part, block in zip(self._parts, blocks, strict=True):
            view = self._view(part, slot)
            view[: len(block)] = block
            _clear(view[len(block) :])

    def _view(self, part: _Part, slot: int) -> Array:
        if not 0 <= slot < self._slots:
            raise IndexError(f"slot {slot} is not in 0..{self._slots - 1}")
        return part.array[slot * part.rows : (slot + 1) * part.rows]


def _read_header(data: bytes) -> tuple[list[tuple[str, str, list[int], int]], int]:
    if len(data) < _PREFIX.size:
        raise CheckpointMismatch("checkpoint is damaged: it is too short")
    magic, version, head_size, crc = _PREFIX.unpack_from(data)
    if magic != _MAGIC:
        raise CheckpointMismatch("checkpoint is damaged: it does not start like slot state")
    if version != _VERSION:
        raise CheckpointMismatch(
            f"checkpoint has slot state version {version}, this program reads {_VERSION}"
        )
    if zlib.crc32(memoryview(data)[_PREFIX.size :]) != crc:
        raise CheckpointMismatch("checkpoint is damaged: its checksum does not match")
    end = _PREFIX.size + head_size
    try:
        header = [
            (str(n), str(d), [int(k) for k in s], int(u))
            for n, d, s, u in json.loads(data[_PREFIX.size : end])
        ]
    except (ValueError, TypeError) as error:
        raise CheckpointMismatch(f"checkpoint is damaged: {error}") from error
    return header, end


def _bytes(view: Array) -> Array:
    """The rows' bytes, [rows, bytes of a row]."""
    width = int(np.prod(view.shape[1:], dtype=np.int64))  # -1 cannot be told where there are no rows
    return np.ascontiguousarray(view).reshape(len(view), width).view(np.uint8)


def _clear(view: Array) -> None:
    """Zero, but leave alone what is zero: writing to pages that were never touched would commit them."""
    if _bytes(view).any():
        view[...] = 0


def _used_rows(view: Array) -> int:
    """Rows up to the last one with a set bit (bits, not values: -0.0 must survive a round trip)."""
    used = np.flatnonzero(_bytes(view).any(axis=1))
    return int(used[-1]) + 1 if used.size else 0


def _portable(dtype: np.dtype[np.generic]) -> np.dtype[np.generic]:
    return dtype.newbyteorder("<")
