"""Replays golden cases and compares every tensor with the reference's (ours).

What the reference caches, keys before norm and rotary embedding, is brought to what is cached here before it
is compared. Serving never imports this.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from realtide.engines.easycontrol import loras, rotary, schedule
from realtide.engines.easycontrol.config import (
    ConditionConfig,
    ImageConfig,
    Role,
    SamplerConfig,
    TransformerConfig,
    VaeConfig,
    cache_names,
)
from realtide.engines.easycontrol.layout import PROGRAMS, TRANSFORMER
from realtide.engines.runtime.golden import (
    Backend,
    CaseError,
    Report,
    check_precision,
    difference,
    read_case,
    weights_beside,
)
from realtide.engines.runtime.program import Array, Runs
from realtide.engines.runtime.rewriting import rewrite
from realtide.engines.runtime.tensor_file import TensorFile, TensorFileError
from realtide.engines.runtime.tensorrt import Sizes

if TYPE_CHECKING:
    from realtide.bundle import Precision

KEY = "cond_size"
"""What the description of an EasyControl case has and no other's."""

# FLUX's own, which cases do not repeat.
_PATCH, _TEXT = 2, "prompt_embeds"


def replay(
    path: Path, backend: Backend = "torch", device: str = "cpu", precision: Precision = "float32"
) -> Report:
    """Replay one case.

    Args:
        path: the case; weights and LoRAs lie beside it.
        backend: *torch*: the modules, eager; *onnxruntime*: their exported graphs (needs the extra
            ``export``); *tensorrt*: plans of these graphs, built on the spot.
        device: of the backends *torch* and *tensorrt*.
        precision: of the graphs that *onnxruntime* runs, see `rewriting.rewrite`.

    Raises:
        CaseError: the file is no EasyControl case, or its weights are not beside it.
        ProgramError: a graph could not be made or run.
        ValueError: the case's numbers make no model.
    """
    check_precision(backend, precision)
    case, tensors = read_case(path)
    if KEY not in case:
        raise CaseError(f"{path}: not an EasyControl case: it has no {KEY}")
    config = _config(case, tensors[_TEXT].shape[1])
    with tempfile.TemporaryDirectory(prefix="realtide-") as graphs:
        images = -(-case["width"] // config.token_pixels) * -(-case["height"] // config.token_pixels)
        count = config.condition_tokens * (case["n_subject"] + case["n_spatial"])
        denoise, remember, weights = _programs(
            path,
            case,
            tensors,
            config,
            backend,
            Path(graphs),
            device,
            _sizes(config, images, count),
            precision,
        )
        found, wanted = _play(path, case, tensors, config, denoise, remember, weights)
    compared = {name: difference(found[name], wanted[name]) for name in sorted(found)}
    return Report(path.name.removesuffix(".safetensors"), backend, compared, device, precision)


def _programs(
    path: Path,
    case: dict[str, Any],
    tensors: dict[str, Array],
    config: ImageConfig,
    backend: Backend,
    directory: Path,
    device: str,
    sizes: dict[str, dict[str, Sizes]],
    precision: Precision,
) -> tuple[Runs, Runs, dict[str, Array]]:
    from realtide.engines.easycontrol import torch_programs
    from realtide.engines.easycontrol.transformer import FluxTransformer

    weights = weights_beside(path, FluxTransformer(config.transformer).state_dict())
    model = torch_programs.transformer(config.transformer, weights)
    if backend == "torch":
        model.to(device).fuse()
        denoise = torch_programs.denoise_program(model, config)
        return denoise, torch_programs.remember_program(model, config), weights
    from realtide.engines.easycontrol import export
    from realtide.engines.runtime.ort import OrtProgram

    step = export.export_denoise(model, directory / "denoise.onnx")
    condition = export.export_remember(model, config, directory / "remember.onnx")
    if backend == "onnxruntime":
        from realtide.engines.easycontrol.graphs import FP8, FP8_KEPT, INT8
        from realtide.engines.runtime.products import Measured

        if precision == "float8":
            # Scales need an example: the case itself, in float32.
            steps, conditions = (Measured(one, weights, {}) for one in (step, condition))
            _play(path, case, tensors, config, steps, conditions, weights)
            ranges = {PROGRAMS.denoise: steps.ranges, PROGRAMS.remember: conditions.ranges}
            kept = [name.removeprefix(TRANSFORMER) for name in FP8_KEPT]
            rewrite((step, condition), precision, FP8, ranges, kept)
        else:
            rewrite((step, condition), precision, INT8)
        return OrtProgram(step, weights, {}), OrtProgram(condition, weights, {}), weights
    from realtide.engines.runtime.plan_program import PlanPrograms
    from realtide.engines.runtime.plan_replay import plans_of, scratch_on

    plan_of = plans_of({PROGRAMS.denoise: step, PROGRAMS.remember: condition}, weights, sizes)
    scratch = scratch_on(device)
    denoise, remember = (
        PlanPrograms(plan_of(name), scratch, device, graphs=False, kept=True).over({})
        for name in (PROGRAMS.denoise, PROGRAMS.remember)
    )
    return denoise, remember, weights


def _sizes(config: ImageConfig, tokens: int, condition_tokens: int) -> dict[str, dict[str, Sizes]]:
    """Of the one image that is made."""
    only = {
        "batch": 1,
        "tokens": tokens,
        "positions": config.transformer.text_tokens + tokens,
        "condition_tokens": condition_tokens,
    }
    return {PROGRAMS.denoise: {name: Sizes(min(size, 1), size, max(size, 1)) for name, size in only.items()}}


def _play(
    path: Path,
    case: dict[str, Any],
    tensors: dict[str, Array],
    config: ImageConfig,
    denoise: Runs,
    remember: Runs,
    weights: Mapping[str, Array],
) -> tuple[dict[str, Array], dict[str, Array]]:
    """What the replay finds and what the case has, by name."""
    model, own = config.transformer, config.condition_grid
    grid = config.grid(case["width"], case["height"])
    pooled = tensors["pooled_prompt_embeds"]
    roles: list[tuple[Role, int]] = [
        *(("subject", n) for n in range(case["n_subject"])),
        *(("spatial", n) for n in range(case["n_spatial"])),
    ]
    count = config.condition_tokens
    places, caches, wanted = [rotary.positions(grid)], [], dict(tensors)
    for number, (role, index) in enumerate(roles):
        where = rotary.condition_positions(role, own, grid, config.conditions.offset)
        places.append(where)
        table = rotary.table(model, where)
        feeds = {
            "latents": tensors[f"{role}_latents"][0, index * count : (index + 1) * count],
            "sinusoids": _sinusoids(config, 0.0, case["guidance"]),
            "pooled": pooled[0],
            "table": table,
        }
        lora = _lora(path.parent / f"{case['loras'][number]}.safetensors", model, case, number)
        made = remember.run(feeds | lora)
        caches.append({name: on_host(values) for name, values in made.items()})
        for block in range(model.blocks):
            before = tensors[f"cond_key_prenorm.{block}"][0][:, number * count : (number + 1) * count]
            wanted[f"key.{number}.{block}"] = _finished(
                before, table, _gain(model, weights, block), model.eps
            )
    found: dict[str, Array] = {
        "img_ids": np.concatenate(places).astype(np.float32),
        "sigmas": schedule.sigmas(config.sampler, case["steps"], grid[0] * grid[1]),
    }
    for number, cache in enumerate(caches):
        found |= {f"key.{number}.{block}": cache[f"key_{block}"] for block in range(model.blocks)}
    held = {name: np.concatenate([c[name] for c in caches], 1)[None] for name in cache_names(model)}
    latents, velocities = tensors["noise"], []
    levels = found["sigmas"]
    for sigma, following in itertools.pairwise(levels):
        feeds = {
            "latents": latents,
            "sinusoids": _sinusoids(config, float(sigma), case["guidance"])[None],
            "pooled": pooled,
            "text": tensors[_TEXT],
            "table": rotary.image_table(model, grid),
        }
        velocities.append(on_host(denoise.run(feeds | held)["velocity"]))
        latents = schedule.step(latents, velocities[-1], float(sigma), float(following))
    found["velocities"] = np.concatenate(velocities)
    found["latents"] = latents
    return found, wanted


def on_host(values: Any) -> Array:
    """An array, or a tensor's values."""
    array: Array = values if isinstance(values, np.ndarray) else values.cpu().numpy()
    return array


def _sinusoids(config: ImageConfig, sigma: float, guidance: float) -> Array:
    scalars = [sigma, guidance][: config.transformer.scalars]
    return schedule.sinusoid(scalars, config.transformer.freq_dim)


def _gain(config: TransformerConfig, weights: Mapping[str, Array], block: int) -> Array:
    if block < config.double_blocks:
        return weights[f"transformer_blocks.{block}.attn.norm_k.weight"]
    return weights[f"single_transformer_blocks.{block - config.double_blocks}.attn.norm_k.weight"]


def _finished(keys: Array, table: Array, gain: Array, eps: float) -> Array:
    """Keys [H, M, d] as the reference caches them, after norm and rotary embedding; in float64."""
    wide = keys.astype(np.float64)
    wide = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + eps) * gain
    pairs = wide.reshape(*wide.shape[:-1], -1, 2)
    cosine, sine = table[..., 0], table[..., 1]
    turned = np.stack(
        [pairs[..., 0] * cosine - pairs[..., 1] * sine, pairs[..., 0] * sine + pairs[..., 1] * cosine], -1
    )
    return turned.reshape(wide.shape)


def _lora(path: Path, config: TransformerConfig, case: dict[str, Any], number: int) -> dict[str, Array]:
    try:
        weights = dict(TensorFile(path))
        scale = case["network_alpha"] / case["lora_rank"]
        return loras.stacked(config, weights, case["lora_weights"][number] * scale)
    except TensorFileError as error:
        raise CaseError(str(error)) from error
    except OSError as error:
        raise CaseError(f"{path}: {error}") from error
    except KeyError as error:
        raise CaseError(f"{path}: the LoRA lacks {error}") from None


def _config(case: dict[str, Any], text_tokens: int) -> ImageConfig:
    model = case["model"]
    transformer = TransformerConfig(
        double_blocks=model["num_layers"],
        single_blocks=model["num_single_layers"],
        heads=model["num_attention_heads"],
        head_dim=model["attention_head_dim"],
        channels=model["in_channels"],
        patch=_PATCH,
        text_dim=model["joint_attention_dim"],
        text_tokens=text_tokens,
        pooled_dim=model["pooled_projection_dim"],
        axes=tuple(model["axes_dims_rope"]),
        guidance=model["guidance_embeds"],
    )
    return ImageConfig(
        transformer,
        ConditionConfig(size=case[KEY], rank=case["lora_rank"]),
        SamplerConfig(steps=case["steps"], guidance=case["guidance"]),
        VaeConfig(latent=transformer.latent),
    )
