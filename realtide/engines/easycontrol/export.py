"""Writes EasyControl's ONNX graphs, without weights (ours; extra ``export``).

Every graph is compared with its module before it is written (`runtime.export`), unless the model lies on the
meta device: then nothing is computed, and a model of any size is exported in little memory. A model in half
precision gives graphs in half precision, inputs and caches included. `prefix` is put before the release's
weight names, so that the parts of a bundle can lie in one file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from realtide.engines.easycontrol import rotary, schedule
from realtide.engines.easycontrol.config import (
    ImageConfig,
    PooledConfig,
    TransformerConfig,
    cache_names,
    lora_shapes,
)
from realtide.engines.easycontrol.layout import POOLED, PREVIEW, PROGRAMS, TEXT, TRANSFORMER, VAE
from realtide.engines.easycontrol.programs import Programs
from realtide.engines.easycontrol.steps import Denoise, Remember
from realtide.engines.easycontrol.text import ClipText, EncodeText, PoolText, T5Encoder
from realtide.engines.easycontrol.torch_programs import Modules
from realtide.engines.easycontrol.transformer import FluxTransformer
from realtide.engines.easycontrol.vae import Decode, Encode, Preview, Projection, Vae
from realtide.engines.runtime.export import export_program
from realtide.engines.runtime.program import Array

OPSET = 20
TOLERANCE = {torch.float32: 5e-4, torch.float16: 0.1}
"""Absolute, by precision: random inputs are not small everywhere."""


def export_all(
    made: Modules, config: ImageConfig, pooled: PooledConfig, directory: Path, *, prefixed: bool = True
) -> Programs[Path]:
    """Write all graphs into an existing directory; returns their paths.

    Args:
        made: the modules.
        config: of the model.
        pooled: of the pooled encoder.
        directory: where the graphs go.
        prefixed: weights are named as in a bundle.

    Raises:
        ProgramError: a graph does not agree with its module.
    """

    def prefix(name: str) -> str:
        return name if prefixed else ""

    paths = PROGRAMS.map(lambda name: directory / f"{name}.onnx")
    export_denoise(made.transformer, paths.denoise, prefix=prefix(TRANSFORMER))
    export_remember(made.transformer, config, paths.remember, prefix=prefix(TRANSFORMER))
    export_encode(made.vae, config.conditions.size, paths.encode, prefix=prefix(VAE))
    export_decode(made.vae, paths.decode, prefix=prefix(VAE))
    export_preview(made.preview, config.vae.latent, paths.preview, prefix=prefix(PREVIEW))
    export_text(made.text, config.transformer.text_tokens, paths.text, prefix=prefix(TEXT))
    export_pooled(made.pooled, pooled.tokens, paths.pooled, prefix=prefix(POOLED))
    return paths


def export_denoise(model: FluxTransformer, path: Path, *, prefix: str = "") -> Path:
    """Write the step's graph, for any batch, image and number of condition tokens. Raises ProgramError."""
    config = model.config
    sizes = (((5, 3), 7, 2), ((3, 5), 11, 3), ((2, 2), 0, 1))
    examples = [_denoise_example(config, *size) for size in sizes]
    dynamic: dict[str, dict[int, str]] = {
        "latents": {0: "batch", 1: "tokens"},
        "sinusoids": {0: "batch"},
        "pooled": {0: "batch"},
        "text": {0: "batch"},
        "table": {0: "positions"},
    }
    dynamic |= {name: {0: "batch", 2: "condition_tokens"} for name in cache_names(config)}
    _Exporter(model, prefix)(Denoise(model), examples, ["velocity"], path, dynamic)
    return path


def _denoise_example(
    config: TransformerConfig, grid: tuple[int, int], condition: int, batch: int
) -> dict[str, Tensor]:
    rng = np.random.default_rng(batch)

    def random(*shape: int) -> Tensor:
        return torch.from_numpy(rng.standard_normal(shape).astype(np.float32))

    scalars = np.tile(np.array([0.7, 3.5][: config.scalars]), (batch, 1))
    return {
        "latents": random(batch, grid[0] * grid[1], config.channels),
        "sinusoids": torch.from_numpy(schedule.sinusoid(scalars, config.freq_dim)),
        "pooled": random(batch, config.pooled_dim),
        "text": random(batch, config.text_tokens, config.text_dim),
        "table": torch.from_numpy(rotary.image_table(config, grid)),
    } | {name: random(batch, config.heads, condition, config.head_dim) for name in cache_names(config)}


def export_remember(model: FluxTransformer, config: ImageConfig, path: Path, *, prefix: str = "") -> Path:
    """Write the condition pass's graph; LoRAs are inputs of it. Raises ProgramError."""
    shape = config.transformer
    rng = np.random.default_rng(1)
    scalars = np.array([0.0, 3.5][: shape.scalars])
    own = config.condition_grid
    where = rotary.condition_positions("spatial", own, (own[0] + 1, own[1]), 0)
    arrays: dict[str, Array] = {
        "latents": rng.standard_normal((config.condition_tokens, shape.channels)),
        "sinusoids": schedule.sinusoid(scalars, shape.freq_dim),
        "pooled": rng.standard_normal(shape.pooled_dim),
        "table": rotary.table(shape, where),
    }
    export = _Exporter(model, prefix)
    loras = export.random(lora_shapes(shape, config.conditions.rank), 0.05)
    example = {name: torch.from_numpy(array.astype(np.float32)) for name, array in arrays.items()} | loras
    export(Remember(model), [example], list(cache_names(shape)), path)
    return path


def export_encode(model: Vae, size: int, path: Path, *, prefix: str = "") -> Path:
    """Write the VAE encoder's graph, for condition images of `size` pixels each way. Raises ProgramError."""
    export = _Exporter(model, prefix)
    export(Encode(model), [export.random({"pixels": (1, 3, size, size)})], ["latents"], path)
    return path


def export_decode(model: Vae, path: Path, *, prefix: str = "") -> Path:
    """Write the VAE decoder's graph, for latents of any size. Raises ProgramError."""
    export = _Exporter(model, prefix)
    shapes = [(6, 4), (2, 6), (4, 4)]
    examples = [export.random({"latents": (1, model.config.latent, *shape)}) for shape in shapes]
    export(Decode(model), examples, ["pixels"], path, {"latents": {2: "height", 3: "width"}})
    return path


def export_preview(model: Projection, latent: int, path: Path, *, prefix: str = "") -> Path:
    """Write the preview projection's graph, for latents of any size. Raises ProgramError."""
    export = _Exporter(model, prefix)
    examples = [export.random({"latents": (1, latent, *shape)}) for shape in ((6, 4), (2, 6))]
    export(Preview(model), examples, ["pixels"], path, {"latents": {2: "height", 3: "width"}})
    return path


def export_text(model: T5Encoder, tokens: int, path: Path, *, prefix: str = "") -> Path:
    """Write the text encoder's graph. Raises ProgramError."""
    _Exporter(model, prefix)(EncodeText(model), [_ids(model.config.vocab, tokens)], ["embeds"], path)
    return path


def export_pooled(model: ClipText, tokens: int, path: Path, *, prefix: str = "") -> Path:
    """Write the pooled encoder's graph. Raises ProgramError."""
    example = _ids(model.config.vocab, tokens)
    example["ids"][tokens // 2 :] = model.config.end
    _Exporter(model, prefix)(PoolText(model), [example], ["pooled"], path)
    return path


def _ids(vocabulary: int, tokens: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {"ids": torch.randint(0, vocabulary, (tokens,), generator=generator)}


class _Exporter:
    """Exports programs of one model, where it lies and in its precision."""

    def __init__(self, model: nn.Module, prefix: str) -> None:
        weight = next(model.parameters())
        self._device, self._dtype = weight.device, weight.dtype
        self._prefix = prefix
        self._generator = torch.Generator().manual_seed(1)

    def random(self, shapes: Mapping[str, Sequence[int]], scale: float = 1.0) -> dict[str, Tensor]:
        """Random tensors; without values where the model has none."""
        if self._device.type == "meta":
            return {name: torch.empty(*shape, device="meta") for name, shape in shapes.items()}
        return {
            name: torch.randn(*shape, generator=self._generator) * scale for name, shape in shapes.items()
        }

    def __call__(
        self,
        module: nn.Module,
        examples: Sequence[Mapping[str, Tensor]],
        outputs: Sequence[str],
        path: Path,
        dynamic: Mapping[str, Mapping[int, str]] | None = None,
    ) -> None:
        """See `runtime.export.export_program`."""
        export_program(
            module,
            [self._placed(example) for example in examples],
            {},
            outputs,
            path,
            dynamic=dynamic,
            opset=OPSET,
            rename=_renamed(self._prefix),
            tolerance=TOLERANCE.get(self._dtype, 0.0),
            check=self._device.type != "meta",
        )

    def _placed(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {
            name: value.to(self._device, self._dtype if value.is_floating_point() else value.dtype)
            for name, value in tensors.items()
        }


def _renamed(prefix: str) -> Callable[[str], str]:
    """Weight names of a program's module (``model.x``) as the bundle has them."""
    return lambda name: prefix + name.partition(".")[2]
