"""The programs of the engine: what they are fed and what they give (ours). Numpy only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Generic, TypeVar

import numpy as np

from realtide.engines.easycontrol.config import ImageConfig, cache_names, lora_shapes
from realtide.engines.runtime.program import Runs, TensorSpec

FLOAT, INT = np.dtype(np.float32), np.dtype(np.int64)
T = TypeVar("T", covariant=True)
U = TypeVar("U")


@dataclass(frozen=True)
class Programs(Generic[T]):
    """One thing for each program.

    Attributes:
        remember: a condition to its keys and values.
        denoise: a batch's velocities.
        encode: a condition image to latents.
        decode: latents to an image.
        preview: latents to a small picture, cheaply.
        text: ids to embeddings.
        pooled: ids to the pooled prompt.
    """

    remember: T
    denoise: T
    encode: T
    decode: T
    preview: T
    text: T
    pooled: T

    def map(self, make: Callable[[T], U]) -> Programs[U]:
        """The same of what `make` makes of each."""
        made: dict[str, Any] = {field.name: make(getattr(self, field.name)) for field in fields(self)}
        return Programs(**made)


ImagePrograms = Programs[Runs]


def denoise_specs(config: ImageConfig) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """Inputs, in the order of the forward's arguments, and outputs of `steps.Denoise`."""
    model = config.transformer
    latents = (model.channels,)
    inputs = [
        TensorSpec("latents", FLOAT, ("batch", "tokens", *latents)),
        TensorSpec("sinusoids", FLOAT, ("batch", model.scalars, model.freq_dim)),
        TensorSpec("pooled", FLOAT, ("batch", model.pooled_dim)),
        TensorSpec("text", FLOAT, ("batch", model.text_tokens, model.text_dim)),
        TensorSpec("table", FLOAT, ("positions", model.head_dim // 2, 2)),
    ]
    shape = ("batch", model.heads, "condition_tokens", model.head_dim)
    inputs += [TensorSpec(name, FLOAT, shape) for name in cache_names(model)]
    return tuple(inputs), (TensorSpec("velocity", FLOAT, ("batch", "tokens", *latents)),)


def remember_specs(config: ImageConfig) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """Inputs and outputs of `steps.Remember`."""
    model, tokens = config.transformer, config.condition_tokens
    inputs = [
        TensorSpec("latents", FLOAT, (tokens, model.channels)),
        TensorSpec("sinusoids", FLOAT, (model.scalars, model.freq_dim)),
        TensorSpec("pooled", FLOAT, (model.pooled_dim,)),
        TensorSpec("table", FLOAT, (tokens, model.head_dim // 2, 2)),
    ]
    loras = lora_shapes(model, config.conditions.rank)
    inputs += [TensorSpec(name, FLOAT, shape) for name, shape in loras.items()]
    shape = (model.heads, tokens, model.head_dim)
    return tuple(inputs), tuple(TensorSpec(name, FLOAT, shape) for name in cache_names(model))
