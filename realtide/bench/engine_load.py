"""The engine alone under the same load: one loop hands over due chunks and steps whoever has work (ours).

    python -m realtide.bench.engine_load < plan.json       lines of JSON on standard output

The **processing delay** of a chunk is the time from when it was due (see `plan`) to the end of the step after
which its stream has no complete frame left; every chunk counts. The loop is what remains of a server if
transport, queues, metrics and deadlines cost nothing: between two steps it hands over what has become due.
"""

from __future__ import annotations

import gc
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from realtide.bench import audio, plan, stats
from realtide.engines.ancat.engine import AncatEngine, load
from realtide.engines.ancat.session import SpeechSession
from realtide.engines.ancat.types import Audio, Final, Partial, SpeechOptions

Tell = Callable[[dict[str, Any]], None]


class Live:
    """One stream: its session, and when the chunks that it has not worked through were due."""

    __slots__ = ("member", "session", "waiting")

    def __init__(self, member: plan.Stream, session: SpeechSession) -> None:
        self.member = member
        self.session = session
        self.waiting: deque[float] = deque()


class Loop:
    """The engine's loop over one load."""

    def __init__(self, engine: AncatEngine, load_plan: plan.Plan, pieces: list[audio.Samples]) -> None:
        self.engine = engine
        self.plan = load_plan
        self.pieces = pieces
        self.delays: list[float] = []
        self.batches: list[float] = []
        self.stages: dict[str, float] = {}
        self.partials = self.finals = self.chunks = 0
        self._stage_seconds: dict[str, float] = {}

    def run(self, tell: Tell) -> float:
        """Play the whole plan. Returns the processor seconds used in the window."""
        options = SpeechOptions(
            sample_rate=self.plan.rate,
            lookahead_bias=self.plan.lookahead_bias or 0.0,
            max_lookahead_ms=self.plan.max_lookahead_ms,
        )
        members = plan.streams(self.plan, len(self.pieces))
        live = {member.index: Live(member, self.engine.open(options)) for member in members}
        gc.collect()
        gc.freeze()
        gc.disable()
        start = time.monotonic() + 0.05
        begin, end = start + self.plan.warmup, start + self.plan.warmup + self.plan.seconds
        schedule = plan.schedule(self.plan, members)
        coming = next(schedule, None)
        ready: dict[int, Live] = {}
        began = used = None
        try:
            while True:
                now = time.monotonic()
                if began is None and now >= begin:
                    began = time.process_time()
                    tell({"event": "begin"})
                if used is None and now >= end:
                    used = time.process_time() - (began or 0.0)
                    tell({"event": "end"})
                while coming is not None and start + coming[0] <= now:
                    due, member, k = coming
                    stream = live[member.index]
                    piece = self.pieces[(member.first + k) % len(self.pieces)]
                    stream.session.push(Audio(piece, start + due))
                    stream.waiting.append(start + due)
                    ready[member.index] = stream
                    coming = next(schedule, None)
                batch = [stream for stream in ready.values() if stream.session.runnable()]
                for index in [i for i, stream in ready.items() if not stream.session.runnable()]:
                    # Nothing complete: the first chunk, which lacks the front end's overhang.
                    ready.pop(index).waiting.clear()
                if batch:
                    batch.sort(key=lambda stream: stream.waiting[0])
                    self._step(batch[: self.engine.max_batch], ready, begin, end)
                elif coming is None:
                    break
                else:
                    time.sleep(max(start + coming[0] - time.monotonic(), 0))
                if used is not None and time.monotonic() > end + self.plan.seconds:
                    break  # hopelessly behind
        finally:
            gc.enable()
        now = time.monotonic()
        for stream in live.values():
            self.delays += [now - due for due in stream.waiting if begin <= due < end]
            stream.session.close()
        return used if used is not None else 0.0

    def _step(self, batch: list[Live], ready: dict[int, Live], begin: float, end: float) -> None:
        started = time.monotonic()
        events = self.engine.step([stream.session for stream in batch], self._on_stage)
        now = time.monotonic()
        inside = begin <= started < end
        for stream, found in zip(batch, events, strict=True):
            if inside:
                self.partials += sum(isinstance(event, Partial) for event in found)
                self.finals += sum(isinstance(event, Final) for event in found)
            if not stream.session.runnable():
                for due in stream.waiting:
                    if begin <= due < end:
                        self.delays.append(now - due)
                stream.waiting.clear()
                del ready[stream.member.index]
        if inside:
            self.batches.append(float(len(batch)))
            for stage, seconds in self._stage_seconds.items():
                self.stages[stage] = self.stages.get(stage, 0.0) + seconds
        self._stage_seconds.clear()

    def _on_stage(self, stage: str, seconds: float, batch: int) -> None:
        self._stage_seconds[stage] = self._stage_seconds.get(stage, 0.0) + seconds


def run(load_plan: plan.Plan, tell: Tell) -> dict[str, Any]:
    """Load the bundle, make the load, and sum up. Raises BundleError, ProgramError, CommandError."""
    count = load_plan.streams
    engine = load(load_plan.bundle, slots=count, max_batch=count, precision=load_plan.precision or None)
    frame = engine.info.frame_seconds
    if frame > load_plan.chunk + 1e-9:
        raise ValueError(f"chunks must be at least an encoder frame ({frame * 1000:g} ms) long")
    sound = audio.loop([Path(path) for path in load_plan.audio], load_plan.rate)
    loop = Loop(engine, load_plan, audio.chunks(sound, load_plan.size))
    cpu = loop.run(tell)
    seconds = load_plan.streams * load_plan.seconds
    return {
        "streams": count,
        "processing_delay": stats.summary(loop.delays),
        "results": {"partials": loop.partials, "finals": loop.finals},
        "engine": {
            "steps": len(loop.batches),
            "mean_batch": round(sum(loop.batches) / max(len(loop.batches), 1), 2),
            "stage_share_of_time": {
                stage: round(spent / load_plan.seconds, 4) for stage, spent in sorted(loop.stages.items())
            },
            "cpu_seconds": round(cpu, 3),
            "real_time_factor": round(cpu / seconds, 5),
            "resident_bytes": psutil.Process().memory_info().rss,
        },
    }


def main() -> None:
    """Read a plan from standard input, make the load, write lines of JSON."""
    from realtide.bench.child import serve

    serve(lambda text, tell: run(plan.Plan.from_json(text), tell))


if __name__ == "__main__":
    main()
