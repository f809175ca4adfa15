"""A scripted server on a free port."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable

import grpc
import pytest

from realtide_client.v1 import models_pb2_grpc, speech_pb2_grpc
from tests.clients.scripted import Script, ScriptedSpeech

Serve = Callable[[Script], Awaitable[tuple[str, ScriptedSpeech]]]


@pytest.fixture
async def serve() -> AsyncIterator[Serve]:
    """Start a server that follows the given script; the answer is its address and the servicer."""
    servers = []

    async def start(script: Script) -> tuple[str, ScriptedSpeech]:
        server = grpc.aio.server()
        servicer = ScriptedSpeech(script)
        speech_pb2_grpc.add_SpeechServicer_to_server(servicer, server)
        models_pb2_grpc.add_ModelsServicer_to_server(servicer, server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        servers.append(server)
        return f"127.0.0.1:{port}", servicer

    yield start
    for server in servers:
        await server.stop(None)
