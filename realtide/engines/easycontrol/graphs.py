"""What EasyControl's graphs run on: sizes of dynamic dimensions, and samples for quality reports (ours)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from realtide.engines.easycontrol import rotary, schedule
from realtide.engines.easycontrol.config import cache_names, lora_shapes
from realtide.engines.easycontrol.engine import architecture
from realtide.engines.easycontrol.layout import PROGRAMS
from realtide.engines.runtime.program import Array
from realtide.engines.runtime.quality import Sample
from realtide.engines.runtime.tensorrt import Sizes

INT8 = (PROGRAMS.remember, PROGRAMS.denoise)
"""Programs whose matrix products are worth int8 on a CPU."""

FP8 = (PROGRAMS.remember, PROGRAMS.denoise)
"""Programs whose matrix products are worth float8 on a GPU."""

FP8_KEPT = (
    *("transformer.time_text_embed.", "transformer.x_embedder.", "transformer.context_embedder."),
    *(".norm1.linear.", ".norm1_context.linear.", ".norm.linear."),
    *("transformer.norm_out.linear.", "transformer.proj_out."),
)
"""Parts of the names of weights that stay in float16: the first and the last layer, and what timestep and
pooled prompt go through, single rows that decide for all tokens. With these in float8 a velocity of
easycontrol-emoji on random samples is 0.070 off, without 0.023. In FLUX they are 27 % of the weights.
"""

HOST_ONLY: tuple[str, ...] = ()
"""Programs without TensorRT plans."""


def sizes(manifest: Mapping[str, Any], max_batch: int) -> dict[str, dict[str, Sizes]]:
    """Sizes of the dynamic dimensions by program and name.

    Args:
        manifest: `architecture` and `limits` of the manifest.
        max_batch: most images in one step.
    """
    config, _, _ = architecture(manifest["architecture"])
    limits, text, scale = manifest["limits"], config.transformer.text_tokens, config.vae.scale
    usual_width, usual_height = (int(side) for side in limits["size"])
    low, high = (int(side) for side in limits["side"])

    def tokens(pixels: int) -> int:
        return pixels // config.token_pixels**2

    image = Sizes(
        tokens(low * low), tokens(usual_width * usual_height), tokens(min(high * high, int(limits["pixels"])))
    )
    most = int(limits["conditions"]) * config.condition_tokens
    latents = {
        "height": Sizes(low // scale, usual_height // scale, high // scale),
        "width": Sizes(low // scale, usual_width // scale, high // scale),
    }
    denoise = {
        "batch": Sizes(1, min(2, max_batch), max_batch),
        "tokens": image,
        "positions": Sizes(text + image.least, text + image.usual, text + image.most),
        "condition_tokens": Sizes(0, min(config.condition_tokens, most), max(most, 1)),
    }
    return {PROGRAMS.denoise: denoise, PROGRAMS.decode: latents, PROGRAMS.preview: latents}


def samples(manifest: Mapping[str, Any]) -> dict[str, Sample]:
    """Random latents, images, conditions and prompts at the manifest's sizes, by program."""
    config, text, pooled = architecture(manifest["architecture"])
    model, vae = config.transformer, config.vae
    rng = np.random.default_rng(5)
    width, height = (int(side) for side in manifest["limits"]["size"])
    grid = config.grid(width, height)

    def random(*shape: int) -> Array:
        return rng.standard_normal(shape).astype(np.float32)

    def scalars(*values: float) -> Array:
        return schedule.sinusoid(np.array(values[: model.scalars]), model.freq_dim)

    own = config.condition_grid
    where = rotary.condition_positions("spatial", own, own, 0)
    tables = rotary.image_table(model, grid), rotary.table(model, where)
    side = config.conditions.size
    latents = random(1, vae.latent, height // vae.scale, width // vae.scale)
    loras = lora_shapes(model, config.conditions.rank)
    denoise = [
        {
            "latents": random(batch, grid[0] * grid[1], model.channels),
            "sinusoids": np.stack([scalars(0.7, 3.5)] * batch),
            "pooled": random(batch, model.pooled_dim),
            "text": random(batch, model.text_tokens, model.text_dim),
            "table": tables[0],
        }
        | {name: random(batch, model.heads, count, model.head_dim) for name in cache_names(model)}
        for batch, count in ((1, 0), (2, config.condition_tokens))
    ]
    remember = {
        "latents": random(config.condition_tokens, model.channels),
        "sinusoids": scalars(0.0, 3.5),
        "pooled": random(model.pooled_dim),
        "table": tables[1],
    } | {name: 0.05 * random(*shape) for name, shape in loras.items()}
    short = rng.integers(0, pooled.vocab, pooled.tokens)
    short[pooled.tokens // 2 :] = pooled.end
    calls: dict[str, list[dict[str, Array]]] = {
        PROGRAMS.remember: [remember],
        PROGRAMS.denoise: denoise,
        PROGRAMS.encode: [{"pixels": np.tanh(random(1, 3, side, side))}],
        PROGRAMS.decode: [{"latents": latents}],
        PROGRAMS.preview: [{"latents": latents}],
        PROGRAMS.text: [{"ids": rng.integers(0, text.vocab, model.text_tokens)}],
        PROGRAMS.pooled: [{"ids": short}],
    }
    return {name: Sample(given, {}) for name, given in calls.items()}
