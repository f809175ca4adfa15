"""Model bundles to engines. Which engine a bundle needs stands in its manifest; it is imported only then."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from realtide.bundle import PRECISIONS, BundleError, gpu_precision, load_bundle, resolve
from realtide.engines.runtime.program import ProgramError
from realtide.engines.runtime.tensorrt import PlanOf
from realtide.server import processors, runtimes
from realtide.server.config import ConfigError, ModelConfig, ServerConfig
from realtide.server.engine_process import Load
from realtide.server.models import AnyEngine
from realtide.server.remote import RemoteEngine
from realtide.server.runtimes import BACKENDS, Choice, Passed, Runtime

log = logging.getLogger(__name__)

# Engine name in the manifest -> module with `load(bundle, *, slots, max_batch, precision, threads,
# step_latency, backend)`; those of _LARGE also take `resident`, those of _CACHED `cache_bytes`, `device`
# whichever a GPU can serve, and `compiled` with PyTorch.
ENGINES = {
    "ancat": "realtide.engines.ancat.engine",
    "longlive": "realtide.engines.longlive.engine",
    "easycontrol": "realtide.engines.easycontrol.engine",
}
# Engines whose sessions are so large that a model has `video_slots` instead of `slots`.
_LARGE = ("longlive",)
# Engines that work in steps only, nothing beside them: their executors can be processes.
_STEPS_ONLY = ("ancat",)
# Engines with a cache of conditions, of which executors get a share each.
_CACHED = ("easycontrol",)


@dataclass(frozen=True, slots=True)
class Loaded:
    """The engines of a model, one for each executor, and the runtime that they have."""

    engines: list[AnyEngine]
    choice: Choice


def load_engines(model: ModelConfig, config: ServerConfig) -> Loaded:
    """Load one engine per executor; together they have the model's slots.

    The first runtime of the model's order that can be had is taken; see `runtimes`.

    Raises:
        ConfigError: no bundle, one that its engine cannot take, an engine that this server does not have, or
            none of the runtimes.
    """
    try:
        return _load(resolve(str(model.bundle)), model, config)
    except BundleError as error:
        raise ConfigError(f"models: {error}") from error


def _load(bundle: Path, model: ModelConfig, config: ServerConfig) -> Loaded:
    name, order = _engine(bundle), model.runtimes or config.runtimes
    passed: list[Passed] = []
    for runtime in order:
        reason = runtimes.missing(runtime, name, model.precision or config.precision)
        if reason is None:
            try:
                return Loaded(_made(bundle, name, runtime, model, config), Choice(runtime, tuple(passed)))
            except (BundleError, ProgramError, ImportError) as error:
                if len(order) == 1:
                    raise
                reason = str(error)
        passed.append(Passed(runtime, reason))
        log.warning("runtime not taken", extra={"bundle": str(bundle), "runtime": runtime, "reason": reason})
    reasons = "; ".join(f"{one.runtime}: {one.reason}" for one in passed)
    raise ConfigError(f"models: {bundle} can be served by none of the runtimes asked for: {reasons}")


def _made(
    bundle: Path, name: str, runtime: Runtime, model: ModelConfig, config: ServerConfig
) -> list[AnyEngine]:
    slots = model.slots or (config.video_slots if name in _LARGE else config.slots)
    executors = min(model.executors or config.executors, slots)
    shares = [slots // executors + (index < slots % executors) for index in range(executors)]
    resident = model.resident or config.video_resident
    more: dict[str, Any] = {"resident": resident and -(-resident // executors)} if name in _LARGE else {}
    backend, device = BACKENDS[runtime]
    if device != "cpu":
        more["device"] = device
    if backend == "torch":
        more["compiled"] = config.torch_compile
    if runtime == "tensorrt":
        batch = min(model.max_batch or config.max_batch or max(shares), max(shares))
        more["plan_of"] = _plans(bundle, model, config, batch)
    if name in _CACHED:
        budget = model.cache_bytes or config.image_cache_bytes
        more["cache_bytes"] = budget and budget // executors
    arguments = [
        {
            **more,
            "slots": share,
            "max_batch": min(model.max_batch or config.max_batch or share, share),
            "precision": model.precision or config.precision,
            "threads": config.ort_threads,
            "step_latency": config.step_latency,
            "backend": backend,
        }
        for share in shares
    ]
    if _in_processes(name, device, model, config):
        return _remote(
            [Load(ENGINES[name], bundle, given, config.log_level, config.log_format) for given in arguments]
        )
    load: Callable[..., AnyEngine] = importlib.import_module(ENGINES[name]).load
    return [load(bundle, **given) for given in arguments]


def _in_processes(engine: str, device: str, model: ModelConfig, config: ServerConfig) -> bool:
    """Whether executors are to be processes. Raises BundleError if they are asked for and cannot be."""
    possible = engine in _STEPS_ONLY and device == "cpu"
    if model.executor_processes and not possible:
        raise BundleError(
            f"{model.bundle}: executor_processes: only executors of speech models on a processor can be "
            f"processes, not of {engine} on {device}"
        )
    wanted = config.executor_processes if model.executor_processes is None else model.executor_processes
    return possible and (processors.usable() > 1 if wanted is None else wanted)


def _remote(loads: Sequence[Load]) -> list[AnyEngine]:
    engines: list[RemoteEngine] = []
    try:
        for load in loads:
            engines.append(RemoteEngine(load))
    except BaseException:
        for engine in engines:
            engine.end()
        raise
    return [*engines]


def _plans(bundle: Path, model: ModelConfig, config: ServerConfig, max_batch: int) -> PlanOf:
    """Plans of a bundle; PyTorch and TensorRT are imported only by whoever comes here."""
    from realtide.engines.runtime import gpu, tensorrt
    from realtide.engines.runtime.plans import PlanCache
    from realtide.plan_building import BundlePlans

    loaded = load_bundle(bundle)
    precision = gpu_precision("tensorrt", PRECISIONS[model.precision or config.precision], ("float8",))
    cache, target = PlanCache(config.plan_directory), tensorrt.target(None, gpu.detect())
    return BundlePlans(loaded, precision, cache, target, max_batch, config.build_plans)


def _engine(bundle: Path) -> str:
    """The engine's name. Only that is read here; the engine checks the whole manifest."""
    manifest = bundle / "manifest.yaml"
    try:
        data: Any = yaml.safe_load(manifest.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"models: {manifest} cannot be read: {error}") from None
    name = data.get("engine") if isinstance(data, dict) else None
    if not isinstance(name, str) or name not in ENGINES:
        raise ConfigError(f"models: {manifest} needs engine {name!r}, must be one of {', '.join(ENGINES)}")
    return name
