"""One connection of a session: channel, call and the server's first message."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import grpc

from realtide_client import errors
from realtide_client.v1 import speech_pb2, speech_pb2_grpc

Call = grpc.aio.StreamStreamCall[speech_pb2.SpeechStreamRequest, speech_pb2.SpeechStreamResponse]
Metadata = Sequence[tuple[str, str | bytes]]

_OPTIONS: tuple[tuple[str, int], ...] = (
    # Channels do not share connections: a new channel may reach another replica behind the same address.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.max_receive_message_length", 64 << 20),
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


class Link:
    """An opened call. `close` is idempotent and frees the server's slot at once."""

    def __init__(self, channel: grpc.aio.Channel, call: Call, opened: speech_pb2.SpeechOpened) -> None:
        self._channel = channel
        self.call = call
        self.opened = opened
        self.finished = False  # the end of the input has been sent

    async def close(self) -> None:
        """Cancel the call if it still runs, and close the channel."""
        self.call.cancel()
        await self._channel.close(None)


async def dial(target: Target, first: Callable[[], speech_pb2.SpeechStreamRequest], timeout: float) -> Link:
    """Connect, send the first message and wait for the server's.

    Args:
        target: Where to connect.
        first: Makes the first message.
        timeout: Seconds to wait for the server's first message (a queue for slots included).

    Raises:
        RealtideError: The server cannot be reached, refused, or did not answer in time.
    """
    channel = target.channel()
    call: Call = speech_pb2_grpc.SpeechStub(channel).Stream(None, metadata=tuple(target.metadata))
    try:
        async with asyncio.timeout(timeout):
            await _write(call, first())
            response = await call.read()
        if not isinstance(response, speech_pb2.SpeechStreamResponse):
            raise await status_of(call) or errors.ServerError(
                "the server closed the stream without opening it"
            )
        if response.WhichOneof("message") != "opened":
            raise errors.ServerError("the server's first message was not `opened`")
        return Link(channel, call, response.opened)
    except BaseException as error:
        call.cancel()
        await channel.close(None)
        if isinstance(error, TimeoutError):
            raise errors.Unavailable(f"no answer from {target.address} within {timeout:g} s") from None
        if isinstance(error, grpc.aio.AioRpcError):
            raise errors.from_rpc_error(error) from None
        raise


async def _write(call: Call, request: speech_pb2.SpeechStreamRequest) -> None:
    try:
        await call.write(request)
    except (asyncio.InvalidStateError, grpc.aio.AioRpcError):
        # The call is over already; its status says why and is read next.
        return


async def status_of(call: Call) -> errors.RealtideError | None:
    """How a call ended whose messages are used up; None for OK."""
    code = await call.code()
    if code is grpc.StatusCode.OK:
        return None
    return errors.from_status(code, await call.details() or "", await call.trailing_metadata())
