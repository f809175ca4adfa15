from __future__ import annotations

import pytest

from realtide.bench.search import again, confirmed, largest


class Limit:
    """Holds up to `most` streams; remembers what was tried."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.tried: list[int] = []

    async def __call__(self, n: int) -> bool:
        self.tried.append(n)
        return n <= self.most


@pytest.mark.parametrize("start", [1, 8, 64])
@pytest.mark.parametrize("limit", [0, 1, 2, 7, 8, 9, 23, 63, 64, 100])
async def test_the_largest_number_that_holds_is_found(limit: int, start: int) -> None:
    trial = Limit(limit)
    assert await largest(trial, start, 64) == min(limit, 64)
    assert len(set(trial.tried)) == len(trial.tried), "no number is tried twice"
    assert len(trial.tried) <= 14


async def test_a_start_out_of_range_is_refused() -> None:
    with pytest.raises(ValueError, match=r"1\.\.4"):
        await largest(Limit(1), 5, 4)


async def test_a_confirmation_goes_down_until_it_holds() -> None:
    trial = Limit(95)
    assert await confirmed(trial, 100) == 94
    assert trial.tried == [100, 97, 94]
    assert await confirmed(Limit(0), 3) == 0
    assert await confirmed(Limit(0), 0) == 0


async def test_one_disturbance_does_not_decide() -> None:
    answers = iter([False, False, True, False, False, False])

    async def trial(n: int) -> bool:
        return next(answers)

    patient = again(trial)
    assert await patient(1)
    assert not await patient(1)
    assert next(answers, None) is None
