"""Makes a bundle of public checkpoints (ours; needs PyTorch, for graphs the extra ``export``).

What is read: FLUX.1 in diffusers' layout, or its transformer and VAE as the original single files, with the
text encoders and tokenizers beside; and LoRAs of EasyControl's release. Nothing is left behind if anything is
wrong.
"""

from __future__ import annotations

import datetime
import json
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from realtide.bundle import BundleError, Precision, write_manifest
from realtide.engines.easycontrol import convert_names, layout
from realtide.engines.easycontrol.config import (
    ConditionConfig,
    ImageConfig,
    PooledConfig,
    Role,
    SamplerConfig,
    TextConfig,
    TransformerConfig,
)
from realtide.engines.easycontrol.text import ClipText, T5Encoder
from realtide.engines.easycontrol.tokenizer import PooledTokenizer, PromptTokenizer
from realtide.engines.easycontrol.torch_programs import Modules
from realtide.engines.easycontrol.transformer import FluxTransformer
from realtide.engines.easycontrol.vae import Projection, Vae
from realtide.engines.runtime.checkpoint_files import (
    DTYPES,
    ConvertError,
    Stored,
    read_checkpoint,
    read_settings,
    write_safetensors,
)

Storage = Literal["float32", "float16", "bfloat16"]
M = TypeVar("M", bound=nn.Module)

_FIT_IMAGES, _FIT_SIDE = 6, 16
"""Pictures, and latent pixels of their sides, that the preview projection is fitted to."""


@dataclass(frozen=True, slots=True)
class Sources:
    """Files and directories of one model.

    Attributes:
        transformer: a checkpoint in either layout.
        vae: likewise.
        text: T5's checkpoint.
        pooled: CLIP's checkpoint.
        tokenizer: T5's SentencePiece model, or a directory with ``spiece.model``.
        pooled_tokenizer: CLIP's ``tokenizer.json``, or a directory with it, or with ``vocab.json`` and
            ``merges.txt``.
        loras: LoRA of each kind of condition, with what its positions are.
    """

    transformer: Path
    vae: Path
    text: Path
    pooled: Path
    tokenizer: Path
    pooled_tokenizer: Path
    loras: Mapping[str, tuple[Path, Role]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Card:
    """What the manifest says of the bundle and no file holds."""

    name: str
    version: str
    description: str
    licence: str
    recipe: str


@dataclass(frozen=True, slots=True)
class Limits:
    """What requests of the bundle may ask for; see `types.ImageModelInfo`."""

    size: tuple[int, int] = (1024, 1024)
    side: tuple[int, int] = (256, 2048)
    pixels: int = 2048 * 1024
    steps: int = 50
    conditions: int = 4


@dataclass(frozen=True, slots=True)
class Model:
    """A model that was found complete: configurations, and tensors by their names in the bundle."""

    config: ImageConfig
    text: TextConfig
    pooled: PooledConfig
    tensors: dict[str, Stored] = field(repr=False)
    tokenizer: Path
    pooled_tokenizer: Path

    def parameters(self, part: str) -> int:
        """Numbers in a part's tensors; ``part`` as in `layout`."""
        return sum(prod(stored.shape) for name, stored in self.tensors.items() if name.startswith(part))

    @property
    def files(self) -> list[Path]:
        """All files that tensors come from."""
        return sorted({stored.file for stored in self.tensors.values()})


def find(directory: Path) -> dict[str, Path]:
    """The parts of a downloaded FLUX.1 in diffusers' layout: `Sources`' names to what is there of them."""
    names = {
        "transformer": "transformer",
        "vae": "vae",
        "text": "text_encoder_2",
        "pooled": "text_encoder",
        "tokenizer": "tokenizer_2",
        "pooled_tokenizer": "tokenizer",
    }
    return {part: directory / name for part, name in names.items() if (directory / name).exists()}


def read(sources: Sources, *, text_tokens: int = 512, condition_size: int = 512) -> Model:
    """Read names and shapes of all checkpoints and check every one of them.

    Raises:
        ConvertError: a file is missing, damaged or holds more than tensors; a tensor is missing, unexpected
            or misshapen; or the parts do not fit each other.
    """
    try:
        transformer, weights = convert_names.transformer(
            read_checkpoint(sources.transformer), read_settings(sources.transformer), text_tokens
        )
        vae, pixels = convert_names.vae(read_checkpoint(sources.vae), read_settings(sources.vae))
        text, words = convert_names.text(read_checkpoint(sources.text), read_settings(sources.text))
        pooled, pool = convert_names.pooled(read_checkpoint(sources.pooled), read_settings(sources.pooled))
        parts = {layout.TRANSFORMER: weights, layout.VAE: pixels, layout.TEXT: words, layout.POOLED: pool}
        rank, adapters = _adapters(sources, transformer)
        conditions = ConditionConfig(
            size=condition_size,
            rank=rank,
            spatial=tuple(kind for kind, (_, role) in sources.loras.items() if role == "spatial"),
            subject=tuple(kind for kind, (_, role) in sources.loras.items() if role == "subject"),
        )
        config = ImageConfig(transformer, conditions, SamplerConfig(), vae)
    except ConvertError:
        raise
    except ValueError as error:  # shapes that make no configuration
        raise ConvertError(str(error)) from None
    for name, have, want in (
        ("text encoder", text.dim, transformer.text_dim),
        ("pooled encoder", pooled.dim, transformer.pooled_dim),
    ):
        if have != want:
            raise ConvertError(f"the {name} gives {have} numbers, the transformer takes {want}")
    tensors = {
        prefix + name: stored for prefix, part in (parts | adapters).items() for name, stored in part.items()
    }
    tokenizer = _tokenizer(sources.tokenizer, text, text_tokens)
    return Model(config, text, pooled, tensors, tokenizer, _pairs(sources.pooled_tokenizer))


def write(
    model: Model,
    out: Path,
    card: Card,
    limits: Limits | None = None,
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
        limits: of requests.
        precision: of the stored weights.
        graphs: precisions to export graphs in.
        check: run each graph and compare it with its module. That takes each part in float32.
        on_tensor: called with the name and the bytes of each tensor that was written.
        on_stage: called with what is done besides that.

    Returns:
        What was written, as plain values.

    Raises:
        ConvertError: `out` exists, or a weight is not finite in this precision.
        ProgramError: a graph does not agree with its module.
    """
    if out.exists():
        raise ConvertError(f"{out}: exists already")
    out.parent.mkdir(parents=True, exist_ok=True)
    # Written under another name and renamed when it is whole.
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as temporary:
        directory = Path(temporary) / "bundle"
        directory.mkdir()
        on_stage("preview")
        tensors = model.tensors | fitted(model)
        write_safetensors(directory / layout.WEIGHTS, tensors, precision, on_tensor)
        shutil.copyfile(model.tokenizer, directory / "tokenizer.model")
        _write_pairs(model, directory / "tokenizer.json")
        names = tuple(vars(layout.PROGRAMS).values())
        programs: dict[str, dict[str, str]] = {name: {} for name in names} if graphs else {}
        for wanted in graphs:
            on_stage(f"graphs in {wanted}")
            _export(model, directory, wanted, check)
            for name in programs:
                programs[name][wanted] = layout.graph_file(name, wanted)
        on_stage("checksums")
        values = _manifest(model, card, limits or Limits(), graphs) | {"programs": programs}
        try:
            manifest = write_manifest(directory, values)
        except BundleError as error:
            raise ConvertError(str(error).replace(f"{directory}/", "")) from None
        directory.rename(out)
    prefixes = {
        "transformer": layout.TRANSFORMER,
        "vae": layout.VAE,
        "text": layout.TEXT,
        "pooled": layout.POOLED,
    }
    return {
        "bundle": str(out),
        "name": manifest.name,
        "precision": precision,
        "bytes": sum(file.size for file in manifest.files),
        "parameters": {part: model.parameters(prefix) for part, prefix in prefixes.items()},
        "kinds": list(model.config.conditions.kinds),
        "graphs": list(graphs),
        "checked": bool(graphs) and check,
    }


def fitted(model: Model) -> dict[str, Stored]:
    """The preview projection: latents to mean colours by least squares, over smooth random pictures."""
    config = model.config.vae
    with torch.device("meta"):
        module = Vae(config)
    names = [name for name in model.tensors if name.startswith(layout.VAE)]
    weights = {name.removeprefix(layout.VAE): model.tensors[name].read().float() for name in names}
    module.load_state_dict(weights, assign=True)
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(_FIT_IMAGES, 3, _FIT_SIDE // 2, _FIT_SIDE // 2, generator=generator) * 2 - 1
    side = _FIT_SIDE * config.scale
    pixels = F.interpolate(coarse, size=(side, side), mode="bilinear", align_corners=False).clamp(-1, 1)
    with torch.inference_mode():
        latents = torch.cat([module.eval().encode(one[None]) for one in pixels])
    rows = latents.transpose(0, 1).flatten(1).T
    colours = F.avg_pool2d(pixels, config.scale).transpose(0, 1).flatten(1).T
    known = torch.cat([rows, torch.ones(len(rows), 1)], 1).double()
    solution = torch.linalg.lstsq(known, colours.double(), driver="gelsd").solution.float()
    weight = solution[:-1].T[..., None, None].contiguous()
    values = {"weight": weight, "bias": solution[-1].contiguous()}
    file = model.tensors[names[0]].file
    return {
        layout.PREVIEW + name: Stored(name, file, tuple(value.shape), _constant(value))
        for name, value in values.items()
    }


def _constant(value: Tensor) -> Callable[[], Tensor]:
    return lambda: value


def _adapters(sources: Sources, config: TransformerConfig) -> tuple[int, dict[str, dict[str, Stored]]]:
    """The largest rank, and all LoRAs at it, by what is before their names."""
    found = {
        kind: convert_names.adapter(read_checkpoint(path), config, kind)
        for kind, (path, _) in sources.loras.items()
    }
    rank = max((rank for rank, _ in found.values()), default=1)
    return rank, {layout.lora(kind): convert_names.widened(part, rank) for kind, (_, part) in found.items()}


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


def _pairs(path: Path) -> Path:
    """What CLIP's tokenizer is read from: a file, or the directory with its vocabulary and merges."""
    if path.is_dir() and (path / "tokenizer.json").is_file():
        return path / "tokenizer.json"
    if path.is_dir() and not all((path / name).is_file() for name in ("vocab.json", "merges.txt")):
        raise ConvertError(f"{path}: has neither tokenizer.json nor vocab.json and merges.txt")
    if not path.exists():
        raise ConvertError(f"{path}: no such file or directory")
    return path


def _write_pairs(model: Model, out: Path) -> None:
    """CLIP's tokenizer as one file; from a vocabulary and merges it is put together as CLIP reads text."""
    path = model.pooled_tokenizer
    if path.is_dir():
        from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

        vocabulary = json.loads((path / "vocab.json").read_text(encoding="utf-8"))
        lines = (path / "merges.txt").read_text(encoding="utf-8").splitlines()
        merges: list[tuple[str, str]] = []
        for line in lines:
            if line and not line.startswith("#version"):
                first, _, second = line.partition(" ")
                merges.append((first, second))
        tokenizer = Tokenizer(
            models.BPE(vocabulary, merges, end_of_word_suffix="</w>", unk_token="<|endoftext|>")
        )
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
        )
        words = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(words), behavior="removed", invert=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
        tokenizer.save(str(out))
    else:
        shutil.copyfile(path, out)
    try:
        PooledTokenizer(model.pooled, PromptTokenizer(model.tokenizer, 1), out)
    except ValueError as error:
        raise ConvertError(f"{path}: {error}") from None


def _manifest(model: Model, card: Card, limits: Limits, graphs: tuple[Precision, ...]) -> dict[str, Any]:
    config = model.config
    sources = ", ".join(f"{path.name} ({path.stat().st_size} bytes)" for path in model.files)
    return {
        "engine": "easycontrol",
        "name": card.name,
        "version": card.version,
        "description": card.description,
        "licence": card.licence,
        "architecture": {
            "transformer": config.transformer.to_dict(),
            "conditions": config.conditions.to_dict(),
            "sampler": config.sampler.to_dict(),
            "vae": config.vae.to_dict(),
            "text": model.text.to_dict(),
            "pooled": model.pooled.to_dict(),
            "preview": config.preview,
        },
        "limits": {
            "size": list(limits.size),
            "side": list(limits.side),
            "pixels": limits.pixels,
            "steps": limits.steps,
            "conditions": limits.conditions,
        },
        "precisions": list(graphs) or ["float32"],
        "weights": layout.WEIGHTS,
        "assets": {layout.TOKENIZER: "tokenizer.model", layout.POOLED_TOKENIZER: "tokenizer.json"},
        "provenance": {
            "recipe": card.recipe,
            "created": datetime.date.today().isoformat(),
            "notes": f"Converted from {sources}.",
        },
    }


def _export(model: Model, directory: Path, precision: Precision, check: bool) -> None:
    """Export every program; without `check` no weight is loaded."""
    from realtide.engines.easycontrol import export

    if precision not in ("float32", "float16"):
        raise ConvertError(f"graphs must be in float32 or float16, not {precision}")
    graphs = (directory / layout.graph_file("denoise", precision)).parent
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

    config = model.config
    made = Modules(
        transformer=part(lambda: FluxTransformer(config.transformer), layout.TRANSFORMER),
        vae=part(lambda: Vae(config.vae), layout.VAE),
        preview=part(lambda: Projection(config.vae.latent, config.preview), layout.PREVIEW),
        text=part(lambda: T5Encoder(model.text), layout.TEXT),
        pooled=part(lambda: ClipText(model.pooled), layout.POOLED),
    )
    export.export_all(made, config, model.pooled, graphs)
