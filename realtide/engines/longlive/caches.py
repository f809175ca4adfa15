"""The caches that sessions take turns on: key/value cache, and the decoder's feature caches (ours).

More sessions may be open than there are caches. Who has work and no cache takes a free one, or that of a
session that has nothing to do. If all have work, the one whose next frames are due later gives way: it begins
no further block, and once its latents are decoded its cache is taken. Whoever loses a cache is *parked*.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from realtide.engines.longlive.programs import HalfPrograms, VideoPrograms
from realtide.engines.runtime.memory import Values


class Holder(Protocol):
    """A session that may hold a cache."""

    @property
    def waits(self) -> bool:
        """True if it has work and no cache."""
        ...

    @property
    def idle(self) -> bool:
        """True if it has nothing to do, so that it loses no time if its cache is taken."""
        ...

    @property
    def at_rest(self) -> bool:
        """True if it has no block under way and nothing to decode, so that no work is lost with its cache."""
        ...

    @property
    def parked(self) -> bool:
        """True if it lost its cache and will come back."""
        ...

    def deadline(self) -> float:
        """When its next frames are due."""
        ...

    def park(self) -> None:
        """Give up the cache."""
        ...


H = TypeVar("H", bound=Holder)


@dataclass(slots=True)
class Cache:
    """One session's worth of state, and the programs that are bound to it.

    Attributes:
        programs: the transformer's, over `keys`.
        keys: see `config.cache_shapes`.
        decoder: the VAE decoder's, over `features`.
        features: see `config.decoder_shapes`.
        holder: whose it is.
    """

    programs: VideoPrograms
    keys: Mapping[str, Values]
    decoder: HalfPrograms
    features: Mapping[str, Values]
    holder: Holder | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the state."""
        return sum(int(values.nbytes) for part in (self.keys, self.features) for values in part.values())


class CachePool(Generic[H]):
    """All caches of an engine, and the sessions that share them. Used by one thread, but for `sessions`."""

    def __init__(self, caches: Sequence[Cache]) -> None:
        if not caches:
            raise ValueError("at least one cache is needed")
        self._caches = tuple(caches)
        self.sessions: frozenset[H] = frozenset()  # replaced, never changed: any thread may look

    @property
    def nbytes(self) -> int:
        """Bytes of all caches."""
        return sum(cache.nbytes for cache in self._caches)

    @property
    def first(self) -> Cache:
        """Any cache, for programs that touch no state."""
        return self._caches[0]

    @property
    def scarce(self) -> bool:
        """True if there are more sessions than caches."""
        return len(self.sessions) > len(self._caches)

    def join(self, holder: H) -> None:
        """`holder` may take caches from now on."""
        self.sessions |= {holder}

    def leave(self, holder: H) -> None:
        """Free what `holder` holds; it takes no more. Any number of times."""
        self.sessions -= {holder}
        self.give_back(holder)

    def available(self, holder: Holder) -> bool:
        """True if `take` would find a cache."""
        return self._choose(holder) is not None

    def contested(self, holder: Holder) -> bool:
        """True if `holder` should begin no further block: a more urgent session waits for a cache."""
        if not self.scarce or any(c.holder is None or c.holder.idle for c in self._caches):
            return False
        due = holder.deadline()
        return any(one.waits and one.deadline() < due for one in self.sessions)

    def take(self, holder: Holder) -> Cache:
        """A cache for `holder`; its contents do not matter.

        Raises:
            ValueError: none is available.
        """
        chosen = self._choose(holder)
        if chosen is None:
            raise ValueError("all caches are in use")
        if chosen.holder is not None:
            chosen.holder.park()
        chosen.holder = holder
        return chosen

    def give_back(self, holder: Holder) -> None:
        """Free whatever `holder` holds."""
        for cache in self._caches:
            if cache.holder is holder:
                cache.holder = None

    def _choose(self, holder: Holder) -> Cache | None:
        for cache in self._caches:
            if cache.holder is None:
                return cache
        held = [(cache, other) for cache in self._caches if (other := cache.holder) is not None]
        due = holder.deadline()
        losers = [
            (other.idle, other.deadline(), index)
            for index, (_, other) in enumerate(held)
            if other.idle or (other.at_rest and other.deadline() > due)
        ]
        return held[max(losers)[2]][0] if losers else None
