"""Memory of a server: with the bundle loaded, and what each open stream adds.

A fresh server; the resident memory of its process and of its executor's (all of it, from /proc; libraries
that both have count twice) is read when it is healthy, after one stream has run to its end (what a first
stream allocates once), and while N streams are open and sending real recordings at the pace of speech, every
second until they end. What a stream adds is the highest of those readings less the one before them, by N.

    python benchmarks/memory.py --bundle BUNDLE [--streams 64] [--seconds 20] [--out FILE]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
from pathlib import Path
from typing import Any

import psutil

from realtide.bench import audio, child, report
from realtide.bench.plan import Plan
from realtide.cli.own_server import own_server

OUT = Path(__file__).parent / "results" / "memory.json"


async def measure(bundle: Path, streams: int, seconds: float, settings: list[str]) -> dict[str, Any]:
    """All readings, in bytes."""
    recordings = tuple(str(path) for path in audio.recordings(None))
    async with own_server([bundle], (f"slots={streams}", *settings)) as server:
        process = psutil.Process(server.pid)

        def plan(count: int, length: float) -> Plan:
            return Plan(
                streams=count, seconds=length, warmup=1.0, chunk_ms=40, probe_ms=500, rate=16000,
                audio=recordings, address=server.address,
            )  # fmt: skip

        async def nothing(name: str, pid: int) -> None:
            pass

        def resident() -> int:
            children = process.children(recursive=True)
            return sum(int(one.memory_info().rss) for one in (process, *children))

        loaded = resident()
        await child.run("realtide.bench.client_load", plan(1, 5.0), nothing)
        before = resident()
        readings: list[int] = []

        async def watch() -> None:
            while True:
                readings.append(resident())
                await asyncio.sleep(1.0)

        watcher = asyncio.create_task(watch())
        result = await child.run("realtide.bench.client_load", plan(streams, seconds), nothing)
        watcher.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await watcher
        await asyncio.sleep(1.0)
        after = resident()
    return {
        "streams": streams,
        "loaded_bytes": loaded,
        "after_one_stream_bytes": before,
        "peak_bytes": max(readings),
        "after_all_streams_bytes": after,
        "per_stream_bytes": round((max(readings) - before) / streams),
        "readings_bytes": readings,
        "failed_streams": result["failed_streams"] + result["unfinished_streams"],
        "processing_delay": result["processing_delay"],
    }


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=20.0, help="for which all streams are open")
    parser.add_argument("--set", action="append", default=[], help="NAME=VALUE setting of the server")
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args()
    found = asyncio.run(measure(arguments.bundle, arguments.streams, arguments.seconds, arguments.set))
    report.write(arguments.out, report.envelope("memory", found))
    print(json.dumps({k: v for k, v in found.items() if k != "readings_bytes"}, indent=2))
    print(f"written to {arguments.out}")


if __name__ == "__main__":
    main()
