"""How many streams pass: an adaptive staircase, and a confirmation (ours).

On a shared machine trials are noisy: a number of streams passes now and fails a minute later, and over
minutes the whole machine gets faster or slower by a third. A bisection believes every trial, so one
disturbance puts its result wherever it likes, and two bisections, one after the other, compare two different
machines. A staircase (PEST: Taylor and Creelman, "PEST: Efficient estimates on probability functions", 1967)
goes up after a trial that passes and down after one that fails, in steps that halve when the direction turns,
and so stays around the number with which half of the trials pass. Two that take their trials in turn see the
same disturbances.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

Trial = Callable[[int], Awaitable[bool]]

_FIRST, _LEAST = 1.0, 1 / 32  # steps in octaves: from doubling to 2.2 percent
_SAME = 3  # so many moves in one direction, and steps grow again


@dataclass(frozen=True, slots=True)
class Estimate:
    """Where a staircase has stayed.

    `streams` is the geometric mean of the numbers tried, `trials` how many there were, `error` the mean's
    standard error if they had nothing to do with each other. Neighbours do, so it is a lower bound.
    """

    streams: float
    error: float
    trials: int


class Staircase:
    """Looks for the number of streams with which half of the trials pass, in 1..most.

    `start` is the first number tried. Raises ValueError unless 1 <= start <= most.
    """

    def __init__(self, start: int, most: int) -> None:
        if not 1 <= start <= most:
            raise ValueError(f"the search must start in 1..{most}, not at {start}")
        self._most = math.log2(most)
        self._level = math.log2(start)
        self._step = _FIRST
        self._last: bool | None = None
        self._run = 0  # moves in the present direction
        self._fine: list[float] = []  # levels tried since steps were smallest for the first time

    @property
    def streams(self) -> int:
        """The number to try next."""
        return round(2**self._level)

    @property
    def counted(self) -> int:
        """Trials that count for the estimate."""
        return len(self._fine)

    def tell(self, passed: bool) -> None:
        """The result of a trial with `streams`."""
        if self._fine or self._step == _LEAST:
            self._fine.append(self._level)
        if passed == self._last:
            self._run += 1
            if self._run > _SAME:
                self._step = min(2 * self._step, _FIRST)
        else:
            self._run = 1
            if self._last is not None:
                self._step = max(self._step / 2, _LEAST)
        self._last = passed
        wanted = self._level + (self._step if passed else -self._step)
        self._level = min(max(wanted, 0.0), self._most)
        if self._level != wanted:  # there is no way on: what is left is to stay
            self._step, self._run = max(self._step / 2, _LEAST), 0

    def estimate(self) -> Estimate:
        """What the trials that count say. Raises ValueError if none does."""
        if not self._fine:
            raise ValueError("no trial counts yet")
        count = len(self._fine)
        mean = sum(self._fine) / count
        spread = math.sqrt(sum((level - mean) ** 2 for level in self._fine) / max(count - 1, 1))
        streams = 2**mean
        return Estimate(streams, streams * (2 ** (spread / math.sqrt(count)) - 1), count)


def again(trial: Trial, attempts: int = 3) -> Trial:
    """A trial that holds if one of `attempts` does: disturbances on a shared machine only take time away."""

    async def repeated(n: int) -> bool:
        for _ in range(attempts):
            if await trial(n):
                return True
        return False

    return repeated


async def confirmed(trial: Trial, found: int, step: float = 0.03) -> int:
    """The first number that passes the longer `trial`, from `found` down in steps of a share; 0 if none."""
    while found > 0 and not await trial(found):
        found -= max(1, round(found * step))
    return max(found, 0)
