"""500 sessions dropped in every way a client can: every slot back, no error logged, memory flat."""

from __future__ import annotations

import asyncio
import ctypes
import gc
import logging
import random
import sys
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import psutil
import pytest

from realtide.server.metrics import OUTCOMES, resident_bytes
from realtide.server.remote import RemoteEngine
from realtide_client.v1 import common_pb2, speech_pb2
from tests.server.burst_process import loading
from tests.server.engine import BurstEngine, pcm16, quiet, tone
from tests.server.helpers import Request, Running, audio, finish, opening, running, until

SESSIONS = 500
AT_ONCE = 40
# Small messages: the memory to be watched is the sessions', not the allocator's pools for large blocks.
SETTINGS: dict[str, Any] = {
    "idle_timeout": 0.3,
    "queue_limit": 100,
    "max_message_bytes": 65536,
    "max_checkpoint_bytes": 65536,
}
# Python, grpc and the allocator keep pools that grow for a while; a leak of what a session holds (its queues
# and tasks, over 20 kB) would show as more than this.
ALLOWED_GROWTH = 8 << 20

Way = Callable[[Running, random.Random], Awaitable[None]]


async def half_open(server: Running, rng: random.Random) -> None:
    """Connect and never say anything."""
    call = server.stream()
    await call.read()


async def cancel_at_once(server: Running, rng: random.Random) -> None:
    call = server.stream()
    call.cancel()


async def cancel_before_opened(server: Running, rng: random.Random) -> None:
    call = server.stream()
    await call.write(opening())
    call.cancel()


async def cancel_while_talking(server: Running, rng: random.Random) -> None:
    call = await server.opened()
    for _ in range(rng.randrange(5)):
        await call.write(audio(pcm16(tone(rng.random()))))
    call.cancel()


async def cancel_while_writing(server: Running, rng: random.Random) -> None:
    """In the middle of a large message."""
    call = await server.opened()
    write = asyncio.create_task(call.write(audio(bytes(240_000))))
    await asyncio.sleep(0)
    call.cancel()
    await asyncio.gather(write, return_exceptions=True)


async def idle(server: Running, rng: random.Random) -> None:
    call = await server.opened()
    await call.write(audio(pcm16(tone(0.1))))
    await drained(call)


async def deadline(server: Running, rng: random.Random) -> None:
    call = server.stream(timeout=0.05 + rng.random() * 0.1)
    await call.write(opening())
    while True:
        await call.write(audio(pcm16(tone(0.1))))
        await asyncio.sleep(0.02)


async def finish_without_audio(server: Running, rng: random.Random) -> None:
    call = await server.opened()
    await call.write(finish())
    await drained(call)


async def half_close_without_audio(server: Running, rng: random.Random) -> None:
    call = await server.opened()
    await call.done_writing()
    await drained(call)


async def normal(server: Running, rng: random.Random) -> None:
    call = await server.opened()
    await call.write(audio(pcm16(tone(0.2))))
    await call.write(Request(checkpoint_request=common_pb2.CheckpointRequest()))
    await call.write(audio(pcm16(quiet(1.0))))
    await call.write(finish())
    await drained(call)


async def leave_results_unread(server: Running, rng: random.Random) -> None:
    call = await server.opened()
    await call.write(audio(pcm16(tone(1.0))))
    await call.write(finish())
    call.cancel()


async def bad_input(server: Running, rng: random.Random) -> None:
    call = await server.opened()
    await call.write(rng.choice([audio(b""), audio(b"x"), opening(), Request(), audio(b"\0\0", 99)]))
    await drained(call)


async def not_a_message(server: Running, rng: random.Random) -> None:
    call: Any = server.channel.stream_stream(
        "/realtide.v1.Speech/Stream",
        request_serializer=lambda data: data,
        response_deserializer=speech_pb2.SpeechStreamResponse.FromString,
    )(None)
    await call.write(opening().SerializeToString())
    await call.write(rng.randbytes(100))
    await drained(call)


async def far_too_large(server: Running, rng: random.Random) -> None:
    call = await server.opened()
    await call.write(audio(bytes(400_000)))
    await drained(call)


async def disconnect(server: Running, rng: random.Random) -> None:
    """Take the whole connection away under a live stream."""
    options = [("grpc.use_local_subchannel_pool", 1)]
    channel = grpc.aio.insecure_channel(f"127.0.0.1:{server.server.port}", options=options)
    call = Running(server.server, server.engine, channel).stream()
    await call.write(opening())
    if rng.random() < 0.7:
        await call.read()
        await call.write(audio(pcm16(tone(0.3))))
    await channel.close(None)


async def no_grpc_at_all(server: Running, rng: random.Random) -> None:
    """Bytes that are not HTTP/2, or a connection that says nothing."""
    _, writer = await asyncio.open_connection("127.0.0.1", server.server.port)
    if rng.random() < 0.5:
        writer.write(rng.randbytes(200))
        await writer.drain()
    writer.close()


async def drained(call: Any) -> None:
    while await call.read() is not grpc.aio.EOF:  # type: ignore[attr-defined]
        pass


WAYS: tuple[Way, ...] = (
    half_open,
    cancel_at_once,
    cancel_before_opened,
    cancel_while_talking,
    cancel_while_writing,
    idle,
    deadline,
    finish_without_audio,
    half_close_without_audio,
    normal,
    leave_results_unread,
    bad_input,
    not_a_message,
    far_too_large,
    disconnect,
    no_grpc_at_all,
)


def memory() -> int:
    """Resident bytes once everything free has been given back."""
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)
    return resident_bytes()


def child_memory(engine: Any) -> int:
    """Resident bytes of the executor's process; 0 if it is a thread."""
    return psutil.Process(engine.process.pid).memory_info().rss if isinstance(engine, RemoteEngine) else 0


@pytest.mark.parametrize("process", [False, True], ids=["thread", "process"])
async def test_every_way_to_go(process: bool, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    rng = random.Random(20)
    seen: Counter[str] = Counter()
    # Fewer slots than sessions at once: many of them come and go through the queue.
    engine: Any = (
        await asyncio.to_thread(RemoteEngine, loading(slots=16)) if process else BurstEngine(slots=16)
    )
    async with running(engine, **SETTINGS) as server:
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

        async def some(count: int) -> None:
            ways = [WAYS[index % len(WAYS)] for index in range(count)]
            rng.shuffle(ways)
            await asyncio.gather(*(one(way) for way in ways))
            await server.all_free()
            await until(lambda: not server.server.host.streams)

        await some(SESSIONS // 2)
        before, child_before = memory(), child_memory(engine)
        await some(SESSIONS)
        child_growth = child_memory(engine) - child_before
        assert child_growth < ALLOWED_GROWTH, f"{child_growth >> 10} kB more in the executor's process"
        growth = memory() - before
        assert growth < ALLOWED_GROWTH, f"{growth >> 10} kB more for {SESSIONS} sessions"
        opened = server.metric("realtide_sessions_opened_total")
        closed = {name: server.metric("realtide_sessions_closed_total", outcome=name) for name in OUTCOMES}
        assert sum(closed.values()) == opened
        assert closed["server_error"] == closed["drained"] == 0
        assert min(closed["ok"], closed["cancelled"], closed["client_error"]) > 0
        assert server.metric("realtide_slots_leaked") == 0
        assert not seen.keys() & {"hung", "UNKNOWN", "INTERNAL", "UNAVAILABLE"}, seen
        # And it still works.
        call = await server.opened()
        await call.write(audio(pcm16(tone(0.2))))
        await call.write(finish())
        await drained(call)
    errors = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert errors == []
