"""EasyControl's programs over the PyTorch modules themselves, instead of their ONNX graphs (ours).

For golden comparisons and for machines where PyTorch is what runs fast. Serving on a CPU never imports this
module.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from realtide.engines.easycontrol.config import ImageConfig, PooledConfig, TextConfig, TransformerConfig
from realtide.engines.easycontrol.layout import POOLED, PREVIEW, TEXT, TRANSFORMER, VAE
from realtide.engines.easycontrol.programs import FLOAT, INT, ImagePrograms, denoise_specs, remember_specs
from realtide.engines.easycontrol.steps import Denoise, Remember
from realtide.engines.easycontrol.text import ClipText, EncodeText, PoolText, T5Encoder
from realtide.engines.easycontrol.transformer import FluxTransformer
from realtide.engines.easycontrol.vae import Decode, Encode, Preview, Projection, Vae
from realtide.engines.runtime.program import Array, Program, TensorSpec
from realtide.engines.runtime.torch_program import TorchProgram, load


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


def denoise_program(model: FluxTransformer, config: ImageConfig) -> Program:
    """Velocities of a batch; see `steps.Denoise`."""
    return TorchProgram(Denoise(model), *denoise_specs(config), (), {})


def remember_program(model: FluxTransformer, config: ImageConfig) -> Program:
    """A condition's cache; see `steps.Remember`."""
    return TorchProgram(Remember(model), *remember_specs(config), (), {})


def image_programs(
    made: Modules, config: ImageConfig, text: TextConfig, pooled: PooledConfig
) -> ImagePrograms:
    """All programs."""
    side = config.conditions.size
    small = side // config.vae.scale
    latents = TensorSpec("latents", FLOAT, (1, config.vae.latent, "height", "width"))
    pixels = TensorSpec("pixels", FLOAT, (1, 3, "rows", "columns"))
    condition = TensorSpec("pixels", FLOAT, (1, 3, side, side))
    encoded = TensorSpec("latents", FLOAT, (1, config.vae.latent, small, small))
    ids = TensorSpec("ids", INT, (config.transformer.text_tokens,))
    embeds = TensorSpec("embeds", FLOAT, (config.transformer.text_tokens, text.dim))
    short = TensorSpec("ids", INT, (pooled.tokens,))
    return ImagePrograms(
        remember=remember_program(made.transformer, config),
        denoise=denoise_program(made.transformer, config),
        encode=TorchProgram(Encode(made.vae), (condition,), (encoded,), (), {}),
        decode=TorchProgram(Decode(made.vae), (latents,), (pixels,), (), {}),
        preview=TorchProgram(Preview(made.preview), (latents,), (pixels,), (), {}),
        text=TorchProgram(EncodeText(made.text), (ids,), (embeds,), (), {}),
        pooled=TorchProgram(
            PoolText(made.pooled), (short,), (TensorSpec("pooled", FLOAT, (pooled.dim,)),), (), {}
        ),
    )
