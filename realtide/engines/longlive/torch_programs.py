"""LongLive's programs over the PyTorch modules themselves, instead of their ONNX graphs (ours).

What serves from a GPU where there is no TensorRT, and what golden cases are replayed with; the processor runs
the same code. Caches, latents and frames stay on the device. Serving from graphs never imports this module.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from realtide.engines.longlive.config import (
    TextConfig,
    TransformerConfig,
    VaeConfig,
    VideoConfig,
    cache_shapes,
    cross_shapes,
    decoder_shapes,
    encoder_shapes,
)
from realtide.engines.longlive.programs import INT, HalfPrograms, VideoPrograms, pass_inputs
from realtide.engines.longlive.steps import Denoise, Prompt, Remember
from realtide.engines.longlive.text import EncodeText, TextEncoder
from realtide.engines.longlive.transformer import WanTransformer
from realtide.engines.longlive.vae import DecodeFirst, DecodeNext, EncodeFirst, EncodeNext, WanVae
from realtide.engines.runtime.device_program import DeviceProgram
from realtide.engines.runtime.program import Array, Runs
from realtide.engines.runtime.resident_program import Bound, ResidentProgram, named
from realtide.engines.runtime.torch_program import State, load, state_tensors

_TABLES = ("time", "space", "window_time")
"""Inputs that stay in float32 whatever the model computes in."""


def transformer(config: TransformerConfig, weights: Mapping[str, Array]) -> WanTransformer:
    """A transformer with weights; raises ValueError if they do not fit."""
    with torch.device("meta"):
        model = WanTransformer(config)
    return load(model, weights)


def vae(config: VaeConfig, weights: Mapping[str, Array]) -> WanVae:
    """A VAE with weights; raises ValueError if they do not fit."""
    return load(WanVae(config), weights)


def text_encoder(config: TextConfig, weights: Mapping[str, Array]) -> TextEncoder:
    """A text encoder with weights; raises ValueError if they do not fit."""
    return load(TextEncoder(config), weights)


def video_programs(
    model: WanTransformer,
    config: VideoConfig,
    cache: State,
    *,
    record: bool = False,
    compiled: bool = False,
    pool: Any = None,
) -> VideoPrograms:
    """Programs of one session over its cache (`config.cache_shapes`), updated in place.

    Args:
        model: decides device and precision.
        config: its shapes.
        cache: tensors of the model's device and precision; on the processor arrays too.
        record: replay CUDA graphs of the passes over a block. A recache comes seldom, and with many sizes.
        compiled: compile those passes first.
        pool: see `DeviceProgram`.

    Raises:
        FeedError: the cache does not fit.
    """
    device, dtype = _where(model)
    state = state_tensors({n: (rows, *shape) for n, (rows, shape) in cache_shapes(config).items()}, cache)
    crossed = cross_shapes(config)
    bound = Bound({n: torch.zeros(shape, dtype=dtype, device=device) for n, shape in crossed.items()})
    types = {
        spec.name: torch.float32 if spec.name in _TABLES else _type(spec.dtype, dtype)
        for spec in pass_inputs(config, "frames")
        if spec.name not in crossed
    }

    def made(module: Callable[..., nn.Module], outputs: Sequence[str], often: bool, held: int) -> Runs:
        program = DeviceProgram(
            module(model, config, held),
            state,
            list(bound.tensors.values()),
            record=record and often,
            compiled=compiled and often,
            pool=pool,
        )
        return ResidentProgram(module.__name__, named(program, outputs), types, device, bound)

    text = ResidentProgram(
        "Prompt", named(DeviceProgram(Prompt(model), []), [*crossed]), {"text": dtype}, device
    )
    return VideoPrograms(
        prompt=text,
        denoise=_Held(partial(made, Denoise, ["flow"], True)),
        clean=_Held(partial(made, Remember, [], True)),
        recache=_Held(partial(made, Remember, [], False)),
    )


class _Held:
    """A pass that knows how many places of the window hold frames, and so needs no mask; see `steps`.

    There is one program for each number, which is a few: the window fills block by block.
    """

    def __init__(self, make: Callable[[int], Runs]) -> None:
        self._make = make
        self._programs: dict[int, Runs] = {}

    def run(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        """See `program.Runs`. ``seen`` must be an array in host memory."""
        held = int(np.count_nonzero(feeds["seen"]))
        if held not in self._programs:
            self._programs[held] = self._make(held)
        return self._programs[held].run(feeds)


def decoder_programs(
    model: WanVae,
    caches: State,
    height: int,
    width: int,
    *,
    record: bool = False,
    compiled: bool = False,
    pool: Any = None,
) -> HalfPrograms:
    """Decoding programs of one stream of latents of `height` x `width` over its feature caches.

    Other arguments are as of `video_programs`.
    """
    state = state_tensors(decoder_shapes(model.config, height, width), caches)

    def made(module: Callable[[WanVae], nn.Module]) -> Runs:
        program = DeviceProgram(module(model), state, record=record, compiled=compiled, pool=pool)
        return _half(model, program, "latents", "frames")

    return HalfPrograms(first=made(DecodeFirst), later=made(DecodeNext))


def encoder_programs(model: WanVae, caches: State, height: int, width: int) -> HalfPrograms:
    """Encoding programs of one video of `height` x `width` pixels over its feature caches."""
    state = state_tensors(encoder_shapes(model.config, height, width), caches)

    def made(module: Callable[[WanVae], nn.Module]) -> Runs:
        return _half(model, DeviceProgram(module(model), state), "frames", "latents")

    return HalfPrograms(first=made(EncodeFirst), later=made(EncodeNext))


def text_program(model: TextEncoder) -> Runs:
    """Ids [tokens] of one prompt to embeddings [tokens, dim]."""
    device, _ = _where(model)
    call = named(DeviceProgram(EncodeText(model), []), ["embeds"])
    return ResidentProgram("EncodeText", call, {"ids": torch.int64}, device)


def _half(model: WanVae, program: DeviceProgram, given: str, made: str) -> Runs:
    device, dtype = _where(model)
    types = {given: dtype, "row": torch.int64}
    return ResidentProgram(f"{given} to {made}", named(program, [made]), types, device)


def _type(dtype: np.dtype[Any], floats: torch.dtype) -> torch.dtype:
    if dtype.kind == "f":
        return floats
    return torch.int64 if dtype == INT else torch.bool


def _where(model: nn.Module) -> tuple[torch.device, torch.dtype]:
    weight: Tensor = next(model.parameters())
    return weight.device, weight.dtype
