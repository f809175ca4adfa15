"""Writes LongLive's ONNX graphs, caches in and out, without weights (ours; extra ``export``).

Every graph is compared with its module before it is written (`runtime.export`). `prefix` is put before the
release's weight names, so that the parts of a bundle can lie in one file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from realtide.engines.longlive import rotary, schedule, window
from realtide.engines.longlive.config import (
    VideoConfig,
    cache_shapes,
    cross_shapes,
    decoder_shapes,
    encoder_shapes,
)
from realtide.engines.longlive.programs import Passes, Stages
from realtide.engines.longlive.steps import Denoise, Prompt, Remember
from realtide.engines.longlive.text import EncodeText, TextEncoder
from realtide.engines.longlive.transformer import WanTransformer
from realtide.engines.longlive.vae import DecodeFirst, DecodeNext, EncodeFirst, EncodeNext, WanVae
from realtide.engines.runtime.export import export_program

OPSET = 20
TOLERANCE = 5e-4  # absolute: random inputs are not small everywhere


def export_video(
    model: WanTransformer, config: VideoConfig, directory: Path, *, prefix: str = ""
) -> Passes[Path]:
    """Write the transformer's four graphs into an existing directory; returns their paths.

    Raises:
        ProgramError: a graph does not agree with its module.
    """
    generator = torch.Generator().manual_seed(1)
    cache = {
        name: torch.randn(rows, *shape, generator=generator)
        for name, (rows, shape) in cache_shapes(config).items()
    }
    stream = config.stream
    paths = Passes[Path](*(directory / f"{name}.onnx" for name in ("prompt", "denoise", "clean", "recache")))
    rename = _renamed(prefix)
    export_program(
        Prompt(model),
        [{"text": torch.randn(config.transformer.text_tokens, config.transformer.text_dim)}],
        {},
        list(cross_shapes(config)),
        paths.prompt,
        opset=OPSET,
        rename=rename,
        tolerance=TOLERANCE,
    )
    later = 3 * stream.window
    block = [
        pass_example(config, first, stream.block, timestep)
        for first, timestep in ((0, 1000.0), (stream.block, 250.0), (later, 937.5))
    ]
    for path, module, outputs in (
        (paths.denoise, Denoise(model, config), ["flow"]),
        (paths.clean, Remember(model, config), []),
    ):
        export_program(module, block, cache, outputs, path, opset=OPSET, rename=rename, tolerance=TOLERANCE)
    # The size that is traced must be none that the graph could take for another dimension's.
    sizes = sorted({stream.window - 1, 1, stream.block, stream.window - stream.sink, stream.window})
    frames = {name: {0: "frames"} for name in ("latents", "sinusoids", "time", "places")}
    # The exporter takes a tuple of absent shapes for one shape: say of each tensor of the rest that it has
    # no dynamic dimension.
    frames |= {name: {} for name in (*cross_shapes(config), *cache)}
    export_program(
        Remember(model, config),
        [pass_example(config, later, size, 0.0) for size in reversed(sizes)],
        cache,
        [],
        paths.recache,
        dynamic=frames,
        opset=OPSET,
        rename=rename,
        tolerance=TOLERANCE,
    )
    return paths


def pass_example(config: VideoConfig, first: int, count: int, timestep: float) -> dict[str, Tensor]:
    """Random inputs of a pass over frames first .. first+count-1, by name."""
    rng = np.random.default_rng(first + count)
    stream = config.stream
    frames = np.arange(first, first + count)
    feeds = {
        "latents": rng.standard_normal((count, *config.latent_shape)).astype(np.float32),
        "sinusoids": schedule.sinusoid(np.full(count, timestep), config.transformer.freq_dim),
        "time": rotary.time_table(config, frames),
        "space": rotary.space_table(config),
        "places": np.arange(count) if count > stream.block else window.places(stream, first, count),
        "seen": window.seen(stream, first + count),
    }
    if stream.rotary == "relative":
        feeds["window_time"] = rotary.time_table(config, np.arange(stream.window))
    for name, shape in cross_shapes(config).items():
        feeds[name] = rng.standard_normal(shape).astype(np.float32)
    return {name: torch.from_numpy(array) for name, array in feeds.items()}


def export_decoder(
    model: WanVae, height: int, width: int, directory: Path, *, prefix: str = ""
) -> Stages[Path]:
    """Write the decoder's two graphs, for latents of `height` x `width`. Raises ProgramError."""
    shape = (1, model.config.latent, height, width)
    state = decoder_shapes(model.config, height, width)
    first = directory / "decode_first.onnx"
    later = directory / "decode_next.onnx"
    _export_half(DecodeFirst(model), "latents", shape, state, "frames", first, prefix)
    _export_half(DecodeNext(model), "latents", shape, state, "frames", later, prefix)
    return Stages(first, later)


def export_encoder(
    model: WanVae, height: int, width: int, directory: Path, *, prefix: str = ""
) -> Stages[Path]:
    """Write the encoder's two graphs, for video of `height` x `width` pixels. Raises ProgramError."""
    state = encoder_shapes(model.config, height, width)
    first = directory / "encode_first.onnx"
    later = directory / "encode_next.onnx"
    chunk = (model.config.temporal_scale, 3, height, width)
    _export_half(EncodeFirst(model), "frames", (1, *chunk[1:]), state, "latents", first, prefix)
    _export_half(EncodeNext(model), "frames", chunk, state, "latents", later, prefix)
    return Stages(first, later)


def export_text(model: TextEncoder, path: Path, *, prefix: str = "") -> Path:
    """Write the text encoder's graph, for prompts of any length. Raises ProgramError."""
    generator = torch.Generator().manual_seed(1)
    examples = [
        {"ids": torch.randint(0, model.config.vocab, (length,), generator=generator)}
        for length in (7, 1, 2, 150)
    ]
    export_program(
        EncodeText(model),
        examples,
        {},
        ["embeds"],
        path,
        dynamic={"ids": {0: "tokens"}},
        opset=OPSET,
        rename=_renamed(prefix),
        tolerance=TOLERANCE,
    )
    return path


def _export_half(
    module: nn.Module,
    name: str,
    shape: Sequence[int],
    state: Mapping[str, tuple[int, ...]],
    output: str,
    path: Path,
    prefix: str,
) -> None:
    generator = torch.Generator().manual_seed(1)
    caches = {key: torch.randn(*dims, generator=generator) for key, dims in state.items()}
    export_program(
        module,
        [{name: torch.randn(*shape, generator=generator), "row": torch.tensor([row])} for row in (1, 0)],
        caches,
        [output],
        path,
        opset=OPSET,
        rename=_renamed(prefix),
        tolerance=TOLERANCE,
    )


def _renamed(prefix: str) -> Callable[[str], str]:
    """Weight names of a program's module (``model.x``) as the bundle has them."""
    return lambda name: prefix + name.partition(".")[2]
