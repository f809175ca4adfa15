"""The cache of conditions on its own."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from realtide.engines.easycontrol.store import ConditionStore, Handle, Key

KEY = Key(b"image", "canny", 1.0, b"pooled", 3.5, (4, 4))
TENSORS = {"key_0": np.zeros(10, np.float32)}


def keys(*numbers: int) -> list[Key]:
    return [replace(KEY, image=bytes([number])) for number in numbers]


def held(store: ConditionStore, *numbers: int) -> Handle:
    handle = store.reserve(keys(*numbers))
    assert handle is not None
    while (key := handle.wanted()) is not None:
        store.put(key, {"key_0": np.full(10, key.image[0], np.float32)})
    return handle


def values(handle: Handle) -> list[float]:
    return [float(tensors["key_0"][0]) for tensors in handle.tensors()]


def test_the_least_recently_used_goes_first() -> None:
    store = ConditionStore(120, 40)
    for number in (1, 2, 3):
        held(store, number).release()
    held(store, 1).release()
    assert (store.hits, store.misses, store.evicted, store.nbytes) == (1, 3, 0, 120)
    held(store, 4).release()
    assert held(store, 1).missing == ()
    assert held(store, 2).missing == tuple(keys(2))
    assert (store.evicted, store.nbytes) == (2, 120)


def test_what_is_held_stays_and_others_wait() -> None:
    store = ConditionStore(80, 40)
    first = held(store, 1, 2)
    assert store.reserve(keys(3)) is None
    again = held(store, 2)
    first.release()
    second = held(store, 3)
    assert values(second) == [3.0]
    assert values(again) == [2.0]
    assert store.reserve(keys(1)) is None
    again.release()
    again.release()
    assert held(store, 1).missing == tuple(keys(1))


def test_what_is_wanted_does_not_go_for_what_else_is() -> None:
    store = ConditionStore(80, 40)
    held(store, 1).release()
    held(store, 2).release()
    handle = held(store, 1, 3)
    assert handle.missing == tuple(keys(3))
    assert values(handle) == [1.0, 3.0]


def test_a_condition_twice_is_one_entry() -> None:
    store = ConditionStore(80, 40)
    handle = held(store, 1, 1)
    assert (store.nbytes, store.misses) == (40, 1)
    assert values(handle) == [1.0, 1.0]
    handle.release()
    assert store.held == 0


def test_what_was_never_computed_leaves_nothing() -> None:
    store = ConditionStore(80, 40)
    first, second = store.reserve(keys(1)), store.reserve(keys(1))
    assert first is not None
    assert second is not None
    assert second.missing == ()
    first.release()
    assert second.wanted() == keys(1)[0]
    second.release()
    assert store.nbytes == 0
    with pytest.raises(ValueError, match="released"):
        first.tensors()


@pytest.mark.parametrize(
    "change",
    [
        {"image": b"other"}, {"kind": "depth"}, {"weight": 0.5}, {"pooled": b"other"},
        {"guidance": 3.0}, {"guidance": None}, {"grid": (4, 5)}, {"grid": None},
    ],
)  # fmt: skip
def test_entries_differ_in_all_that_they_depend_on(change: dict[str, object]) -> None:
    store = ConditionStore(80, 40)
    assert store.reserve([KEY]) is not None
    other = store.reserve([replace(KEY, **change)])  # type: ignore[arg-type]
    assert other is not None
    assert len(other.missing) == 1


def test_misuse_is_refused() -> None:
    with pytest.raises(ValueError, match="a condition needs 40 bytes, the budget is 39"):
        ConditionStore(39, 40)
    store = ConditionStore(80, 40)
    with pytest.raises(ValueError, match="3 conditions do not fit into 80 bytes"):
        store.reserve(keys(1, 2, 3))
    with pytest.raises(ValueError, match="only what is held"):
        store.put(KEY, TENSORS)
    handle = store.reserve([KEY])
    assert handle is not None
    with pytest.raises(ValueError, match="has not been computed"):
        handle.tensors()
    with pytest.raises(ValueError, match="larger than 40 bytes"):
        store.put(KEY, {"key_0": np.zeros(11, np.float32)})
