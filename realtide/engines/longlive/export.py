"""Writes LongLive's ONNX graphs, caches in and out, without weights (ours; extra ``export``).

Every graph is compared with its module before it is written (`runtime.export`), unless the model lies on the
meta device: then nothing is computed, and a model of any size is exported in little memory. A model in half
precision gives graphs in half precision, inputs and caches included. `prefix` is put before the release's
weight names, so that the parts of a bundle can lie in one file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from realtide.engines.longlive.config import (
    VideoConfig,
    cache_shapes,
    cross_shapes,
    decoder_shapes,
    encoder_shapes,
)
from realtide.engines.longlive.graphs import pass_feeds
from realtide.engines.longlive.layout import DECODE, ENCODE, PASSES
from realtide.engines.longlive.programs import Passes, Stages
from realtide.engines.longlive.steps import Denoise, Prompt, Remember
from realtide.engines.longlive.text import EncodeText, TextEncoder
from realtide.engines.longlive.transformer import WanTransformer
from realtide.engines.longlive.vae import DecodeFirst, DecodeNext, EncodeFirst, EncodeNext, WanVae
from realtide.engines.runtime.export import export_program

OPSET = 20
TOLERANCE = {torch.float32: 5e-4, torch.float16: 0.1}
"""Absolute, by precision: random inputs are not small everywhere."""


def export_video(
    model: WanTransformer, config: VideoConfig, directory: Path, *, prefix: str = ""
) -> Passes[Path]:
    """Write the transformer's four graphs into an existing directory; returns their paths.

    Raises:
        ProgramError: a graph does not agree with its module.
    """
    export = _Exporter(model, prefix)
    cache = export.random({name: (rows, *shape) for name, (rows, shape) in cache_shapes(config).items()})
    stream = config.stream
    paths = PASSES.map(lambda name: directory / f"{name}.onnx")
    text = {"text": (config.transformer.text_tokens, config.transformer.text_dim)}
    export(Prompt(model), [export.random(text)], {}, list(cross_shapes(config)), paths.prompt)
    later = 3 * stream.window
    block = [
        pass_example(config, first, stream.block, timestep)
        for first, timestep in ((0, 1000.0), (stream.block, 250.0), (later, 937.5))
    ]
    export(Denoise(model, config), block, cache, ["flow"], paths.denoise)
    export(Remember(model, config), block, cache, [], paths.clean)
    # The size that is traced must be none that the graph could take for another dimension's.
    sizes = sorted({stream.window - 1, 1, stream.block, stream.window - stream.sink, stream.window})
    frames = {name: {0: "frames"} for name in ("latents", "sinusoids", "time", "places")}
    # The exporter takes a tuple of absent shapes for one shape: say of each tensor of the rest that it has
    # no dynamic dimension.
    frames |= {name: {} for name in (*cross_shapes(config), *cache)}
    windows = [pass_example(config, later, size, 0.0) for size in reversed(sizes)]
    export(Remember(model, config), windows, cache, [], paths.recache, frames)
    return paths


def pass_example(config: VideoConfig, first: int, count: int, timestep: float) -> dict[str, Tensor]:
    """Random inputs of a pass over frames first .. first+count-1, by name."""
    feeds = pass_feeds(config, first, count, timestep)
    return {name: torch.from_numpy(array) for name, array in feeds.items()}


def export_decoder(
    model: WanVae, height: int, width: int, directory: Path, *, prefix: str = ""
) -> Stages[Path]:
    """Write the decoder's two graphs, for latents of `height` x `width`. Raises ProgramError."""
    export = _Exporter(model, prefix)
    paths = DECODE.map(lambda name: directory / f"{name}.onnx")
    shape = (1, model.config.latent, height, width)
    state = decoder_shapes(model.config, height, width)
    export.half(DecodeFirst(model), "latents", shape, state, "frames", paths.first)
    export.half(DecodeNext(model), "latents", shape, state, "frames", paths.later)
    return paths


def export_encoder(
    model: WanVae, height: int, width: int, directory: Path, *, prefix: str = ""
) -> Stages[Path]:
    """Write the encoder's two graphs, for video of `height` x `width` pixels. Raises ProgramError."""
    export = _Exporter(model, prefix)
    paths = ENCODE.map(lambda name: directory / f"{name}.onnx")
    state = encoder_shapes(model.config, height, width)
    chunk = (model.config.temporal_scale, 3, height, width)
    export.half(EncodeFirst(model), "frames", (1, *chunk[1:]), state, "latents", paths.first)
    export.half(EncodeNext(model), "frames", chunk, state, "latents", paths.later)
    return paths


def export_text(model: TextEncoder, path: Path, *, prefix: str = "") -> Path:
    """Write the text encoder's graph, for prompts of any length. Raises ProgramError."""
    generator = torch.Generator().manual_seed(1)
    examples = [
        {"ids": torch.randint(0, model.config.vocab, (length,), generator=generator)}
        for length in (7, 1, 2, 150)
    ]
    export = _Exporter(model, prefix)
    export(EncodeText(model), examples, {}, ["embeds"], path, {"ids": {0: "tokens"}})
    return path


class _Exporter:
    """Exports programs of one model, where it lies and in its precision."""

    def __init__(self, model: nn.Module, prefix: str) -> None:
        weight = next(model.parameters())
        self._device, self._dtype = weight.device, weight.dtype
        self._prefix = prefix
        self._generator = torch.Generator().manual_seed(1)

    def random(self, shapes: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
        """Random tensors; without values where the model has none."""
        if self._device.type == "meta":
            return {name: torch.empty(*shape, device="meta") for name, shape in shapes.items()}
        return {name: torch.randn(*shape, generator=self._generator) for name, shape in shapes.items()}

    def __call__(
        self,
        module: nn.Module,
        examples: Sequence[Mapping[str, Tensor]],
        state: Mapping[str, Tensor],
        outputs: Sequence[str],
        path: Path,
        dynamic: Mapping[str, Mapping[int, str]] | None = None,
    ) -> None:
        """See `runtime.export.export_program`."""
        export_program(
            module,
            [self._placed(example) for example in examples],
            self._placed(state),
            outputs,
            path,
            dynamic=dynamic,
            opset=OPSET,
            rename=_renamed(self._prefix),
            tolerance=TOLERANCE.get(self._dtype, 0.0),
            check=self._device.type != "meta",
        )

    def half(
        self,
        module: nn.Module,
        name: str,
        shape: Sequence[int],
        state: Mapping[str, Sequence[int]],
        output: str,
        path: Path,
    ) -> None:
        """Export a program of a half of the VAE."""
        caches = self.random(state)
        examples = [{**self.random({name: shape}), "row": torch.tensor([row])} for row in (1, 0)]
        self(module, examples, caches, [output], path)

    def _placed(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {
            name: value.to(self._device, self._dtype if value.is_floating_point() else value.dtype)
            for name, value in tensors.items()
        }


def _renamed(prefix: str) -> Callable[[str], str]:
    """Weight names of a program's module (``model.x``) as the bundle has them."""
    return lambda name: prefix + name.partition(".")[2]
