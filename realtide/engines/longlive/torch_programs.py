"""LongLive's programs over the PyTorch modules themselves, instead of their ONNX graphs (ours).

For golden comparisons and for machines where PyTorch is what runs fast. Serving on a CPU never imports this
module.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

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
from realtide.engines.longlive.programs import (
    FLOAT,
    INT,
    ROW,
    HalfPrograms,
    VideoPrograms,
    decode_specs,
    pass_inputs,
)
from realtide.engines.longlive.steps import Denoise, Prompt, Remember
from realtide.engines.longlive.text import EncodeText, TextEncoder
from realtide.engines.longlive.transformer import WanTransformer
from realtide.engines.longlive.vae import DecodeFirst, DecodeNext, EncodeFirst, EncodeNext, WanVae
from realtide.engines.runtime.program import Array, Program, TensorSpec
from realtide.engines.runtime.torch_program import State, TorchProgram, load


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


def video_programs(model: WanTransformer, config: VideoConfig, cache: State) -> VideoPrograms:
    """Programs of one session over its cache (`config.cache_shapes`), updated in place."""
    state = tuple(
        TensorSpec(name, FLOAT, (rows, *shape)) for name, (rows, shape) in cache_shapes(config).items()
    )
    text = TensorSpec("text", FLOAT, (config.transformer.text_tokens, config.transformer.text_dim))
    cross = tuple(TensorSpec(name, FLOAT, dims) for name, dims in cross_shapes(config).items())
    block = pass_inputs(config, config.stream.block)
    flow = TensorSpec("flow", FLOAT, (config.stream.block, *config.latent_shape))
    remember = Remember(model, config)
    return VideoPrograms(
        prompt=TorchProgram(Prompt(model), (text,), cross, (), {}),
        denoise=TorchProgram(Denoise(model, config), block, (flow,), state, cache),
        clean=TorchProgram(remember, block, (), state, cache),
        recache=TorchProgram(remember, pass_inputs(config, "frames"), (), state, cache),
    )


def decoder_programs(model: WanVae, caches: State, height: int, width: int) -> HalfPrograms:
    """Decoding programs of one stream of latents of `height` x `width` over its feature caches."""
    config = model.config
    state = _state(decoder_shapes(config, height, width))
    latents, frame = decode_specs(config, height, width, 1)
    _, frames = decode_specs(config, height, width, config.temporal_scale)
    return HalfPrograms(
        first=TorchProgram(DecodeFirst(model), (latents, ROW), (frame,), state, caches),
        later=TorchProgram(DecodeNext(model), (latents, ROW), (frames,), state, caches),
    )


def encoder_programs(model: WanVae, caches: State, height: int, width: int) -> HalfPrograms:
    """Encoding programs of one video of `height` x `width` pixels over its feature caches."""
    config = model.config
    state = _state(encoder_shapes(config, height, width))
    scale = config.spatial_scale
    latents, frame = decode_specs(config, height // scale, width // scale, 1)
    _, frames = decode_specs(config, height // scale, width // scale, config.temporal_scale)
    return HalfPrograms(
        first=TorchProgram(EncodeFirst(model), (frame, ROW), (latents,), state, caches),
        later=TorchProgram(EncodeNext(model), (frames, ROW), (latents,), state, caches),
    )


def text_program(model: TextEncoder) -> Program:
    """Ids [tokens] of one prompt to embeddings [tokens, dim]."""
    ids = TensorSpec("ids", INT, ("tokens",))
    return TorchProgram(
        EncodeText(model), (ids,), (TensorSpec("embeds", FLOAT, ("tokens", model.config.dim)),), (), {}
    )


def _state(shapes: Mapping[str, tuple[int, ...]]) -> tuple[TensorSpec, ...]:
    return tuple(TensorSpec(name, FLOAT, shape) for name, shape in shapes.items())
