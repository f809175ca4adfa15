"""EasyControl's programs over the PyTorch modules themselves, instead of their ONNX graphs (ours).

What serves from a GPU where there is no TensorRT, and what golden cases are replayed with; the processor runs
the same code. Caches of conditions stay on the device. Serving from graphs never imports this module.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from realtide.engines.easycontrol.config import ImageConfig, PooledConfig, TextConfig, TransformerConfig
from realtide.engines.easycontrol.layout import POOLED, PREVIEW, TEXT, TRANSFORMER, VAE
from realtide.engines.easycontrol.programs import ImagePrograms, denoise_specs, remember_specs
from realtide.engines.easycontrol.steps import Denoise, Remember
from realtide.engines.easycontrol.text import ClipText, EncodeText, PoolText, T5Encoder
from realtide.engines.easycontrol.transformer import FluxTransformer
from realtide.engines.easycontrol.vae import Decode, Encode, Preview, Projection, Vae
from realtide.engines.runtime.device_program import DeviceProgram
from realtide.engines.runtime.program import Array, Runs
from realtide.engines.runtime.resident_program import ResidentProgram, named
from realtide.engines.runtime.torch_program import load


@dataclass(frozen=True)
class Modules:
    """All modules of a model."""

    transformer: FluxTransformer
    vae: Vae
    preview: Projection
    text: T5Encoder
    pooled: ClipText

    def parts(self) -> dict[str, nn.Module]:
        """The modules by what is before their names in a weight file."""
        return {
            TRANSFORMER: self.transformer,
            VAE: self.vae,
            PREVIEW: self.preview,
            TEXT: self.text,
            POOLED: self.pooled,
        }


def modules(config: ImageConfig, text: TextConfig, pooled: PooledConfig) -> Modules:
    """Modules with weights as they are made."""
    return Modules(
        transformer=FluxTransformer(config.transformer),
        vae=Vae(config.vae),
        preview=Projection(config.vae.latent, config.preview),
        text=T5Encoder(text),
        pooled=ClipText(pooled),
    )


def loaded(
    config: ImageConfig, text: TextConfig, pooled: PooledConfig, weights: Mapping[str, Array]
) -> Modules:
    """Modules with the weights of a bundle. Raises ValueError if they do not fit."""
    made = modules(config, text, pooled)
    for prefix, module in made.parts().items():
        load(module, {n.removeprefix(prefix): weights[n] for n in weights if n.startswith(prefix)})
    return made


def transformer(config: TransformerConfig, weights: Mapping[str, Array]) -> FluxTransformer:
    """A transformer with weights; raises ValueError if they do not fit."""
    with torch.device("meta"):
        model = FluxTransformer(config)
    return load(model, weights)


def denoise_program(model: FluxTransformer, config: ImageConfig, compiled: bool = False) -> Runs:
    """Velocities of a batch; see `steps.Denoise`."""
    inputs, outputs = denoise_specs(config)
    names = [spec.name for spec in inputs], [spec.name for spec in outputs]
    return _program(Denoise(model), *names, compiled)


def remember_program(model: FluxTransformer, config: ImageConfig) -> Runs:
    """A condition's cache; see `steps.Remember`."""
    inputs, outputs = remember_specs(config)
    return _program(Remember(model), [spec.name for spec in inputs], [spec.name for spec in outputs])


def image_programs(made: Modules, config: ImageConfig, compiled: bool = False) -> ImagePrograms:
    """All programs, where the modules lie and in their precision; what a step runs compiled, if wanted."""
    return ImagePrograms(
        remember=remember_program(made.transformer, config),
        denoise=denoise_program(made.transformer, config, compiled),
        encode=_program(Encode(made.vae), ["pixels"], ["latents"]),
        decode=_program(Decode(made.vae), ["latents"], ["pixels"]),
        preview=_program(Preview(made.preview), ["latents"], ["pixels"]),
        text=_program(EncodeText(made.text), ["ids"], ["embeds"]),
        pooled=_program(PoolText(made.pooled), ["ids"], ["pooled"]),
    )


def _program(
    module: nn.Module, inputs: Sequence[str], outputs: Sequence[str], compiled: bool = False
) -> Runs:
    """A module that is run kernel by kernel: sizes change from image to image."""
    weight = next(module.parameters())
    # Rotary tables stay in float32 whatever the model computes in.
    types = dict.fromkeys(inputs, weight.dtype) | {
        name: kind for name, kind in (("table", torch.float32), ("ids", torch.int64)) if name in inputs
    }
    call = named(DeviceProgram(module, [], compiled=compiled, varying=True), outputs)
    return ResidentProgram(type(module).__name__, call, types, weight.device)
