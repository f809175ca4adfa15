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
from grpc_health.v1 import health_pb2, health_pb2_grpc

from realtide.server.app import Server
from realtide.server.config import ConfigError, ModelConfig, ServerConfig
from realtide.server.engine_process import Load
from realtide.server.loading import load_engines
from realtide.server.remote import RemoteEngine
from realtide_client.v1 import speech_pb2_grpc
from tests.server.burst_process import loading
from tests.server.engine import BurstEngine, pcm16, tone
from tests.server.helpers import DEFAULTS, audio, failure, finish, opening, responses, running

SERVING, NOT_SERVING = 1, 2
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


async def test_a_server_that_stops_takes_no_new_connections() -> None:
    async with process(drain_seconds=30.0, admin_host="127.0.0.1", admin_port=0) as (child, ready):
        channel, call = await opened(ready["port"])
        child.send_signal(signal.SIGTERM)
        assert (await call.read()).WhichOneof("message") == "going_away"
        async with asyncio.timeout(10):
            while await connects(ready["port"]):
                await asyncio.sleep(0.01)
        # Those who ask get an answer all the while.
        async with grpc.aio.insecure_channel(f"127.0.0.1:{ready['admin_port']}") as admin:
            stub: Any = health_pb2_grpc.HealthStub(admin)
            assert (await stub.Check(health_pb2.HealthCheckRequest(), timeout=10)).status == NOT_SERVING
        await call.write(finish())
        await responses(call)
        async with asyncio.timeout(30):
            await child.wait()
        assert child.returncode == 0
        await channel.close(None)


async def connects(port: int) -> bool:
    try:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
    except ConnectionRefusedError:
        return False
    writer.close()
    return True


async def test_who_watches_health_hears_of_the_drain_and_holds_up_nothing() -> None:
    async with (
        process(drain_seconds=3600.0, grace_seconds=0.5) as (child, ready),
        grpc.aio.insecure_channel(f"127.0.0.1:{ready['port']}") as channel,
    ):
        stub: Any = health_pb2_grpc.HealthStub(channel)
        watch = stub.Watch(health_pb2.HealthCheckRequest())
        assert (await watch.read()).status == SERVING
        child.send_signal(signal.SIGTERM)
        assert (await watch.read()).status == NOT_SERVING
        async with asyncio.timeout(30):
            await child.wait()
        assert child.returncode == 0
        watch.cancel()


async def test_a_signal_while_models_are_loaded() -> None:
    code = (
        "import asyncio, time\n"
        "from realtide.server import app, config\n"
        "def slow(model, settings):\n"
        "    print('loading', flush=True)\n"
        "    time.sleep(3600)\n"
        "app.load_engines = slow\n"
        "app.run(config.ServerConfig(models=['somewhere'], log_format='json'))\n"
    )
    child = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        code,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    try:
        assert child.stdout is not None
        async with asyncio.timeout(60):
            assert await child.stdout.readline() == b"loading\n"
            child.send_signal(signal.SIGTERM)
            _, errors = await child.communicate()
        assert child.returncode == 0, errors.decode()
        assert json.loads(errors.decode().splitlines()[-1])["message"] == "stopped while loading"
    finally:
        if child.returncode is None:
            child.kill()


async def test_an_address_in_use_is_a_sentence() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(ConfigError, match=f"port: cannot listen on 127.0.0.1:{port}"):
            async with Server(ServerConfig(**(DEFAULTS | {"port": port})), [BurstEngine()]):
                pass
        settings: dict[str, Any] = {"admin_host": "127.0.0.1", "admin_port": port}
        with pytest.raises(ConfigError, match=f"admin_port: cannot listen on 127.0.0.1:{port}"):
            async with Server(ServerConfig(**(DEFAULTS | settings)), [BurstEngine()]):
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
    config = ServerConfig(
        slots=7, executors=3, executor_processes=False, max_batch=3, precision="int8", ort_threads=2
    )
    engines = load_engines(ModelConfig(bundle=tmp_path), config).engines
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


@pytest.mark.parametrize(
    ("server", "model", "usable", "processes"),
    [
        (None, None, 2, True),
        (None, None, 1, False),
        (True, None, 1, True),
        (False, None, 2, False),
        (False, True, 1, True),
        (True, False, 2, False),
    ],
)
def test_executors_of_speech_are_processes_where_there_are_two_processors(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    server: bool | None,
    model: bool | None,
    usable: int,
    processes: bool,
) -> None:
    (tmp_path / "manifest.yaml").write_text("engine: ancat\n")
    told: list[Load] = []

    class Module:
        @staticmethod
        def load(bundle: Path, **options: Any) -> BurstEngine:
            return BurstEngine(slots=options["slots"])

    class Remote(RemoteEngine):
        def __init__(self, load: Load) -> None:
            told.append(load)

    monkeypatch.setattr("realtide.server.loading.RemoteEngine", Remote)
    monkeypatch.setattr("realtide.server.processors.usable", lambda: usable)
    monkeypatch.setattr("importlib.import_module", lambda name: Module)
    config = ServerConfig(slots=5, executors=2, executor_processes=server, log_format="json")
    engines = load_engines(ModelConfig(bundle=tmp_path, executor_processes=model), config).engines
    assert [isinstance(engine, RemoteEngine) for engine in engines] == [processes] * 2
    if processes:
        assert [one.arguments["slots"] for one in told] == [3, 2]
        assert {(one.module, one.bundle, one.log_format) for one in told} == {
            ("realtide.engines.ancat.engine", tmp_path, "json")
        }
    # Engines that work beside steps are threads, and are refused where they are not to be.
    (tmp_path / "manifest.yaml").write_text("engine: longlive\n")
    if model:
        with pytest.raises(ConfigError, match="executor_processes: only executors of speech models"):
            load_engines(ModelConfig(bundle=tmp_path, executor_processes=model), config)
    else:
        engines = load_engines(ModelConfig(bundle=tmp_path, executor_processes=model), config).engines
        assert not [engine for engine in engines if isinstance(engine, RemoteEngine)]


def test_no_process_is_left_if_a_second_one_cannot_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[RemoteEngine] = []

    class Remote(RemoteEngine):
        def __init__(self, load: Load) -> None:
            super().__init__(loading() if not made else loading(goes_wrong="refuses"))
            made.append(self)

    (tmp_path / "manifest.yaml").write_text("engine: ancat\n")
    monkeypatch.setattr("realtide.server.loading.RemoteEngine", Remote)
    with pytest.raises(ConfigError, match="weights: none"):
        load_engines(ModelConfig(bundle=tmp_path), ServerConfig(executors=2, executor_processes=True))
    assert [engine.process.returncode for engine in made] == [0]


async def test_stopping_twice_and_without_a_start() -> None:
    server = Server(ServerConfig(**DEFAULTS), [BurstEngine()])
    await server.stop()
    async with running() as live:
        await live.server.stop()
        await live.server.stop()


def test_serving_imports_no_torch() -> None:
    code = "import realtide.server.app, sys; assert 'torch' not in sys.modules, 'torch was imported'"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, env=environment)
