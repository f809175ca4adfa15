"""Shapes and their validation."""

from __future__ import annotations

from math import prod
from typing import Any

import pytest

from realtide.engines.longlive.config import (
    StreamConfig,
    TextConfig,
    TransformerConfig,
    VaeConfig,
    VideoConfig,
    cache_shapes,
    cross_shapes,
    decoder_shapes,
    session_bytes,
)
from tests.engines.longlive.conftest import video_config

MOMENTS: dict[str, Any] = {"mean": (0.0,) * 16, "std": (1.0,) * 16}


def test_the_defaults_are_wan_at_832x480() -> None:
    config = VideoConfig(TransformerConfig(), StreamConfig())
    assert config.frame_tokens == 1560
    assert config.transformer.rotary_pairs == (22, 21, 21)
    # The design's 3.4 GB of bf16 cache.
    bytes_ = 2 * sum(rows * prod(shape) for rows, shape in cache_shapes(config).values())
    assert bytes_ == 2 * 30 * 12 * 1560 * 1536 * 2 == 3_450_470_400
    assert cross_shapes(config)["cross_key_29"] == (12, 512, 128)
    vae = VaeConfig(**MOMENTS)
    assert (vae.spatial_scale, vae.temporal_scale, vae.widths) == (8, 4, (96, 192, 384, 384))


def test_sections_survive_the_manifest() -> None:
    for section in (TransformerConfig(), StreamConfig(steps=(900, 100)), VaeConfig(**MOMENTS), TextConfig()):
        values = section.to_dict()
        assert not any(isinstance(value, tuple) for value in values.values())  # YAML has lists
        assert type(section).from_dict(values) == section
        with pytest.raises(ValueError, match=f"{section.section} has no field 'size'"):
            type(section).from_dict(values | {"size": 1})


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        (TransformerConfig, {"layers": 0}, "transformer.layers must be"),
        (TransformerConfig, {"dim": 10.0}, "transformer.dim must be"),
        (TransformerConfig, {"heads": 7}, "must be a multiple of transformer.heads"),
        (TransformerConfig, {"dim": 48, "heads": 12}, "even and at least 6, got 4"),
        (TransformerConfig, {"freq_dim": 7}, "freq_dim must be even"),
        (TransformerConfig, {"eps": 0.0}, "eps must be positive"),
        (StreamConfig, {"sink": 10}, r"stream.sink must be in 0..9"),
        (StreamConfig, {"sink": -1}, r"stream.sink must be in 0..9"),
        (StreamConfig, {"rotary": "cubic"}, "stream.rotary must be"),
        (StreamConfig, {"steps": []}, "stream.steps must fall"),
        (StreamConfig, {"steps": [500, 500]}, "stream.steps must fall"),
        (StreamConfig, {"steps": [1001]}, "stream.steps must fall"),
        (StreamConfig, {"shift": 0}, "stream.shift must be"),
        (StreamConfig, {"context_noise": 1000}, "stream.context_noise must be"),
        (VaeConfig, {**MOMENTS, "temporal": [True]}, "vae.temporal must have 3 values"),
        (VaeConfig, {**MOMENTS, "multipliers": []}, "vae.multipliers must be"),
        (VaeConfig, {"std": [1.0] * 16}, "vae.mean must have 16 values, got 0"),
        (VaeConfig, {**MOMENTS, "std": [0.0] * 16}, "vae.std must be positive"),
        (TextConfig, {"heads": 63}, "must be a multiple of text.heads"),
        (TextConfig, {"buckets": 30}, "text.buckets must be a multiple of 4"),
        (TextConfig, {"max_distance": 8}, "text.max_distance must be above 8"),
    ],
)
def test_wrong_fields_are_named(kind: Any, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind.from_dict(values)


def test_a_frame_must_be_made_of_whole_patches() -> None:
    with pytest.raises(ValueError, match=r"stream.width \(7\) must be a multiple of transformer.patch \(2\)"):
        video_config(width=7)


def test_a_session_at_832x480_needs_about_four_gigabytes_in_16_bits() -> None:
    """The cache by arithmetic: 12 frames of 1,560 tokens, 1,536 numbers twice in 30 layers, 2 bytes each."""
    cache = 12 * 1560 * 1536 * 2 * 30 * 2
    assert cache == 3_450_470_400
    prompt = 512 * 1536 * 2 * 30 * 2
    vae = VaeConfig(**MOMENTS)
    features = 2 * sum(prod(shape) for shape in decoder_shapes(vae, 60, 104).values())
    latents, text = 15 * 16 * 60 * 104 * 2, 2 * 512 * 4096 * 2
    video = VideoConfig(TransformerConfig(), StreamConfig())
    assert session_bytes(video, vae, itemsize=2) == cache + prompt + features + latents + text
    assert 0.5e9 < features < 2e9


@pytest.mark.parametrize("places", [-1, 5, 7, 12])
def test_places_are_a_frame_s_tokens_or_none(places: int) -> None:
    assert video_config(places=6).transformer.places == video_config().frame_tokens == 6
    with pytest.raises(ValueError, match=r"transformer\.places must be 0 or a frame's 6 tokens"):
        video_config(places=places)
