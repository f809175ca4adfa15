"""How a call's status is told apart from that of a write that failed beside it (grpc/grpc#36066)."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import grpc
import pytest

import realtide_client as rt
from realtide_client.link import SPEECH, Link, Target
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
