"""A server of the command's own: a child process on free ports, gone when the command ends."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
import tempfile
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from realtide.cli.errors import CommandError

_START_SECONDS = 120.0
_STOP_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class OwnServer:
    """Where the child listens."""

    address: str
    metrics_url: str
    pid: int
    models: tuple[str, ...]


@contextlib.asynccontextmanager
async def own_server(bundles: Sequence[Path] = (), settings: Sequence[str] = ()) -> AsyncIterator[OwnServer]:
    """Start a server, wait until it is healthy, and stop it at the end, SIGTERM included (exit status 143).

    Args:
        bundles: What it serves; none: what `realtide serve` finds by itself.
        settings: NAME=VALUE, as for `realtide serve --set`.

    Raises:
        CommandError: It did not start; the message has its last words.
    """
    # REALTIDE_* settings are for servers that the user starts: their ports or TLS would not fit this one.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("REALTIDE_")}
    arguments = ["serve", *map(str, bundles), "--host", "127.0.0.1", "--port", "0", "--metrics-port", "0"]
    arguments += ["--log-level", "warning", "--set", "metrics_host=127.0.0.1", "--set", "drain_seconds=0"]
    for setting in settings:
        arguments += ["--set", setting]
    with tempfile.TemporaryFile("w+b") as errors:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "realtide.cli",
            *arguments,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=errors,
            env=environment,
            start_new_session=True,  # Ctrl-C is for the command, which then stops the server
        )
        try:
            async with _ended_by_sigterm():
                ready = await _ready(process)
                if ready is None:
                    errors.seek(0)
                    raise CommandError(f"the server did not start: {_last_words(errors.read())}")
                server = OwnServer(
                    address=f"127.0.0.1:{ready['port']}",
                    metrics_url=f"http://127.0.0.1:{ready['metrics_port']}/metrics",
                    pid=process.pid,
                    models=tuple(ready["models"]),
                )
                await wait_healthy(server.address)
                yield server
        finally:
            await _stop(process)


@contextlib.asynccontextmanager
async def _ended_by_sigterm() -> AsyncIterator[None]:
    """Let SIGTERM end the task in order; by itself it would end the process and leave the server behind."""
    loop, task, told = asyncio.get_running_loop(), asyncio.current_task(), False

    def end() -> None:
        nonlocal told
        told = True
        if task is not None:
            task.cancel()

    loop.add_signal_handler(signal.SIGTERM, end)
    try:
        yield
    except asyncio.CancelledError:
        if told:
            raise SystemExit(128 + signal.SIGTERM) from None
        raise
    finally:
        loop.remove_signal_handler(signal.SIGTERM)


async def wait_healthy(address: str, timeout: float = 30.0) -> None:
    """Wait until the server reports SERVING.

    Raises:
        CommandError: It did not within `timeout` seconds.
    """
    async with grpc.aio.insecure_channel(address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        with contextlib.suppress(TimeoutError, grpc.aio.AioRpcError):
            async with asyncio.timeout(timeout):
                call = stub.Watch(health_pb2.HealthCheckRequest(), wait_for_ready=True)
                async for answer in call:
                    if answer.status == health_pb2.HealthCheckResponse.SERVING:
                        call.cancel()
                        return
    raise CommandError(f"the server at {address} did not become healthy within {timeout:g} s")


async def _ready(process: asyncio.subprocess.Process) -> dict[str, Any] | None:
    """The child's line that says it is ready; None if it ended or took too long."""
    if process.stdout is None:
        raise RuntimeError("the child's output is not connected")
    try:
        async with asyncio.timeout(_START_SECONDS):
            while line := await process.stdout.readline():
                with contextlib.suppress(ValueError):
                    message = json.loads(line)
                    if isinstance(message, dict) and message.get("ready"):
                        return message
            await process.wait()
    except TimeoutError:
        return None
    return None


async def _stop(process: asyncio.subprocess.Process) -> None:
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
    try:
        async with asyncio.timeout(_STOP_SECONDS):
            await process.communicate()
    except TimeoutError:
        process.kill()
        await process.communicate()


def _last_words(output: bytes) -> str:
    lines = [line for line in output.decode(errors="replace").splitlines() if line.strip()]
    return lines[-1].removeprefix("realtide: ") if lines else "it said nothing"
