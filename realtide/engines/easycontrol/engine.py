"""The image engine: sessions whose steps are batched, over one cache of conditions (ours).

A step either does one thing that an image needs before its steps (its prompt, one of its conditions), or
denoises a batch of images of one size under equally many conditions. Sessions take turns between any two
steps. Finished latents are decoded and encoded by the worker thread while the next steps run. Needs no
PyTorch where programs come from ONNX graphs; `backends` has the others.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from realtide.bundle import PRECISIONS, Bundle, BundleError, gpu_precision, load_bundle
from realtide.engines.easycontrol import backends, loras
from realtide.engines.easycontrol.config import (
    ConditionConfig,
    ImageConfig,
    PooledConfig,
    SamplerConfig,
    TextConfig,
    TransformerConfig,
    VaeConfig,
    condition_bytes,
)
from realtide.engines.easycontrol.layout import POOLED_TOKENIZER, TOKENIZER, lora
from realtide.engines.easycontrol.parts import Parts
from realtide.engines.easycontrol.session import ImageSession, unpack
from realtide.engines.easycontrol.store import ConditionStore
from realtide.engines.easycontrol.tokenizer import PooledTokenizer, PromptTokenizer
from realtide.engines.easycontrol.types import ImageEvent, ImageModelInfo, ImageOptions
from realtide.engines.easycontrol.worker import Worker
from realtide.engines.engine import Session, StageTimer
from realtide.engines.runtime.program import Array, ProgramError
from realtide.engines.runtime.slots import SlotPool
from realtide.engines.runtime.weights import WeightFile

if TYPE_CHECKING:
    from realtide.engines.runtime.tensorrt import PlanOf

CACHE_BYTES = 1 << 28
"""Budget of the condition cache where nothing else is said; a condition always fits."""


class EasyControlEngine:
    """See `engine.Engine`; sessions take the inputs and give the events of `types`.

    Args:
        name: of the bundle.
        info: what is known of the model.
        parts: model and cache.
        slots: sessions that can be open at once.
        max_batch: most sessions that one step advances.
        latency: seconds after which a session's next step is due.
    """

    def __init__(
        self,
        name: str,
        info: ImageModelInfo,
        parts: Parts,
        slots: int,
        max_batch: int,
        latency: float = 0.1,
    ) -> None:
        self._model, self._info, self._parts = name, info, parts
        self._pool = SlotPool(slots)
        self._max_batch, self._latency = max_batch, latency
        self._wake: Callable[[Session], None] = lambda session: None
        self._on_stage: StageTimer = lambda stage, seconds, batch: None
        self._sessions: frozenset[ImageSession] = frozenset()

    @property
    def name(self) -> str:
        """Engine name as used in metric labels."""
        return "easycontrol"

    @property
    def model(self) -> str:
        """Name of the loaded bundle."""
        return self._model

    @property
    def info(self) -> ImageModelInfo:
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
        """Most sessions that one step advances."""
        return self._max_batch

    @property
    def cache_bytes(self) -> int:
        """Budget of the condition cache."""
        return self._parts.store.budget

    @property
    def store(self) -> ConditionStore:
        """The condition cache."""
        return self._parts.store

    @property
    def parked(self) -> int:
        """None: images are small while they form."""
        return 0

    @property
    def computes(self) -> tuple[str, str] | None:
        """See `engine.Engine`: never long between other work."""
        return None

    def attach(self, wake: Callable[[Session], None], on_stage: StageTimer) -> None:
        """See `engine.Engine`."""
        self._wake, self._on_stage = wake, on_stage

    def wake(self, session: ImageSession) -> None:
        """`session` has something to collect; from any thread."""
        self._wake(session)

    def freed(self) -> None:
        """Sessions that wait for memory of the condition cache may go on."""
        for session in self._sessions:
            if session.current is not None:
                self._wake(session)

    def on_stage(self, stage: str, seconds: float, batch: int) -> None:
        """Pass on how long the worker's thread took."""
        self._on_stage(stage, seconds, batch)

    def close(self) -> None:
        """End the worker's thread."""
        self._parts.worker.close()

    def open(self, options: ImageOptions) -> ImageSession:
        """Take a slot. Raises SlotsExhausted."""
        return self._open(options, None)

    def restore(self, checkpoint: bytes, options: ImageOptions | None = None) -> ImageSession:
        """Take a slot and continue an exported session: the image under way comes out the same.

        Raises:
            ValueError: no options; how images are encoded and which comes next is in no checkpoint.
            SlotsExhausted: no slot is free.
            CheckpointMismatch: the checkpoint is damaged, or of another model.
        """
        if options is None:
            raise ValueError("options are needed: a checkpoint does not say how images are encoded")
        return self._open(options, checkpoint)

    def _open(self, options: ImageOptions, checkpoint: bytes | None) -> ImageSession:
        state = None if checkpoint is None else unpack(checkpoint)
        lease = self._pool.take()
        try:
            session = ImageSession(self._parts, self, lease, options, self._latency, state)
        except BaseException:
            lease.free()
            raise
        self._sessions = frozenset(s for s in self._sessions if not s.closed) | {session}
        return session

    def batch_key(self, session: ImageSession) -> Hashable:
        """Images of one size under equally many conditions share a step."""
        current = session.current
        if current is None or not current.ready:
            return id(session)
        return current.grid, current.condition_tokens

    def step(self, sessions: Sequence[ImageSession], on_stage: StageTimer) -> list[list[ImageEvent]]:
        """Advance sessions of one key by one step.

        Receipts are made last: a step that fails is tried again session by session.
        """
        first = sessions[0].current
        if first is None or not first.ready:
            told = [session.prepare(on_stage) for session in sessions]
            return [[*session.begin(), *found] for session, found in zip(sessions, told, strict=True)]
        rows = [session.row() for session in sessions]
        begun = time.perf_counter()
        velocities = self._parts.velocities(rows, first.grid)
        on_stage("denoise", time.perf_counter() - begun, len(rows))
        return [
            [*session.begin(), *session.advance(velocity)]
            for session, velocity in zip(sessions, velocities, strict=True)
        ]


def load(
    bundle: Bundle | Path | str,
    *,
    slots: int,
    max_batch: int = 8,
    precision: str | None = None,
    threads: int = 1,
    step_latency: float = 0.1,
    backend: str = "onnxruntime",
    device: str = "cpu",
    plan_of: PlanOf | None = None,
    compiled: bool = False,
    cache_bytes: int | None = None,
) -> EasyControlEngine:
    """Load a bundle into an engine.

    Args:
        bundle: the bundle or its directory.
        slots: sessions that can be open at once.
        max_batch: most sessions that one step advances.
        precision: ``fp32``, ``fp16``, ``bf16``, ``int8`` or ``fp8``; None: the bundle's default.
        threads: threads of one program.
        step_latency: seconds after which a session's next step is due.
        backend: ``onnxruntime``, ``torch`` where PyTorch is installed, or ``tensorrt``.
        device: of the backends ``torch`` and ``tensorrt``: ``cpu``, or ``cuda:0``.
        plan_of: where the backend ``tensorrt`` has plans in this precision from.
        compiled: have PyTorch compile what a step runs, when the first image of a size comes.
        cache_bytes: budget of the condition cache; None: 256 MiB, or a few conditions if that is more.

    Raises:
        BundleError, ProgramError: the bundle is not usable; the message names the file or the field.
    """
    loaded = bundle if isinstance(bundle, Bundle) else load_bundle(bundle)
    long = None if precision is None else PRECISIONS.get(precision, precision)
    if backend == "onnxruntime":
        wanted = loaded.precision(long)
    else:
        wanted = gpu_precision(backend, long, ("float8",) if backend == "tensorrt" else ())
    try:
        config, text, pooled = architecture(loaded.manifest.architecture)
        pieces, short = tokenizers(loaded, config, pooled)
        limits = _limits(loaded.manifest.limits, config)
        itemsize = 2 if wanted in ("float16", "bfloat16", "float8") else 4
        each = condition_bytes(config, itemsize)
        budget = cache_bytes or max(CACHE_BYTES, limits["max_conditions"] * each)
        if budget < limits["max_conditions"] * each:
            raise ValueError(
                f"cache_bytes: {limits['max_conditions']} conditions of an image need"
                f" {limits['max_conditions'] * each} bytes, got {budget}"
            )
    except (KeyError, TypeError, ValueError, ImportError, OSError) as error:
        raise BundleError(f"{loaded.directory}: {error}") from None
    weights = WeightFile(loaded.weights)
    stacked = adapters(loaded, config, weights)
    model = backends.Model(loaded, wanted, config, text, pooled, weights)
    if backend == "tensorrt":
        if plan_of is None:
            raise ProgramError("the backend tensorrt needs plans")
        made = backends.tensorrt(model, device, plan_of)
    elif backend == "torch":
        made = backends.torch(model, threads, device, compiled)
    else:
        made = backends.onnx(model, threads)
    store = ConditionStore(budget, each)
    worker = Worker(f"images-{loaded.manifest.name}", made.memory)
    try:
        parts = Parts(config, made.programs, pieces, short, stacked, store, worker, made.dtype)
    except ValueError as error:
        raise BundleError(f"{loaded.weights}: {error}") from None
    info = ImageModelInfo(
        version=loaded.manifest.version,
        backend=backend,
        precision={long: short_name for short_name, long in PRECISIONS.items()}[wanted],
        device=made.memory.device,
        license=loaded.manifest.licence,
        multiple=config.token_pixels,
        steps=config.sampler.steps,
        guidance=config.sampler.guidance if config.transformer.guidance else None,
        kinds={kind: config.conditions.role(kind) for kind in config.conditions.kinds},
        condition_size=config.conditions.size,
        condition_bytes=each,
        cache_bytes=budget,
        preview_scale=config.vae.scale // config.preview,
        max_prompt_tokens=pieces.limit,
        count_tokens=pieces.count,
        **limits,
    )
    return EasyControlEngine(loaded.manifest.name, info, parts, slots, max_batch, step_latency)


def tokenizers(
    bundle: Bundle, config: ImageConfig, pooled: PooledConfig
) -> tuple[PromptTokenizer, PooledTokenizer]:
    """Those of both text encoders. Raises BundleError, OSError, ValueError, ImportError."""
    pieces = PromptTokenizer(bundle.asset(TOKENIZER), config.transformer.text_tokens)
    pairs = bundle.asset(POOLED_TOKENIZER) if POOLED_TOKENIZER in bundle.manifest.assets else None
    return pieces, PooledTokenizer(pooled, pieces, pairs)


def adapters(
    bundle: Bundle, config: ImageConfig, weights: Mapping[str, Array]
) -> dict[str, dict[str, Array]]:
    """The LoRA of each kind at weight 1, by `config.lora_shapes`. Raises BundleError: one is not whole."""
    found = {}
    for kind in config.conditions.kinds:
        try:
            found[kind] = loras.stacked(config.transformer, weights, 1.0, lora(kind))
        except KeyError as error:
            raise BundleError(f"{bundle.weights}: the LoRA of {kind} lacks {error}") from None
    return found


def architecture(values: Mapping[str, Any]) -> tuple[ImageConfig, TextConfig, PooledConfig]:
    """The shapes in a manifest's `architecture`. Raises KeyError, TypeError, ValueError."""
    config = ImageConfig(
        TransformerConfig.from_dict(values["transformer"]),
        ConditionConfig.from_dict(values["conditions"]),
        SamplerConfig.from_dict(values["sampler"]),
        VaeConfig.from_dict(values["vae"]),
        values.get("preview", 1),
    )
    text, pooled = TextConfig.from_dict(values["text"]), PooledConfig.from_dict(values["pooled"])
    if text.dim != config.transformer.text_dim:
        raise ValueError(
            f"text.dim ({text.dim}) must be transformer.text_dim ({config.transformer.text_dim})"
        )
    if pooled.dim != config.transformer.pooled_dim:
        raise ValueError(
            f"pooled.dim ({pooled.dim}) must be transformer.pooled_dim ({config.transformer.pooled_dim})"
        )
    return config, text, pooled


def _limits(values: Mapping[str, Any], config: ImageConfig) -> dict[str, Any]:
    """The manifest's `limits` as fields of `ImageModelInfo`, checked. Raises KeyError, ValueError."""
    side = config.token_pixels
    width, height = (int(value) for value in values["size"])
    low, high = (int(value) for value in values["side"])
    config.grid(width, height)
    if low % side or high % side or not side <= low <= min(width, height) <= max(width, height) <= high:
        raise ValueError(f"limits.side must be two multiples of {side} around limits.size, got {[low, high]}")
    pixels = int(values["pixels"])
    if pixels < width * height:
        raise ValueError(f"limits.pixels must be at least {width * height}, got {pixels}")
    steps = int(values["steps"])
    if steps < config.sampler.steps:
        raise ValueError(f"limits.steps must be at least sampler.steps ({config.sampler.steps}), got {steps}")
    conditions = int(values["conditions"])
    if conditions < 0:
        raise ValueError(f"limits.conditions must be at least 0, got {conditions}")
    ranges = {}
    for name, default in (("weight", (0.0, 2.0)), ("guidance", (0.0, 30.0))):
        first, last = (float(value) for value in values.get(name, default))
        if not first <= last:
            raise ValueError(f"limits.{name} must be two rising numbers, got {[first, last]}")
        ranges[name] = first, last
    return {
        "size": (width, height),
        "side_range": (low, high),
        "max_pixels": pixels,
        "max_steps": steps,
        "max_conditions": conditions,
        "weight_range": ranges["weight"],
        "guidance_range": ranges["guidance"],
    }
