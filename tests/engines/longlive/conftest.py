"""Small models with random weights, and streams over them in PyTorch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from realtide.engines.longlive.config import (
    StreamConfig,
    TransformerConfig,
    VaeConfig,
    VideoConfig,
    cache_shapes,
)
from realtide.engines.longlive.generation import VideoStream
from realtide.engines.longlive.programs import VideoPrograms
from realtide.engines.longlive.torch_programs import video_programs
from realtide.engines.longlive.transformer import WanTransformer
from realtide.engines.longlive.vae import WanVae
from realtide.engines.runtime.program import Array

GOLDEN = Path(__file__).parents[2] / "golden" / "longlive"


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """More threads than cores only spin against each other."""
    torch.set_num_threads(1)


def video_config(*, places: int = 0, **stream: object) -> VideoConfig:
    """Two layers, blocks of 2 frames of 6 tokens, a window of 6 frames of which 2 are the sink."""
    values = {"height": 4, "width": 6, "block": 2, "window": 6, "sink": 2, "steps": (1000, 500)} | stream
    model = TransformerConfig(
        layers=2, dim=24, heads=2, ff_dim=40, freq_dim=16, channels=4, text_dim=10, text_tokens=5,
        places=places,
    )  # fmt: skip
    return VideoConfig(model, StreamConfig.from_dict(values))


def transformer(config: VideoConfig) -> WanTransformer:
    """Random weights under which every frame matters to every later one."""
    torch.manual_seed(1)
    model = WanTransformer(config.transformer)
    for name, weight in model.named_parameters():
        if "modulation" not in name and weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.3)
    return model.eval().requires_grad_(False)


class Player:
    """A model, and streams over caches of their own."""

    def __init__(self, config: VideoConfig) -> None:
        self.config = config
        self.model = transformer(config)

    def bound(self) -> tuple[VideoPrograms, dict[str, Array]]:
        """Programs over a cache that holds something else."""
        cache = {
            name: np.full((rows, *shape), 7.0, np.float32)
            for name, (rows, shape) in cache_shapes(self.config).items()
        }
        return video_programs(self.model, self.config, cache), cache

    def stream(self, seed: int = 5) -> tuple[VideoStream, dict[str, Array]]:
        """A new stream and its cache."""
        programs, cache = self.bound()
        return VideoStream(self.config, programs, cache, seed), cache

    def text(self, number: int) -> Array:
        """Embeddings of some prompt, shorter than the limit."""
        rng = np.random.default_rng(number)
        return rng.standard_normal((3 + number % 3, self.config.transformer.text_dim)).astype(np.float32)

    def padded(self, number: int) -> Array:
        """The same, zero padded."""
        model = self.config.transformer
        out = np.zeros((model.text_tokens, model.text_dim), np.float32)
        text = self.text(number)
        out[: len(text)] = text
        return out


@pytest.fixture(scope="session")
def vae() -> WanVae:
    """Two halvings of space, one of them of time too."""
    torch.manual_seed(2)
    config = VaeConfig(
        dim=4, latent=3, multipliers=(1, 2, 2), residual_blocks=1, temporal=(False, True),
        mean=(0.1, -0.2, 0.3), std=(1.5, 0.5, 1.0),
    )  # fmt: skip
    return WanVae(config).eval().requires_grad_(False)
