"""A whole server: starts everything, stops it in the right order, and runs it as a process."""

from __future__ import annotations

import asyncio
import contextlib
import gc
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
from realtide.server import (
    image_service,
    logs,
    models,
    models_service,
    processors,
    speech_service,
    tls,
    video_service,
)
from realtide.server.access import Access, AccessInterceptor
from realtide.server.config import ConfigError, ServerConfig
from realtide.server.engine_process import GC_THRESHOLDS
from realtide.server.health import HealthReporter
from realtide.server.host import Host
from realtide.server.interceptor import MetricsInterceptor
from realtide.server.loading import Loaded, load_engines
from realtide.server.metrics import Metrics
from realtide.server.models import AnyEngine
from realtide.server.remote import RemoteEngine, RemoteExecutor
from realtide.server.runtimes import Choice
from realtide.server.turns import TurnSelector
from realtide_client.v1 import image_pb2_grpc, models_pb2_grpc, speech_pb2_grpc, video_pb2_grpc

log = logging.getLogger(__name__)

_LAG_INTERVAL = 0.05
_SWITCH_INTERVAL = 0.0001
_DRAIN_POLL = 0.02
_LONG = 1e6
# Time in milliseconds that a connection has for its handshake, and that it may stay without a call.
_HANDSHAKE, _IDLE_CONNECTION = 10_000, 600_000


class Server:
    """One server; ``async with Server(config) as server`` starts and stops it.

    Args:
        config: settings; port 0 chooses a free one (see `port`, `metrics_port` and `admin_port`).
        engines: serve these instead of loading `config.models`; those of one model share its queue.
    """

    def __init__(self, config: ServerConfig, engines: Sequence[AnyEngine] | None = None) -> None:
        self.config = config
        self.metrics = Metrics(realtide.__version__)
        self.host = Host(config, self.metrics, realtide.__version__)
        self.port = 0
        self.metrics_port = 0
        self.admin_port: int | None = None
        self.access: Access | None = None
        self._engines = engines
        self._processes: list[RemoteEngine] = []
        self._health = HealthReporter(self.host)
        self._tasks: list[asyncio.Task[None]] = []
        self._http: Any = None
        self._grpc: Any = None
        self._admin: Any = None
        self._hurry = asyncio.Event()
        self._stopped = False

    async def start(self) -> None:
        """Load the models, start executors and listen.

        Raises:
            ConfigError: no model, a bundle that cannot be served, certificates or keys that cannot be used,
                or an address that is in use.
        """
        try:
            await self._start()
        except BaseException:
            self._hurry.set()
            await self.stop()
            raise

    async def _start(self) -> None:
        # What is wrong with keys or certificates is said before models are loaded.
        access = self.access = Access(self.config, self.metrics)
        credentials = self._credentials()
        for name, (engines, choice) in (await self._load()).items():
            model = models.serve(engines, self.config, self.metrics, self._health.changed)
            model.choice = choice
            self.host.models[name] = model
            model.start()
        if not self.host.models:
            raise ConfigError("models: none given, at least one bundle is needed")
        self._listen(access, credentials)
        if self.config.admin_port is not None:
            self._listen_admin(self.config.admin_port)
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
            asyncio.create_task(access.watch(lambda: self.host.streams)),
        ]
        if self._admin is not None:
            await self._admin.start()
        await self._grpc.start()
        log.info("ready", extra=self.ready())
        if self.config.port_file is not None:
            _write(self.config.port_file, json.dumps(self.ready()))

    def processors_of_others(self) -> int:
        """Processors that executors in processes of their own keep busy; 0 if this process computes too."""
        executors = [executor for model in self.host.models.values() for executor in model.executors]
        if not all(isinstance(executor, RemoteExecutor) for executor in executors):
            return 0
        return len(executors) * self.config.ort_threads

    @property
    def loaded(self) -> bool:
        """Whether the models are loaded."""
        return self._grpc is not None

    def ready(self) -> dict[str, Any]:
        """What a parent process needs to know."""
        return {
            "ready": True,
            "pid": os.getpid(),
            "port": self.port,
            "metrics_port": self.metrics_port,
            **({} if self.admin_port is None else {"admin_port": self.admin_port}),
            "models": sorted(self.host.models),
        }

    async def _load(self) -> dict[str, tuple[list[AnyEngine], Choice | None]]:
        found: dict[str, tuple[list[AnyEngine], Choice | None]] = {}
        if self._engines is not None:
            for engine in self._engines:
                found.setdefault(engine.model, ([], None))[0].append(engine)
            return found
        for model in self.config.models:
            began = time.monotonic()
            loaded: Loaded = await asyncio.to_thread(load_engines, model, self.config)
            engines, choice = loaded.engines, loaded.choice
            self._processes += [engine for engine in engines if isinstance(engine, RemoteEngine)]
            name = engines[0].model
            if name in found:
                raise ConfigError(f"models: two bundles are called {name!r}")
            found[name] = engines, choice
            seconds = time.monotonic() - began
            self.metrics.model_load.labels(engines[0].name, name).set(seconds)
            log.info(
                "model loaded",
                extra={"model": name, "seconds": round(seconds, 3), "runtime": choice.runtime},
            )
        return found

    def _credentials(self) -> grpc.ServerCredentials | None:
        failed = self.metrics.reload_failures.labels("tls")
        certificates = tls.certificates(self.config, failed.inc)
        if certificates is not None:
            return certificates.credentials()
        if self.config.api_key_file is not None:
            log.warning("keys are asked for without TLS: whoever listens on the way can copy them")
        return None

    def _listen(self, access: Access, credentials: grpc.ServerCredentials | None) -> None:
        config = self.config
        received = max(4 * config.max_message_bytes, config.max_checkpoint_bytes + 1024)
        # Of a connection's age only the GOAWAY is gRPC's; sessions are sent away one by one (sessions.py).
        age = [("grpc.max_connection_age_ms", round(config.max_connection_age * 1000))]
        self._grpc = grpc.aio.server(
            interceptors=[MetricsInterceptor(self.metrics.grpc), AccessInterceptor(access)],
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
                ("grpc.server_handshake_timeout_ms", _HANDSHAKE),
                ("grpc.max_connection_idle_ms", _IDLE_CONNECTION),
                *(age if config.max_connection_age else ()),
            ],
        )
        speech_pb2_grpc.add_SpeechServicer_to_server(speech_service.SpeechService(self.host), self._grpc)
        video_pb2_grpc.add_VideoServicer_to_server(video_service.VideoService(self.host), self._grpc)
        image_pb2_grpc.add_ImageServicer_to_server(image_service.ImageService(self.host), self._grpc)
        models_pb2_grpc.add_ModelsServicer_to_server(models_service.ModelsService(self.host), self._grpc)
        health_pb2_grpc.add_HealthServicer_to_server(self._health.servicer, self._grpc)
        if config.admin_port is None:
            reflection.enable_server_reflection(_SERVICES, self._grpc)
        self.port = _bind("port", self._grpc, config.host, config.port, credentials)

    def _listen_admin(self, port: int) -> None:
        """Health for probes, which hold no keys and may speak no TLS, and reflection."""
        self._admin = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        health_pb2_grpc.add_HealthServicer_to_server(self._health.servicer, self._admin)
        reflection.enable_server_reflection(_SERVICES, self._admin)
        self.admin_port = _bind("admin_port", self._admin, self.config.admin_host, port, None)

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
            await self._stop_grpc()
        for model in self.host.models.values():
            await model.stop()
        for engine in self._processes:  # those of a model that could not be served too
            await asyncio.to_thread(engine.end)
        if self._admin is not None:
            await self._admin.stop(0.0)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._http is not None:
            server, thread = self._http
            await asyncio.to_thread(server.shutdown)
            server.server_close()
            await asyncio.to_thread(thread.join)
        log.info("stopped")

    async def _stop_grpc(self) -> None:
        """Close the door at once, so that balancers go elsewhere; then wait for whoever is inside."""
        self.drain()
        loop = asyncio.get_running_loop()
        end = (self.host.drain_until or loop.time()) + self.config.grace_seconds
        # Streams that exist go on, those of health's watchers too; new connections are refused. The time is
        # kept here: grpcio may crash if one of two calls of stop() runs out of time while the other ends.
        stopping = asyncio.ensure_future(self._grpc.stop(_LONG))
        await self._until_drained(end)
        hurry = asyncio.ensure_future(self._hurry.wait())
        left = min(max(end - loop.time(), 0.0), self.config.grace_seconds)
        await asyncio.wait({stopping, hurry}, timeout=left, return_when=asyncio.FIRST_COMPLETED)
        hurry.cancel()
        if not stopping.done():
            await self._grpc.stop(None)
        await stopping

    async def _until_drained(self, end: float) -> None:
        """Wait until no stream is left, or until loop time `end`."""
        loop = asyncio.get_running_loop()
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
        if not server.loaded:
            # Nobody is served yet, and a model that is being loaded cannot be interrupted.
            log.info("stopped while loading")
            logging.shutdown()
            os._exit(0)
        if asked.is_set():
            server.hurry()
        asked.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    try:
        await server.start()
        # What is loaded stays: the garbage collector need not look at it again, which takes tens of
        # milliseconds in which nothing else runs.
        gc.collect()
        gc.freeze()
        processors.leave(server.processors_of_others())
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
    gc.set_threshold(*GC_THRESHOLDS)
    with asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(TurnSelector())) as runner:
        runner.run(serve(config))


async def _measure_lag(metrics: Metrics) -> None:
    loop = asyncio.get_running_loop()
    while True:
        due = loop.time() + _LAG_INTERVAL
        await asyncio.sleep(_LAG_INTERVAL)
        metrics.loop_lag.observe(max(loop.time() - due, 0.0))


_SERVICES = (
    speech_service.SERVICE,
    video_service.SERVICE,
    image_service.SERVICE,
    models_service.SERVICE,
    "grpc.health.v1.Health",
    reflection.SERVICE_NAME,
)


def _bind(field: str, server: Any, host: str, port: int, credentials: grpc.ServerCredentials | None) -> int:
    """Give `server` an address; the port that it got."""
    address = f"{host}:{port}"
    try:
        if credentials is None:
            return int(server.add_insecure_port(address))
        return int(server.add_secure_port(address, credentials))
    except RuntimeError as error:
        raise ConfigError(f"{field}: cannot listen on {address}: {error}") from None


def _write(path: Path, text: str) -> None:
    """Write at once: a reader sees nothing or everything."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(path.name + ".tmp")
    draft.write_text(text, encoding="utf-8")
    draft.replace(path)
