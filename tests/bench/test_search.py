from __future__ import annotations

import math
import random

import pytest

from realtide.bench.search import Staircase, again, confirmed


class Limit:
    """Holds up to `most` streams; remembers what was tried."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.tried: list[int] = []

    async def __call__(self, n: int) -> bool:
        self.tried.append(n)
        return n <= self.most


def climbed(limit: float, noise: float, start: int, seed: int = 0) -> tuple[Staircase, list[int]]:
    """A staircase with 16 trials that count; each meets the limit disturbed by `noise` octaves."""
    stair, tried, chance = Staircase(start, 256), [], random.Random(seed)
    while stair.counted < 16:
        tried.append(stair.streams)
        stair.tell(math.log2(stair.streams) + chance.gauss(0, noise) < math.log2(limit))
        assert len(tried) < 60
    return stair, tried


@pytest.mark.parametrize("start", [1, 8, 100, 256])
@pytest.mark.parametrize("limit", [3, 23, 112, 200])
def test_a_staircase_comes_to_the_limit_from_anywhere(limit: int, start: int) -> None:
    stair, tried = climbed(limit + 0.5, 0.0, start)
    found = stair.estimate()
    assert found.streams == pytest.approx(limit + 0.5, rel=0.03, abs=0.5)
    assert found.trials == 16
    assert len(tried) <= 34


def test_a_staircase_that_is_disturbed_stays_around_the_middle() -> None:
    found = [climbed(112, 0.05, start=8, seed=seed)[0].estimate() for seed in range(200)]
    mean = sum(one.streams for one in found) / len(found)
    assert mean == pytest.approx(112, rel=0.01)
    spread = math.sqrt(sum((one.streams - mean) ** 2 for one in found) / len(found))
    assert spread < 0.02 * mean
    # The error that each says of itself is a lower bound, and not far from it.
    assert spread / 3 < sum(one.error for one in found) / len(found) < spread


def test_one_disturbance_costs_a_staircase_little() -> None:
    stair = Staircase(64, 256)
    for trial in range(60):
        stair.tell(trial != 0 and stair.streams <= 112)
    assert stair.streams == pytest.approx(112, rel=0.05)


def test_a_staircase_stays_within_its_range() -> None:
    everything, nothing = climbed(1e9, 0.0, 16), climbed(0.1, 0.0, 16)
    assert max(everything[1]) == everything[0].estimate().streams == 256
    assert min(nothing[1]) == nothing[0].estimate().streams == 1


def test_a_start_out_of_range_is_refused() -> None:
    with pytest.raises(ValueError, match=r"1\.\.4"):
        Staircase(5, 4)
    with pytest.raises(ValueError, match="no trial"):
        Staircase(1, 4).estimate()


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
