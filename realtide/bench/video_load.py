"""The load generator of video: a process with clients that take frames and change prompts (ours).

    python -m realtide.bench.video_load < plan.json        lines of JSON on standard output

It uses the Python client as others do. Frames are not decoded: what is measured is what a viewer is given.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import time
from collections.abc import Callable
from typing import Any

import grpc

import realtide_client as rt
from realtide.bench import stats
from realtide.bench.video_plan import Meter, VideoPlan
from realtide_client.v1 import common_pb2, video_pb2, video_pb2_grpc

Tell = Callable[[dict[str, Any]], None]
_SILENCE = 8.0  # seconds after which a neighbour has all that is generated for it without being read
_NEVER = rt.RetryPolicy(max_retries=0)  # a lost connection is a result, not something to be mended


async def run(plan: VideoPlan, tell: Tell) -> dict[str, Any]:
    """Make the load. Raises RealtideError."""
    async with rt.connect(plan.address) as client:
        work = {"rate": _rate, "first": _first, "switch": _switch, "long": _long}[plan.part]
        return await work(client, plan, tell)


def _open(client: rt.Client, plan: VideoPlan, number: int = 0, **choices: Any) -> rt.VideoStream:
    return client.video(
        prompt=plan.prompts[0],
        encoding=plan.encoding,
        model=plan.model,
        seed=plan.seed + number,
        buffer_seconds=plan.buffer_seconds,
        retry=_NEVER,
        **choices,
    )


async def _rate(client: rt.Client, plan: VideoPlan, tell: Tell) -> dict[str, Any]:
    async with contextlib.AsyncExitStack() as stack:
        for number in range(plan.silent):
            await stack.enter_async_context(_silent(plan, number))
        if plan.silent:
            await asyncio.sleep(_SILENCE)
        streams = [
            await stack.enter_async_context(_open(client, plan, number)) for number in range(plan.streams)
        ]
        meters = [Meter() for _ in streams]
        takers = [
            asyncio.create_task(_take(stream, meter)) for stream, meter in zip(streams, meters, strict=True)
        ]
        start = time.monotonic() + plan.warmup
        for meter in meters:
            meter.begin, meter.end = start, start + plan.seconds
        gc.collect()
        try:
            await _pass(takers, plan.warmup)
            tell({"event": "begin"})
            used = time.process_time()
            await _pass(takers, plan.seconds)
            used = time.process_time() - used
            tell({"event": "end"})
        finally:
            for task in takers:
                task.cancel()
            await asyncio.gather(*takers, return_exceptions=True)
    rates = [meter.frames_per_second for meter in meters]
    return {
        "streams": plan.streams,
        "silent_neighbours": plan.silent,
        "frames_per_second": round(sum(rates), 3),
        "of_each": [round(rate, 3) for rate in rates],
        "arrival_interval": stats.summary([gap for meter in meters for gap in meter.intervals]),
        "generator_cpu_seconds": round(used, 3),
    }


async def _pass(takers: list[asyncio.Task[None]], seconds: float) -> None:
    """Let time pass; what ends one of the videos is raised."""
    done, _ = await asyncio.wait(takers, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
    for task in done:
        task.result()
        raise rt.StreamClosed("an endless video has ended")


async def _take(stream: rt.VideoStream, meter: Meter) -> None:
    async for event in stream:
        if isinstance(event, rt.Frames):
            meter.came(event.timing.arrived_at, event.end)


@contextlib.asynccontextmanager
async def _silent(plan: VideoPlan, number: int) -> Any:
    """A neighbour that opens a video, gives all credit that it may give, and reads nothing."""
    async with grpc.aio.insecure_channel(plan.address, [("grpc.use_local_subchannel_pool", 1)]) as channel:
        stub: Any = video_pb2_grpc.VideoStub(channel)
        call = stub.Stream()
        options = video_pb2.VideoOptions(
            prompt=plan.prompts[0],
            encoding=video_pb2.VIDEO_ENCODING_RAW_RGB,
            seed=plan.seed + 100 + number,
        )
        session = common_pb2.SessionOptions(model=plan.model)
        opening = video_pb2.VideoOpen(session=session, options=options)
        await call.write(video_pb2.VideoStreamRequest(open=opening))
        opened = (await call.read()).opened
        credit = common_pb2.Credit(position=opened.limits.max_credit_frames)
        await call.write(video_pb2.VideoStreamRequest(credit=credit))
        yield
        call.cancel()


async def _first(client: rt.Client, plan: VideoPlan, tell: Tell) -> dict[str, Any]:
    waited: list[float] = []
    for number in range(plan.count):
        began = time.monotonic()
        async with _open(client, plan, number) as stream:
            async for event in stream:
                if isinstance(event, rt.Frames):
                    waited.append(event.timing.arrived_at - began)
                    break
    return {"first_frame": stats.summary(waited)}


async def _switch(client: rt.Client, plan: VideoPlan, tell: Tell) -> dict[str, Any]:
    """Change the prompt every `plan.frames` frames, as soon as possible each time."""
    waited: list[float] = []
    recached: list[float] = []
    ahead: list[int] = []
    asked: dict[str, tuple[float, int]] = {}
    new: rt.PromptApplied | None = None
    due, start = plan.frames, 0.0
    async with _open(client, plan) as stream:
        rate = stream.info.frames_per_second
        async for event in stream:
            if isinstance(event, rt.PromptApplied):
                new = event if event.control_id else None
                continue
            if new is not None:
                when, frame = asked.pop(new.control_id)
                waited.append(event.timing.arrived_at - when)
                recached.append(new.recache_seconds)
                ahead.append(new.first_frame - frame)
                new = None
                due = event.end + plan.frames
            if len(waited) >= plan.count:
                break
            if plan.pace:
                start = start or time.monotonic()
                await asyncio.sleep(start + event.position / rate - time.monotonic())
            if event.end >= due and not asked:
                prompt = plan.prompts[(len(waited) + 1) % len(plan.prompts)]
                now = time.monotonic()
                control = await stream.set_prompt(prompt)
                asked[control.control_id] = now, event.end
    return {
        "prompt_to_first_frame": stats.summary(waited),
        "recache": stats.summary(recached),
        "frames_in_between": round(sum(ahead) / len(ahead), 1),
    }


async def _long(client: rt.Client, plan: VideoPlan, tell: Tell) -> dict[str, Any]:
    """Arrivals of a long video: (seconds since its first frame, frames so far)."""
    arrivals: list[tuple[float, int]] = []
    async with _open(client, plan, length_frames=plan.frames) as stream:
        tell({"event": "begin"})
        async for event in stream:
            if isinstance(event, rt.Frames):
                arrivals.append((event.timing.arrived_at, event.end))
    tell({"event": "end"})
    start = arrivals[0][0]
    return {"arrivals": [(round(when - start, 5), end) for when, end in arrivals]}


def main() -> None:
    """Read a plan from standard input, make the load, write lines of JSON."""
    from realtide.bench.child import serve

    serve(lambda text, tell: asyncio.run(run(VideoPlan.from_json(text), tell)))


if __name__ == "__main__":
    main()
