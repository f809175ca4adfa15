"""The server as a process: how it says that it is ready, how it stops; what cannot be started."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from realtide.server.app import Server
from realtide.server.config import ConfigError, ModelConfig, ServerConfig
from realtide.server.loading import load_engines
from realtide_client.v1 import models_pb2, models_pb2_grpc, speech_pb2_grpc
from tests.server.engine import BurstEngine, pcm16, tone
from tests.server.helpers import DEFAULTS, audio, failure, finish, opening, responses, running

ROOT = Path(__file__).parents[2]


@contextlib.asynccontextmanager
async def process(**settings: Any) -> AsyncIterator[tuple[Any, dict[str, Any]]]:
    """A server process and what it said when it was ready."""
    flags = DEFAULTS | {"log_format": "json"} | settings
    environment = {name: value for name, value in os.environ.items() if not name.startswith("REALTIDE_")}
    child = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "tests.server.serve_bursts",
        json.dumps(flags),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=ROOT,
        env=environment | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert child.stdout is not None
    try:
        async with asyncio.timeout(60):
            line = await child.stdout.readline()
        assert line, (await child.communicate())[1].decode()
        yield child, json.loads(line)
    finally:
        if child.returncode is None:
            child.kill()
        await child.communicate()


async def opened(port: int) -> tuple[grpc.aio.Channel, Any]:
    channel = grpc.aio.insecure_channel(f"127.0.0.1:{port}")
    stub: Any = speech_pb2_grpc.SpeechStub(channel)
    call = stub.Stream()
    await call.write(opening())
    assert (await call.read()).WhichOneof("message") == "opened"
    return channel, call


async def test_ready_line_port_file_and_a_graceful_end(tmp_path: Path) -> None:
    file = tmp_path / "deeper" / "ports.json"
    async with process(port_file=str(file), drain_seconds=30.0) as (child, ready):
        assert ready == json.loads(file.read_text())
        assert ready["models"] == ["bursts"]
        channel, call = await opened(ready["port"])
        child.send_signal(signal.SIGTERM)
        assert (await call.read()).WhichOneof("message") == "going_away"
        await call.write(audio(pcm16(tone(0.2))))
        await call.write(finish())
        found = await responses(call)
        assert [one.final.text for one in found if one.WhichOneof("message") == "final"] == ["burst1"]
        async with asyncio.timeout(30):
            _, errors = await child.communicate()
        assert child.returncode == 0, errors.decode()
        lines = [json.loads(line) for line in errors.decode().splitlines()]
        assert lines[-1]["message"] == "stopped"
        assert all(line["level"] in ("info", "debug") for line in lines)
        session = next(line for line in lines if line["message"] == "session opened")
        assert session["session"]
        await channel.close(None)


async def test_the_second_signal_does_not_wait() -> None:
    async with process(drain_seconds=3600.0) as (child, ready):
        channel, call = await opened(ready["port"])
        child.send_signal(signal.SIGTERM)
        assert (await call.read()).WhichOneof("message") == "going_away"
        child.send_signal(signal.SIGINT)
        async with asyncio.timeout(30):
            await child.wait()
        assert child.returncode == 0
        await failure(call)
        await channel.close(None)


async def test_an_address_in_use_is_a_sentence() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(ConfigError, match=f"port: cannot listen on 127.0.0.1:{port}"):
            async with Server(ServerConfig(**(DEFAULTS | {"port": port})), [BurstEngine()]):
                pass
        settings = {"metrics_enabled": True, "metrics_port": port}
        with pytest.raises(ConfigError, match=f"metrics_port: {port} cannot be used"):
            async with Server(ServerConfig(**(DEFAULTS | settings)), [BurstEngine()]):
                pass


async def test_no_model_is_refused() -> None:
    with pytest.raises(ConfigError, match="at least one bundle"):
        async with Server(ServerConfig(**DEFAULTS)):
            pass


def test_bundles_that_cannot_be_served(tmp_path: Path) -> None:
    for name in (tmp_path, Path("no-such-bundle")):
        with pytest.raises(ConfigError, match="models: there is no bundle"):
            load_engines(ModelConfig(bundle=name), ServerConfig())
    (tmp_path / "manifest.yaml").write_text("[")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_engines(ModelConfig(bundle=tmp_path), ServerConfig())
    (tmp_path / "manifest.yaml").write_text("engine: ancat\n")
    with pytest.raises(ConfigError, match=str(tmp_path)):  # the engine itself misses the rest
        load_engines(ModelConfig(bundle=tmp_path), ServerConfig())
    (tmp_path / "manifest.yaml").write_text("engine: steam\n")
    with pytest.raises(ConfigError, match="needs engine 'steam', must be one of ancat, longlive"):
        load_engines(ModelConfig(bundle=tmp_path), ServerConfig())


def test_loading_shares_the_slots_among_executors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "manifest.yaml").write_text("engine: ancat\n")
    seen: list[dict[str, Any]] = []

    class Module:
        @staticmethod
        def load(bundle: Path, **options: Any) -> BurstEngine:
            assert bundle == tmp_path
            seen.append(options)
            return BurstEngine(slots=options["slots"])

    monkeypatch.setattr("importlib.import_module", lambda name: Module)
    config = ServerConfig(slots=7, executors=3, max_batch=3, precision="int8", ort_threads=2)
    engines = load_engines(ModelConfig(bundle=tmp_path), config)
    assert [engine.slots for engine in engines] == [3, 2, 2]
    assert [options["max_batch"] for options in seen] == [3, 2, 2]
    assert all((one["precision"], one["threads"]) == ("int8", 2) for one in seen)
    seen.clear()
    load_engines(ModelConfig(bundle=tmp_path, slots=1, precision="fp32"), config)
    assert [(one["slots"], one["precision"]) for one in seen] == [(1, "fp32")]
    seen.clear()
    (tmp_path / "manifest.yaml").write_text("engine: longlive\n")
    load_engines(ModelConfig(bundle=tmp_path), config)
    load_engines(ModelConfig(bundle=tmp_path, slots=9), config)
    # A session of video is large: other numbers are the default.
    assert [one["slots"] for one in seen] == [2, 1, 1, 3, 3, 3]


async def test_stopping_twice_and_without_a_start() -> None:
    server = Server(ServerConfig(**DEFAULTS), [BurstEngine()])
    await server.stop()
    async with running() as live:
        await live.server.stop()
        await live.server.stop()


def _self_signed(key: Path, certificate: Path) -> None:
    request = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1"]
    names = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    files = ["-keyout", str(key), "-out", str(certificate)]
    subprocess.run([*request, *names, *files], check=True, capture_output=True)


async def test_tls(tmp_path: Path) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    _self_signed(key, certificate)
    settings: dict[str, Any] = {"tls_certificate": certificate, "tls_key": key, "tls_client_ca": certificate}
    async with running(**settings) as server:
        pem = certificate.read_bytes()
        with_own = grpc.ssl_channel_credentials(pem, key.read_bytes(), pem)
        async with grpc.aio.secure_channel(f"localhost:{server.server.port}", with_own) as channel:
            stub: Any = models_pb2_grpc.ModelsStub(channel)
            listed = await stub.ListModels(models_pb2.ListModelsRequest())
            assert [model.name for model in listed.models] == ["bursts"]
        without = grpc.ssl_channel_credentials(pem)
        async with grpc.aio.secure_channel(f"localhost:{server.server.port}", without) as channel:
            stub = models_pb2_grpc.ModelsStub(channel)
            with pytest.raises(grpc.aio.AioRpcError):
                await stub.ListModels(models_pb2.ListModelsRequest(), timeout=5)


def test_serving_imports_no_torch() -> None:
    code = "import realtide.server.app, sys; assert 'torch' not in sys.modules, 'torch was imported'"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, env=environment)
