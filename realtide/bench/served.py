"""One load against a server: the clients' view, and the server's own over the same seconds (ours)."""

from __future__ import annotations

import asyncio
import urllib.request
from typing import Any

from realtide.bench import child
from realtide.bench.plan import Plan
from realtide.bench.stats import Gained, Reading
from realtide.cli.errors import CommandError

_TIMES = ("queue_wait_seconds", "word_delay_seconds", "first_partial_seconds", "final_delay_seconds")


async def scrape(url: str) -> Reading:
    """Read a server's metrics. Raises CommandError."""

    def fetch() -> str:
        with urllib.request.urlopen(url, timeout=10) as answer:
            text: str = answer.read().decode()
            return text

    try:
        return Reading.parse(await asyncio.to_thread(fetch))
    except (OSError, ValueError) as error:
        raise CommandError(f"no metrics at {url}: {error}") from None


async def trial(plan: Plan, metrics_url: str | None) -> dict[str, Any]:
    """Make the load; with `metrics_url` the server's metrics over the measured window are in the result.

    Raises CommandError: it could not be made (a session was refused, the server is gone).
    """
    readings: list[Reading] = []

    async def on_event(name: str, pid: int) -> None:
        if metrics_url is not None:
            readings.append(await scrape(metrics_url))

    result = await child.run("realtide.bench.client_load", plan, on_event)
    if len(readings) == 2:
        result["server"] = server_view(readings[0], readings[1], plan.seconds)
    return result


def server_view(before: Reading, after: Reading, seconds: float) -> dict[str, Any]:
    """What the server says of the window between two readings `seconds` apart.

    Percentiles are interpolated in the buckets of its histograms. `real_time_factor` is the processor time of
    the server and its executors' processes by seconds of audio received; `executor_share` the part of the
    time in which an executor was in a step.
    """

    def gained(name: str, **labels: str) -> Gained:
        return Gained.between(before, after, f"realtide_{name}", **labels)

    def difference(name: str) -> float:
        return after.total(name) - before.total(name)

    batch = gained("step_batch_size")
    audio = difference("realtide_audio_seconds_total")
    cpu = difference("process_cpu_seconds_total") + difference("realtide_executor_process_cpu_seconds_total")
    stages = {
        stage: gained("step_seconds", stage=stage)
        for stage in after.values("realtide_step_seconds_count", "stage")
    }
    return {
        "audio_seconds": round(audio, 2),
        "cpu_seconds": round(cpu, 3),
        "real_time_factor": round(cpu / audio, 5) if audio else None,
        "executor_share": round(sum(stage.sum for stage in stages.values()) / seconds, 4),
        "resident_bytes": int(
            after.total("process_resident_memory_bytes")
            + after.total("realtide_executor_process_resident_bytes")
        ),
        "deadline_misses": int(difference("realtide_deadline_misses_total")),
        "mean_batch": batch.mean,
        "step": {stage: histogram.summary() for stage, histogram in stages.items()},
        **{name.removesuffix("_seconds"): gained(name).summary() for name in _TIMES},
        "event_loop_lag": gained("event_loop_lag_seconds").summary(),
    }
