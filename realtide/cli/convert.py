"""`realtide models convert`: bundles made of the files that a model's owners publish."""

from __future__ import annotations

import json
import re
import shlex
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from realtide.cli.errors import CommandError, UsageError

if TYPE_CHECKING:
    from realtide.bundle import Precision
    from realtide.engines.longlive.convert import Model

app = typer.Typer(help="Make a bundle of a public model's own files.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Make a bundle of a public model's own files."""


class Storage(StrEnum):
    """How weights are stored."""

    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    FLOAT32 = "float32"


class Graphs(StrEnum):
    """What graphs compute in."""

    FLOAT32 = "float32"
    FLOAT16 = "float16"


class Rotary(StrEnum):
    """See docs/longlive.md."""

    ABSOLUTE = "absolute"
    RELATIVE = "relative"


@app.command("longlive")
def longlive(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Directory to make; its name is the bundle's.")],
    licence: Annotated[str, typer.Option(help="SPDX identifier of the weights' licence.")],
    wan: Annotated[
        Path | None,
        typer.Option(help="A downloaded Wan2.1, as released or in diffusers' layout: parts not named below."),
    ] = None,
    transformer: Annotated[
        Path | None, typer.Option(help="For example longlive_base.pt, or a directory of safetensors.")
    ] = None,
    lora: Annotated[Path | None, typer.Option(help="lora.pt: low-rank updates, merged in float32.")] = None,
    vae: Annotated[Path | None, typer.Option(help="For example Wan2.1_VAE.pth.")] = None,
    text: Annotated[
        Path | None, typer.Option(help="models_t5_umt5-xxl-enc-bf16.pth, or a directory.")
    ] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="spiece.model, or the directory with it.")] = None,
    precision: Annotated[Storage, typer.Option(help="How weights are stored.")] = Storage.BFLOAT16,
    export: Annotated[
        list[Graphs] | None, typer.Option(help="Export ONNX graphs in this precision; may be repeated.")
    ] = None,
    check: Annotated[
        bool, typer.Option(help="Run each exported graph and compare it with its module.")
    ] = True,
    size: Annotated[str, typer.Option(metavar="WxH", help="Of the video, in pixels.")] = "832x480",
    window: Annotated[int, typer.Option(help="Latent frames of the cache.")] = 12,
    sink: Annotated[int, typer.Option(help="Of these, first frames that never leave.")] = 3,
    block: Annotated[int, typer.Option(help="Latent frames that are denoised together.")] = 3,
    rotary: Annotated[
        Rotary, typer.Option(help="relative: for streams without end; see docs/longlive.md.")
    ] = Rotary.ABSOLUTE,
    text_tokens: Annotated[int, typer.Option(help="Longest prompt, in tokens.")] = 512,
    heads: Annotated[
        int | None, typer.Option(help="Of attention. Default: config.json's, or width / 128.")
    ] = None,
    ema: Annotated[bool, typer.Option("--ema", help="Take generator_ema of the transformer's file.")] = False,
    lora_alpha: Annotated[float | None, typer.Option(help="Default: the updates' rank.")] = None,
    version: Annotated[str, typer.Option(help="Of the bundle.")] = "1.0.0",
    description: Annotated[
        str, typer.Option(help="One line for the manifest.")
    ] = "Live video that follows its prompts, converted from public checkpoints.",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Make a LongLive bundle of the public files of LongLive and Wan2.1.

    Every name and shape is held to the architecture that the files themselves show. A tensor that is
    missing, unexpected or misshapen is an error that names it, and nothing is left behind. Pickles are read
    only if they hold tensors and nothing else. Needs PyTorch (extra `train`), and with --export the extras
    `cpu` and `export`.

    Files are mapped, and tensors are written one after the other. Graphs hold no weights. With --no-check
    they are exported without loading any, whatever the size. With --check every part is loaded and run in
    float32, several passes of each: right for small models, very long for 832x480 on a CPU.

    Example: realtide models convert longlive models/longlive-1.3b --licence CC-BY-NC-4.0
    --wan Wan2.1-T2V-1.3B --transformer longlive_base.pt --lora lora.pt --export float32 --no-check

    Example: realtide models convert longlive models/wan --licence Apache-2.0
    --wan Wan2.1-T2V-1.3B-Diffusers --precision float16 --json
    """
    try:
        from realtide.engines.longlive import convert
        from realtide.engines.longlive.config import StreamConfig
        from realtide.engines.runtime.golden import quiet
        from realtide.engines.runtime.program import ProgramError
    except ImportError as error:
        raise CommandError(f"converting needs the extra train (PyTorch): {error}") from None
    found: dict[str, Any] = {} if wan is None else convert.find(wan)
    if wan is not None and not found:
        raise CommandError(f"{wan}: holds no part of Wan2.1 that is known by its name")
    named = {"transformer": transformer, "vae": vae, "text": text, "tokenizer": tokenizer}
    found |= {part: path for part, path in named.items() if path is not None}
    for part in named:
        if part not in found:
            where = "" if wan is None else f", and {wan} has none"
            raise UsageError(f"name the {part} with --{part}{where}")
    if lora_alpha is not None and not 0 < lora_alpha < float("inf"):
        raise UsageError("--lora-alpha must be positive")
    sources = convert.Sources(**found, lora=lora, lora_alpha=lora_alpha, ema=ema, heads=heads)
    card = convert.Card(out.name, version, description, licence, _recipe())
    try:
        model = convert.read(sources, text_tokens)
        height, width = _latent(size, model.vae.spatial_scale, model.transformer.patch)
        stream = StreamConfig(
            height=height, width=width, block=block, window=window, sink=sink, rotary=rotary.value
        )
        graphs: tuple[Precision, ...] = tuple(dict.fromkeys(one.value for one in export or []))
        with quiet():
            done = _written(convert, model, out, card, stream, precision, graphs, check)
    except (ValueError, ProgramError, OSError) as error:
        raise CommandError(str(error)) from None
    except ImportError as error:
        raise CommandError(f"--export needs the extras cpu and export: {error}") from None
    if as_json:
        typer.echo(json.dumps(done))
        return
    counts = ", ".join(f"{part} {count / 1e6:,.1f} M" for part, count in done["parameters"].items())
    typer.echo(f"{done['bundle']}: {done['bytes'] / 1e6:,.1f} MB in {precision.value}; parameters: {counts}")


def _written(
    convert: Any,
    model: Model,
    out: Path,
    card: Any,
    stream: Any,
    precision: Storage,
    graphs: tuple[Precision, ...],
    check: bool,
) -> dict[str, Any]:
    """Write the bundle; bars on standard error show how far it is if that is a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        width = 4 if precision is Storage.FLOAT32 else 2
        parts = {
            part: progress.add_task(part, total=width * model.parameters(f"{part}."))
            for part in ("transformer", "vae", "text")
        }

        def on_tensor(name: str, size: int) -> None:
            progress.advance(parts[name.partition(".")[0]], size)

        def on_stage(what: str) -> None:
            progress.add_task(what, total=None)

        result: dict[str, Any] = convert.write(
            model,
            out,
            card,
            stream,
            precision=precision.value,
            graphs=graphs,
            check=check,
            on_tensor=on_tensor,
            on_stage=on_stage,
        )
    return result


def _latent(size: str, scale: int, patch: int) -> tuple[int, int]:
    """Latent height and width of a size in pixels. Raises CommandError."""
    at = re.fullmatch(r"(\d{1,5})x(\d{1,5})", size)
    step = scale * patch
    if not at or any(not int(side) or int(side) % step for side in at.groups()):
        raise UsageError(f"--size must be two multiples of {step} such as 832x480, got {size!r}")
    return int(at[2]) // scale, int(at[1]) // scale


def _recipe() -> str:
    """The command that was given; directories of paths are left out, they say nothing elsewhere."""
    words = [Path(word).name if "/" in word and not word.startswith("-") else word for word in sys.argv[1:]]
    return shlex.join(["realtide", *words])


@app.command("easycontrol")
def easycontrol(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Directory to make; its name is the bundle's.")],
    licence: Annotated[str, typer.Option(help="SPDX identifier of the weights' licence.")],
    flux: Annotated[
        Path | None,
        typer.Option(help="A downloaded FLUX.1 in diffusers' layout: parts not named below."),
    ] = None,
    transformer: Annotated[
        Path | None, typer.Option(help="For example flux1-dev.safetensors, or a directory.")
    ] = None,
    vae: Annotated[Path | None, typer.Option(help="For example ae.safetensors, or a directory.")] = None,
    text: Annotated[Path | None, typer.Option(help="T5's checkpoint (text_encoder_2).")] = None,
    pooled: Annotated[Path | None, typer.Option(help="CLIP's checkpoint (text_encoder).")] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="T5's spiece.model, or its directory.")] = None,
    pooled_tokenizer: Annotated[
        Path | None, typer.Option(help="CLIP's tokenizer.json, or the directory with its vocabulary.")
    ] = None,
    lora: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KIND=PATH[:subject]",
            help="A LoRA of EasyControl's, by the kind of its conditions. Repeatable.",
        ),
    ] = None,
    precision: Annotated[Storage, typer.Option(help="How weights are stored.")] = Storage.BFLOAT16,
    export: Annotated[
        list[Graphs] | None, typer.Option(help="Export ONNX graphs in this precision; may be repeated.")
    ] = None,
    check: Annotated[
        bool, typer.Option(help="Run each exported graph and compare it with its module.")
    ] = True,
    size: Annotated[str, typer.Option(metavar="WxH", help="Of images by default, in pixels.")] = "1024x1024",
    sides: Annotated[
        str, typer.Option(metavar="LOW-HIGH", help="Shortest and longest side of an image.")
    ] = "256-2048",
    condition_size: Annotated[int, typer.Option(help="Pixels of a condition, each way.")] = 512,
    text_tokens: Annotated[int, typer.Option(help="Tokens of a prompt, padding included.")] = 512,
    version: Annotated[str, typer.Option(help="Of the bundle.")] = "1.0.0",
    description: Annotated[
        str, typer.Option(help="One line for the manifest.")
    ] = "Images guided by other images, converted from public checkpoints.",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Make an image bundle of the public files of FLUX.1 and EasyControl.

    Transformer and VAE may be in diffusers' layout or the original single files. Every name and shape is held
    to the architecture that the files themselves show. A tensor that is missing, unexpected or misshapen is
    an error that names it, and nothing is left behind. A kind whose LoRA is marked :subject says what is
    shown and not where. The preview projection is fitted to the VAE. Needs PyTorch (extra `train`) and the
    extra `images`, with --export the extras `cpu` and `export`.

    Example: realtide models convert easycontrol models/flux --licence LicenseRef-FLUX-1-dev
    --flux FLUX.1-dev --lora canny=canny.safetensors --lora subject=subject.safetensors:subject
    """
    try:
        from realtide.engines.easycontrol import convert
        from realtide.engines.easycontrol.config import Role
        from realtide.engines.runtime.golden import quiet
        from realtide.engines.runtime.program import ProgramError
    except ImportError as error:
        raise CommandError(f"converting needs the extra train (PyTorch): {error}") from None
    found: dict[str, Any] = {} if flux is None else convert.find(flux)
    if flux is not None and not found:
        raise CommandError(f"{flux}: holds no part of FLUX.1 that is known by its name")
    named = {
        "transformer": transformer, "vae": vae, "text": text, "pooled": pooled,
        "tokenizer": tokenizer, "pooled_tokenizer": pooled_tokenizer,
    }  # fmt: skip
    found |= {part: path for part, path in named.items() if path is not None}
    for part in named:
        if part not in found:
            where = "" if flux is None else f", and {flux} has none"
            raise UsageError(f"name the {part.replace('_', ' ')} with --{part.replace('_', '-')}{where}")
    loras: dict[str, tuple[Path, Role]] = {}
    for one in lora or []:
        kind, mark, rest = one.partition("=")
        path, role = rest.removesuffix(":subject"), "subject" if rest.endswith(":subject") else "spatial"
        if not mark or not kind or not path or kind in loras:
            raise UsageError(f"--lora {one}: must be KIND=PATH or KIND=PATH:subject, each kind once")
        loras[kind] = (Path(path), "subject" if role == "subject" else "spatial")
    width, height = _pair(size, "x", "--size", "1024x1024")
    low, high = _pair(sides, "-", "--sides", "256-2048")
    limits = convert.Limits((width, height), (low, high), max(width * height, high * high // 2))
    card = convert.Card(out.name, version, description, licence, _recipe())
    try:
        model = convert.read(
            convert.Sources(**found, loras=loras), text_tokens=text_tokens, condition_size=condition_size
        )
        graphs: tuple[Precision, ...] = tuple(dict.fromkeys(one.value for one in export or []))
        with quiet():
            done = convert.write(
                model, out, card, limits, precision=precision.value, graphs=graphs, check=check
            )
    except (ValueError, ProgramError, OSError) as error:
        raise CommandError(str(error)) from None
    except ImportError as error:
        raise CommandError(f"a package is missing (extras images, cpu, export): {error}") from None
    if as_json:
        typer.echo(json.dumps(done))
        return
    counts = ", ".join(f"{part} {count / 1e6:,.1f} M" for part, count in done["parameters"].items())
    typer.echo(f"{done['bundle']}: {done['bytes'] / 1e6:,.1f} MB in {precision.value}; parameters: {counts}")


def _pair(text: str, mark: str, option: str, example: str) -> tuple[int, int]:
    """Two whole numbers. Raises UsageError."""
    at = re.fullmatch(rf"(\d{{1,5}}){mark}(\d{{1,5}})", text)
    if not at:
        raise UsageError(f"{option} {text}: must be like {example}")
    return int(at[1]), int(at[2])
