"""What the trainings of base model and LoRAs share: batches, text, losses, learning rates (ours)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from names import BACKGROUNDS, STYLES, paraphrase
from numpy.typing import NDArray
from pictures import SIDE
from shapes import image_config, pooled_config, text_config, vae_config
from torch import Tensor
from torch.nn import functional as F

from realtide.engines.easycontrol import rotary, schedule, transformer
from realtide.engines.easycontrol.config import ImageConfig
from realtide.engines.easycontrol.text import ClipText, T5Encoder
from realtide.engines.easycontrol.tokenizer import PooledTokenizer, PromptTokenizer
from realtide.engines.easycontrol.transformer import FluxTransformer, Lora

PURE = 0.5
"""Share of noise levels that are noise alone: there nothing but prompt and condition help."""
NAMELESS = 0.15
"""Share of prompts without a name."""
SHARP = 1.6
"""Weights of the norms of queries and keys to begin with: looking at one place needs large scores."""


def plainly(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Attention out of matrix products, which autocast's bfloat16 speeds up on a CPU, gradients too."""
    scores = (queries * queries.shape[-1] ** -0.5) @ keys.transpose(2, 3)
    return (scores.softmax(-1).to(values.dtype) @ values).transpose(1, 2).flatten(2)


@dataclass
class Round:
    """Latents of one file of `encode`."""

    told: NDArray[np.int64]
    latents: NDArray[np.float16]
    edges: NDArray[np.float16]


@dataclass
class Model:
    """Everything that is trained."""

    transformer: FluxTransformer
    text: T5Encoder
    pooled: ClipText

    def modules(self) -> torch.nn.ModuleDict:
        """By part."""
        return torch.nn.ModuleDict(
            {"transformer": self.transformer, "text": self.text, "pooled": self.pooled}
        )

    def load(self, path: Path) -> None:
        """Take a checkpoint's weights."""
        self.modules().load_state_dict(torch.load(path, weights_only=True)["weights"])


def config() -> ImageConfig:
    """Shapes; the VAE's normalisation does not matter here."""
    return image_config(vae_config())


def build(vocabulary: int) -> Model:
    """Fresh weights; the first prediction is no velocity at all."""
    model = Model(
        FluxTransformer(config().transformer),
        T5Encoder(text_config(vocabulary)),
        ClipText(pooled_config(vocabulary)),
    )
    torch.nn.init.zeros_(model.transformer.proj_out.weight)
    torch.nn.init.zeros_(model.transformer.proj_out.bias)
    for name, weight in model.transformer.named_parameters():
        if ".norm_" in name and weight.ndim == 1:
            torch.nn.init.constant_(weight, SHARP)
    for name, weight in model.text.named_parameters():
        if weight.ndim == 2:
            # No scale divides this encoder's scores: small queries do.
            torch.nn.init.normal_(weight, std=0.3 if "shared" in name else 0.05)
    for name, weight in model.pooled.named_parameters():
        if "embedding" in name:
            torch.nn.init.normal_(weight, std=0.3 if "token" in name else 0.05)
    return model


def load_rounds(directory: Path) -> list[Round]:
    """All rounds that are there."""
    found = []
    for path in sorted(directory.glob("round-*.npz")):
        with np.load(path) as stored:
            found.append(Round(stored["told"], stored["latents"], stored["edges"]))
    return found


class Teacher:
    """Makes batches of prompts and latents, and their losses."""

    def __init__(self, names: Sequence[str], tokenizer: Path, model: Model) -> None:
        self.config = config()
        self._names, self._model = names, model
        self._pieces = PromptTokenizer(tokenizer, self.config.transformer.text_tokens)
        self._pooled = PooledTokenizer(model.pooled.config, self._pieces)

    def embed(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Embedded [B, T, D] and pooled [B, P] prompts."""
        ids = torch.from_numpy(np.stack([self._pieces.encode(prompt) for prompt in prompts]))
        short = torch.from_numpy(np.stack([self._pooled.encode(prompt) for prompt in prompts]))
        return self._model.text(ids), self._model.pooled(short)

    def say(self, rng: np.random.Generator, told: NDArray[np.int64], nameless: float = NAMELESS) -> list[str]:
        """A prompt for each (name, style, background)."""
        styles, colours = list(STYLES), list(BACKGROUNDS)
        return [paraphrase(rng, self._names[n], colours[b], styles[s], nameless) for n, s, b in told]

    def loss(
        self,
        rng: np.random.Generator,
        latents: NDArray[np.float16],
        prompts: Sequence[str],
        conditions: Sequence[tuple[str, Tensor, Sequence[Lora]]] = (),
        *,
        pure: float = PURE,
    ) -> Tensor:
        """Mean squared error of clean latents.

        Args:
            rng: of prompts and noise levels.
            latents: [B, latent, h, w].
            prompts: B of them.
            conditions: kind, latents [B, latent, h, w] and LoRA of each.
            pure: share of noise levels that are noise alone.
        """
        model, config = self._model.transformer, self.config
        grid = latents.shape[2] // 2, latents.shape[3] // 2
        real = packed(torch.from_numpy(latents.astype(np.float32)))
        level = rng.random(len(real))
        shift = float(np.exp(config.sampler.base_shift))
        level = shift * level / (1 + (shift - 1) * level)
        level = np.where(rng.random(len(real)) < pure, 1.0, level)
        sigma = torch.from_numpy(level).float()[:, None, None]
        noisy = (1 - sigma) * real + sigma * torch.randn_like(real)
        text, pooled = self.embed(prompts)
        caches = self._caches(grid, pooled, conditions)
        sinusoids = torch.from_numpy(schedule.sinusoid(level[:, None], config.transformer.freq_dim))
        table = torch.from_numpy(rotary.image_table(config.transformer, grid))
        velocity = model(noisy, sinusoids, pooled, text, table, caches).float()
        return (noisy - sigma * velocity - real).square().mean()

    def _caches(
        self,
        grid: tuple[int, int],
        pooled: Tensor,
        conditions: Sequence[tuple[str, Tensor, Sequence[Lora]]],
    ) -> list[tuple[Tensor, Tensor]] | None:
        if not conditions:
            return None
        config = self.config
        still = torch.from_numpy(schedule.sinusoid(np.zeros((len(pooled), 1)), config.transformer.freq_dim))
        made = []
        for kind, latents, loras in conditions:
            where = rotary.condition_positions(
                config.conditions.role(kind), config.condition_grid, grid, config.conditions.offset
            )
            table = torch.from_numpy(rotary.table(config.transformer, where))
            model = self._model.transformer
            made.append(model.condition(packed(latents), still, pooled, table, loras))
        return [
            (torch.cat([one[b][0] for one in made], 2), torch.cat([one[b][1] for one in made], 2))
            for b in range(config.transformer.blocks)
        ]


def packed(latents: Tensor) -> Tensor:
    """Latents [B, C, h, w] -> tokens [B, h / 2 * w / 2, 4 C]."""
    return F.pixel_unshuffle(latents, 2).flatten(2).transpose(1, 2)


def prepare(seed: int) -> np.random.Generator:
    """One thread, seeds, and attention that trains fast."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    transformer.attend = plainly
    return np.random.default_rng(seed)


def pace(step: int, steps: int, cool: float = 0.5) -> float:
    """Share of the learning rate: up in 40 steps, down in the last `cool` of them."""
    left = (steps - step) / max(1.0, cool * steps)
    return min(1.0, (step + 1) / 40, 0.02 + 0.98 * left)


def saved_names(path: Path) -> list[str]:
    """Names in the order of the pictures."""
    with np.load(path) as stored:
        return [str(name) for name in stored["names"]]


def checkpoint(path: Path, weights: dict[str, Any]) -> None:
    """Write weights at once: a reader sees nothing or everything."""
    draft = path.with_suffix(".tmp")
    torch.save({"weights": weights}, draft)
    draft.replace(path)


assert config().conditions.size == SIDE
