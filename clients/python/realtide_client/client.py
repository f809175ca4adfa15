"""The entrance: a server, its models and its sessions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any, Self

import grpc

from realtide_client import errors
from realtide_client import image_types as i
from realtide_client import types as t
from realtide_client import video_types as v
from realtide_client.image import ImageStream
from realtide_client.link import Metadata, Target
from realtide_client.retry import RetryPolicy
from realtide_client.stream import SpeechStream
from realtide_client.v1 import models_pb2, models_pb2_grpc
from realtide_client.video import VideoStream


class Client:
    """A server. Nothing is connected before the first call. See `connect`."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._channel: grpc.aio.Channel | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connection of `models` and `describe`; speech sessions have their own. Idempotent."""
        if self._channel is not None:
            await self._channel.close(None)
            self._channel = None

    def speech(
        self,
        options: t.SpeechOptions | None = None,
        *,
        resume: t.Checkpoint | None = None,
        retry: RetryPolicy | None = None,
        open_timeout: float = 30.0,
        checkpoint_interval_ms: int = 5000,
        replay_seconds: float = 60.0,
        send_ahead_seconds: float = 10.0,
        **choices: Any,
    ) -> SpeechStream:
        """A speech session, to be used with `async with`.

        Args:
            options: The session's choices; default: all defaults.
            resume: A checkpoint to continue from; its choices hold.
            retry: When to connect again; `RetryPolicy(max_retries=0)`: never.
            open_timeout: Seconds to wait for the server's first message.
            checkpoint_interval_ms: Milliseconds of audio between checkpoints.
            replay_seconds: Most audio kept for being sent again.
            send_ahead_seconds: Audio that may wait for being sent before `send` waits.
            **choices: Fields of SpeechOptions, as a shorthand: `client.speech(sample_rate=8000)`.
        """
        return SpeechStream(
            self._target,
            replace(options or t.SpeechOptions(), **choices),
            resume=resume,
            retry=retry,
            open_timeout=open_timeout,
            checkpoint_interval_ms=checkpoint_interval_ms,
            replay_seconds=replay_seconds,
            send_ahead_seconds=send_ahead_seconds,
        )

    def video(
        self,
        options: v.VideoOptions | None = None,
        *,
        resume: t.Checkpoint | None = None,
        retry: RetryPolicy | None = None,
        open_timeout: float = 30.0,
        checkpoint_interval_ms: int = 5000,
        buffer_seconds: float | None = 2.0,
        **choices: Any,
    ) -> VideoStream:
        """A video session, to be used with `async with`.

        Args:
            options: The session's choices.
            resume: A checkpoint to continue from; its choices hold, the encoding too.
            retry: When to connect again; `RetryPolicy(max_retries=0)`: never.
            open_timeout: Seconds to wait for the server's first message.
            checkpoint_interval_ms: Milliseconds of video between checkpoints.
            buffer_seconds: Video that may be generated ahead of what was taken from the iterator; None: only
                `VideoStream.grant` gives credit.
            **choices: Fields of VideoOptions, as a shorthand: `client.video(prompt="a red apple", seed=7)`.

        Raises:
            ValueError: An encoding that there is not, a value that does not fit its field at all, or a
                buffer that is not more than 0.
        """
        return VideoStream(
            self._target,
            replace(options or v.VideoOptions(), **choices),
            resume=resume,
            retry=retry,
            open_timeout=open_timeout,
            checkpoint_interval_ms=checkpoint_interval_ms,
            buffer_seconds=buffer_seconds,
        )

    def image(
        self,
        options: i.ImageOptions | None = None,
        *,
        resume: t.Checkpoint | None = None,
        retry: RetryPolicy | None = None,
        open_timeout: float = 30.0,
        checkpoint_every: int = 1,
        **choices: Any,
    ) -> ImageStream:
        """An image session, to be used with `async with`: any number of images, one after the other.

        Args:
            options: The session's choices.
            resume: A checkpoint to continue from; its choices hold, the encoding too.
            retry: When to connect again; `RetryPolicy(max_retries=0)`: never.
            open_timeout: Seconds to wait for the server's first message.
            checkpoint_every: Images between checkpoints.
            **choices: Fields of ImageOptions, as a shorthand: `client.image(encoding="jpeg")`.

        Raises:
            ValueError: An encoding that there is not, or a value that does not fit its field at all.
        """
        return ImageStream(
            self._target,
            replace(options or i.ImageOptions(), **choices),
            resume=resume,
            retry=retry,
            open_timeout=open_timeout,
            checkpoint_every=checkpoint_every,
        )

    async def models(self, timeout: float = 10.0) -> list[models_pb2.Model]:
        """Every model of the server, as protobuf messages.

        Raises:
            RealtideError: The server cannot be reached or refused.
        """
        try:
            response = await self._models().ListModels(
                models_pb2.ListModelsRequest(), timeout=timeout, metadata=tuple(self._target.metadata)
            )
        except grpc.aio.AioRpcError as error:
            raise errors.from_rpc_error(error) from None
        return list(response.models)

    async def describe(self, name: str, timeout: float = 10.0) -> models_pb2.Model:
        """One model with its limits and momentary capacity.

        Raises:
            NotFound: There is no such model.
            RealtideError: The server cannot be reached or refused.
        """
        try:
            response = await self._models().DescribeModel(
                models_pb2.DescribeModelRequest(name=name),
                timeout=timeout,
                metadata=tuple(self._target.metadata),
            )
        except grpc.aio.AioRpcError as error:
            raise errors.from_rpc_error(error) from None
        return response.model

    def _models(self) -> models_pb2_grpc.ModelsAsyncStub:
        if self._channel is None:
            self._channel = self._target.channel()
        return models_pb2_grpc.ModelsStub(self._channel)


def target_of(
    address: str,
    *,
    tls: bool = False,
    root_certificates: bytes | None = None,
    client_key: bytes | None = None,
    client_certificate: bytes | None = None,
    api_key: str | None = None,
    metadata: Metadata = (),
    channel_options: Sequence[tuple[str, str | int]] = (),
) -> Target:
    """How to reach a server; the arguments are those of `connect`."""
    credentials = None
    if tls or root_certificates or client_certificate:
        credentials = grpc.ssl_channel_credentials(root_certificates, client_key, client_certificate)
    if api_key is not None:
        metadata = (*metadata, ("authorization", f"Bearer {api_key}"))
    return Target(address, credentials, tuple(metadata), tuple(channel_options))


def connect(
    address: str,
    *,
    tls: bool = False,
    root_certificates: bytes | None = None,
    client_key: bytes | None = None,
    client_certificate: bytes | None = None,
    api_key: str | None = None,
    metadata: Metadata = (),
    channel_options: Sequence[tuple[str, str | int]] = (),
) -> Client:
    """A client of the server at `address`, for `asyncio`.

    Args:
        address: gRPC target, for example `localhost:50051` or `dns:///speech.example:443`.
        tls: Use TLS with the system's root certificates.
        root_certificates: PEM; use TLS with these roots instead.
        client_key: PEM; the client's key, for mutual TLS.
        client_certificate: PEM; the client's certificate chain, for mutual TLS.
        api_key: Sent as `authorization: Bearer ...` with every call. Without TLS it travels in plain text.
        metadata: Further metadata of every call.
        channel_options: Further gRPC channel options.
    """
    return Client(
        target_of(
            address,
            tls=tls,
            root_certificates=root_certificates,
            client_key=client_key,
            client_certificate=client_certificate,
            api_key=api_key,
            metadata=metadata,
            channel_options=channel_options,
        )
    )
