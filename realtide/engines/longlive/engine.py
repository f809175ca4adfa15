"""The video engine: sessions that take turns on caches, a pass at a time, and a thread that decodes (ours).

A step makes one pass over one session's block, so that sessions get their turns between any two passes.
Latents of finished blocks are decoded and encoded by the worker thread while the next block is denoised.
Needs no PyTorch where programs come from ONNX graphs; `backends` has the others.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from realtide.bundle import PRECISIONS, Bundle, BundleError, gpu_precision, load_bundle
from realtide.engines.engine import Session, StageTimer
from realtide.engines.longlive import backends
from realtide.engines.longlive.caches import Cache, CachePool
from realtide.engines.longlive.config import (
    StreamConfig,
    TextConfig,
    TransformerConfig,
    VaeConfig,
    VideoConfig,
    session_bytes,
)
from realtide.engines.longlive.decoding import FrameWorker
from realtide.engines.longlive.session import Parts, VideoSession, unpack
from realtide.engines.longlive.timeline import Timeline
from realtide.engines.longlive.tokenizer import PromptTokenizer
from realtide.engines.longlive.types import VideoEvent, VideoModelInfo, VideoOptions
from realtide.engines.runtime.memory import HOST, Memory
from realtide.engines.runtime.program import ProgramError
from realtide.engines.runtime.slots import SlotPool
from realtide.engines.runtime.weights import WeightFile

if TYPE_CHECKING:
    from realtide.engines.runtime.tensorrt import PlanOf

Float32 = NDArray[np.float32]


class LongLiveEngine:
    """See `engine.Engine`; sessions take the inputs and give the events of `types`.

    Args:
        name: of the bundle.
        info: what is known of the model.
        config: transformer and stream.
        vae: the VAE.
        embed: a prompt to text embeddings [n, text_dim].
        caches: for at least one session.
        slots: sessions that can be open at once; those that find no cache park another.
        memory: where the caches are.
    """

    def __init__(
        self,
        name: str,
        info: VideoModelInfo,
        config: VideoConfig,
        vae: VaeConfig,
        embed: Callable[[str], Float32],
        caches: Sequence[Cache],
        slots: int,
        memory: Memory = HOST,
    ) -> None:
        self._model = name
        self._info = info
        self._pool = SlotPool(slots)
        self._wake: Callable[[Session], None] = lambda session: None
        self._on_stage: StageTimer = lambda stage, seconds, batch: None
        worker = FrameWorker(f"frames-{name}", memory)
        timeline = Timeline(vae.temporal_scale)
        self._parts = Parts(config, vae, embed, CachePool(caches), worker, self, timeline)

    @property
    def name(self) -> str:
        """Engine name as used in metric labels."""
        return "longlive"

    @property
    def model(self) -> str:
        """Name of the loaded bundle."""
        return self._model

    @property
    def info(self) -> VideoModelInfo:
        """Limits and facts of the model."""
        return self._info

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
        """One: a pass fills the processor with one session's block."""
        return 1

    @property
    def cache_bytes(self) -> int:
        """Bytes of all caches; pages of caches that were never used are not committed."""
        return self._parts.caches.nbytes

    @property
    def parked(self) -> int:
        """Sessions without a cache that had one."""
        return sum(session.parked for session in self._parts.caches.sessions)

    @property
    def computes(self) -> tuple[str, str] | None:
        """See `engine.Engine`: never long between other work."""
        return None

    def attach(self, wake: Callable[[Session], None], on_stage: StageTimer) -> None:
        """See `engine.Engine`."""
        self._wake, self._on_stage = wake, on_stage

    def wake(self, session: VideoSession) -> None:
        """`session` has something to collect, or others may have its cache; from any thread."""
        self._wake(session)
        if self._parts.caches.scarce:
            for other in self._parts.caches.sessions:
                if other is not session:
                    self._wake(other)

    def on_stage(self, stage: str, seconds: float, batch: int) -> None:
        """Pass on how long the worker's thread took."""
        self._on_stage(stage, seconds, batch)

    def close(self) -> None:
        """End the worker's thread."""
        self._parts.worker.close()

    def open(self, options: VideoOptions) -> VideoSession:
        """Take a slot. Raises SlotsExhausted."""
        return self._open(options, None)

    def restore(self, checkpoint: bytes, options: VideoOptions | None = None) -> VideoSession:
        """Take a slot and continue an exported session.

        With the options that it was opened with (`prompt` and `seed` come from the checkpoint) it continues
        with the same frames; see `VideoSession.export` for how exactly.

        Raises:
            ValueError: no options; how frames are encoded is in no checkpoint.
            SlotsExhausted: no slot is free.
            CheckpointMismatch: the checkpoint is damaged, or of another model.
        """
        if options is None:
            raise ValueError("options are needed: a checkpoint does not say how frames are encoded")
        return self._open(options, checkpoint)

    def _open(self, options: VideoOptions, checkpoint: bytes | None) -> VideoSession:
        state = None if checkpoint is None else unpack(checkpoint)
        lease = self._pool.take()
        try:
            session = VideoSession(self._parts, lease, options, state)
        except BaseException:
            lease.free()
            raise
        self._parts.caches.join(session)
        return session

    def batch_key(self, session: VideoSession) -> Hashable:
        """No two sessions share a step."""
        return id(session)

    def step(self, sessions: Sequence[VideoSession], on_stage: StageTimer) -> list[list[VideoEvent]]:
        """Make one pass for one session; see `VideoSession.advance`."""
        events = [session.advance(on_stage) for session in sessions]
        if self._parts.caches.scarce:
            for session in sessions:
                self.wake(session)
        return events


def load(
    bundle: Bundle | Path | str,
    *,
    slots: int,
    max_batch: int = 1,
    precision: str | None = None,
    threads: int = 1,
    step_latency: float = 0.0,
    backend: str = "onnxruntime",
    device: str = "cpu",
    plan_of: PlanOf | None = None,
    compiled: bool = False,
    resident: int | None = None,
) -> LongLiveEngine:
    """Load a bundle into an engine.

    Args:
        bundle: the bundle or its directory.
        slots: sessions that can be open at once.
        max_batch: not used: a step is one session's.
        precision: ``fp32``, ``fp16``, ``bf16``, ``int8`` or ``fp8``; None: the bundle's default. PyTorch
            computes in ``fp32``, ``bf16`` and ``fp8``, whatever graphs the bundle has.
        threads: threads of one program.
        step_latency: not used: frames are due when they are played.
        backend: ``onnxruntime``, ``torch`` where PyTorch is installed, or ``tensorrt``.
        device: of the backends ``torch`` and ``tensorrt``: ``cpu``, or ``cuda:0``.
        plan_of: where the backend ``tensorrt`` has plans in this precision from.
        compiled: have PyTorch compile what it runs for every block, while the bundle is loaded.
        resident: sessions whose caches are in memory, at most `slots`; None: all.

    Raises:
        BundleError, ProgramError: the bundle is not usable; the message names the file or the field.
    """
    loaded = bundle if isinstance(bundle, Bundle) else load_bundle(bundle)
    long = None if precision is None else PRECISIONS.get(precision, precision)
    served = gpu_precision(backend, long, ("float8",)) if backend != "onnxruntime" else None
    wanted = served or loaded.precision(long)
    architecture, limits = loaded.manifest.architecture, loaded.manifest.limits
    try:
        config = VideoConfig(
            TransformerConfig.from_dict(architecture["transformer"]),
            StreamConfig.from_dict(architecture["stream"]),
        )
        vae = VaeConfig.from_dict(architecture["vae"])
        text = TextConfig.from_dict(architecture["text"])
        rate = float(architecture["video"]["frames_per_second"])
        rates = tuple(float(value) for value in limits.get("frames_per_second", (1, 60)))
        lowest, highest = rates
        if not 0 < lowest <= rate <= highest:
            raise ValueError(f"limits.frames_per_second must be two rates around {rate:g}, got {rates}")
    except (KeyError, TypeError, ValueError) as error:
        raise BundleError(f"{loaded.directory}: architecture: {error}") from None
    try:
        tokenizer = PromptTokenizer(loaded.asset("tokenizer"), config.transformer.text_tokens)
    except (OSError, ValueError) as error:
        raise BundleError(f"{loaded.directory}: assets.tokenizer: {error}") from None
    model = backends.Model(loaded, wanted, config, vae, text, WeightFile(loaded.weights))
    count = min(resident or slots, slots)
    if backend == "tensorrt":
        if plan_of is None:
            raise ProgramError("the backend tensorrt needs plans")
        made = backends.tensorrt(model, count, device, plan_of)
    elif backend == "torch":
        made = backends.torch(model, count, threads, device, compiled)
    else:
        made = backends.onnx(model, count, threads)
    memory = made.memory

    def embed(prompt: str) -> Float32:
        ids = np.array(tokenizer.encode(prompt), np.int64)
        return memory.get(made.text.run({"ids": ids})["embeds"])

    timeline, block = Timeline(vae.temporal_scale), config.stream.block
    size = (config.stream.width * vae.spatial_scale, config.stream.height * vae.spatial_scale)
    info = VideoModelInfo(
        version=loaded.manifest.version,
        backend=backend,
        precision={long: short for short, long in PRECISIONS.items()}[wanted],
        device=memory.device,
        license=loaded.manifest.licence,
        sizes=(size,),
        frames_per_second=rate,
        frames_per_second_range=(lowest, highest),
        first_block=timeline.first(block),
        block=block * timeline.scale,
        max_prompt_tokens=tokenizer.limit,
        count_tokens=tokenizer.count,
        session_bytes=session_bytes(config, vae),
    )
    return LongLiveEngine(loaded.manifest.name, info, config, vae, embed, made.caches, slots, memory)
