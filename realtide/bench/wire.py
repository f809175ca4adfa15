"""gRPC calls over plain HTTP/2, driven by one loop without threads or tasks: a lean client for loads (ours).

A client's own cost is on the same processors as the server that it measures, where real clients are not. What
grpc's asyncio client spends on a message is as much as the server does; here a message that was framed
beforehand costs its HTTP/2 frame and its share of a system call. The protocol itself is the library `h2`'s.
"""

from __future__ import annotations

import contextlib
import socket
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from urllib.parse import unquote

import grpc
import h2.config
import h2.connection
import h2.errors
import h2.events
import h2.exceptions
import h2.settings

_PREFIX = 5  # bytes before a message: not compressed, its length
_READ = 1 << 18
_WINDOW = 1 << 30  # bytes that the server may send without being asked to go on
_NAMES = {code.value[0]: code.name for code in grpc.StatusCode}


def framed(message: bytes) -> bytes:
    """A serialized message as gRPC frames it, not compressed."""
    return b"\0" + len(message).to_bytes(_PREFIX - 1, "big") + message


@dataclass(slots=True, eq=False)
class Call:
    """One call of a connection.

    Attributes:
        stream: HTTP/2 stream.
        answers: messages that came and were not taken yet.
        ended: nothing more comes.
        failure: the status' name and message, if it is not OK; what broke the connection.
    """

    stream: int
    answers: deque[bytes] = field(default_factory=deque)
    ended: bool = False
    failure: str | None = None
    _out: deque[tuple[bytes, bool]] = field(default_factory=deque)  # what the window does not let go yet
    _in: bytearray = field(default_factory=bytearray)

    def take(self, data: bytes) -> None:
        """Bytes came."""
        self._in += data
        while len(self._in) >= _PREFIX:
            end = _PREFIX + int.from_bytes(self._in[1:_PREFIX], "big")
            if len(self._in) < end:
                return
            self.answers.append(bytes(self._in[_PREFIX:end]))
            del self._in[:end]

    def close(self, failure: str | None) -> None:
        """Nothing more comes; the first failure counts."""
        self.ended = True
        self.failure = self.failure or failure


class Connection:
    """One HTTP/2 connection without TLS.

    Args:
        address: HOST:PORT.

    Raises:
        OSError: nobody answers there.
    """

    def __init__(self, address: str) -> None:
        host, _, port = address.rpartition(":")
        self._authority = address
        self._socket = socket.create_connection((host.strip("[]"), int(port)), timeout=10)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket.setblocking(False)
        self._http = h2.connection.H2Connection(h2.config.H2Configuration(header_encoding="utf-8"))
        codes = h2.settings.SettingCodes
        self._http.local_settings = h2.settings.Settings(
            client=True, initial_values={codes.INITIAL_WINDOW_SIZE: _WINDOW, codes.ENABLE_PUSH: 0}
        )
        self._http.initiate_connection()
        self._http.increment_flow_control_window(_WINDOW)
        self._calls: dict[int, Call] = {}
        self._waiting: set[Call] = set()  # have messages that the window does not let go
        self._unsent = b""

    def fileno(self) -> int:
        """For a selector."""
        return self._socket.fileno()

    @property
    def blocked(self) -> bool:
        """True if the kernel did not take all that was sent: call `flush` when the socket can be written."""
        return bool(self._unsent)

    def call(self, method: str) -> Call:
        """Start a call of `method`, as /package.Service/Method."""
        stream = self._http.get_next_available_stream_id()
        headers = [
            (":method", "POST"),
            (":scheme", "http"),
            (":path", method),
            (":authority", self._authority),
            ("te", "trailers"),
            ("content-type", "application/grpc"),
        ]
        self._http.send_headers(stream, headers)
        call = self._calls[stream] = Call(stream)
        return call

    def send(self, call: Call, message: bytes, end: bool = False) -> None:
        """Queue a framed message, the last one if `end`; `flush` sends it. Nothing if the call has ended."""
        if call.ended:
            return
        call._out.append((message, end))
        self._push(call)

    def flush(self) -> None:
        """Hand everything to the kernel that it takes now."""
        data = self._unsent + self._http.data_to_send()
        try:
            self._unsent = data[self._socket.send(data) :] if data else b""
        except BlockingIOError:
            self._unsent = data
        except OSError as error:
            self._lost(str(error))

    def receive(self) -> Iterable[Call]:
        """Take what has come; returns the calls that have something new."""
        try:
            data = self._socket.recv(_READ)
            if not data:
                return self._lost("the server closed the connection")
            events = self._http.receive_data(data)
        except BlockingIOError:
            return ()
        except (OSError, h2.exceptions.ProtocolError) as error:
            return self._lost(str(error))
        touched: dict[Call, None] = {}
        for event in events:
            call = self._calls.get(getattr(event, "stream_id", None) or 0)
            if isinstance(event, h2.events.ConnectionTerminated):
                return self._lost(f"the server ended the connection ({event.error_code})")
            if isinstance(event, h2.events.DataReceived) and call is not None:
                call.take(event.data or b"")
            elif isinstance(event, h2.events.TrailersReceived | h2.events.ResponseReceived):
                self._status(call, dict(event.headers or ()))  # type: ignore[arg-type]  # decoded
            elif isinstance(event, h2.events.StreamEnded) and call is not None:
                call.close(None)
            elif isinstance(event, h2.events.StreamReset) and call is not None:
                call.close(f"the server reset the call ({event.error_code})")
            if call is not None:
                touched[call] = None
        for call in list(self._waiting):  # a window may have grown
            self._push(call)
        self.flush()  # acknowledgements, and what could be pushed
        return touched

    def cancel(self, call: Call) -> None:
        """End a call that has not ended."""
        if not call.ended:
            call.close("cancelled")
            with contextlib.suppress(h2.exceptions.ProtocolError):
                self._http.reset_stream(call.stream, h2.errors.ErrorCodes.CANCEL)
            self.flush()

    def close(self) -> None:
        """End the connection, and with it all calls."""
        self._socket.close()

    def _push(self, call: Call) -> None:
        """Give HTTP/2 as much as windows allow."""
        http = self._http
        try:
            while call._out:
                message, end = call._out[0]
                room = min(http.local_flow_control_window(call.stream), http.max_outbound_frame_size)
                if len(message) <= room:
                    http.send_data(call.stream, message, end_stream=end)
                    call._out.popleft()
                elif room > 0:
                    http.send_data(call.stream, message[:room])
                    call._out[0] = (message[room:], end)
                else:
                    self._waiting.add(call)
                    return
        except h2.exceptions.ProtocolError as error:  # the server has ended the call meanwhile
            call._out.clear()
            call.close(str(error))
        self._waiting.discard(call)

    def _status(self, call: Call | None, headers: dict[str, str]) -> None:
        status = headers.get("grpc-status")
        if call is not None and status is not None and status != "0":
            name = _NAMES.get(int(status), status)
            call.failure = call.failure or f"{name}: {unquote(headers.get('grpc-message', ''))}"

    def _lost(self, failure: str) -> Iterable[Call]:
        lost = [call for call in self._calls.values() if not call.ended]
        for call in lost:
            call.close(failure)
        self._unsent = b""
        return lost
