"""The cache of conditions: keys and values under a byte budget, shared by all requests of an engine (ours).

An entry is found by all that it depends on (`Key`) and by nothing else, so that requests share one exactly if
their conditions are alike. A request takes all its conditions at once or none (`reserve`), so that two
requests never hold what the other one waits for. Entries that a request holds stay; of the others the one
that was used longest ago goes first. What went is computed again by whoever needs it. Used by one thread.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from realtide.engines.runtime.memory import Values


@dataclass(frozen=True, slots=True)
class Key:
    """What the keys and values of a condition depend on.

    Attributes:
        image: digest of the condition's pixels.
        kind: which LoRA.
        weight: of the LoRA.
        pooled: digest of the pooled prompt, which modulates the condition's tokens.
        guidance: likewise; None: the model takes none.
        grid: the image's tokens, where positions are stretched over them; None: they are not.
    """

    image: bytes
    kind: str
    weight: float
    pooled: bytes
    guidance: float | None
    grid: tuple[int, int] | None


@dataclass(slots=True)
class _Entry:
    holders: int = 0
    tensors: Mapping[str, Values] | None = None  # until it was computed


class Handle:
    """A request's hold on the conditions of one image, until `release`."""

    def __init__(self, store: ConditionStore, keys: tuple[Key, ...], missing: tuple[Key, ...]) -> None:
        self._store: ConditionStore | None = store
        self.keys = keys
        self.missing = missing
        """Those that were not there when the handle was made, each once."""

    def wanted(self) -> Key | None:
        """One that still has to be computed: nobody has done so yet."""
        if self._store is None:
            return None
        return next((key for key in self.keys if self._store._tensors(key) is None), None)

    def tensors(self) -> list[Mapping[str, Values]]:
        """The cache of each condition, in order; they must all have been computed."""
        if self._store is None:
            raise ValueError("the handle was released")
        found = []
        for key in self.keys:
            tensors = self._store._tensors(key)
            if tensors is None:
                raise ValueError("a condition has not been computed")
            found.append(tensors)
        return found

    def release(self) -> None:
        """Let go. Any number of times."""
        store, self._store = self._store, None
        if store is not None:
            store._release(self.keys)


class ConditionStore:
    """All cached conditions of an engine.

    Args:
        budget: most bytes of keys and values.
        entry_bytes: of one condition.
    """

    def __init__(self, budget: int, entry_bytes: int) -> None:
        if budget < entry_bytes:
            raise ValueError(f"a condition needs {entry_bytes} bytes, the budget is {budget}")
        self.budget = budget
        self.entry_bytes = entry_bytes
        self.hits = 0
        self.misses = 0
        self.evicted = 0
        self._entries: OrderedDict[Key, _Entry] = OrderedDict()  # least recently used first

    @property
    def capacity(self) -> int:
        """Conditions that fit into the budget; an image may have no more."""
        return self.budget // self.entry_bytes

    @property
    def nbytes(self) -> int:
        """Bytes of all entries; what is reserved counts."""
        return len(self._entries) * self.entry_bytes

    @property
    def held(self) -> int:
        """Entries that some request holds."""
        return sum(entry.holders > 0 for entry in self._entries.values())

    def reserve(self, keys: Sequence[Key]) -> Handle | None:
        """Hold entries for all `keys`, making room for those that are not there; None: others hold too much.

        Raises:
            ValueError: they will never fit.
        """
        different = dict.fromkeys(keys)
        if len(different) > self.capacity:
            raise ValueError(f"{len(different)} conditions do not fit into {self.budget} bytes")
        missing = tuple(key for key in different if key not in self._entries)
        kept = sum(entry.holders > 0 or key in different for key, entry in self._entries.items())
        if kept + len(missing) > self.capacity:
            return None
        while len(self._entries) + len(missing) > self.capacity:
            # Those that are wanted now must not go to make room for the others.
            oldest = next(k for k, e in self._entries.items() if not e.holders and k not in different)
            del self._entries[oldest]
            self.evicted += 1
        for key in different:
            entry = self._entries.setdefault(key, _Entry())
            entry.holders += 1
            self._entries.move_to_end(key)
        self.hits += len(different) - len(missing)
        self.misses += len(missing)
        return Handle(self, tuple(keys), missing)

    def put(self, key: Key, tensors: Mapping[str, Values]) -> None:
        """Fill an entry that somebody holds.

        Raises:
            ValueError: nobody holds it, or the tensors are larger than an entry.
        """
        entry = self._entries.get(key)
        if entry is None or not entry.holders:
            raise ValueError("only what is held can be filled")
        if sum(tensor.nbytes for tensor in tensors.values()) > self.entry_bytes:
            raise ValueError(f"the tensors are larger than {self.entry_bytes} bytes")
        entry.tensors = tensors

    def _tensors(self, key: Key) -> Mapping[str, Values] | None:
        return self._entries[key].tensors

    def _release(self, keys: Sequence[Key]) -> None:
        for key in dict.fromkeys(keys):
            entry = self._entries[key]
            entry.holders -= 1
            if not entry.holders and entry.tensors is None:
                del self._entries[key]  # its request was cancelled before it was computed
