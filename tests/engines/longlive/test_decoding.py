"""From latents to frames beside the steps: when a session is idle, and who is told."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import pytest

from realtide.engines.longlive.decoding import Decoding, FrameWorker
from realtide.engines.longlive.programs import HalfPrograms
from realtide.engines.longlive.timeline import Clock, Timeline
from realtide.engines.longlive.types import Frames
from realtide.engines.runtime.program import Array

LATENTS = np.zeros((1, 2, 1, 1), np.float32)
SCALE = 4
WAIT = 30.0


class Halves:
    """Decodes a latent frame to black pixels at once."""

    def __init__(self, frames: int) -> None:
        self.frames = frames

    def run(self, feeds: Mapping[str, Any]) -> dict[str, Array]:
        return {"frames": np.zeros((self.frames, 3, 2, 2), np.float32)}


@pytest.fixture
def worker() -> Iterator[FrameWorker]:
    made = FrameWorker("frames")
    yield made
    made.close()


@pytest.fixture
def hasty() -> Iterator[None]:
    """Threads take turns as often as the interpreter can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def decoding(worker: FrameWorker, wake: Callable[[], None], encode: Any = None) -> Decoding:
    made = Decoding(Timeline(SCALE), Clock(0.0, 16.0), worker, wake, lambda *_: None, encode, 1)
    programs: Any = HalfPrograms(Halves(1), Halves(SCALE))
    made.bind(programs, LATENTS[:0])
    return made


def test_no_instant_between_two_pieces_of_work_is_idle(worker: FrameWorker, hasty: None) -> None:
    one = decoding(worker, lambda: None)
    end = 1 + 400 * SCALE
    one.allow(end, 0.0)
    one.put(np.repeat(LATENTS, 401, axis=0))
    early = []
    got = 0
    while got < end:
        got += sum(event.count for event in one.collect() if isinstance(event, Frames))
        if one.idle and one.sent < end:
            early.append(one.sent)
            if len(early) > 100_000:
                break  # it stands still
    assert early == []


def test_the_last_who_is_told_finds_the_session_idle(worker: FrameWorker) -> None:
    """Sessions that wait for its cache look when they are woken, and not again."""
    seen: list[bool] = []
    done = threading.Event()

    def wake() -> None:
        taken = one.collect()
        seen.append(one.idle)
        if any(isinstance(event, Frames) and event.first + event.count == 1 + SCALE for event in taken):
            done.set()

    one = decoding(worker, wake)
    one.allow(1 + SCALE, 0.0)
    one.put(np.repeat(LATENTS, 2, axis=0))
    assert done.wait(WAIT)
    worker.close()
    assert seen[-1]
    assert not all(seen)


def test_an_error_is_told_and_raised(worker: FrameWorker) -> None:
    told = threading.Event()

    def fail(first: int, frames: Array) -> bytes:
        raise OSError("no encoder")

    one = decoding(worker, told.set, fail)
    one.allow(1, 0.0)
    one.put(LATENTS)
    while not one.idle:
        assert told.wait(WAIT)
    with pytest.raises(OSError, match="no encoder"):
        one.collect()
