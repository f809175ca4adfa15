"""The video metrics mean what docs/metrics.md says: measured with a clock of the test's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from realtide.engines.longlive.types import PromptApplied
from realtide.server.metrics import Metrics
from realtide.server.video_meter import FrameRates, VideoMeter

Clock = Callable[[float], None]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Sets the time that meters see."""
    now = [1000.0]
    monkeypatch.setattr("realtide.server.video_meter.time.monotonic", lambda: now[0])

    def at(seconds: float) -> None:
        now[0] = 1000.0 + seconds

    return at


class Measured:
    def __init__(self, start: int = 0, credit: int = 0, paused: bool = False) -> None:
        self.metrics = Metrics("0")
        self.rates = FrameRates()
        self.meter = VideoMeter(
            self.metrics, self.metrics.for_model("e", "m"), self.rates, start, credit, paused
        )
        self.meter.begin()

    def histogram(self, name: str) -> Any:
        """Number and sum of observations."""
        read = self.metrics.registry.get_sample_value
        labels = {"engine": "e", "model": "m"}
        return read(f"realtide_{name}_count", labels) or 0.0, read(f"realtide_{name}_sum", labels) or 0.0

    def frames(self, stage: str) -> float:
        labels = {"engine": "e", "model": "m", "stage": stage}
        return self.metrics.registry.get_sample_value("realtide_frames_total", labels) or 0.0


def change(control_id: str, recache: float = 0.2, replayed: int = 3) -> PromptApplied:
    return PromptApplied(control_id, "cat", 0, recache, replayed)


def test_the_first_frame_counts_from_open_or_from_the_first_credit(clock: Clock) -> None:
    one = Measured(credit=8)
    clock(0.7)
    one.meter.delivered(1)
    clock(0.9)
    one.meter.delivered(2)
    assert one.histogram("first_frame_seconds") == (1, pytest.approx(0.7))
    clock(10.0)
    late = Measured(start=40, credit=40)
    clock(15.0)
    late.meter.credit(44)
    clock(15.25)
    late.meter.credit(48)
    late.meter.delivered(41)
    assert late.histogram("first_frame_seconds") == (1, pytest.approx(0.25))


def test_intervals_are_by_frame_and_not_over_waits(clock: Clock) -> None:
    one = Measured(credit=8)
    clock(1.0)
    one.meter.delivered(2)
    assert one.histogram("frame_interval_seconds") == (0, 0)
    clock(1.4)
    one.meter.delivered(6)  # four frames in 0.4 s
    assert one.histogram("frame_interval_seconds") == (1, pytest.approx(0.1))
    clock(1.45)
    one.meter.delivered(8)  # the credit is used up
    clock(9.0)
    one.meter.credit(20)
    clock(9.5)
    one.meter.delivered(10)
    assert one.histogram("frame_interval_seconds") == (2, pytest.approx(0.1 + 0.025))
    one.meter.pause(True)
    clock(20.0)
    one.meter.pause(False)
    clock(20.5)
    one.meter.delivered(12)
    assert one.histogram("frame_interval_seconds")[0] == 2
    clock(20.6)
    one.meter.delivered(14)
    assert one.histogram("frame_interval_seconds") == (3, pytest.approx(0.1 + 0.025 + 0.05))


def test_a_prompt_switch_counts_to_the_frame_that_shows_it(clock: Clock) -> None:
    one = Measured(credit=100)
    one.meter.applied(PromptApplied("", "fish", 0, 0.0, 0))  # the prompt of the open
    one.meter.delivered(4)
    assert one.histogram("prompt_switch_seconds") == one.histogram("recache_seconds") == (0, 0)
    clock(1.0)
    one.meter.prompt("replaced")
    clock(1.5)
    one.meter.prompt("shown")
    clock(1.9)
    one.meter.prompt("later")
    clock(2.0)
    one.meter.delivered(8)
    one.meter.applied(change("shown"))
    clock(2.25)
    one.meter.delivered(9)
    assert one.histogram("prompt_switch_seconds") == (1, pytest.approx(0.75))
    assert one.histogram("recache_seconds") == (1, pytest.approx(0.2))
    one.meter.applied(
        change("scheduled", 0.0, 0)
    )  # wanted for a frame, or before a resume: no switch, no replay
    one.meter.delivered(10)
    assert one.histogram("prompt_switch_seconds")[0] == one.histogram("recache_seconds")[0] == 1
    clock(3.0)
    one.meter.applied(change("later"))
    one.meter.delivered(11)
    assert one.histogram("prompt_switch_seconds") == (2, pytest.approx(0.75 + 1.1))


def test_frames_are_counted_by_stage_and_from_where_a_session_begins(clock: Clock) -> None:
    one = Measured(start=100, credit=120)
    one.meter.denoised(12)
    one.meter.decoded(104)
    one.meter.decoded(108)
    one.meter.decoded(108)
    one.meter.delivered(103)
    assert [one.frames(stage) for stage in ("denoised", "decoded", "delivered")] == [12, 8, 3]


def rates(one: Measured) -> Any:
    return one.rates.read()


def test_rates_are_by_active_second(clock: Clock) -> None:
    one = Measured(credit=1000)
    for index in range(1, 201):  # 20 frames a second for 10 seconds
        clock(index / 20)
        one.meter.delivered(index)
    assert rates(one)["delivered"] == pytest.approx(20, rel=0.02)
    assert rates(one)["denoised"] == rates(one)["decoded"] == 0
    one.meter.pause(True)
    clock(12.5)  # of the last 5 seconds the session was active for 2.5
    assert rates(one)["delivered"] == pytest.approx(20, rel=0.1)
    clock(15.1)
    assert rates(one) == {}
    clock(100.0)
    assert rates(one) == {}
    one.meter.pause(False)
    assert rates(one) == {}
    clock(102.0)
    assert rates(one)["delivered"] == 0  # active, and nothing comes
    for index in range(8):
        one.meter.delivered(201 + index)
    clock(110.0)
    assert rates(one)["delivered"] == 0


def test_rates_are_averaged_over_sessions(clock: Clock) -> None:
    one = Measured(credit=1000)
    other = VideoMeter(one.metrics, one.metrics.for_model("e", "m"), one.rates, 0, 1000)
    other.begin()
    idle = VideoMeter(one.metrics, one.metrics.for_model("e", "m"), one.rates, 0, 0)  # without credit
    idle.begin()
    for index in range(1, 161):
        clock(index / 20)
        one.meter.delivered(index)
        other.delivered(2 * index)
    assert rates(one)["delivered"] == pytest.approx(30, rel=0.02)  # 20 and 40
    other.close()
    other.close()
    for index in range(161, 321):
        clock(index / 20)
        one.meter.delivered(index)
    assert rates(one)["delivered"] == pytest.approx(20, rel=0.02)


def test_little_is_remembered(clock: Clock) -> None:
    one = Measured(credit=10**9)
    for index in range(1, 20_001):
        clock(index / 100)
        one.meter.delivered(index)
    assert len(one.rates._kept) < 100
