"""Clients on the bad side of a link: `python -m tests.ops.fault_load ADDRESS SECONDS`.

One session after the other of each kind, begun for so many seconds; writes what each has given as JSON.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Awaitable, Callable, Iterable
from itertools import chain, repeat
from typing import Any

import realtide_client as rt
from tests.ops.plain import speaks_plainly
from tests.ops.processes import recognized, spoken

SPEECHES, VIDEOS, PLAIN = 4, 1, 3
# Frames of a video, seconds of silence after what is said. One session of each kind is long enough to be open
# when the network is cut.
FRAMES, LONG_FRAMES = 48, 400
GAP, LONG_GAP = 1.5, 36.0
# A client that notices within 8 seconds that nobody answers, as the library does within 15.
ALIVE = (("grpc.keepalive_time_ms", 6000), ("grpc.keepalive_timeout_ms", 2000))
PATIENT = rt.RetryPolicy(max_retries=30, max_seconds=2.0)


async def says(client: rt.Client, samples: Any, rate: int) -> dict[str, Any]:
    async with client.speech(sample_rate=rate, retry=PATIENT, checkpoint_interval_ms=1000) as stream:
        texts = await recognized(stream, samples, rate, 1.0)
        return {"kind": "speech", "given": texts, "reconnects": stream.reconnects}


async def watches(client: rt.Client, length: int, rate: float) -> dict[str, Any]:
    """A video at so many frames a second; whether each frame came once and in order."""
    positions: list[int] = []
    settings: dict[str, Any] = {"encoding": "jpeg", "length_frames": length, "buffer_seconds": 1.0, "seed": 5}
    prompt = "a red apple moves up on a blue background"
    async with client.video(prompt=prompt, retry=PATIENT, checkpoint_interval_ms=1000, **settings) as stream:
        async for event in stream:
            if isinstance(event, rt.Frames):
                positions += range(event.position, event.position + event.count)
                await asyncio.sleep(event.count / rate)
        whole = positions == list(range(length))
        return {"kind": "video", "given": whole, "reconnects": stream.reconnects}


async def tries_once(address: str, samples: Any, rate: int) -> dict[str, Any]:
    """A client that never tries again; the last message that it got, and its status."""
    kinds, code = await speaks_plainly(address, samples, rate, options=ALIVE)
    return {"kind": "plain", "given": kinds[-1] if kinds else "", "code": code}


Job = Callable[[], Awaitable[dict[str, Any]]]


async def again(until: float, jobs: Iterable[Job]) -> list[dict[str, Any]]:
    """One after the other; a failure is a result."""
    found = []
    for job in jobs:
        if time.monotonic() >= until:
            break
        try:
            found.append(await job())
        except rt.RealtideError as error:
            found.append({"kind": "failed", "given": repr(error)})
    return found


async def main(address: str, seconds: float) -> None:
    samples, rate = spoken(1, GAP, ("coffee-mocha",))
    long, _ = spoken(1, LONG_GAP, ("coffee-mocha",))
    until = time.monotonic() + seconds
    async with rt.connect(address) as client:

        def say() -> Awaitable[dict[str, Any]]:
            return says(client, samples, rate)

        def watch() -> Awaitable[dict[str, Any]]:
            return watches(client, FRAMES, 16.0)

        def plainly() -> Awaitable[dict[str, Any]]:
            return tries_once(address, samples, rate)

        people: list[Iterable[Job]] = [
            chain([lambda: says(client, long, rate)], repeat(say)),
            chain([lambda: watches(client, LONG_FRAMES, 12.0)], repeat(watch)),
            *[repeat(say)] * SPEECHES,
            *[repeat(watch)] * VIDEOS,
            *[repeat(plainly)] * PLAIN,
        ]
        found = await asyncio.gather(*(again(until, jobs) for jobs in people))
    print(json.dumps([result for results in found for result in results]))


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], float(sys.argv[2])))
