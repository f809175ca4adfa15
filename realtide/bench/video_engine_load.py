"""The video engine alone under the same load: one loop that steps whoever has work (ours).

    python -m realtide.bench.video_engine_load < plan.json     lines of JSON on standard output

Sessions have the credit that a client would give them, and the encoder that the server would. The loop is
what remains of a server if transport, queues and metrics cost nothing.
"""

from __future__ import annotations

import gc
import math
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from realtide.bench.video_plan import Meter, VideoPlan
from realtide.engines.longlive.engine import LongLiveEngine, load
from realtide.engines.longlive.session import VideoSession
from realtide.engines.longlive.types import Credit, Frames, VideoOptions
from realtide.server.frames import FragmentedMp4, FrameEncoder, Jpeg, RawRgb

Tell = Callable[[dict[str, Any]], None]
_CRF, _QUALITY = 20, 90  # the contract's defaults


def run(plan: VideoPlan, tell: Tell) -> dict[str, Any]:
    """Load the bundle and make the load. Raises BundleError, ProgramError."""
    engine = load(
        Path(plan.bundle), slots=plan.streams, precision=plan.precision or None, threads=plan.threads
    )
    loop = _Loop(engine, plan)
    try:
        used = loop.run(tell)
    finally:
        engine.close()
    rates = [meter.frames_per_second for meter in loop.meters]
    return {
        "streams": plan.streams,
        "frames_per_second": round(sum(rates), 3),
        "of_each": [round(rate, 3) for rate in rates],
        "stage_share_of_time": {
            stage: round(spent / plan.seconds, 4) for stage, spent in sorted(loop.stages.items())
        },
        "cpu_seconds": round(used, 3),
        "resident_bytes": psutil.Process().memory_info().rss,
    }


class _Loop:
    """Sessions as fast as they go."""

    def __init__(self, engine: LongLiveEngine, plan: VideoPlan) -> None:
        self._engine, self._plan = engine, plan
        self._wake = threading.Event()
        self.stages: dict[str, float] = {}
        self._measuring = False
        engine.attach(lambda session: self._wake.set(), self._on_stage)
        info = engine.info
        self._window = math.ceil(plan.buffer_seconds * info.frames_per_second)
        width, height = info.sizes[0]
        self._sessions: list[VideoSession] = []
        for number in range(plan.streams):
            encoder = encoder_of(plan, width, height, info.frames_per_second)
            options = VideoOptions(
                prompt=plan.prompts[0],
                width=width,
                height=height,
                frames_per_second=info.frames_per_second,
                seed=plan.seed + number,
                credit=self._window,
                group=encoder.group,
                encode=encoder,
            )
            self._sessions.append(engine.open(options))
        self.meters = [Meter() for _ in self._sessions]

    def run(self, tell: Tell) -> float:
        """Generate through warm-up and window; gives the processor seconds used in the window."""
        start = time.monotonic() + self._plan.warmup
        end = start + self._plan.seconds
        for meter in self.meters:
            meter.begin, meter.end = start, end
        used = 0.0
        gc.collect()
        gc.freeze()
        gc.disable()
        try:
            while (now := time.monotonic()) < end:
                if not self._measuring and now >= start:
                    self._measuring = True
                    used = time.process_time()
                    tell({"event": "begin"})
                self._turn()
            used = time.process_time() - used
            tell({"event": "end"})
        finally:
            gc.enable()
            for session in self._sessions:
                session.close()
        return used

    def _turn(self) -> None:
        """Hand on what there is, then step the session whose next frame is due first."""
        self._wake.clear()
        for number, session in enumerate(self._sessions):
            self._take(number, session.collect())
        ready = [number for number, session in enumerate(self._sessions) if session.runnable()]
        if not ready:
            self._wake.wait(0.1)
            return
        number = min(ready, key=lambda n: self._sessions[n].deadline())
        (events,) = self._engine.step([self._sessions[number]], self._on_stage)
        self._take(number, events)

    def _take(self, number: int, events: Any) -> None:
        for event in events:
            if isinstance(event, Frames):
                now, end = time.monotonic(), event.first + event.count
                self.meters[number].came(now, end)
                self._sessions[number].push(Credit(end + self._window, now))

    def _on_stage(self, stage: str, seconds: float, batch: int) -> None:
        if self._measuring:
            self.stages[stage] = self.stages.get(stage, 0.0) + seconds


def encoder_of(plan: VideoPlan, width: int, height: int, rate: float) -> FrameEncoder:
    """The encoder that a server would use."""
    if plan.encoding == "h264":
        return FragmentedMp4(width, height, rate, _CRF)
    return Jpeg(_QUALITY) if plan.encoding == "jpeg" else RawRgb()


def main() -> None:
    """Read a plan from standard input, make the load, write lines of JSON."""
    from realtide.bench.child import serve

    serve(lambda text, tell: run(VideoPlan.from_json(text), tell))


if __name__ == "__main__":
    main()
