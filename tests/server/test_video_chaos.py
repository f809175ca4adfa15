"""Video sessions dropped in every way a client can: every slot back, no error logged, memory flat."""

from __future__ import annotations

import asyncio
import logging
import random
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import pytest

from realtide.server.metrics import OUTCOMES
from realtide_client.v1 import common_pb2, video_pb2
from tests.server.helpers import until
from tests.server.test_chaos import ALLOWED_GROWTH, drained, memory
from tests.server.video_engine import ClipEngine
from tests.server.video_helpers import (
    H264,
    JPEG,
    RAW,
    Clips,
    Request,
    checkpointing,
    clips,
    credit,
    finishing,
    opening,
    pausing,
    playing,
    prompting,
    until_kind,
)

SESSIONS = 200
AT_ONCE = 24
SETTINGS: dict[str, Any] = {"idle_timeout": 0.3, "queue_limit": 100, "max_checkpoint_bytes": 65536}

Way = Callable[[Clips, random.Random], Awaitable[None]]


def some(rng: random.Random) -> Any:
    """Any encoding."""
    return rng.choice([RAW, JPEG, H264])


async def cancel_at_once(server: Clips, rng: random.Random) -> None:
    server.stream().cancel()


async def cancel_before_opened(server: Clips, rng: random.Random) -> None:
    call = server.stream()
    await call.write(opening(encoding=some(rng), credit=20))
    call.cancel()


async def cancel_without_credit(server: Clips, rng: random.Random) -> None:
    call = await server.opened(encoding=some(rng))
    await call.write(prompting("p", "cat", 50))
    call.cancel()


async def cancel_while_frames_come(server: Clips, rng: random.Random) -> None:
    call = await server.opened(encoding=some(rng), credit=200)
    for _ in range(rng.randrange(8)):
        await call.read()
    call.cancel()


async def cancel_while_paused(server: Clips, rng: random.Random) -> None:
    call = await server.opened(encoding=some(rng), credit=30)
    await call.write(pausing("p"))
    await until_kind(call, "applied")
    if rng.random() < 0.5:
        await call.write(playing("q"))
    call.cancel()


async def cancel_while_finishing(server: Clips, rng: random.Random) -> None:
    call = await server.opened(encoding=some(rng), credit=60)
    await call.write(finishing())
    call.cancel()


async def never_read(server: Clips, rng: random.Random) -> None:
    call = server.stream()
    await call.write(opening(credit=300))
    await asyncio.sleep(rng.random() * 0.2)
    call.cancel()


async def idle(server: Clips, rng: random.Random) -> None:
    call = await server.opened(encoding=some(rng), credit=5)
    await drained(call)


async def deadline(server: Clips, rng: random.Random) -> None:
    call = server.stream(timeout=0.05 + rng.random() * 0.1)
    await call.write(opening(encoding=some(rng)))
    end = 0
    while True:
        end += 1
        await call.write(credit(end))
        await asyncio.sleep(0.02)


async def normal(server: Clips, rng: random.Random) -> None:
    call = await server.opened(encoding=some(rng), credit=10)
    await call.write(prompting("p", "cat"))
    await call.write(checkpointing())
    await call.write(pausing("q"))
    await call.write(playing("r"))
    await call.write(credit(20))
    await call.write(finishing())
    await drained(call)


async def to_its_length(server: Clips, rng: random.Random) -> None:
    call = await server.opened(encoding=some(rng), credit=40, length_frames=rng.randrange(1, 40))
    await drained(call)


async def go_on_elsewhere(server: Clips, rng: random.Random) -> None:
    call = await server.opened(encoding=some(rng), credit=rng.randrange(20))
    await call.write(checkpointing())
    checkpoint = await until_kind(call, "checkpoint")
    call.cancel()
    call = server.stream()
    await call.write(Request(resume=common_pb2.Resume(checkpoint=checkpoint.data)))
    await call.write(credit(24))
    await call.write(finishing())
    await drained(call)


async def bad_input(server: Clips, rng: random.Random) -> None:
    call = await server.opened(encoding=some(rng), credit=10)
    await call.write(
        rng.choice([credit(9), credit(10_000), opening(), Request(), pausing(""), prompting("c", "")])
    )
    await drained(call)


async def not_a_message(server: Clips, rng: random.Random) -> None:
    call: Any = server.channel.stream_stream(
        "/realtide.v1.Video/Stream",
        request_serializer=lambda data: data,
        response_deserializer=video_pb2.VideoStreamResponse.FromString,
    )(None)
    await call.write(opening(credit=10).SerializeToString())
    await call.write(rng.randbytes(100))
    await drained(call)


async def disconnect(server: Clips, rng: random.Random) -> None:
    """Take the whole connection away under a live stream."""
    options = [("grpc.use_local_subchannel_pool", 1)]
    channel = grpc.aio.insecure_channel(f"127.0.0.1:{server.server.port}", options=options)
    call = Clips(server.server, server.engine, channel).stream()
    await call.write(opening(encoding=some(rng), credit=100))
    if rng.random() < 0.7:
        await call.read()
    await channel.close(None)


WAYS: tuple[Way, ...] = (
    cancel_at_once,
    cancel_before_opened,
    cancel_without_credit,
    cancel_while_frames_come,
    cancel_while_paused,
    cancel_while_finishing,
    never_read,
    idle,
    deadline,
    normal,
    to_its_length,
    go_on_elsewhere,
    bad_input,
    not_a_message,
    disconnect,
)


async def test_every_way_to_go(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    rng = random.Random(21)
    seen: Counter[str] = Counter()
    # Fewer slots than sessions at once: many of them come and go through the queue.
    async with clips(ClipEngine(slots=8, delay=0.001), **SETTINGS) as server:
        limit = asyncio.Semaphore(AT_ONCE)

        async def one(way: Way) -> None:
            async with limit:
                try:
                    async with asyncio.timeout(30):
                        await way(server, rng)
                    seen["quiet"] += 1
                except TimeoutError:
                    seen["hung"] += 1
                except grpc.aio.AioRpcError as error:
                    # grpc's client calls it INTERNAL when it writes to a call whose deadline has just passed.
                    own = error.details() == "Internal error from Core"
                    seen["over" if own else error.code().name] += 1
                except (asyncio.CancelledError, asyncio.InvalidStateError, OSError):
                    seen["over"] += 1  # the call ended under the client's hands

        async def many(count: int) -> None:
            ways = [WAYS[index % len(WAYS)] for index in range(count)]
            rng.shuffle(ways)
            await asyncio.gather(*(one(way) for way in ways))
            await server.all_free()
            await until(lambda: not server.server.host.streams)

        await many(SESSIONS // 2)
        before = memory()
        await many(SESSIONS)
        growth = memory() - before
        assert growth < ALLOWED_GROWTH, f"{growth >> 10} kB more for {SESSIONS} sessions"
        opened = server.metric("realtide_sessions_opened_total")
        closed = {name: server.metric("realtide_sessions_closed_total", outcome=name) for name in OUTCOMES}
        assert sum(closed.values()) == opened
        assert closed["server_error"] == closed["drained"] == 0
        assert min(closed["ok"], closed["cancelled"], closed["client_error"]) > 0
        assert server.metric("realtide_slots_leaked") == 0
        assert server.metric("realtide_sessions", state="active") == 0
        assert not seen.keys() & {"hung", "UNKNOWN", "INTERNAL", "UNAVAILABLE"}, seen
        # And it still works.
        call = await server.opened(credit=4, length_frames=4)
        await drained(call)
    errors = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert errors == []
