"""Makes a bundle of public checkpoints (ours; needs PyTorch, for graphs the extra ``export``).

What is read: LongLive's release (``longlive_base.pt``, ``lora.pt``), that of Wan2.1 (``Wan2.1_VAE.pth``,
``models_t5_umt5-xxl-enc-bf16.pth``, a UMT5 tokenizer), or directories in diffusers' layout. Nothing is left
behind if anything is wrong.
"""

from __future__ import annotations

import datetime
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import nn

from realtide.bundle import BundleError, Precision, write_manifest
from realtide.engines.longlive import convert_names, layout
from realtide.engines.longlive.config import (
    StreamConfig,
    TextConfig,
    TransformerConfig,
    VaeConfig,
    VideoConfig,
)
from realtide.engines.longlive.text import TextEncoder
from realtide.engines.longlive.tokenizer import PromptTokenizer
from realtide.engines.longlive.transformer import WanTransformer
from realtide.engines.longlive.vae import WanVae
from realtide.engines.runtime.checkpoint_files import (
    DTYPES,
    ConvertError,
    Stored,
    read_checkpoint,
    read_settings,
    write_safetensors,
)

Storage = Literal["float32", "float16", "bfloat16"]
FRAMES_PER_SECOND = 16.0  # of Wan2.1
M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True, slots=True)
class Sources:
    """Files and directories of one model, and what they do not say themselves.

    Attributes:
        transformer: a checkpoint.
        vae: a checkpoint.
        text: a checkpoint.
        tokenizer: a SentencePiece model, or a directory with ``spiece.model``.
        lora: low-rank updates to add to the transformer.
        lora_alpha: None: the updates' rank.
        ema: take averaged weights where a checkpoint has both.
        heads: of the transformer; None: as its ``config.json`` says, else one for every 128 of its width.
    """

    transformer: Path
    vae: Path
    text: Path
    tokenizer: Path
    lora: Path | None = None
    lora_alpha: float | None = None
    ema: bool = False
    heads: int | None = None


@dataclass(frozen=True, slots=True)
class Card:
    """What the manifest says of the bundle and no file holds."""

    name: str
    version: str
    description: str
    licence: str
    recipe: str


@dataclass(frozen=True, slots=True)
class Model:
    """A model that was found complete: configurations, and tensors by their names in the bundle."""

    transformer: TransformerConfig
    vae: VaeConfig
    text: TextConfig
    tensors: dict[str, Stored]
    tokenizer: Path

    def parameters(self, part: str) -> int:
        """Numbers in a part's tensors; ``part`` as in `layout`."""
        return sum(prod(stored.shape) for name, stored in self.tensors.items() if name.startswith(part))

    @property
    def files(self) -> list[Path]:
        """All files that tensors come from."""
        return sorted({stored.file for stored in self.tensors.values()})


def find(directory: Path) -> dict[str, Path]:
    """The parts of a downloaded Wan2.1 in either layout: `Sources`' names to what is there of them."""
    release = {
        "transformer": directory / "diffusion_pytorch_model.safetensors",
        "vae": directory / "Wan2.1_VAE.pth",
        "text": directory / "models_t5_umt5-xxl-enc-bf16.pth",
        "tokenizer": directory / "google" / "umt5-xxl",
    }
    diffusers = {
        "transformer": directory / "transformer",
        "vae": directory / "vae",
        "text": directory / "text_encoder",
        "tokenizer": directory / "tokenizer",
    }
    found = diffusers if diffusers["vae"].is_dir() else release
    return {part: path for part, path in found.items() if path.exists()}


def read(sources: Sources, text_tokens: int = 512) -> Model:
    """Read names and shapes of all checkpoints and check every one of them.

    Raises:
        ConvertError: a file is missing, damaged or holds more than tensors; a tensor is missing, unexpected
            or misshapen; or the parts do not fit each other.
    """
    wrappers = ("generator_ema",) if sources.ema else ("generator", "generator_ema", "model")
    try:
        transformer, weights = convert_names.transformer(
            read_checkpoint(sources.transformer, wrappers),
            read_settings(sources.transformer),
            sources.heads,
            text_tokens,
        )
        if sources.lora is not None:
            lora = read_checkpoint(sources.lora, ("generator_lora",))
            weights = convert_names.merged(weights, lora, sources.lora_alpha)
        vae, frames = convert_names.vae(
            read_checkpoint(sources.vae, ("state_dict",)), read_settings(sources.vae)
        )
        text, words = convert_names.text(
            read_checkpoint(sources.text, ("state_dict",)), read_settings(sources.text)
        )
    except ConvertError:
        raise
    except ValueError as error:  # shapes that make no configuration
        raise ConvertError(str(error)) from None
    if text.dim != transformer.text_dim:
        raise ConvertError(
            f"the text encoder gives {text.dim} numbers a token, the transformer takes {transformer.text_dim}"
        )
    if vae.latent != transformer.channels:
        raise ConvertError(
            f"the VAE has {vae.latent} latent channels, the transformer takes {transformer.channels}"
        )
    tensors: dict[str, Stored] = {}
    for prefix, part in ((layout.TRANSFORMER, weights), (layout.VAE, frames), (layout.TEXT, words)):
        tensors |= {prefix + name: stored for name, stored in part.items()}
    return Model(transformer, vae, text, tensors, _tokenizer(sources.tokenizer, text, text_tokens))


def write(
    model: Model,
    out: Path,
    card: Card,
    stream: StreamConfig,
    *,
    precision: Storage = "bfloat16",
    graphs: tuple[Precision, ...] = (),
    check: bool = True,
    on_tensor: Callable[[str, int], None] = lambda name, size: None,
    on_stage: Callable[[str], None] = lambda what: None,
) -> dict[str, Any]:
    """Write the bundle.

    Args:
        model: what `read` found.
        out: directory to make; it must not exist.
        card: for the manifest.
        stream: how video is generated.
        precision: of the stored weights.
        graphs: precisions to export graphs in.
        check: run each graph and compare it with its module. That takes the model in float32, several times.
        on_tensor: called with the name and the bytes of each tensor that was written.
        on_stage: called with what is done after that.

    Returns:
        What was written, as plain values.

    Raises:
        ConvertError: `out` exists, a weight is not finite in this precision, or the size does not fit.
        ProgramError: a graph does not agree with its module.
    """
    if out.exists():
        raise ConvertError(f"{out}: exists already")
    try:
        video = VideoConfig(model.transformer, stream)
    except ValueError as error:
        raise ConvertError(str(error)) from None
    out.parent.mkdir(parents=True, exist_ok=True)
    # Written under another name and renamed when it is whole.
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as temporary:
        directory = Path(temporary) / "bundle"
        directory.mkdir()
        write_safetensors(directory / layout.WEIGHTS, model.tensors, precision, on_tensor)
        shutil.copyfile(model.tokenizer, directory / layout.TOKENIZER)
        programs: dict[str, dict[str, str]] = {name: {} for name in layout.PROGRAMS} if graphs else {}
        for wanted in graphs:
            on_stage(f"graphs in {wanted}")
            _export(model, video, directory, wanted, check)
            for name in programs:
                programs[name][wanted] = layout.graph_file(name, wanted)
        on_stage("checksums")
        values = _manifest(model, card, stream, graphs) | {"programs": programs}
        try:
            manifest = write_manifest(directory, values)
        except BundleError as error:
            raise ConvertError(str(error).replace(f"{directory}/", "")) from None
        directory.rename(out)
    return {
        "bundle": str(out),
        "name": manifest.name,
        "precision": precision,
        "bytes": sum(file.size for file in manifest.files),
        "parameters": {
            "transformer": model.parameters(layout.TRANSFORMER),
            "vae": model.parameters(layout.VAE),
            "text": model.parameters(layout.TEXT),
        },
        "graphs": list(graphs),
        "checked": bool(graphs) and check,
    }


def _tokenizer(path: Path, text: TextConfig, limit: int) -> Path:
    if path.is_dir():
        path = path / "spiece.model"
    try:
        pieces = PromptTokenizer(path, limit).vocabulary
    except OSError as error:
        raise ConvertError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise ConvertError(f"{path}: {error}") from None
    if pieces > text.vocab:
        raise ConvertError(f"{path}: has {pieces} pieces, the text encoder knows {text.vocab}")
    return path


def _manifest(
    model: Model, card: Card, stream: StreamConfig, graphs: tuple[Precision, ...]
) -> dict[str, Any]:
    sources = ", ".join(f"{path.name} ({path.stat().st_size} bytes)" for path in model.files)
    return {
        "engine": "longlive",
        "name": card.name,
        "version": card.version,
        "description": card.description,
        "licence": card.licence,
        "architecture": {
            "transformer": model.transformer.to_dict(),
            "stream": stream.to_dict(),
            "vae": model.vae.to_dict(),
            "text": model.text.to_dict(),
            "video": {"frames_per_second": FRAMES_PER_SECOND},
        },
        "precisions": list(graphs) or ["float32"],
        "weights": layout.WEIGHTS,
        "assets": {"tokenizer": layout.TOKENIZER},
        "provenance": {
            "recipe": card.recipe,
            "created": datetime.date.today().isoformat(),
            "notes": f"Converted from {sources}.",
        },
    }


def _export(model: Model, video: VideoConfig, directory: Path, precision: Precision, check: bool) -> None:
    """Export every program with one part in memory at a time; without `check` none is."""
    from realtide.engines.longlive import export

    if precision not in ("float32", "float16"):
        raise ConvertError(f"graphs must be in float32 or float16, not {precision}")
    graphs = (directory / layout.graph_file(layout.TEXT_GRAPH, precision)).parent
    graphs.mkdir(parents=True)

    def part(make: Callable[[], M], prefix: str) -> M:
        with torch.device("meta"):
            module = make()
        if check:
            written = read_checkpoint(directory / layout.WEIGHTS)
            names = [name for name in written if name.startswith(prefix)]
            values = {name.removeprefix(prefix): written[name].read().float() for name in names}
            module.load_state_dict(values, assign=True)
        return module.to(DTYPES[precision][1]).eval().requires_grad_(False)

    stream, scale = video.stream, model.vae.spatial_scale
    transformer = part(lambda: WanTransformer(model.transformer), layout.TRANSFORMER)
    export.export_video(transformer, video, graphs, prefix=layout.TRANSFORMER)
    vae = part(lambda: WanVae(model.vae), layout.VAE)
    export.export_decoder(vae, stream.height, stream.width, graphs, prefix=layout.VAE)
    export.export_encoder(vae, stream.height * scale, stream.width * scale, graphs, prefix=layout.VAE)
    text = part(lambda: TextEncoder(model.text), layout.TEXT)
    export.export_text(text, graphs / f"{layout.TEXT_GRAPH}.onnx", prefix=layout.TEXT)
