"""What LongLive's graphs are run on: sizes of dynamic dimensions, and samples for quality reports (ours)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from realtide.engines.longlive import rotary, schedule, window
from realtide.engines.longlive.config import (
    StreamConfig,
    TextConfig,
    TransformerConfig,
    VaeConfig,
    VideoConfig,
    cache_shapes,
    cross_shapes,
    decoder_shapes,
    encoder_shapes,
)
from realtide.engines.longlive.layout import DECODE, ENCODE, PASSES, TEXT_GRAPH
from realtide.engines.runtime.program import Array
from realtide.engines.runtime.quality import Sample
from realtide.engines.runtime.tensorrt import Sizes

INT8 = (PASSES.denoise, PASSES.clean, PASSES.recache)
"""Programs whose matrix products are worth int8 on a CPU; see int8.py."""

FP8 = (PASSES.denoise, PASSES.clean, PASSES.recache)
"""Programs whose matrix products are worth float8 on a GPU."""

FP8_KEPT = ("transformer.time_embedding.", "transformer.time_projection.", "transformer.head.")
"""Parts of the names of weights that stay in float16: the last layer, and what timesteps go through, rows
that decide for all tokens of a frame. With these in float8 a flow of longlive-emoji on random samples is
0.067 off, without 0.059.
"""

HOST_ONLY: tuple[str, ...] = ()
"""Programs without TensorRT plans."""


def architecture(values: Mapping[str, Any]) -> tuple[VideoConfig, VaeConfig, TextConfig]:
    """The shapes in a manifest's `architecture`. Raises KeyError, TypeError, ValueError."""
    config = VideoConfig(
        TransformerConfig.from_dict(values["transformer"]), StreamConfig.from_dict(values["stream"])
    )
    return config, VaeConfig.from_dict(values["vae"]), TextConfig.from_dict(values["text"])


def sizes(manifest: Mapping[str, Any], max_batch: int) -> dict[str, dict[str, Sizes]]:
    """Sizes of the dynamic dimensions by program and name: frames of a recache, tokens of a prompt.

    Args:
        manifest: `architecture` and `limits` of the manifest.
        max_batch: not used: a step is one session's.
    """
    config, _, _ = architecture(manifest["architecture"])
    tokens = config.transformer.text_tokens
    return pass_sizes(config) | {TEXT_GRAPH: {"tokens": Sizes(1, min(16, tokens), tokens)}}


def pass_sizes(config: VideoConfig) -> dict[str, dict[str, Sizes]]:
    """Those of the transformer's programs."""
    stream = config.stream
    return {PASSES.recache: {"frames": Sizes(1, stream.window - stream.sink, stream.window)}}


def samples(manifest: Mapping[str, Any]) -> dict[str, Sample]:
    """Random latents, caches, frames and prompts at the manifest's sizes, by program."""
    config, vae, text = architecture(manifest["architecture"])
    rng = np.random.default_rng(5)
    stream, later = config.stream, 3 * config.stream.window
    height, width, scale = stream.height, stream.width, vae.spatial_scale

    def random(*shape: int) -> Array:
        return rng.standard_normal(shape).astype(np.float32)

    cache = {name: 0.5 * random(rows, *shape) for name, (rows, shape) in cache_shapes(config).items()}
    halves = {
        DECODE: decoder_shapes(vae, height, width),
        ENCODE: encoder_shapes(vae, height * scale, width * scale),
    }
    features = {
        stages: {name: 0.5 * random(*shape) for name, shape in s.items()} for stages, s in halves.items()
    }
    latents = {"latents": random(1, vae.latent, height, width), "row": np.array([1])}
    pixels = np.tanh(random(vae.temporal_scale, 3, height * scale, width * scale))
    block = [pass_feeds(config, first, stream.block, step) for first, step in ((0, 1000.0), (later, 250.0))]
    clean = [pass_feeds(config, later, stream.block, 0.0)]
    recache = [pass_feeds(config, later, stream.window - stream.sink, 0.0)]
    ids = rng.integers(0, text.vocab, min(9, config.transformer.text_tokens))
    embeds = random(config.transformer.text_tokens, config.transformer.text_dim)
    return {
        PASSES.prompt: Sample([{"text": embeds}], {}),
        PASSES.denoise: Sample(block, cache),
        PASSES.clean: Sample(clean, cache),
        PASSES.recache: Sample(recache, cache),
        DECODE.first: Sample([latents], features[DECODE]),
        DECODE.later: Sample([latents], features[DECODE]),
        ENCODE.first: Sample([{"frames": pixels[:1], "row": np.array([1])}], features[ENCODE]),
        ENCODE.later: Sample([{"frames": pixels, "row": np.array([1])}], features[ENCODE]),
        TEXT_GRAPH: Sample([{"ids": ids}], {}),
    }


def pass_feeds(config: VideoConfig, first: int, count: int, timestep: float) -> dict[str, Array]:
    """Random inputs of a pass over frames first .. first+count-1, by name."""
    rng = np.random.default_rng(first + count)
    stream = config.stream
    frames = np.arange(first, first + count)
    feeds: dict[str, Array] = {
        "latents": rng.standard_normal((count, *config.latent_shape)).astype(np.float32),
        "sinusoids": schedule.sinusoid(np.full(count, timestep), config.transformer.freq_dim),
        "time": rotary.time_table(config, frames),
        "space": rotary.space_table(config),
        "places": np.arange(count) if count > stream.block else window.places(stream, first, count),
        "seen": window.seen(stream, first + count),
    }
    if stream.rotary == "relative":
        feeds["window_time"] = rotary.time_table(config, np.arange(stream.window))
    for name, shape in cross_shapes(config).items():
        feeds[name] = rng.standard_normal(shape).astype(np.float32)
    return feeds
