"""As much of HTTP/2 and gRPC as a load generator needs, without TLS (ours; RFC 9113, RFC 7541).

A generator that shares the processor with what it measures must cost little. One chunk through grpc.aio costs
a client several times what it costs to frame it and to write it to a socket, which is all that happens here.
Messages are bytes; a stream tells its listener of every answer and of its end.
"""

from __future__ import annotations

import asyncio
import struct
from typing import Protocol
from urllib.parse import unquote

import grpc

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_DATA, _HEADERS, _RESET, _SETTINGS, _PING, _GOAWAY, _WINDOW, _CONTINUATION = 0, 1, 3, 4, 6, 7, 8, 9
_END_STREAM = _ACK = 1
_END_HEADERS, _PADDED, _PRIORITY = 4, 8, 32
_TABLE_SIZE, _INITIAL_WINDOW, _MAX_FRAME = 1, 4, 5
_ENOUGH = (1 << 31) - 1  # all that will be received: windows are never updated
_CODES = {code.value[0]: code.name for code in grpc.StatusCode}


class Listener(Protocol):
    """Hears of one stream."""

    def answered(self, message: bytes) -> None:
        """A message has come."""
        ...

    def ended(self, failure: str | None) -> None:
        """The stream is over; None: with status OK. Called once."""
        ...


class Stream:
    """One call."""

    __slots__ = ("_connection", "_partial", "_waiting", "ending", "listener", "number", "window")

    def __init__(self, connection: Connection, number: int, listener: Listener, window: int) -> None:
        self.number = number
        self.listener = listener
        self.window = window  # bytes that the server takes now
        self.ending = False
        self._connection = connection
        self._partial = b""
        self._waiting = bytearray()

    def send(self, message: bytes) -> None:
        """Send a message now, or as soon as the server takes it."""
        framed = b"\0" + len(message).to_bytes(4, "big") + message
        most = min(self.window, self._connection.window, self._connection.max_frame)
        if self._waiting or len(framed) > most:
            self._waiting += framed
            self.flush()
        else:
            self.window -= len(framed)
            self._connection.window -= len(framed)
            self._connection.write(_DATA, 0, self.number, framed)

    def finish(self) -> None:
        """Nothing follows what was sent."""
        self.ending = True
        self.flush()

    def flush(self) -> None:
        """Send of what waits as much as the server takes."""
        connection = self._connection
        while self._waiting and (most := min(self.window, connection.window, connection.max_frame)) > 0:
            piece = bytes(self._waiting[:most])
            del self._waiting[:most]
            self.window -= len(piece)
            connection.window -= len(piece)
            connection.write(_DATA, 0, self.number, piece)
        if self.ending and not self._waiting:
            self.ending = False
            connection.write(_DATA, _END_STREAM, self.number, b"")

    def cancel(self) -> None:
        """End the call from this side; the listener hears no more."""
        self._connection.forget(self.number)

    def received(self, data: bytes) -> None:
        """Part of the answers has come."""
        data = self._partial + data if self._partial else data
        at = 0
        while len(data) - at >= 5 and len(data) - at >= (size := 5 + int.from_bytes(data[at + 1 : at + 5])):
            self.listener.answered(data[at + 5 : at + size])
            at += size
        self._partial = data[at:]


class Connection(asyncio.Protocol):
    """One connection; `await Connection.to(address)` makes it. Raises OSError if nobody listens."""

    def __init__(self, authority: str) -> None:
        self.window = 65535
        self.max_frame = 16384
        self._authority = authority
        self._initial = 65535
        self._streams: dict[int, Stream] = {}
        self._next = 1
        self._received = b""
        self._transport: asyncio.Transport | None = None

    @classmethod
    async def to(cls, address: str) -> Connection:
        """Connect to HOST:PORT."""
        host, _, port = address.rpartition(":")
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(lambda: cls(address), host.strip("[]"), int(port))
        return connection

    def call(self, path: str, listener: Listener) -> Stream:
        """Begin a call of a method that takes and gives streams."""
        stream = Stream(self, self._next, listener, self._initial)
        self._streams[self._next] = stream
        self._next += 2
        # Indices of the static table: POST, http, :path, :authority, content-type. Nothing is compressed.
        block = b"\x83\x86\x04" + _string(path) + b"\x01" + _string(self._authority)
        block += b"\x0f\x10" + _string("application/grpc") + b"\x00" + _string("te") + _string("trailers")
        self.write(_HEADERS, _END_HEADERS, stream.number, block)
        return stream

    def close(self) -> None:
        """Drop the connection."""
        self._streams.clear()
        if self._transport is not None:
            self._transport.close()

    def write(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        """Send a frame."""
        if self._transport is not None:
            head = struct.pack(">HBBBI", len(payload) >> 8, len(payload) & 255, kind, flags, stream)
            self._transport.write(head + payload)

    def forget(self, number: int) -> None:
        """Reset a stream, if it is still there."""
        if self._streams.pop(number, None) is not None:
            self.write(_RESET, 0, number, (8).to_bytes(4, "big"))

    # -- asyncio.Protocol --------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Say how much may come, and that header tables stay empty."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        transport.write(_PREFACE)
        settings = struct.pack(">HIHI", _TABLE_SIZE, 0, _INITIAL_WINDOW, _ENOUGH)
        self.write(_SETTINGS, 0, 0, settings)
        self.write(_WINDOW, 0, 0, (_ENOUGH - 65535).to_bytes(4, "big"))

    def connection_lost(self, error: Exception | None) -> None:
        """Every call that is left has failed."""
        self._transport = None
        self._fail(f"UNAVAILABLE: connection lost: {error}")

    def data_received(self, data: bytes) -> None:
        """Take frames apart."""
        data = self._received + data if self._received else data
        at = 0
        while len(data) - at >= 9:
            high, low, kind, flags, stream = struct.unpack_from(">HBBBI", data, at)
            size = high << 8 | low
            if len(data) - at < 9 + size:
                break
            self._frame(kind, flags, stream, data[at + 9 : at + 9 + size])
            at += 9 + size
        self._received = data[at:]

    def _frame(self, kind: int, flags: int, number: int, payload: bytes) -> None:
        stream = self._streams.get(number)
        if kind in (_DATA, _HEADERS) and flags & _PADDED:
            payload = payload[1 : len(payload) - payload[0]]
        if kind == _DATA:
            if stream is not None:
                stream.received(payload)
        elif kind == _HEADERS:
            if flags & _END_STREAM and self._streams.pop(number, None) is not None and stream is not None:
                stream.listener.ended(_failure(payload[5:] if flags & _PRIORITY else payload))
        elif kind == _RESET:
            if self._streams.pop(number, None) is not None and stream is not None:
                stream.listener.ended(f"reset with code {int.from_bytes(payload, 'big')}")
        elif kind == _SETTINGS and not flags & _ACK:
            self._settings(payload)
        elif kind == _PING and not flags & _ACK:
            self.write(_PING, _ACK, 0, payload)
        elif kind == _WINDOW:
            more = int.from_bytes(payload, "big")
            if number == 0:
                self.window += more
                for one in list(self._streams.values()):
                    one.flush()
            elif stream is not None:
                stream.window += more
                stream.flush()
        elif kind in (_GOAWAY, _CONTINUATION):
            self._fail("UNAVAILABLE: the server closes the connection")

    def _settings(self, payload: bytes) -> None:
        for name, value in struct.iter_unpack(">HI", payload):
            if name == _INITIAL_WINDOW:
                for stream in self._streams.values():
                    stream.window += value - self._initial
                self._initial = value
            elif name == _MAX_FRAME:
                self.max_frame = value
        self.write(_SETTINGS, _ACK, 0, b"")
        for stream in list(self._streams.values()):
            stream.flush()

    def _fail(self, failure: str) -> None:
        streams, self._streams = self._streams, {}
        for stream in streams.values():
            stream.listener.ended(failure)


def _string(text: str) -> bytes:
    data = text.encode()
    return bytes([len(data)]) + data if len(data) < 127 else b"\x7f" + _integer(len(data) - 127) + data


def _integer(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


def _failure(block: bytes) -> str | None:
    """What trailers say: None for OK, else the status' name and message.

    Reads literals that are not compressed, which is how gRPC's own server writes names and values that are
    not in the static table; skips everything else.
    """
    fields: dict[bytes, bytes] = {}
    at = 0

    def integer(bits: int) -> int:
        nonlocal at
        value = block[at] & (1 << bits) - 1
        at += 1
        if value == (1 << bits) - 1:
            shift, more = 0, True
            while more:
                value += (block[at] & 127) << shift
                shift, more = shift + 7, bool(block[at] & 128)
                at += 1
        return value

    def string() -> bytes:
        nonlocal at
        compressed = block[at] & 128
        size = integer(7)
        at += size
        return b"" if compressed else block[at - size : at]

    try:
        while at < len(block):
            first = block[at]
            if first & 128:
                integer(7)
            elif first & 224 == 32:
                integer(5)
            else:
                index = integer(6 if first & 64 else 4)
                name = string() if index == 0 else b""
                fields[name] = string()
        code = int(fields[b"grpc-status"])
    except (IndexError, KeyError, ValueError):
        return "UNKNOWN: the trailers cannot be read"
    message = unquote(fields.get(b"grpc-message", b"").decode(errors="replace"))
    return None if code == 0 else f"{_CODES.get(code, code)}: {message}"
