"""Slots are freed exactly once; a slot's rows are its own, and survive export and import to the bit."""

from __future__ import annotations

import gc
import resource
import struct

import numpy as np
import pytest

from realtide.engines.engine import CheckpointMismatch, SlotsExhausted
from realtide.engines.runtime.program import Array
from realtide.engines.runtime.slots import SlotLease, SlotPool, SlotState

SLOTS, ROWS = 3, 4


def test_every_slot_is_handed_out_once() -> None:
    pool = SlotPool(4)
    leases = [pool.take() for _ in range(4)]
    assert sorted(lease.slot for lease in leases) == [0, 1, 2, 3]
    assert pool.free_slots == 0
    with pytest.raises(SlotsExhausted, match="all 4 slots are in use"):
        pool.take()
    assert pool.taken_total == 4


def test_freeing_twice_does_not_free_the_next_holder() -> None:
    pool = SlotPool(1)
    first = pool.take()
    first.free()
    second = pool.take()
    first.free()
    assert (second.slot, second.held, first.held, pool.free_slots) == (0, True, False, 0)
    with pytest.raises(SlotsExhausted):
        pool.take()
    second.free()
    assert (pool.free_slots, pool.leaked_total, pool.taken_total) == (1, 0, 2)


def test_the_slot_freed_last_is_taken_first() -> None:
    pool = SlotPool(8)
    leases = [pool.take() for _ in range(3)]
    leases[1].free()
    assert pool.take().slot == leases[1].slot


def test_a_lease_is_freed_by_leaving_its_block() -> None:
    pool = SlotPool(1)

    def fail(lease: SlotLease) -> None:
        with lease:
            raise RuntimeError("in between")

    with pytest.raises(RuntimeError, match="in between"):
        fail(pool.take())
    gc.collect()
    assert (pool.free_slots, pool.leaked_total) == (1, 0)


def test_a_dropped_lease_is_counted_and_recovered() -> None:
    pool = SlotPool(2)
    kept = pool.take()
    dropped = pool.take()
    slot = dropped.slot
    del dropped
    gc.collect()
    assert (pool.leaked_total, pool.free_slots) == (1, 1)
    assert pool.take().slot == slot
    kept.free()
    gc.collect()


def test_a_pool_needs_a_slot() -> None:
    with pytest.raises(ValueError, match="slots must be at least 1, not 0"):
        SlotPool(0)


def arrays(seed: int = 0) -> dict[str, Array]:
    random = np.random.default_rng(seed)
    return {
        "keys": random.standard_normal((SLOTS * ROWS + 1, 5)).astype(np.float32),
        "half": random.standard_normal((SLOTS * ROWS, 2, 3)).astype(np.float16),
        "position": random.integers(0, 99, (SLOTS,)),
        "flags": random.random((SLOTS, 2)) < 0.5,
    }


def slot_state(values: dict[str, Array]) -> SlotState:
    return SlotState(values, {"keys": ROWS, "half": ROWS}, SLOTS)


def test_zero_clears_one_slot_only() -> None:
    values = arrays()
    before = {name: array.copy() for name, array in values.items()}
    state = slot_state(values)
    state.zero(1)
    assert not values["keys"][ROWS : 2 * ROWS].any()
    assert not values["half"][ROWS : 2 * ROWS].any()
    assert values["position"][1] == 0
    for name, array in values.items():
        assert not state.rows(name, 1).any()
        for other in (0, 2):
            assert np.array_equal(state.rows(name, other), slot_state(before).rows(name, other))
        if name == "keys":
            assert np.array_equal(array[-1], before[name][-1])  # the dump row is nobody's


def test_zeroing_and_loading_commit_no_untouched_memory() -> None:
    values = {"keys": np.zeros((64 * 1024, 1024, 4), np.float32)}  # 1 GB
    state = SlotState(values, {"keys": 1024}, 64)
    values["keys"][0] = 1
    data = state.export(0)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for slot in range(64):
        state.zero(slot)
        state.load(slot, data)
    peak_mb = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert values["keys"][63 * 1024].all()
    # One row of each slot was written: at most two huge pages of 2 MB each, of the 16 MB that a slot owns.
    assert peak_mb < 400


def test_export_and_load_move_a_slot_to_the_bit() -> None:
    source, target = arrays(1), arrays(2)
    source["keys"][2 * ROWS] = [np.nan, np.inf, -0.0, 1e-42, 0]
    source["keys"][2 * ROWS + 2] = 0
    source["half"][2 * ROWS + 1 :] = 0
    source["half"][3 * ROWS - 1, 1, 2] = -0.0
    untouched = {name: array.copy() for name, array in target.items()}
    data = slot_state(source).export(2)
    slot_state(target).load(0, data)
    for name in source:
        assert slot_state(source).rows(name, 2).tobytes() == slot_state(target).rows(name, 0).tobytes()
        for other in (1, 2):
            assert np.array_equal(
                slot_state(target).rows(name, other), slot_state(untouched).rows(name, other)
            )
    assert np.array_equal(target["keys"][-1], untouched["keys"][-1])
    assert slot_state(source).export(2) == data


def test_export_leaves_out_trailing_zero_rows() -> None:
    values = arrays()
    state = slot_state(values)
    full = len(state.export(0))
    state.zero(0)
    empty = len(state.export(0))
    values["keys"][1] = 1
    assert full - empty == state.slot_nbytes
    assert len(state.export(0)) - empty == 2 * 5 * 4
    other = arrays(3)
    slot_state(other).load(1, state.export(0))
    assert slot_state(other).rows("keys", 1).tolist() == [[0.0] * 5, [1.0] * 5, [0.0] * 5, [0.0] * 5]


def test_sizes() -> None:
    values = arrays()
    state = slot_state(values)
    assert state.nbytes == sum(array.nbytes for array in values.values())
    assert state.slot_nbytes == ROWS * 5 * 4 + ROWS * 6 * 2 + 8 + 2


def renamed(values: dict[str, Array]) -> SlotState:
    values["other"] = values.pop("flags")
    return slot_state(values)


def retyped(values: dict[str, Array]) -> SlotState:
    values["position"] = values["position"].astype(np.int32)
    return slot_state(values)


def reshaped(values: dict[str, Array]) -> SlotState:
    values["keys"] = np.zeros((SLOTS * ROWS, 6), np.float32)
    return slot_state(values)


def shortened(values: dict[str, Array]) -> SlotState:
    del values["flags"]
    return slot_state(values)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (renamed, r"checkpoint has state 'flags' .* where this model has 'other'"),
        (retyped, r"'position' <i8 \[1\] where this model has 'position' <i4 \[1\]"),
        (reshaped, r"'keys' <f4 \[4, 5\] where this model has 'keys' <f4 \[4, 6\]"),
        (shortened, "checkpoint has 4 state arrays, this model 3"),
    ],
)
def test_state_of_another_model_is_refused(make: object, message: str) -> None:
    data = slot_state(arrays()).export(0)
    values = arrays(4)
    state = make(values)  # type: ignore[operator]
    before = {name: array.copy() for name, array in values.items()}
    with pytest.raises(CheckpointMismatch, match=message):
        state.load(1, data)
    assert all(np.array_equal(array, before[name]) for name, array in values.items())


def test_damaged_exports_are_refused_and_change_nothing() -> None:
    data = slot_state(arrays()).export(0)
    values = arrays(5)
    state = slot_state(values)
    before = {name: array.copy() for name, array in values.items()}
    damaged = [data[:length] for length in range(0, len(data), 7)] + [data + b"\0"]
    damaged += [data[:at] + bytes([data[at] ^ 0x40]) + data[at + 1 :] for at in range(0, len(data), 5)]
    for bad in damaged:
        with pytest.raises(CheckpointMismatch):
            state.load(1, bad)
    assert all(np.array_equal(array, before[name]) for name, array in values.items())
    later = data[:4] + struct.pack("<H", 2) + data[6:]
    with pytest.raises(CheckpointMismatch, match="slot state version 2, this program reads 1"):
        state.load(1, later)


def test_wrong_slots_and_layouts_are_refused() -> None:
    state = slot_state(arrays())
    for slot in (-1, SLOTS):
        with pytest.raises(IndexError, match=rf"slot {slot} is not in 0\.\.2"):
            state.export(slot)
        with pytest.raises(IndexError):
            state.zero(slot)
    with pytest.raises(KeyError):
        state.rows("absent", 0)
    with pytest.raises(ValueError, match=r"state 'x' of shape \[14, 2\] does not hold 3 slots of 4 rows"):
        SlotState({"x": np.zeros((14, 2))}, {"x": 4}, 3)
    with pytest.raises(ValueError, match="rows_per_slot names 'y', which is no state array"):
        SlotState({"x": np.zeros((3, 2))}, {"y": 4}, 3)
