"""Shapes of the bundle's models: the manifest's `architecture` is made from these (ours)."""

from __future__ import annotations

from collections.abc import Sequence

from prompts import TOKENS, VOCABULARY
from scene import BLOCK, SIZE

from realtide.engines.longlive.config import (
    StreamConfig,
    TextConfig,
    TransformerConfig,
    VaeConfig,
    VideoConfig,
)

LATENT = 8
"""Channels of the latents."""
PATCH = 2
"""Latent pixels of a token, each way."""


def vae_config(mean: Sequence[float] = (), std: Sequence[float] = ()) -> VaeConfig:
    """The VAE."""
    return VaeConfig(
        dim=16,
        latent=LATENT,
        multipliers=(1, 2, 3),
        residual_blocks=1,
        temporal=(True, True),
        mean=tuple(mean) or (0.0,) * LATENT,
        std=tuple(std) or (1.0,) * LATENT,
    )


def text_config() -> TextConfig:
    """The text encoder."""
    return TextConfig(
        vocab=VOCABULARY,
        dim=96,
        attention_dim=96,
        ff_dim=144,
        heads=4,
        layers=2,
        buckets=32,
        max_distance=64,
    )


def video_config() -> VideoConfig:
    """The transformer, and the way it generates."""
    side = SIZE // vae_config().spatial_scale
    return VideoConfig(
        TransformerConfig(
            layers=6,
            dim=160,
            heads=2,
            ff_dim=512,
            freq_dim=64,
            channels=LATENT,
            patch=PATCH,
            text_dim=text_config().dim,
            text_tokens=TOKENS,
            places=(side // PATCH) ** 2,
        ),
        StreamConfig(
            height=side,
            width=side,
            block=BLOCK,
            window=4 * BLOCK,
            sink=BLOCK,
            rotary="relative",
            shift=2.0,
        ),
    )
