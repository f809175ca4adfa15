"""One connection of a session: channel, call and the server's first message."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any

import grpc

from realtide_client import errors
from realtide_client.v1 import (
    common_pb2,
    image_pb2,
    image_pb2_grpc,
    speech_pb2,
    speech_pb2_grpc,
    video_pb2,
    video_pb2_grpc,
)

Request = speech_pb2.SpeechStreamRequest | video_pb2.VideoStreamRequest | image_pb2.ImageStreamRequest
Response = speech_pb2.SpeechStreamResponse | video_pb2.VideoStreamResponse | image_pb2.ImageStreamResponse
Metadata = Sequence[tuple[str, str | bytes]]

_Status = tuple[grpc.StatusCode, str, Any]
_WRITE_FAILED = "Internal error from Core"
_STATUS_SECONDS = 0.005  # between looks for the server's status
_STATUS_TRIES = 40

_OPTIONS: tuple[tuple[str, int], ...] = (
    # Channels do not share connections: a new channel may reach another replica behind the same address.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.max_receive_message_length", 64 << 20),
    # A network that is cut says nothing: only an answer that does not come tells.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
)


@dataclass(frozen=True, slots=True)
class Target:
    """Where the server is and how to reach it.

    Attributes:
        address: gRPC target, for example `localhost:50051`.
        credentials: TLS credentials; None: plain text.
        metadata: Sent with every call.
        options: Further channel options.
    """

    address: str
    credentials: grpc.ChannelCredentials | None = None
    metadata: Metadata = ()
    options: Sequence[tuple[str, str | int]] = ()

    def channel(self) -> grpc.aio.Channel:
        """A new channel with connections of its own."""
        options = [*_OPTIONS, *self.options]
        if self.credentials is None:
            return grpc.aio.insecure_channel(self.address, options=options)
        return grpc.aio.secure_channel(self.address, self.credentials, options=options)


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of session: the service that serves it, and its messages; all kinds follow one grammar.

    Attributes:
        name: For people and logs.
        stub: Makes the service's stub of a channel.
        request: Makes a message of the client.
        response: Class of the server's messages.
    """

    name: str
    stub: Callable[[grpc.aio.Channel], Any]
    request: Callable[..., Request]
    response: (
        type[speech_pb2.SpeechStreamResponse]
        | type[video_pb2.VideoStreamResponse]
        | type[image_pb2.ImageStreamResponse]
    )


SPEECH = Kind(
    "speech", speech_pb2_grpc.SpeechStub, speech_pb2.SpeechStreamRequest, speech_pb2.SpeechStreamResponse
)
VIDEO = Kind("video", video_pb2_grpc.VideoStub, video_pb2.VideoStreamRequest, video_pb2.VideoStreamResponse)
IMAGE = Kind("image", image_pb2_grpc.ImageStub, image_pb2.ImageStreamRequest, image_pb2.ImageStreamResponse)


class Link:
    """One call. `close` is idempotent and frees the server's slot at once."""

    def __init__(self, target: Target, kind: Kind) -> None:
        self._target = target
        self._kind = kind
        self._channel = target.channel()
        self._call: grpc.aio.StreamStreamCall[Any, Any] = kind.stub(self._channel).Stream(
            None, metadata=tuple(target.metadata)
        )
        self._status: _Status | None = None
        self._call.add_done_callback(self._on_done)
        self.opened: Any = None  # the server's first message, once `open` has returned
        self.finished = False  # the end of the input has been sent

    async def open(self, first: Request, timeout: float) -> None:
        """Send the first message and wait for the server's.

        Args:
            first: `open` or `resume`.
            timeout: Seconds to wait for the server's first message (a queue for slots included).

        Raises:
            RealtideError: The server cannot be reached, refused, or did not answer in time.
        """
        try:
            async with asyncio.timeout(timeout):
                await self.write(first)
                response = await self.read()
        except TimeoutError:
            raise errors.Unavailable(f"no answer from {self._target.address} within {timeout:g} s") from None
        if response is None or response.WhichOneof("message") != "opened":
            raise errors.ServerError("the server's first message was not `opened`")
        self.opened = response.opened

    async def write(self, request: Request) -> bool:
        """Send a message; waits for flow control. False if the call is over: `read` says why."""
        try:
            await self._call.write(request)
        except (asyncio.InvalidStateError, grpc.aio.AioRpcError):
            return False
        return True

    async def finish(self) -> None:
        """Send the end of the input."""
        self.finished = True
        if await self.write(self._kind.request(finish=common_pb2.Finish())):
            with contextlib.suppress(asyncio.InvalidStateError, grpc.aio.AioRpcError):
                await self._call.done_writing()

    async def half_close(self) -> None:
        """Say that nothing more will be sent: everything has come. Idempotent."""
        if not self.finished:
            self.finished = True
            with contextlib.suppress(asyncio.InvalidStateError, grpc.aio.AioRpcError):
                await self._call.done_writing()

    async def read(self) -> Response | None:
        """The next message, or None if the stream has ended with OK.

        Raises:
            RealtideError: The stream has ended otherwise.
        """
        with contextlib.suppress(grpc.aio.AioRpcError):
            response = await self._call.read()
            if isinstance(response, self._kind.response):
                return response
        code, details, metadata = await self._final_status()
        if code is grpc.StatusCode.OK:
            return None
        if details == _WRITE_FAILED:
            raise errors.Unavailable("the connection was lost while sending", code=code)
        raise errors.from_status(code, details, metadata)

    async def close(self) -> None:
        """Cancel the call if it still runs, and close the channel."""
        self._call.cancel()
        await self._channel.close(None)

    # grpcio overwrites the status that the server sent when a write fails as the call ends (grpc/grpc#36066).
    # So the first status is noted at the moment it comes; and if it is that of the failed write, the server's
    # is waited for.

    def _on_done(self, _: Any) -> None:
        self._status = self._status_now()

    def _status_now(self) -> _Status:
        call = self._call
        return _now(call.code()), _now(call.details()) or "", _now(call.trailing_metadata())

    async def _final_status(self) -> _Status:
        await self._call.code()
        status = self._status or self._status_now()
        for _ in range(_STATUS_TRIES):
            if status[1] != _WRITE_FAILED:
                break
            await asyncio.sleep(_STATUS_SECONDS)
            status = self._status_now()
        return status


def _now(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """The result of a coroutine that need not wait, because the call is over."""
    try:
        coroutine.send(None)
    except StopIteration as done:
        return done.value
    coroutine.close()
    raise RuntimeError("the call is not over")
