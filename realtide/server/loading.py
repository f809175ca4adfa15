"""Model bundles to engines. Which engine a bundle needs stands in its manifest; it is imported only then."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from realtide.bundle import BundleError, resolve
from realtide.server.config import ConfigError, ModelConfig, ServerConfig
from realtide.server.models import AnyEngine

# Engine name in the manifest -> module with `load(bundle, *, slots, max_batch, precision, threads,
# step_latency)`; those of _LARGE also take `resident`, those of _CACHED `cache_bytes`.
ENGINES = {
    "ancat": "realtide.engines.ancat.engine",
    "longlive": "realtide.engines.longlive.engine",
    "easycontrol": "realtide.engines.easycontrol.engine",
}
# Engines whose sessions are so large that a model has `video_slots` instead of `slots`.
_LARGE = ("longlive",)
# Engines with a cache of conditions, of which executors get a share each.
_CACHED = ("easycontrol",)


def load_engines(model: ModelConfig, config: ServerConfig) -> list[AnyEngine]:
    """Load one engine per executor; together they have the model's slots.

    Raises:
        ConfigError: no bundle, one that its engine cannot take, or an engine that this server does not have.
    """
    try:
        return _load(resolve(str(model.bundle)), model, config)
    except BundleError as error:
        raise ConfigError(f"models: {error}") from error


def _load(bundle: Path, model: ModelConfig, config: ServerConfig) -> list[AnyEngine]:
    name = _engine(bundle)
    load: Callable[..., AnyEngine] = importlib.import_module(ENGINES[name]).load
    slots = model.slots or (config.video_slots if name in _LARGE else config.slots)
    executors = min(model.executors or config.executors, slots)
    shares = [slots // executors + (index < slots % executors) for index in range(executors)]
    resident = model.resident or config.video_resident
    more: dict[str, Any] = {"resident": resident and -(-resident // executors)} if name in _LARGE else {}
    if name in _CACHED:
        budget = model.cache_bytes or config.image_cache_bytes
        more["cache_bytes"] = budget and budget // executors
    return [
        load(
            bundle,
            **more,
            slots=share,
            max_batch=min(model.max_batch or config.max_batch or share, share),
            precision=model.precision or config.precision,
            threads=config.ort_threads,
            step_latency=config.step_latency,
        )
        for share in shares
    ]


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
