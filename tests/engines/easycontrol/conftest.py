"""Small models with random weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from realtide.engines.easycontrol.config import (
    ConditionConfig,
    ImageConfig,
    SamplerConfig,
    TransformerConfig,
    VaeConfig,
)
from realtide.engines.easycontrol.transformer import FluxTransformer
from realtide.engines.runtime.program import Array

GOLDEN = Path(__file__).parents[2] / "golden" / "easycontrol"
MODEL = TransformerConfig(
    double_blocks=2, single_blocks=2, heads=2, head_dim=12, channels=16, text_dim=10, text_tokens=5,
    pooled_dim=6, freq_dim=16, axes=(4, 4, 4),
)  # fmt: skip
VAE = VaeConfig(latent=4, widths=(4, 8, 8), layers=1, groups=4, scaling=0.7, shift=0.2)
CONFIG = ImageConfig(
    MODEL,
    ConditionConfig(size=32, rank=3, offset=16, spatial=("canny", "depth"), subject=("subject",)),
    SamplerConfig(steps=4, base_tokens=4, max_tokens=64),
    VAE,
    preview=2,
)


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """More threads than cores only spin against each other."""
    torch.set_num_threads(1)


def transformer(config: TransformerConfig = MODEL, seed: int = 1) -> FluxTransformer:
    """Random weights under which every token matters to every other."""
    torch.manual_seed(seed)
    model = FluxTransformer(config)
    for name, weight in model.named_parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.6 * weight.shape[1] ** -0.5 if "norm" in name else 0.25)
    return model.eval().requires_grad_(False)


def random(seed: int, *shape: int) -> Array:
    """Standard normal numbers."""
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
