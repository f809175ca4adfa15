"""The speech engine: slots of streams advanced together through front end, encoder and decoder (ours).

A step takes what is complete of each session (at most `step_frames` encoder frames), runs the encoder on
all of it in one call, again for streams whose burst did not fit, and hands the resolved rows to the
decoder. Needs no PyTorch where programs come from ONNX graphs; `backends` has the others.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from realtide.bundle import PRECISIONS, Bundle, BundleError, gpu_precision, load_bundle
from realtide.engines.ancat import backends
from realtide.engines.ancat.backends import Rows
from realtide.engines.ancat.config import LOGIT_BOUND, EncoderConfig, threshold
from realtide.engines.ancat.decoder import MAX_BEAM, Decoder
from realtide.engines.ancat.frontend import Features, Float32, Frontend, FrontendConfig
from realtide.engines.ancat.search import Int64
from realtide.engines.ancat.session import SpeechSession, Work, unpack
from realtide.engines.ancat.static_encoder import names
from realtide.engines.ancat.tokenizer import Tokenizer
from realtide.engines.ancat.types import SpeechEvent, SpeechOptions
from realtide.engines.ancat.utterance import DecoderConfig
from realtide.engines.ancat.words import WordTiming
from realtide.engines.engine import CheckpointMismatch, Session, StageTimer
from realtide.engines.runtime.program import Array, ProgramError, Runs
from realtide.engines.runtime.slots import SlotPool
from realtide.engines.runtime.weights import WeightFile

if TYPE_CHECKING:
    from realtide.engines.runtime.tensorrt import PlanOf


@dataclass(frozen=True, slots=True)
class SpeechModelInfo:
    """What is known of the loaded model; see `realtide.server.models.SpeechInfo`."""

    version: str
    backend: str
    precision: str
    device: str
    license: str
    language_codes: tuple[str, ...]
    sample_rate: int
    sample_rate_range: tuple[int, int]
    frame_seconds: float
    front_end_lookahead_ms: float
    max_lookahead_ms: float
    max_beam: int
    lookahead_bias_range: tuple[float, float]
    max_boost: float
    max_utterance_ms: int
    characters: frozenset[str]


@dataclass(frozen=True, slots=True)
class Model:
    """The parts of a loaded bundle that sessions share."""

    name: str
    info: SpeechModelInfo
    config: EncoderConfig
    step_frames: int
    frontend: FrontendConfig
    mean: Float32
    std: Float32
    decoder: Decoder


class AncatEngine:
    """See `engine.Engine`; sessions take the inputs and give the events of `types`."""

    def __init__(
        self,
        model: Model,
        encoder: Runs,
        rows: Rows,
        *,
        slots: int,
        max_batch: int,
        step_latency: float,
    ) -> None:
        self._model = model
        self._encoder = encoder
        self._pool = SlotPool(slots)
        self._rows = rows
        self._max_batch = max_batch
        self._step_latency = step_latency
        self._features = Features(model.frontend, mean=model.mean, std=model.std)
        self._inputs = names(model.config)

    @property
    def name(self) -> str:
        """Engine name as used in metric labels."""
        return "ancat"

    @property
    def model(self) -> str:
        """Name of the loaded bundle."""
        return self._model.name

    @property
    def info(self) -> SpeechModelInfo:
        """Limits and facts of the model."""
        return self._model.info

    @property
    def slots(self) -> int:
        """Sessions that can be open at once."""
        return self._pool.slots

    @property
    def free_slots(self) -> int:
        """Slots that no session holds."""
        return self._pool.free_slots

    @property
    def max_batch(self) -> int:
        """Most sessions in one step."""
        return self._max_batch

    @property
    def cache_bytes(self) -> int:
        """Bytes of all slots' state; pages of slots that were never used are not committed."""
        return self._rows.nbytes

    @property
    def parked(self) -> int:
        """None ever: each slot has its own state."""
        return 0

    @property
    def computes(self) -> tuple[str, str] | None:
        """See `engine.Engine`: the encoder's graph."""
        return "features", "encoder"

    def attach(self, wake: Callable[[Session], None], on_stage: StageTimer) -> None:
        """See `engine.Engine`; all work is done in steps."""

    def close(self) -> None:
        """See `engine.Engine`; there are no threads."""

    def open(self, options: SpeechOptions) -> SpeechSession:
        """Take a slot. Raises SlotsExhausted; ValueError for options that this model cannot serve."""
        model = self._model
        decode = model.decoder.new_state(options)
        frontend = Frontend(options.sample_rate, features=self._features)
        lease = self._pool.take()
        try:
            self._rows.zero(lease.slot)
            return self._session(lease, frontend, decode)
        except BaseException:
            lease.free()
            raise

    def restore(self, checkpoint: bytes, options: SpeechOptions | None = None) -> SpeechSession:
        """Take a slot and continue an exported session, bit for bit.

        `options` replaces those in the checkpoint from the next frame on. Raises SlotsExhausted,
        CheckpointMismatch.
        """
        model = self._model
        parts = unpack(checkpoint)
        try:
            frontend = Frontend.restore(parts.front, features=self._features)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise CheckpointMismatch(f"front end state does not fit this model: {error}") from None
        kept = None if options is None else replace(options, sample_rate=frontend.sample_rate)
        state = model.decoder.restore(parts.decode, kept)
        lease = self._pool.take()
        try:
            self._rows.load(lease.slot, parts.rows)
            session = self._session(lease, frontend, state)
            session.resume_at(parts.plain, parts.held)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            lease.free()
            raise CheckpointMismatch(f"checkpoint does not fit this model: {error}") from None
        except BaseException:
            lease.free()
            raise
        return session

    def _session(self, lease: Any, frontend: Frontend, decode: Any) -> SpeechSession:
        return SpeechSession(
            lease,
            self._rows,
            frontend,
            decode,
            self._model.decoder,
            round(1000 * self._model.info.frame_seconds),
            self._model.step_frames,
            self._step_latency,
        )

    def batch_key(self, session: SpeechSession) -> Hashable:
        """All sessions of a model can share a step."""
        return None

    def step(self, sessions: Sequence[SpeechSession], on_stage: StageTimer) -> list[list[SpeechEvent]]:
        """Advance sessions by what is complete; see `engine.Engine.step`.

        Whoever is in a step that raises is lost if it had taken input: the state may hold a part of it. A
        further step with such a session raises the same, before anybody's input is taken.
        """
        for session in sessions:
            if session.lost is not None:
                raise session.lost
        works: list[Work] = []
        try:
            return self._step(sessions, works, on_stage)
        except Exception as error:
            for session, _ in zip(sessions, works, strict=False):
                session.lost = error
            raise

    def _step(
        self, sessions: Sequence[SpeechSession], works: list[Work], on_stage: StageTimer
    ) -> list[list[SpeechEvent]]:
        """A step; `works` is filled with what it takes."""
        begun = time.perf_counter()
        for session in sessions:
            works.append(session.take())
        windows = self._features.windows([work.drawn for work in works])
        frames = [(i, work.first + k) for i, work in enumerate(works) for k in range(work.frames)]
        stream, position = np.array(frames, np.int64).reshape(-1, 2).T.copy()
        feeds = self._feeds(sessions, works, windows, stream, position)
        features_done = time.perf_counter()
        on_stage("features", features_done - begun, len(sessions))
        encoded, available, counts = self._encode(sessions, works, feeds)
        encoder_done = time.perf_counter()
        on_stage("encoder", encoder_done - features_done, len(sessions))
        endings = [work.ending for work in works]
        events = self._model.decoder.advance(
            [s.decode for s in sessions], encoded, available, counts, final=endings
        )
        for session, work, found in zip(sessions, works, events, strict=True):
            found.extend(session.ended(work))
        on_stage("decoder", time.perf_counter() - encoder_done, len(sessions))
        return events

    def _feeds(
        self,
        sessions: Sequence[SpeechSession],
        works: Sequence[Work],
        windows: Float32,
        stream: Int64,
        position: Int64,
    ) -> dict[str, Array]:
        """Inputs of the encoder's graph for some sessions and their new windows."""
        feeds: dict[str, Array] = {
            "windows": windows,
            "stream": stream,
            "position": position,
            "slots": np.array([session.slot for session in sessions], np.int64),
            "arrived": np.array([work.first + work.frames for work in works], np.int64),
            "least": np.array([threshold(s.options.lookahead_bias) for s in sessions], np.float32),
            "cap": np.array([session.cap for session in sessions], np.int64),
            "final": np.array([work.ending is not None for work in works], np.int64),
        }
        return {name: feeds[name] for name in self._inputs}

    def _encode(
        self, sessions: Sequence[SpeechSession], works: Sequence[Work], feeds: dict[str, Array]
    ) -> tuple[Float32, Int64, list[int]]:
        """Encoder rows [M, J] and their availability [M], session by session; the number of rows of each."""
        active = list(range(len(sessions)))
        parts: list[tuple[Float32, Int64, Int64]] = []
        while True:
            out = self._encoder.run(feeds)
            owner = np.array(active, np.int64)[out["stream_out"]]
            parts.append((out["encoded"], out["available"], owner))
            active = [i for i, more in zip(active, out["more"].tolist(), strict=True) if more]
            if not active:
                break
            none = [feeds[name][:0] for name in ("windows", "stream", "position")]
            feeds = self._feeds([sessions[i] for i in active], [works[i] for i in active], *none)
        encoded, available, owner = parts[0]
        if len(parts) > 1:
            encoded, available, owner = (np.concatenate(column) for column in zip(*parts, strict=True))
            order = np.argsort(owner, kind="stable")
            encoded, available, owner = encoded[order], available[order], owner[order]
        return encoded, available, np.bincount(owner, minlength=len(sessions)).tolist()


def load(
    bundle: Bundle | Path | str,
    *,
    slots: int,
    max_batch: int,
    precision: str | None = None,
    threads: int = 1,
    step_latency: float = 0.05,
    backend: str = "onnxruntime",
    device: str | None = None,
    plan_of: PlanOf | None = None,
    compiled: bool = False,
    programs: Callable[[backends.Source], backends.Loaded] | None = None,
) -> AncatEngine:
    """Load a bundle into an engine.

    Args:
        bundle: the bundle or its directory.
        slots: sessions that can be open at once.
        max_batch: most sessions in one step.
        precision: ``fp32`` or ``int8``; None: the bundle's default. PyTorch computes in ``fp32`` or ``bf16``,
            plans in ``fp16`` too.
        threads: threads of one program.
        step_latency: seconds within which a complete frame should be worked on (the executor's deadlines).
        backend: ``onnxruntime``, ``torch`` where PyTorch is installed, or ``tensorrt``.
        device: of the backends ``torch`` and ``tensorrt``: ``cuda:0``, or ``cpu`` to run the same programs
            there. None: the processor, with programs that suit it.
        plan_of: where the backend ``tensorrt`` has plans in this precision from.
        compiled: have PyTorch compile its programs, in the form for GPUs, while the bundle is loaded.
        programs: what runs the programs instead of a backend, in the precision of `precision`.

    Raises:
        BundleError, ProgramError: the bundle is not usable; the message names the file or the field.
    """
    loaded = bundle if isinstance(bundle, Bundle) else load_bundle(bundle)
    long = None if precision is None else PRECISIONS.get(precision, precision)
    wanted = loaded.precision(long) if backend == "onnxruntime" else gpu_precision(backend, long)
    architecture = loaded.manifest.architecture
    try:
        config = EncoderConfig.from_dict(architecture["encoder"])
        step_frames = int(architecture["step_frames"])
        front = FrontendConfig(**architecture["frontend"])
        timing = WordTiming(frame_ms=front.subsampling * front.shift_ms, **architecture["word_times"])
        limits = dict(loaded.manifest.limits)
        maximum = int(limits.get("max_utterance_ms", 60_000))
        search = DecoderConfig(timing=timing, hard_max_utterance_ms=maximum, **architecture.get("search", {}))
    except (KeyError, TypeError, ValueError) as error:
        raise BundleError(f"{loaded.directory}: architecture: {error}") from None
    weights = WeightFile(loaded.weights)
    source = backends.Source(loaded, wanted, config, step_frames, slots, max_batch, weights)
    if programs is not None:
        made = programs(source)
    elif backend == "tensorrt":
        if plan_of is None:
            raise ProgramError("the backend tensorrt needs plans")
        made = backends.tensorrt(source, device or "cpu", plan_of)
    elif backend == "torch":
        made = backends.torch(source, threads, device, compiled)
    else:
        made = backends.onnxruntime(source, threads)
    tokenizer = Tokenizer(loaded.asset("tokenizer"))
    decoder = Decoder(made.joiner, tokenizer, search)
    frame_ms = front.subsampling * front.shift_ms
    short = {long: name for name, long in PRECISIONS.items()}
    info = SpeechModelInfo(
        version=loaded.manifest.version,
        backend=backend,
        precision=short[wanted],
        device=device or "cpu",
        license=loaded.manifest.licence,
        language_codes=tuple(limits.get("language_codes", ("en-US",))),
        sample_rate=front.sample_rate,
        sample_rate_range=(8000, 48000),
        frame_seconds=frame_ms / 1000,
        front_end_lookahead_ms=front.frame_ms - front.shift_ms,
        max_lookahead_ms=config.layers * config.right * frame_ms,
        max_beam=MAX_BEAM,
        lookahead_bias_range=(-LOGIT_BOUND, LOGIT_BOUND),
        max_boost=float(limits.get("max_boost", 10.0)),
        max_utterance_ms=maximum,
        characters=frozenset(limits.get("characters", "abcdefghijklmnopqrstuvwxyz'")),
    )
    mean, std = (np.asarray(weights[f"features.{name}"], np.float32) for name in ("mean", "std"))
    model = Model(loaded.manifest.name, info, config, step_frames, front, mean, std, decoder)
    return AncatEngine(
        model, made.encoder, made.rows, slots=slots, max_batch=max_batch, step_latency=step_latency
    )
