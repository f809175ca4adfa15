"""The largest number of streams that still passes: doubling, then bisection (ours)."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

Trial = Callable[[int], Awaitable[bool]]


async def largest(trial: Trial, start: int, most: int) -> int:
    """The largest n in 1..most for which `trial(n)` holds, 0 if it does not even for 1.

    Trials are taken to be monotone, but for noise: no n is tried twice. Raises ValueError unless 1 <= start
    <= most.
    """
    if not 1 <= start <= most:
        raise ValueError(f"the search must start in 1..{most}, not at {start}")
    passed, failed = 0, most + 1
    n = start
    while passed + 1 < failed:
        if await trial(n):
            passed = n
        else:
            failed = n
        n = min(2 * n, most) if failed > most else (passed + failed) // 2
    return passed


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
