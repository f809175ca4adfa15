"""A whole server: starts everything, stops it in the right order, and runs it as a process."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import grpc
from grpc_health.v1 import health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from prometheus_client import start_http_server

import realtide
from realtide.server import logs, models, models_service, speech_service, video_service
from realtide.server.config import ConfigError, ServerConfig
from realtide.server.health import HealthReporter
from realtide.server.host import Host
from realtide.server.interceptor import MetricsInterceptor
from realtide.server.loading import load_engines
from realtide.server.metrics import Metrics
from realtide.server.models import AnyEngine
from realtide_client.v1 import models_pb2_grpc, speech_pb2_grpc, video_pb2_grpc

log = logging.getLogger(__name__)

_LAG_INTERVAL = 0.05
_SWITCH_INTERVAL = 0.0005
_DRAIN_POLL = 0.02


class Server:
    """One server; ``async with Server(config) as server`` starts and stops it.

    Args:
        config: settings; port 0 chooses a free one (see `port` and `metrics_port`).
        engines: serve these instead of loading `config.models`; those of one model share its queue.
    """

    def __init__(self, config: ServerConfig, engines: Sequence[AnyEngine] | None = None) -> None:
        self.config = config
        self.metrics = Metrics(realtide.__version__)
        self.host = Host(config, self.metrics, realtide.__version__)
        self.port = 0
        self.metrics_port = 0
        self._engines = engines
        self._health = HealthReporter(self.host)
        self._tasks: list[asyncio.Task[None]] = []
        self._http: Any = None
        self._grpc: Any = None
        self._hurry = asyncio.Event()
        self._stopped = False

    async def start(self) -> None:
        """Load the models, start executors and listen.

        Raises:
            ConfigError: no model, a bundle that cannot be served, or an address that is in use.
        """
        try:
            await self._start()
        except BaseException:
            self._hurry.set()
            await self.stop()
            raise

    async def _start(self) -> None:
        for name, engines in (await self._load()).items():
            model = models.serve(engines, self.config, self.metrics, self._health.changed)
            self.host.models[name] = model
            model.start()
        if not self.host.models:
            raise ConfigError("models: none given, at least one bundle is needed")
        await self._listen()
        if self.config.metrics_enabled:
            try:
                self._http = start_http_server(
                    self.config.metrics_port, self.config.metrics_host, registry=self.metrics.registry
                )
            except OSError as error:
                raise ConfigError(
                    f"metrics_port: {self.config.metrics_port} cannot be used: {error}"
                ) from None
            self.metrics_port = self._http[0].server_port
        self._tasks = [
            asyncio.create_task(self._health.run()),
            asyncio.create_task(_measure_lag(self.metrics)),
        ]
        await self._grpc.start()
        log.info("ready", extra=self.ready())
        if self.config.port_file is not None:
            _write(self.config.port_file, json.dumps(self.ready()))

    def ready(self) -> dict[str, Any]:
        """What a parent process needs to know."""
        return {
            "ready": True,
            "pid": os.getpid(),
            "port": self.port,
            "metrics_port": self.metrics_port,
            "models": sorted(self.host.models),
        }

    async def _load(self) -> dict[str, list[AnyEngine]]:
        found: dict[str, list[AnyEngine]] = {}
        if self._engines is not None:
            for engine in self._engines:
                found.setdefault(engine.model, []).append(engine)
            return found
        for model in self.config.models:
            began = time.monotonic()
            engines = await asyncio.to_thread(load_engines, model, self.config)
            name = engines[0].model
            if name in found:
                raise ConfigError(f"models: two bundles are called {name!r}")
            found[name] = engines
            seconds = time.monotonic() - began
            self.metrics.model_load.labels(engines[0].name, name).set(seconds)
            log.info("model loaded", extra={"model": name, "seconds": round(seconds, 3)})
        return found

    async def _listen(self) -> None:
        config = self.config
        received = max(4 * config.max_message_bytes, config.max_checkpoint_bytes + 1024)
        self._grpc = grpc.aio.server(
            interceptors=[MetricsInterceptor(self.metrics.grpc)],
            maximum_concurrent_rpcs=config.max_streams,
            options=[
                # Above max_message_bytes the session itself refuses, with details; far above, gRPC does.
                ("grpc.max_receive_message_length", received),
                ("grpc.max_send_message_length", -1),
                ("grpc.so_reuseport", 0),
                ("grpc.keepalive_time_ms", round(config.keepalive_seconds * 1000)),
                ("grpc.keepalive_timeout_ms", round(config.keepalive_timeout * 1000)),
                ("grpc.keepalive_permit_without_calls", 1),
                ("grpc.http2.min_recv_ping_interval_without_data_ms", 5000),
            ],
        )
        speech_pb2_grpc.add_SpeechServicer_to_server(speech_service.SpeechService(self.host), self._grpc)
        video_pb2_grpc.add_VideoServicer_to_server(video_service.VideoService(self.host), self._grpc)
        models_pb2_grpc.add_ModelsServicer_to_server(models_service.ModelsService(self.host), self._grpc)
        health_pb2_grpc.add_HealthServicer_to_server(self._health.servicer, self._grpc)
        names = (
            speech_service.SERVICE,
            video_service.SERVICE,
            models_service.SERVICE,
            "grpc.health.v1.Health",
        )
        reflection.enable_server_reflection((*names, reflection.SERVICE_NAME), self._grpc)
        address = f"{config.host}:{config.port}"
        try:
            if config.tls_certificate is None:
                self.port = self._grpc.add_insecure_port(address)
            else:
                self.port = self._grpc.add_secure_port(address, _credentials(config))
        except RuntimeError as error:
            raise ConfigError(f"port: cannot listen on {address}: {error}") from None

    def drain(self) -> None:
        """Take no more sessions; tell those there are to go on elsewhere. Any number of times."""
        if self.host.drain_until is None:
            log.info("draining", extra={"streams": len(self.host.streams)})
        self.host.drain()
        self._health.changed()

    def hurry(self) -> None:
        """Do not wait for sessions any longer."""
        self._hurry.set()

    async def stop(self) -> None:
        """Drain, wait for the sessions or their deadline, and stop everything. Any number of times."""
        if self._stopped:
            return
        self._stopped = True
        if self._grpc is not None:
            self.drain()
            await self._until_drained()
            stopping = asyncio.ensure_future(
                self._grpc.stop(0.0 if self._hurry.is_set() else self.config.grace_seconds)
            )
            hurry = asyncio.create_task(self._hurry.wait())
            await asyncio.wait({stopping, hurry}, return_when=asyncio.FIRST_COMPLETED)
            if not stopping.done():
                await self._grpc.stop(0.0)
            await stopping
            hurry.cancel()
        for model in self.host.models.values():
            await model.stop()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._http is not None:
            server, thread = self._http
            await asyncio.to_thread(server.shutdown)
            server.server_close()
            await asyncio.to_thread(thread.join)
        log.info("stopped")

    async def _until_drained(self) -> None:
        """Wait until no stream is left; their deadlines see to it that this ends."""
        loop = asyncio.get_running_loop()
        end = (self.host.drain_until or loop.time()) + self.config.grace_seconds
        while self.host.streams and not self._hurry.is_set() and loop.time() < end:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._hurry.wait(), _DRAIN_POLL)

    async def __aenter__(self) -> Server:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()


async def serve(config: ServerConfig, engines: Sequence[AnyEngine] | None = None) -> None:
    """Serve until SIGTERM or SIGINT; a second signal does not wait for sessions.

    Writes one JSON line to standard output when the server is ready.

    Raises:
        ConfigError: see `Server.start`.
    """
    loop = asyncio.get_running_loop()
    asked = asyncio.Event()
    server = Server(config, engines)

    def on_signal() -> None:
        if asked.is_set():
            server.hurry()
        asked.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    try:
        await server.start()
        sys.stdout.write(json.dumps(server.ready()) + "\n")
        sys.stdout.flush()
        await asked.wait()
    finally:
        await server.stop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)


def run(config: ServerConfig) -> None:
    """Configure logs and serve in this process until it is told to stop.

    Raises:
        ConfigError: see `Server.start`.
    """
    logs.configure(config.log_level, config.log_format)
    # Executor and event loop share the interpreter's lock. Who wants it back may wait as long as this, and
    # the executor wants it back after every graph (docs/server.md has what it gains).
    sys.setswitchinterval(_SWITCH_INTERVAL)
    asyncio.run(serve(config))


async def _measure_lag(metrics: Metrics) -> None:
    loop = asyncio.get_running_loop()
    while True:
        due = loop.time() + _LAG_INTERVAL
        await asyncio.sleep(_LAG_INTERVAL)
        metrics.loop_lag.observe(max(loop.time() - due, 0.0))


def _credentials(config: ServerConfig) -> grpc.ServerCredentials:
    if config.tls_certificate is None or config.tls_key is None:
        raise ConfigError("tls_certificate and tls_key: both are needed")
    roots = config.tls_client_ca.read_bytes() if config.tls_client_ca is not None else None
    pair = (config.tls_key.read_bytes(), config.tls_certificate.read_bytes())
    return grpc.ssl_server_credentials([pair], root_certificates=roots, require_client_auth=roots is not None)


def _write(path: Path, text: str) -> None:
    """Write at once: a reader sees nothing or everything."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(path.name + ".tmp")
    draft.write_text(text, encoding="utf-8")
    draft.replace(path)
