"""Shapes of the bundle's models: the manifest's `architecture` is made from these (ours)."""

from __future__ import annotations

from names import TOKENS
from pictures import SIDE

from realtide.engines.easycontrol.config import (
    ConditionConfig,
    ImageConfig,
    PooledConfig,
    SamplerConfig,
    TextConfig,
    TransformerConfig,
    VaeConfig,
)

LATENT = 16
RANK = 32
WIDTH = 128
"""Of both text encoders."""


def vae_config(scaling: float = 1.0, shift: float = 0.0) -> VaeConfig:
    """The VAE: two halvings, so that a token is 8 x 8 pixels."""
    return VaeConfig(latent=LATENT, widths=(32, 64, 96), layers=1, groups=8, scaling=scaling, shift=shift)


def text_config(vocabulary: int) -> TextConfig:
    """The encoder of the prompt's tokens."""
    return TextConfig(
        vocab=vocabulary, dim=WIDTH, head_dim=32, heads=4, ff_dim=256, layers=2, buckets=32, max_distance=64
    )


def pooled_config(vocabulary: int) -> PooledConfig:
    """The encoder of the pooled prompt; it takes the same pieces."""
    return PooledConfig(
        vocab=vocabulary, dim=WIDTH, heads=4, ff_dim=256, layers=2, tokens=TOKENS, start=-1, end=1
    )


def image_config(vae: VaeConfig) -> ImageConfig:
    """Transformer, conditions and sampler."""
    return ImageConfig(
        TransformerConfig(
            double_blocks=2,
            single_blocks=4,
            heads=4,
            head_dim=48,
            channels=4 * LATENT,
            patch=2,
            text_dim=WIDTH,
            text_tokens=TOKENS,
            pooled_dim=WIDTH,
            freq_dim=64,
            axes=(8, 20, 20),
            guidance=False,
        ),
        ConditionConfig(size=SIDE, rank=RANK, offset=16, spatial=("canny",), subject=("subject",)),
        SamplerConfig(steps=12, base_tokens=64, max_tokens=256),
        vae,
        preview=4,
    )
