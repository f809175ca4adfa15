"""How frames come: the video metrics of one session and of one model (docs/metrics.md defines each)."""

from __future__ import annotations

import time
from collections import deque
from typing import NamedTuple

from realtide.engines.longlive.types import PromptApplied
from realtide.server.metrics import FRAME_STAGES, Metrics, ModelMetrics

# Seconds that rates are averaged over, and at most so often a point of them is kept.
_WINDOW = 5.0
_STEP = 0.25


class _Point(NamedTuple):
    when: float
    active: int  # sessions
    seconds: float  # that sessions have been active so far, all together
    frames: tuple[int, ...]  # so far, in the order of FRAME_STAGES

    def at(self, when: float) -> _Point:
        """The same at `when`, if nothing happens until then."""
        return self._replace(when=when, seconds=self.seconds + self.active * (when - self.when))


class FrameRates:
    """Frames per second of an active session of one model, on average over the last seconds.

    The event loop writes; points do not change once they are kept, so that the scraping thread can read.
    """

    def __init__(self) -> None:
        self._now = _Point(time.monotonic(), 0, 0.0, (0,) * len(FRAME_STAGES))
        self._kept: deque[_Point] = deque([self._now])

    def activate(self, sessions: int) -> None:
        """So many sessions more (or, negative, fewer) are active: neither paused nor out of credit."""
        now = self._now.at(time.monotonic())
        self._keep(now._replace(active=now.active + sessions))

    def count(self, stage: str, frames: int) -> None:
        """`frames` more have passed `stage`."""
        now = self._now.at(time.monotonic())
        index = FRAME_STAGES.index(stage)
        counts = (*now.frames[:index], now.frames[index] + frames, *now.frames[index + 1 :])
        self._keep(now._replace(frames=counts))

    def read(self) -> dict[str, float]:
        """The rate by stage; empty if no session was active."""
        points = [*list(self._kept), self._now]
        now = points[-1].at(time.monotonic())
        begin = now.when - _WINDOW
        # The newest point that is old enough, as it was when the window began.
        start = next((point.at(begin) for point in reversed(points) if point.when <= begin), points[0])
        seconds = now.seconds - start.seconds
        if seconds <= 0.0:
            return {}
        return {
            stage: (after - before) / seconds
            for stage, before, after in zip(FRAME_STAGES, start.frames, now.frames, strict=True)
        }

    def _keep(self, point: _Point) -> None:
        """Make `point` the newest; keep the one before it and its end, unless one was kept a moment ago."""
        kept = self._kept
        if point.when - kept[-1].when >= _STEP:
            kept.append(self._now)
            kept.append(self._now.at(point.when))
            while len(kept) > 2 and kept[1].when <= point.when - _WINDOW:
                kept.popleft()
        self._now = point


class VideoMeter:
    """Measures one session. Positions are frames.

    Args:
        metrics: the server's.
        model: those of the session's model.
        rates: likewise.
        start: first frame that will be sent.
        credit: frames below it may be sent.
        paused: whether the session is.
    """

    def __init__(
        self,
        metrics: Metrics,
        model: ModelMetrics,
        rates: FrameRates,
        start: int,
        credit: int,
        paused: bool = False,
    ) -> None:
        self._all = metrics
        self._model = model
        self._rates = rates
        self._decoded = self._sent = start
        self._credit = credit
        self._paused = paused
        self._active = False
        self._opened: float | None = time.monotonic() if credit > start else None
        self._first = True
        self._last: float | None = None  # when the frame before was sent, without a wait for the client since
        self._prompted: dict[str, float] = {}
        self._switching: float | None = None
        self._closed = False

    def begin(self) -> None:
        """The session has its slot."""
        self._update()

    def credit(self, position: int) -> None:
        """Frames below `position` may be sent."""
        if self._opened is None and position > self._credit:
            self._opened = time.monotonic()
        self._credit = position
        self._update()

    def pause(self, paused: bool) -> None:
        """The session was paused or goes on."""
        self._paused = paused
        self._update()

    def prompt(self, control_id: str) -> None:
        """A prompt that is wanted as soon as possible has come."""
        self._prompted[control_id] = time.monotonic()

    def denoised(self, frames: int) -> None:
        """So many more frames exist as latents."""
        self._count("denoised", frames)

    def decoded(self, position: int) -> None:
        """Frames below `position` have been decoded."""
        if position > self._decoded:
            self._count("decoded", position - self._decoded)
            self._decoded = position

    def applied(self, event: PromptApplied) -> None:
        """A prompt is in force from the next frame on."""
        if event.replayed:
            self._model.observe(self._all.recache, event.recache)
        if event.control_id in self._prompted:
            # Those before it were replaced by it, and no frame shows them.
            for control_id in list(self._prompted):
                self._switching = self._prompted.pop(control_id)
                if control_id == event.control_id:
                    break

    def delivered(self, position: int) -> None:
        """Frames below `position` have been written to the client."""
        now = time.monotonic()
        frames, self._sent = position - self._sent, position
        if self._last is not None:
            self._model.observe(self._all.frame_interval, (now - self._last) / frames)
        self._last = now
        if self._first:
            self._first = False
            if self._opened is not None:
                self._model.observe(self._all.first_frame, now - self._opened)
        if self._switching is not None:
            self._model.observe(self._all.prompt_switch, now - self._switching)
            self._switching = None
        self._count("delivered", frames)
        self._update()

    def close(self) -> None:
        """The session is over."""
        self._closed = True
        self._update()

    def _count(self, stage: str, frames: int) -> None:
        self._model.frames(stage, frames)
        self._rates.count(stage, frames)

    def _update(self) -> None:
        active = not (self._closed or self._paused) and self._sent < self._credit
        if active != self._active:
            self._active = active
            self._rates.activate(1 if active else -1)
        if not active:
            self._last = None
