"""Clients on the bad side of a link: `python -m tests.ops.fault_load ADDRESS SECONDS`.

One session after the other of each kind, begun for so many seconds; writes what each has given as JSON.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
import time
from collections.abc import Awaitable, Callable
from typing import Any

import grpc

import realtide_client as rt
from realtide_client.v1 import common_pb2, speech_pb2, speech_pb2_grpc
from tests.ops.processes import recognized, spoken

SPEECHES, VIDEOS, PLAIN = 5, 2, 3
FRAMES = 48
# A client that notices within 8 seconds that nobody answers, as the library does within 15.
ALIVE = (("grpc.keepalive_time_ms", 6000), ("grpc.keepalive_timeout_ms", 2000))
PATIENT = rt.RetryPolicy(max_retries=30, max_seconds=2.0)


async def says(client: rt.Client, samples: Any, rate: int) -> dict[str, Any]:
    async with client.speech(sample_rate=rate, retry=PATIENT, checkpoint_interval_ms=1000) as stream:
        texts = await recognized(stream, samples, rate, 1.0)
        return {"kind": "speech", "given": texts, "reconnects": stream.reconnects}


async def watches(client: rt.Client) -> dict[str, Any]:
    """A video, as fast as it plays; the positions of its frames."""
    positions: list[int] = []
    settings: dict[str, Any] = {"encoding": "jpeg", "length_frames": FRAMES, "buffer_seconds": 1.0, "seed": 5}
    prompt = "a red apple moves up on a blue background"
    async with client.video(prompt=prompt, retry=PATIENT, checkpoint_interval_ms=1000, **settings) as stream:
        async for event in stream:
            if isinstance(event, rt.Frames):
                positions += range(event.position, event.position + event.count)
                await asyncio.sleep(event.count / 16)
        return {"kind": "video", "given": positions, "reconnects": stream.reconnects}


async def speaks_plainly(address: str, samples: Any, rate: int) -> dict[str, Any]:
    """A client that never tries again; the last message that it got, and its status."""
    last = ""
    options = [*ALIVE, ("grpc.use_local_subchannel_pool", 1)]
    async with grpc.aio.insecure_channel(address, options=options) as channel:
        stub: Any = speech_pb2_grpc.SpeechStub(channel)
        call = stub.Stream()
        Request = speech_pb2.SpeechStreamRequest

        async def talk() -> None:
            form = speech_pb2.AudioFormat(encoding=speech_pb2.AUDIO_ENCODING_FLOAT32, sample_rate_hz=rate)
            await call.write(Request(open=speech_pb2.SpeechOpen(audio=form)))
            for start in range(0, len(samples), rate // 10):
                data = samples[start : start + rate // 10].tobytes()
                await call.write(Request(audio=speech_pb2.AudioChunk(data=data)))
                await asyncio.sleep(0.1)
            await call.write(Request(finish=common_pb2.Finish()))
            await call.done_writing()

        talking = asyncio.create_task(talk())
        with contextlib.suppress(grpc.aio.AioRpcError):
            while (response := await call.read()) is not grpc.aio.EOF:  # type: ignore[attr-defined]
                last = response.WhichOneof("message")
        code = (await call.code()).name
        talking.cancel()
        await asyncio.gather(talking, return_exceptions=True)
    return {"kind": "plain", "given": last, "code": code}


async def again(until: float, one: Callable[[], Awaitable[dict[str, Any]]]) -> list[dict[str, Any]]:
    """One after the other; a failure is a result."""
    found = []
    while time.monotonic() < until:
        try:
            found.append(await one())
        except rt.RealtideError as error:
            found.append({"kind": "failed", "given": repr(error)})
    return found


async def main(address: str, seconds: float) -> None:
    samples, rate = spoken(1, names=("coffee-mocha",))
    until = time.monotonic() + seconds
    async with rt.connect(address) as client:
        jobs: list[Callable[[], Awaitable[dict[str, Any]]]] = [
            *[lambda: says(client, samples, rate)] * SPEECHES,
            *[lambda: watches(client)] * VIDEOS,
            *[lambda: speaks_plainly(address, samples, rate)] * PLAIN,
        ]
        found = await asyncio.gather(*(again(until, job) for job in jobs))
    print(json.dumps([result for results in found for result in results]))


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], float(sys.argv[2])))
