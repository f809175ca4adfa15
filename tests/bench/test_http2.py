"""The load generator's HTTP/2: framing, windows, and what trailers say."""

from __future__ import annotations

import asyncio
import struct
from typing import Any, cast

import pytest

from realtide.bench import http2
from realtide.bench.http2 import Connection, _failure
from realtide.cli.own_server import own_server
from realtide_client.v1 import models_pb2
from tests.bench.conftest import Tiny

PREFACE = len(http2._PREFACE)


class Wire:
    """A transport that remembers what was written."""

    def __init__(self) -> None:
        self.data = b""

    def write(self, data: bytes) -> None:
        self.data += data

    def frames(self) -> list[tuple[int, int, int, bytes]]:
        """(kind, flags, stream, payload) since the last call."""
        at, found = PREFACE if self.data.startswith(b"PRI") else 0, []
        while at < len(self.data):
            high, low, kind, flags, stream = struct.unpack_from(">HBBBI", self.data, at)
            size = high << 8 | low
            found.append((kind, flags, stream, self.data[at + 9 : at + 9 + size]))
            at += 9 + size
        self.data = b""
        return found


class Ear:
    def __init__(self) -> None:
        self.heard: list[Any] = []

    def answered(self, message: bytes) -> None:
        self.heard.append(message)

    def ended(self, failure: str | None) -> None:
        self.heard.append(("end", failure))


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return struct.pack(">HBBBI", len(payload) >> 8, len(payload) & 255, kind, flags, stream) + payload


@pytest.fixture
def wired(monkeypatch: pytest.MonkeyPatch) -> tuple[Connection, Wire]:
    connection, wire = Connection("localhost:1"), Wire()
    monkeypatch.setattr(asyncio, "Transport", Wire)
    connection.connection_made(cast(Any, wire))
    assert [one[0] for one in wire.frames()] == [http2._SETTINGS, http2._WINDOW]
    return connection, wire


def test_messages_wait_for_the_windows_and_keep_their_order(wired: tuple[Connection, Wire]) -> None:
    connection, wire = wired
    stream = connection.call("/a/B", Ear())
    message = bytes(range(256)) * 200  # 51200 bytes
    stream.send(message)
    stream.send(message)
    stream.finish()
    sent = [one for one in wire.frames() if one[0] == http2._DATA]
    assert sum(len(one[3]) for one in sent) == 65535
    assert all(len(one[3]) <= 16384 for one in sent)
    more = (1 << 20).to_bytes(4, "big")
    connection.data_received(frame(http2._WINDOW, 0, 0, more))
    assert not wire.frames()  # the stream's own window is still closed
    connection.data_received(frame(http2._WINDOW, 0, 1, more))
    sent += wire.frames()
    framed = b"\0" + len(message).to_bytes(4, "big") + message
    assert b"".join(one[3] for one in sent) == 2 * framed
    assert [one[1] for one in sent] == [0] * (len(sent) - 1) + [http2._END_STREAM]


def test_settings_change_open_windows_and_are_acknowledged(wired: tuple[Connection, Wire]) -> None:
    connection, wire = wired
    stream = connection.call("/a/B", Ear())
    connection.data_received(frame(http2._SETTINGS, 0, 0, struct.pack(">HIHI", 4, 100, 5, 20000)))
    assert (stream.window, connection.max_frame) == (100, 20000)
    assert (http2._SETTINGS, http2._ACK, 0, b"") in wire.frames()
    connection.data_received(frame(http2._PING, 0, 0, b"12345678"))
    assert wire.frames() == [(http2._PING, http2._ACK, 0, b"12345678")]


def test_answers_are_put_together_from_any_pieces(wired: tuple[Connection, Wire]) -> None:
    connection, _ = wired
    ears = [Ear(), Ear()]
    for ear in ears:
        connection.call("/a/B", ear)
    framed = b"".join(b"\0" + len(text).to_bytes(4, "big") + text for text in (b"one", b"", b"three"))
    data = b""
    for at in range(0, len(framed), 4):
        for number in (1, 3):
            data += frame(http2._DATA, 0, number, framed[at : at + 4])
    data += frame(http2._RESET, 0, 3, (8).to_bytes(4, "big"))
    for at in range(0, len(data), 7):
        connection.data_received(data[at : at + 7])
    assert ears[0].heard == [b"one", b"", b"three"]
    assert ears[1].heard == [b"one", b"", b"three", ("end", "reset with code 8")]
    connection.connection_lost(None)
    assert ears[0].heard[-1] == ("end", "UNAVAILABLE: connection lost: None")


def test_trailers() -> None:
    name, message = b"\x0bgrpc-status", b"\x0cgrpc-message"
    assert _failure(b"\x20\x40" + name + b"\x010") is None
    assert _failure(b"\x88\x40" + name + b"\x018\x00" + message + b"\x05a%20b") == "RESOURCE_EXHAUSTED: a b"
    assert _failure(b"\x88") == "UNKNOWN: the trailers cannot be read"
    assert _failure(b"\x40" + name) == "UNKNOWN: the trailers cannot be read"


async def test_a_real_server_answers_and_refuses(tiny: Tiny) -> None:
    async with own_server([tiny.path], ()) as server:
        connection = await Connection.to(server.address)
        for method, expected in (("ListModels", None), ("Nothing", "UNIMPLEMENTED")):
            ear = Ear()
            stream = connection.call(f"/realtide.v1.Models/{method}", ear)
            stream.send(models_pb2.ListModelsRequest().SerializeToString())
            stream.finish()
            async with asyncio.timeout(30):
                while not ear.heard or not isinstance(ear.heard[-1], tuple):
                    await asyncio.sleep(0.01)
            if expected is None:
                answer, end = ear.heard
                assert models_pb2.ListModelsResponse.FromString(answer).models[0].name == "tiny"
                assert end == ("end", None)
            else:
                ((_, failure),) = ear.heard
                assert failure.startswith(expected)
        connection.close()
