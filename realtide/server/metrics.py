"""Every Prometheus metric of the server: names, labels, buckets (docs/metrics.md; a test compares).

Buckets are dense around the range that each metric is meant to stay in, so that its 50th and 99th percentiles
are readable, and reach far enough beyond to show how bad it is when it does not. No label ever holds a
session id, a text or a client's address.
"""

from __future__ import annotations

import contextlib
import math
import platform
import threading
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path

import psutil
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from realtide.server.device_memory import DeviceMemory

_MODEL = ("engine", "model")
_STEP = (
    0.0005,
    0.001,
    0.002,
    0.003,
    0.005,
    0.0075,
    0.01,
    0.015,
    0.02,
    0.03,
    0.04,
    0.06,
    0.08,
    0.1,
    0.15,
    0.25,
    0.5,
    1,
    2.5,
    5,
)
_DELAY = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.8, 1, 1.25, 1.5, 2, 3, 5)
_LOOKAHEAD = (0, 0.04, 0.08, 0.12, 0.16, 0.2, 0.24, 0.32, 0.4, 0.5, 0.64, 0.8, 1, 1.28, 2)
_FIRST = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1, 1.25, 1.5, 2, 2.5, 3, 4, 5, 7.5, 10, 20, 30)
_INTERVAL = (
    0.002,
    0.005,
    0.01,
    0.015,
    0.02,
    0.025,
    0.03,
    0.035,
    0.04,
    0.05,
    0.06,
    0.07,
    0.08,
    0.1,
    0.125,
    0.15,
    0.2,
    0.3,
    0.5,
    0.75,
    1,
    2,
    5,
)
_FACTOR = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1, 2)
_BATCH = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 256)
_DURATION = (1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1800, 3600, 7200)
_BYTES = tuple(float(1 << power) for power in range(10, 27, 2))
_RESUME = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)
_RECACHE = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.6, 0.8, 1, 1.5, 2.5, 5, 10)
_IMAGE = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 1.5, 2, 3, 4, 5, 7.5, 10, 15, 20, 30, 60, 120)
_LAG = (0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.1, 0.25, 0.5, 1)
_CALL = (0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1, 5, 10, 30, 60, 120, 300, 600, 1800, 3600)

OUTCOMES = ("ok", "cancelled", "client_error", "server_error", "drained", "resumed_elsewhere")
REFUSALS = ("queue_full", "queue_timeout", "draining", "failed")
CALL_REFUSALS = (
    "no_key",
    "wrong_key",
    "expired_key",
    "forbidden_service",
    "client_sessions",
    "client_rate",
)
RELOADED = ("api_keys", "tls")
FRAME_STAGES = ("denoised", "decoded", "delivered")


@dataclass(frozen=True, slots=True)
class Occupancy:
    """What a model's slots are doing at one moment; read when metrics are scraped."""

    active: int  # sessions that hold a slot and are served
    queued: int  # sessions that wait for a slot
    parked: int  # sessions that hold a slot and are not advanced, or whose engine has put them aside
    capacity: int  # slots
    leaked: int  # slots that are taken though no session holds them
    cache_bytes: int  # preallocated state of all slots
    processes: tuple[int, ...] = ()  # process ids of the executors that are processes of their own
    # Frames per second of an active session, by stage; empty without one.
    frame_rates: Mapping[str, float] = field(default_factory=dict)


class _AtScrape(Collector):
    """Gauges whose values exist already and need not be pushed."""

    def __init__(self) -> None:
        self.sources: dict[tuple[str, str], Callable[[], Occupancy]] = {}
        self._device = DeviceMemory()

    def collect(self) -> Iterable[Metric]:
        """One consistent reading of every model."""
        sessions = GaugeMetricFamily("realtide_sessions", "Sessions by state.", labels=(*_MODEL, "state"))
        capacity = GaugeMetricFamily("realtide_session_capacity", "Slots.", labels=_MODEL)
        leaked = GaugeMetricFamily("realtide_slots_leaked", "Slots taken by no session.", labels=_MODEL)
        cache = GaugeMetricFamily(
            "realtide_kv_cache_bytes", "Preallocated state of all slots.", labels=_MODEL
        )
        rates = GaugeMetricFamily(
            "realtide_fps", "Frames per second of an active session.", labels=(*_MODEL, "stage")
        )
        resident = GaugeMetricFamily(
            "realtide_executor_process_resident_bytes",
            "Resident memory of executors in processes of their own.",
            labels=_MODEL,
        )
        cpu = CounterMetricFamily(
            "realtide_executor_process_cpu_seconds", "Processor time of the same.", labels=_MODEL
        )
        elsewhere = 0
        for labels, read in list(self.sources.items()):
            now = read()
            used, seconds = _usage(now.processes)
            elsewhere += used
            resident.add_metric(labels, used)
            cpu.add_metric(labels, seconds)
            for state in ("active", "queued", "parked"):
                sessions.add_metric((*labels, state), getattr(now, state))
            capacity.add_metric(labels, now.capacity)
            leaked.add_metric(labels, now.leaked)
            cache.add_metric(labels, now.cache_bytes)
            for stage, rate in now.frame_rates.items():
                rates.add_metric((*labels, stage), rate)
        memory = GaugeMetricFamily(
            "realtide_device_memory_bytes", "Memory in use, by kind.", labels=("kind",)
        )
        memory.add_metric(("host_resident",), resident_bytes() + elsewhere)
        for kind, value in self._device.read().items():
            memory.add_metric((kind,), value)
        yield from (sessions, capacity, leaked, cache, rates, memory, resident, cpu)


class BatchHistogram(Collector):
    """A histogram by model of what comes many values at a time: one lock for all, no call for each.

    A step of 150 sessions would spend 3 percent of its time on 150 calls of `Histogram.observe`.
    """

    def __init__(self, name: str, text: str, buckets: Sequence[float]) -> None:
        self._name, self._text = name, text
        self._bounds = [*buckets, math.inf]
        self._names = [floatToGoString(bound) for bound in self._bounds]  # type: ignore[no-untyped-call]
        self._models: dict[tuple[str, str], tuple[list[int], list[float]]] = {}
        self._lock = threading.Lock()

    def observe_all(self, labels: tuple[str, str], values: Sequence[float]) -> None:
        """Record values of the model with these labels; any thread may."""
        places = [bisect_left(self._bounds, value) for value in values]
        with self._lock:
            counts, total = self._of(labels)
            for place in places:
                counts[place] += 1
            total[0] += sum(values)

    def begin(self, labels: tuple[str, str]) -> None:
        """Expose the model with zeros before its first value."""
        with self._lock:
            self._of(labels)

    def _of(self, labels: tuple[str, str]) -> tuple[list[int], list[float]]:
        return self._models.setdefault(labels, ([0] * len(self._bounds), [0.0]))

    def collect(self) -> Iterable[Metric]:
        """As a `Histogram` would."""
        family = HistogramMetricFamily(self._name, self._text, labels=_MODEL)
        with self._lock:
            models = {labels: (list(counts), total[0]) for labels, (counts, total) in self._models.items()}
        for labels, (counts, total) in models.items():
            family.add_metric(labels, list(zip(self._names, accumulate(counts), strict=True)), total)
        yield family


def resident_bytes() -> int:
    """Resident memory of this process in bytes; 0 where /proc does not exist."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, IndexError, ValueError):
        return 0
    import resource

    return pages * resource.getpagesize()


def _usage(processes: Iterable[int]) -> tuple[int, float]:
    """Resident bytes and processor seconds of some processes; those that have ended count nothing."""
    resident, seconds = 0, 0.0
    for number in processes:
        with contextlib.suppress(psutil.Error):
            process = psutil.Process(number)
            resident += process.memory_info().rss
            times = process.cpu_times()
            seconds += times.user + times.system
    return resident, seconds


class Metrics:
    """All metrics of one server, in a registry of its own so that several servers fit into one process."""

    def __init__(self, version: str) -> None:
        self.registry = CollectorRegistry()
        self._scrape = _AtScrape()
        self.registry.register(self._scrape)
        ProcessCollector(registry=self.registry)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"realtide_{name}", text, (*_MODEL, *labels), registry=self.registry)

        def histogram(name: str, text: str, buckets: Sequence[float], *labels: str) -> Histogram:
            return Histogram(
                f"realtide_{name}", text, (*_MODEL, *labels), buckets=buckets, registry=self.registry
            )

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(f"realtide_{name}", text, (*_MODEL, *labels), registry=self.registry)

        self.opened = counter("sessions_opened", "Sessions that got a slot.")
        self.closed = counter("sessions_closed", "Sessions that gave their slot back.", "outcome")
        self.duration = histogram("session_duration_seconds", "From slot taken to slot free.", _DURATION)
        self.refused = counter("admission_refused", "Sessions that got no slot.", "reason")
        self.checkpoint_bytes = histogram("checkpoint_bytes", "Size of checkpoints sent.", _BYTES)
        self.resume = histogram("resume_seconds", "From a resume message to opened.", _RESUME)
        self.step = histogram("step_seconds", "Time of a step's stages.", _STEP, "stage")
        self.batch = histogram("step_batch_size", "Sessions advanced by one step.", _BATCH)
        self.queue_wait = BatchHistogram(
            "realtide_queue_wait_seconds", "From ready to the start of the step.", _STEP
        )
        self.registry.register(self.queue_wait)
        self.misses = counter("deadline_misses", "Session steps that ended after their deadline.")
        self.first_partial = histogram(
            "first_partial_seconds",
            "From the arrival of an utterance's first word to its first text.",
            _DELAY,
        )
        self.final_delay = histogram(
            "final_delay_seconds", "From the arrival of the last speech sample to the final.", _DELAY
        )
        self.word_delay = histogram(
            "word_delay_seconds", "From the arrival of a word's last sample to its first appearance.", _DELAY
        )
        self.lookahead = histogram(
            "lookahead_seconds", "Future audio that words of finals waited for.", _LOOKAHEAD
        )
        self.audio = counter("audio_seconds", "Audio received.")
        self.real_time_factor = histogram(
            "real_time_factor", "Executor time per second of audio, by session.", _FACTOR
        )
        self.frames = counter("frames", "Frames of video that passed a stage.", "stage")
        self.first_frame = histogram(
            "first_frame_seconds", "From open, or the first credit after it, to the first frame.", _FIRST
        )
        self.frame_interval = histogram(
            "frame_interval_seconds", "Time between frames while the client waits for them.", _INTERVAL
        )
        self.prompt_switch = histogram(
            "prompt_switch_seconds", "From a prompt wanted now to the first frame that shows it.", _FIRST
        )
        self.recache = histogram("recache_seconds", "Making a cache follow a new prompt.", _RECACHE)
        self.images = counter("images", "Images made.")
        self.first_preview = histogram(
            "first_preview_seconds", "From the request of an image to its first preview.", _IMAGE
        )
        self.image_time = histogram("image_seconds", "From the request of an image to the image.", _IMAGE)
        self.condition_hits = counter("condition_cache_hits", "Conditions of images that were in the cache.")
        self.condition_misses = counter("condition_cache_misses", "Conditions of images that were computed.")
        self.model_load = gauge("model_load_seconds", "Time that loading the model took.")
        self.model_info = gauge("model_info", "1.", "version", "backend", "precision", "device")
        self.build_info = Gauge("realtide_build_info", "1.", ("version", "python"), registry=self.registry)
        self.build_info.labels(version, platform.python_version()).set(1)
        self.calls_refused = Counter(
            "realtide_calls_refused",
            "Calls refused before they were begun.",
            ("reason",),
            registry=self.registry,
        )
        self.reload_failures = Counter(
            "realtide_reload_failures",
            "Files that changed and could not be used.",
            ("file",),
            registry=self.registry,
        )
        for reason in CALL_REFUSALS:
            self.calls_refused.labels(reason)
        for file in RELOADED:
            self.reload_failures.labels(file)
        self.loop_lag = Histogram(
            "realtide_event_loop_lag_seconds",
            "How late the event loop runs a timer.",
            buckets=_LAG,
            registry=self.registry,
        )
        self.grpc = GrpcMetrics(self.registry)

    def for_model(self, engine: str, model: str) -> ModelMetrics:
        """The metrics of one model with their labels bound."""
        return ModelMetrics(self, engine, model)

    def watch(self, engine: str, model: str, read: Callable[[], Occupancy]) -> None:
        """Read `read()` at every scrape; it is called from the scraping thread."""
        self._scrape.sources[engine, model] = read


class GrpcMetrics:
    """The grpc-ecosystem's server metrics."""

    def __init__(self, registry: CollectorRegistry) -> None:
        labels = ("grpc_type", "grpc_service", "grpc_method")

        def counter(name: str, text: str, *more: str) -> Counter:
            return Counter(f"grpc_server_{name}", text, (*labels, *more), registry=registry)

        self.started = counter("started", "Calls started.")
        self.handled = counter("handled", "Calls completed, by status.", "grpc_code")
        self.received = counter("msg_received", "Messages received.")
        self.sent = counter("msg_sent", "Messages sent.")
        self.handling = Histogram(
            "grpc_server_handling_seconds", "Time of calls.", labels, buckets=_CALL, registry=registry
        )


@dataclass(slots=True)
class ModelMetrics:
    """Metrics of one model. The executor's thread calls its hooks, the event loop all others."""

    metrics: Metrics
    engine: str
    model: str
    _stages: dict[str, Histogram] = field(default_factory=dict)
    _audio: Counter = field(init=False)
    _batch: Histogram = field(init=False)

    def __post_init__(self) -> None:
        # Counters exist from the start, so that rate() and alerts see the first increment.
        for outcome in OUTCOMES:
            self.metrics.closed.labels(self.engine, self.model, outcome)
        for reason in REFUSALS:
            self.metrics.refused.labels(self.engine, self.model, reason)
        for metric in (self.metrics.opened, self.metrics.misses):
            metric.labels(self.engine, self.model)
        # Those of every chunk and every step, found once.
        self._audio = self.metrics.audio.labels(self.engine, self.model)
        self._batch = self.metrics.batch.labels(self.engine, self.model)
        self.metrics.queue_wait.begin((self.engine, self.model))

    def observe(self, metric: Histogram, value: float) -> None:
        """Record `value` in one of this model's histograms."""
        metric.labels(self.engine, self.model).observe(value)

    def refused(self, reason: str) -> None:
        """A session got no slot; `reason` is one of REFUSALS."""
        self.metrics.refused.labels(self.engine, self.model, reason).inc()

    def opened(self) -> None:
        """A session got a slot."""
        self.metrics.opened.labels(self.engine, self.model).inc()

    def closed(self, outcome: str, seconds: float) -> None:
        """A session gave its slot back; `outcome` is one of OUTCOMES."""
        self.metrics.closed.labels(self.engine, self.model, outcome).inc()
        self.observe(self.metrics.duration, seconds)

    def audio(self, seconds: float) -> None:
        """Audio arrived."""
        self._audio.inc(seconds)

    def frames(self, stage: str, count: int) -> None:
        """Frames of video passed `stage`, one of FRAME_STAGES."""
        self.metrics.frames.labels(self.engine, self.model, stage).inc(count)

    def image(self, seconds: float) -> None:
        """An image was sent, so many seconds after it was asked for."""
        self.metrics.images.labels(self.engine, self.model).inc()
        self.observe(self.metrics.image_time, seconds)

    def conditions(self, hits: int, misses: int) -> None:
        """So many conditions of an image were in the cache, and so many were not."""
        self.metrics.condition_hits.labels(self.engine, self.model).inc(hits)
        self.metrics.condition_misses.labels(self.engine, self.model).inc(misses)

    def on_stage(self, stage: str, seconds: float, batch: int) -> None:
        """Executor: a stage of a step took `seconds`."""
        histogram = self._stages.get(stage)
        if histogram is None:
            histogram = self._stages[stage] = self.metrics.step.labels(self.engine, self.model, stage)
        histogram.observe(seconds)

    def on_step(self, waits: Sequence[float], misses: int) -> None:
        """Executor: a step advanced ``len(waits)`` sessions, each of which had waited so many seconds."""
        self._batch.observe(len(waits))
        self.metrics.queue_wait.observe_all((self.engine, self.model), waits)
        if misses:
            self.metrics.misses.labels(self.engine, self.model).inc(misses)
