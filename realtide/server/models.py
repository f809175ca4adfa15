"""The models a server serves: engines with their executors, admission and description, of every kind."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import ClassVar, Protocol, TypeVar

from realtide.engines.easycontrol.types import ImageModelInfo
from realtide.engines.engine import Engine, Session
from realtide.engines.longlive.types import VideoModelInfo
from realtide.server.admission import Admission, Lease, Refused
from realtide.server.config import ServerConfig
from realtide.server.executor import Executor
from realtide.server.handle import Front
from realtide.server.metrics import Metrics, Occupancy
from realtide.server.remote import RemoteEngine, RemoteExecutor
from realtide.server.runtimes import Choice
from realtide.server.status import invalid, misfit, no_model, refused
from realtide.server.video_meter import FrameRates

# However large frames are, so many events may wait.
_LEAST_EVENTS = 4


class ModelInfo(Protocol):
    """What every engine says of its model, as its attribute `info`; every value is the bundle's."""

    @property
    def version(self) -> str:
        """Version of the bundle."""
        ...

    @property
    def backend(self) -> str:
        """``onnxruntime``, ``torch`` or ``tensorrt``."""
        ...

    @property
    def precision(self) -> str:
        """``fp32``, ``fp16``, ``bf16``, ``int8`` or ``fp8``."""
        ...

    @property
    def device(self) -> str:
        """``cpu`` or ``cuda:0``."""
        ...

    @property
    def license(self) -> str:
        """SPDX expression of the weights' licence."""
        ...


class SpeechInfo(ModelInfo, Protocol):
    """What an engine for speech says of its model."""

    @property
    def language_codes(self) -> tuple[str, ...]:
        """BCP-47 tags, the default first."""
        ...

    @property
    def sample_rate(self) -> int:
        """Rate that the model works at, in samples per second."""
        ...

    @property
    def sample_rate_range(self) -> tuple[int, int]:
        """Lowest and highest rate of a client's audio."""
        ...

    @property
    def frame_seconds(self) -> float:
        """Length of an encoder frame."""
        ...

    @property
    def front_end_lookahead_ms(self) -> float:
        """Future audio that the front end always needs."""
        ...

    @property
    def max_lookahead_ms(self) -> float:
        """Most lookahead that the encoder can use without a cap."""
        ...

    @property
    def max_beam(self) -> int:
        """Widest beam."""
        ...

    @property
    def lookahead_bias_range(self) -> tuple[float, float]:
        """Lowest and highest lookahead bias."""
        ...

    @property
    def max_boost(self) -> float:
        """Largest absolute boost, in nats."""
        ...

    @property
    def max_utterance_ms(self) -> int:
        """Longest utterance."""
        ...

    @property
    def characters(self) -> frozenset[str]:
        """Characters that the model can write (without the space); empty: any."""
        ...


class SpeechEngine(Engine, Protocol):
    """An engine that serves Speech.Stream with the inputs and events of `realtide.engines.ancat.types`."""

    @property
    def info(self) -> SpeechInfo:
        """What is known of the model."""
        ...


class VideoEngine(Engine, Protocol):
    """An engine that serves Video.Stream with the inputs and events of `realtide.engines.longlive.types`."""

    @property
    def info(self) -> VideoModelInfo:
        """What is known of the model."""
        ...


class ImageEngine(Engine, Protocol):
    """An engine that serves Image.Stream with inputs and events of `realtide.engines.easycontrol.types`."""

    @property
    def info(self) -> ImageModelInfo:
        """What is known of the model."""
        ...


AnyEngine = SpeechEngine | RemoteEngine | VideoEngine | ImageEngine


class ServedModel:
    """One model: engines that are alike, an executor for each, one queue in front of all.

    Args:
        engines: at least one; all of the same model.
        info: what they say of it.
        config: limits.
        metrics: the server's.
        events: events that a session's client may leave unread.
        on_change: called when the model's occupancy or state changed.
    """

    kind: ClassVar[str]
    """What the model makes or understands, for people."""

    def __init__(
        self,
        engines: Sequence[Engine | RemoteEngine],
        info: ModelInfo,
        config: ServerConfig,
        metrics: Metrics,
        events: int,
        on_change: Callable[[], None],
    ) -> None:
        self.name = engines[0].model
        self.engine_name = engines[0].name
        self.max_batch = engines[0].max_batch
        self.choice: Choice | None = None  # None: the engines were handed over, not loaded
        self.metrics = metrics.for_model(self.engine_name, self.name)
        more = (self.metrics, config.max_audio_ahead, events, on_change)
        self.executors: list[Executor | RemoteExecutor] = [
            RemoteExecutor(engine, *more) if isinstance(engine, RemoteEngine) else Executor(engine, *more)
            for engine in engines
        ]
        self._held = dict.fromkeys(self.executors, 0)
        slots = sum(executor.slots for executor in self.executors)
        self.admission = Admission(slots, config.queue_limit, config.queue_timeout, on_change)
        metrics.watch(self.engine_name, self.name, self.occupancy)
        metrics.model_info.labels(
            self.engine_name,
            self.name,
            info.version,
            info.backend,
            info.precision,
            info.device,
        ).set(1)

    @property
    def info(self) -> ModelInfo:
        """What is known of the model."""
        raise NotImplementedError

    @property
    def failed(self) -> bool:
        """True if no executor runs any more."""
        return all(executor.failed for executor in self.executors)

    def start(self) -> None:
        """Start the executors."""
        for executor in self.executors:
            executor.start()

    async def stop(self) -> None:
        """Stop the executors."""
        await asyncio.gather(*(executor.stop() for executor in self.executors))

    async def admit(self) -> Lease:
        """Wait for a slot's place.

        Raises:
            StatusError: RESOURCE_EXHAUSTED or UNAVAILABLE.
        """
        try:
            if self.failed:
                raise Refused("failed", None)
            return await self.admission.acquire()
        except Refused as error:
            self.metrics.refused(error.reason)
            raise refused(error) from None

    async def open(
        self, lease: Lease, make: Callable[[Engine], Session], session_id: str, start: int
    ) -> Front:
        """Open a session on the executor with most free slots; the lease goes with the slot.

        Raises:
            ExecutorStopped: the executors stopped meanwhile.
            Exception: see `Executor.open`.
        """
        running = [executor for executor in self.executors if not executor.failed] or self.executors
        executor = max(running, key=lambda one: one.slots - self._held[one])
        self._held[executor] += 1

        def released() -> None:
            self._held[executor] -= 1
            lease.release()

        return await executor.open(make, session_id, start, released)

    def occupancy(self) -> Occupancy:
        """For the metrics; called from the scraping thread."""
        opened = sum(executor.open_sessions for executor in self.executors)
        # A session that its engine has put aside may have a client that does not read as well.
        parked = min(sum(one.parked + one.engine.parked for one in self.executors), opened)
        return Occupancy(
            active=opened - parked,
            queued=self.admission.queued,
            parked=parked,
            capacity=self.admission.slots,
            leaked=sum(executor.leaked for executor in self.executors),
            cache_bytes=sum(executor.cache_bytes for executor in self.executors),
            processes=tuple(
                executor.engine.process.pid
                for executor in self.executors
                if isinstance(executor, RemoteExecutor)
            ),
        )


class SpeechModel(ServedModel):
    """A model that recognizes speech."""

    kind = "speech"

    def __init__(
        self,
        engines: Sequence[SpeechEngine | RemoteEngine],
        config: ServerConfig,
        metrics: Metrics,
        on_change: Callable[[], None],
    ) -> None:
        self._info = engines[0].info
        super().__init__(engines, self._info, config, metrics, config.max_pending_events, on_change)

    @property
    def info(self) -> SpeechInfo:
        """What is known of the model."""
        return self._info


class VideoModel(ServedModel):
    """A model that generates video."""

    kind = "video"

    def __init__(
        self,
        engines: Sequence[VideoEngine],
        config: ServerConfig,
        metrics: Metrics,
        on_change: Callable[[], None],
    ) -> None:
        self._info = engines[0].info
        # An event may be a raw frame: what counts is their memory.
        frame = max(3 * width * height for width, height in self._info.sizes)
        events = min(max(config.max_pending_frame_bytes // frame, _LEAST_EVENTS), config.max_pending_events)
        self.rates = FrameRates()
        super().__init__(engines, self._info, config, metrics, events, on_change)

    @property
    def info(self) -> VideoModelInfo:
        """What is known of the model."""
        return self._info

    def occupancy(self) -> Occupancy:
        """For the metrics; called from the scraping thread."""
        return replace(super().occupancy(), frame_rates=self.rates.read())


class ImageModel(ServedModel):
    """A model that makes images."""

    kind = "image"

    def __init__(
        self,
        engines: Sequence[ImageEngine],
        config: ServerConfig,
        metrics: Metrics,
        on_change: Callable[[], None],
    ) -> None:
        self._info = engines[0].info
        # An event may be a raw image: what counts is their memory.
        image = 3 * self._info.max_pixels
        events = min(max(config.max_pending_frame_bytes // image, _LEAST_EVENTS), config.max_pending_events)
        super().__init__(engines, self._info, config, metrics, events, on_change)

    @property
    def info(self) -> ImageModelInfo:
        """What is known of the model."""
        return self._info


def serve(
    engines: Sequence[AnyEngine], config: ServerConfig, metrics: Metrics, on_change: Callable[[], None]
) -> ServedModel:
    """The model of `engines`, which are alike, as its kind is served."""
    video: list[VideoEngine] = []
    images: list[ImageEngine] = []
    speech: list[SpeechEngine | RemoteEngine] = []
    for engine in engines:
        if isinstance(engine, RemoteEngine):
            speech.append(engine)
        elif isinstance(engine.info, VideoModelInfo):
            video.append(engine)
        elif isinstance(engine.info, ImageModelInfo):
            images.append(engine)
        else:
            speech.append(engine)
    if video:
        return VideoModel(video, config, metrics, on_change)
    if images:
        return ImageModel(images, config, metrics, on_change)
    return SpeechModel(speech, config, metrics, on_change)


Kind = TypeVar("Kind", bound=ServedModel)


def select(models: Mapping[str, ServedModel], kind: type[Kind], name: str, field: str) -> Kind:
    """The model called `name`; with an empty name the only one of its kind.

    Raises:
        StatusError: NOT_FOUND; INVALID_ARGUMENT if it is of another kind, or if there are several and none is
            named.
    """
    fitting = {model.name: model for model in models.values() if isinstance(model, kind)}
    known = ", ".join(sorted(fitting)) or "none is served here"
    if name:
        if name not in models:
            raise no_model(name, sorted(fitting))
        if name not in fitting:
            raise invalid(field, f"{name!r} is a {models[name].kind} model, {kind.kind} models: {known}")
        return fitting[name]
    if not fitting:
        raise no_model("", [])
    if len(fitting) > 1:
        raise invalid(field, f"must be one of {known}")
    return next(iter(fitting.values()))


def of_checkpoint(models: Mapping[str, ServedModel], kind: type[Kind], name: str) -> Kind:
    """The model that a checkpoint says it is of.

    Raises:
        StatusError: FAILED_PRECONDITION, it is not served or of another kind.
    """
    model = models.get(name)
    if not isinstance(model, kind):
        raise misfit(f"of model {name}, which is no {kind.kind} model of this server")
    return model
