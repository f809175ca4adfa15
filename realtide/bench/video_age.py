"""What a block costs late in a video, against a block of a young one, in turn on the same engine (ours).

    python -m realtide.bench.video_age < plan.json     lines of JSON on standard output

Minutes lie between a long video's beginning and its end, in which a shared machine changes more than the
model may. Here both blocks are made in neighbouring moments: what the machine does, it does to both.
"""

from __future__ import annotations

import gc
import statistics
import threading
import time
from pathlib import Path
from typing import Any

from realtide.bench.child import Tell
from realtide.bench.video_engine_load import encoder_of
from realtide.bench.video_plan import VideoPlan
from realtide.engines.longlive.engine import LongLiveEngine, load
from realtide.engines.longlive.session import VideoSession
from realtide.engines.longlive.types import Credit, Frames, VideoOptions


def run(plan: VideoPlan, tell: Tell) -> dict[str, Any]:
    """Make a video of `plan.frames`, a young one beside it, then `plan.count` blocks of each in turn.

    Returns:
        Medians of milliseconds a block of each, and `old_by_young`: the median of the ratios of neighbours.
        A block lasts until its last frame is encoded.

    Raises:
        BundleError, ProgramError: The bundle cannot be loaded.
    """
    engine = load(Path(plan.bundle), slots=2, precision=plan.precision or None, threads=plan.threads)
    wake = threading.Event()
    engine.attach(lambda session: wake.set(), lambda stage, seconds, batch: None)
    old, young = (_Video(engine, plan, seed, wake) for seed in (plan.seed, plan.seed + 1))
    try:
        while old.frames < plan.frames:
            old.block()
        age = old.frames
        for _ in range(plan.warmup_blocks):
            young.block()
        start = young.frames
        gc.collect()
        tell({"event": "begin"})
        spent: dict[_Video, list[float]] = {old: [], young: []}
        for number in range(plan.count):
            for video in (old, young) if number % 2 == 0 else (young, old):
                begun = time.perf_counter()
                video.block()
                spent[video].append(time.perf_counter() - begun)
        tell({"event": "end"})
    finally:
        for video in (old, young):
            video.session.close()
        engine.close()
    ratios = [one / other for one, other in zip(spent[old], spent[young], strict=True)]
    return {
        "blocks_of_each": plan.count,
        "old_from_frame": age,
        "young_from_frame": start,
        "old_block_ms": round(1000 * statistics.median(spent[old]), 3),
        "young_block_ms": round(1000 * statistics.median(spent[young]), 3),
        "old_by_young": round(statistics.median(ratios), 4),
        "quartiles": [round(quartile, 4) for quartile in statistics.quantiles(ratios, n=4)],
    }


class _Video:
    """A session that gets credit for a block at a time."""

    def __init__(self, engine: LongLiveEngine, plan: VideoPlan, seed: int, wake: threading.Event) -> None:
        self._engine, self._wake, self._info = engine, wake, engine.info
        self.frames = 0
        width, height = self._info.sizes[0]
        encoder = encoder_of(plan, width, height, self._info.frames_per_second)
        self.session: VideoSession = engine.open(
            VideoOptions(
                prompt=plan.prompts[0],
                width=width,
                height=height,
                frames_per_second=self._info.frames_per_second,
                seed=seed,
                credit=0,
                group=encoder.group,
                encode=encoder,
            )
        )

    def block(self) -> None:
        """Make the next block, to its last frame."""
        end = self.frames + (self._info.block if self.frames else self._info.first_block)
        self.session.push(Credit(end, time.monotonic()))
        while self.frames < end:
            self._wake.clear()
            events = list(self.session.collect())
            if self.session.runnable():
                events += self._engine.step([self.session], lambda stage, seconds, batch: None)[0]
            elif not events:
                self._wake.wait(0.1)
            for event in events:
                if isinstance(event, Frames):
                    self.frames = event.first + event.count


def main() -> None:
    """Read a plan from standard input, make the load, write lines of JSON."""
    from realtide.bench.child import serve

    serve(lambda text, tell: run(VideoPlan.from_json(text), tell))


if __name__ == "__main__":
    main()
