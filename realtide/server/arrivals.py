"""When did sample n arrive? A bounded answer, for measuring delays."""

from __future__ import annotations

from bisect import bisect_left


class Arrivals:
    """Arrival times of the most recent media, as (end position, time) per message.

    At most `limit` messages are remembered: when there are more, every second one of the older half is merged
    into its successor, which makes those answers later by at most one message each time.
    """

    def __init__(self, start: int, limit: int = 1024) -> None:
        self._ends: list[int] = []
        self._times: list[float] = []
        self._limit = limit
        self._start = start

    def add(self, end: int, when: float) -> None:
        """Media up to, not including, position `end` had arrived at `when`."""
        self._ends.append(end)
        self._times.append(when)
        if len(self._ends) > self._limit:
            half = self._limit // 2
            self._ends[:half] = self._ends[1:half:2]
            self._times[:half] = self._times[1:half:2]

    def of(self, position: int) -> float | None:
        """When the media unit before `position` arrived; None if it came before this stream or not yet."""
        if position <= self._start:
            return None
        index = bisect_left(self._ends, position)
        return self._times[index] if index < len(self._times) else None

    def forget(self, position: int) -> None:
        """Nothing before `position` will be asked for again."""
        index = bisect_left(self._ends, position)
        if index > 64:  # in bulk: removing from the front of a list costs its length
            del self._ends[:index], self._times[:index]
            self._start = max(self._start, min(position, self._ends[0] if self._ends else position) - 1)
