"""How a call's status is told apart from that of a write that failed beside it (grpc/grpc#36066)."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest

import realtide_client as rt
from realtide_client.link import SPEECH, Link, Target
from realtide_client.v1 import speech_pb2, speech_pb2_grpc
from tests.clients.scripted import rich_status

Status = tuple[grpc.StatusCode, str, Any]
SERVER: Status = (
    grpc.StatusCode.INVALID_ARGUMENT,
    "bad",
    rich_status(grpc.StatusCode.INVALID_ARGUMENT, "bad"),
)
FAILED_WRITE: Status = (grpc.StatusCode.INTERNAL, "Internal error from Core", ())


class Call:
    """A call that is over; its status changes as grpcio changes it."""

    def __init__(self, status: Status) -> None:
        self.status = status
        self.done: Callable[[Any], None] = lambda call: None

    async def read(self) -> Any:
        raise grpc.aio.AioRpcError(
            self.status[0], grpc.aio.Metadata(), grpc.aio.Metadata(), self.status[1], None
        )

    async def code(self) -> grpc.StatusCode:
        return self.status[0]

    async def details(self) -> str:
        return self.status[1]

    async def trailing_metadata(self) -> Any:
        return self.status[2]


async def link_of(call: Call) -> Link:
    link = Link(Target("127.0.0.1:1"), SPEECH)
    await link.close()
    link._call = call  # type: ignore[assignment]
    link._on_done(call)
    return link


async def test_a_failed_write_does_not_hide_the_status_that_came_before_it() -> None:
    call = Call(SERVER)
    link = await link_of(call)
    call.status = FAILED_WRITE
    with pytest.raises(rt.InvalidRequest, match="bad"):
        await link.read()


async def test_a_status_that_comes_after_the_failed_write_is_waited_for() -> None:
    call = Call(FAILED_WRITE)
    link = await link_of(call)
    reading = asyncio.create_task(link.read())
    await asyncio.sleep(0.01)
    assert not reading.done()
    call.status = SERVER
    with pytest.raises(rt.InvalidRequest, match="bad"):
        await reading


async def test_a_status_that_never_comes_is_a_lost_connection() -> None:
    link = await link_of(Call(FAILED_WRITE))
    with pytest.raises(rt.Unavailable, match="lost while sending") as caught:
        await link.read()
    assert caught.value.reconnectable


async def test_an_internal_error_of_the_server_stays_one() -> None:
    link = await link_of(Call((grpc.StatusCode.INTERNAL, "a bug", ())))
    with pytest.raises(rt.ServerError, match="a bug"):
        await link.read()
    link = await link_of(Call((grpc.StatusCode.OK, "", ())))
    assert await link.read() is None


class Leaving(speech_pb2_grpc.SpeechServicer):
    """Ends its call, which the client has not finished, when it is told to."""

    def __init__(self) -> None:
        self.leave = threading.Event()

    def Stream(self, request_iterator: Iterator[Any], context: grpc.ServicerContext) -> Any:
        yield speech_pb2.SpeechStreamResponse(opened=speech_pb2.SpeechOpened())
        self.leave.wait(30)
        context.abort(grpc.StatusCode.UNAVAILABLE, "resume elsewhere")


async def test_the_status_of_a_real_server_is_read_though_a_write_fails_after_it() -> None:
    servicer = Leaving()
    server = grpc.server(ThreadPoolExecutor(1))
    speech_pb2_grpc.add_SpeechServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    link = Link(Target(f"127.0.0.1:{port}"), SPEECH)
    try:
        await link.open(speech_pb2.SpeechStreamRequest(open=speech_pb2.SpeechOpen()), 30)
        reading = asyncio.create_task(link.read())
        audio = speech_pb2.SpeechStreamRequest(audio=speech_pb2.AudioChunk(data=b"\0" * 3200))
        assert await link.write(audio)
        servicer.leave.set()
        # The loop is kept from seeing the status that comes meanwhile, so that the next write fails after it.
        time.sleep(0.2)  # noqa: ASYNC251
        while await link.write(audio):
            time.sleep(0.02)  # noqa: ASYNC251
        with pytest.raises(rt.Unavailable, match="resume elsewhere") as caught:
            await reading
        assert caught.value.reconnectable
    finally:
        await link.close()
        server.stop(None).wait()
