"""A real server on free ports and a raw gRPC client for the server's tests."""

from __future__ import annotations

import asyncio
import contextlib
import urllib.request
from collections.abc import AsyncIterator, Sequence
from typing import Any

import grpc
import grpc.aio
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from realtide.server.app import Server
from realtide.server.config import ServerConfig
from realtide.server.models import AnyEngine
from realtide.server.remote import RemoteEngine
from realtide_client.v1 import common_pb2, speech_pb2, speech_pb2_grpc
from tests.server.engine import BurstEngine

EOF: Any = grpc.aio.EOF  # type: ignore[attr-defined]
Request = speech_pb2.SpeechStreamRequest

DEFAULTS: dict[str, Any] = {
    "host": "127.0.0.1",
    "port": 0,
    "metrics_host": "127.0.0.1",
    "metrics_port": 0,
    "metrics_enabled": False,  # its HTTP server takes half a second to stop
    "drain_seconds": 0.0,
    "grace_seconds": 0.5,
}


class Live:
    """A server, an engine of it and a channel to it."""

    def __init__(self, server: Server, engine: Any, channel: grpc.aio.Channel) -> None:
        self.server = server
        self.engine = engine
        self.channel = channel

    def metric(self, name: str, **labels: str) -> float:
        """A sample's value; 0 if it does not exist."""
        value = self.server.metrics.registry.get_sample_value(
            name, {"engine": self.engine.name, "model": self.engine.model, **labels}
        )
        return value or 0.0

    def exposition(self) -> str:
        url = f"http://127.0.0.1:{self.server.metrics_port}/metrics"
        with urllib.request.urlopen(url, timeout=5) as reply:
            return str(reply.read().decode())

    async def all_free(self) -> None:
        """Wait until every slot is free."""
        models = self.server.host.models.values()
        await until(lambda: not any(one.open_sessions for model in models for one in model.executors))
        if not isinstance(self.engine, RemoteEngine):
            await until(lambda: self.engine.free_slots == self.engine.slots)
        await until(lambda: all(not model.admission.used for model in self.server.host.models.values()))
        assert self.metric("realtide_slots_leaked") == 0


class Running(Live):
    """A server of speech."""

    def stream(self, **options: Any) -> Any:
        stub: Any = speech_pb2_grpc.SpeechStub(self.channel)
        return stub.Stream(**options)

    async def opened(self, **options: Any) -> Any:
        """A stream that has been opened."""
        call = self.stream()
        await call.write(opening(**options))
        response = await call.read()
        assert response.WhichOneof("message") == "opened", response
        return call


@contextlib.asynccontextmanager
async def connected(
    engines: Sequence[AnyEngine], **settings: Any
) -> AsyncIterator[tuple[Server, grpc.aio.Channel]]:
    """Start a server around `engines` and connect to it."""
    async with Server(ServerConfig(**(DEFAULTS | settings)), engines) as server:
        options = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_receive_message_length", -1)]
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}", options=options) as channel:
            yield server, channel


@contextlib.asynccontextmanager
async def running(
    engine: BurstEngine | None = None, more: Sequence[AnyEngine] = (), **settings: Any
) -> AsyncIterator[Running]:
    """Start a server around `engine`."""
    engine = engine or BurstEngine()
    async with connected([engine, *more], **settings) as (server, channel):
        yield Running(server, engine, channel)


async def until(condition: Any, seconds: float = 10.0) -> None:
    """Wait for `condition()`; fails after `seconds`, which are far more than it should need."""
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.005)


def opening(
    rate: int = 16000,
    encoding: int = speech_pb2.AUDIO_ENCODING_LINEAR16,
    session: common_pb2.SessionOptions | None = None,
    **options: Any,
) -> speech_pb2.SpeechStreamRequest:
    form = speech_pb2.AudioFormat(encoding=encoding, sample_rate_hz=rate)  # type: ignore[arg-type]
    return Request(
        open=speech_pb2.SpeechOpen(session=session, audio=form, options=speech_pb2.SpeechOptions(**options))
    )


def audio(data: bytes, position: int | None = None) -> speech_pb2.SpeechStreamRequest:
    return Request(audio=speech_pb2.AudioChunk(data=data, position=position))


def finish() -> speech_pb2.SpeechStreamRequest:
    return Request(finish=common_pb2.Finish())


async def responses(call: Any) -> list[Any]:
    """Everything that still comes; raises if the stream ends badly."""
    found = []
    while (response := await call.read()) is not EOF:
        found.append(response)
    if (code := await call.code()) != grpc.StatusCode.OK:
        raise AssertionError(f"{code}: {await call.details()}")
    return found


async def failure(call: Any, found: list[Any] | None = None) -> grpc.aio.AioRpcError:
    """Read until the stream ends badly; what comes before goes into `found`."""
    try:
        async with asyncio.timeout(10):
            while (response := await call.read()) is not EOF:
                if found is not None:
                    found.append(response)
    except grpc.aio.AioRpcError as error:
        return error
    raise AssertionError(f"the stream ended with {await call.code()}")


def violation(error: grpc.aio.AioRpcError) -> tuple[str, str]:
    """Field and description of the error's BadRequest."""
    detail = _detail(error, error_details_pb2.BadRequest)
    (one,) = detail.field_violations
    return one.field, one.description


def retry_seconds(error: grpc.aio.AioRpcError) -> float:
    """Delay of the error's RetryInfo."""
    delay = _detail(error, error_details_pb2.RetryInfo).retry_delay
    return float(delay.seconds) + float(delay.nanos) / 1e9


def _detail(error: grpc.aio.AioRpcError, kind: Any) -> Any:
    status = rpc_status.from_call(error)  # type: ignore[arg-type]
    assert status is not None, f"no details: {error}"
    for packed in status.details:
        detail = kind()
        if packed.Unpack(detail):
            return detail
    raise AssertionError(f"no {kind.__name__} in {status}")
