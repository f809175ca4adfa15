"""`realtide bench image`: images a second, how soon they show, and what a cached condition spares (ours)."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from realtide.cli.errors import CommandError, UsageError

if TYPE_CHECKING:
    from realtide_client import Client, ImageStream
    from realtide_client.v1.models_pb2 import Model

_LOAD, _SERVER, _OUTPUT = "Load", "Server", "Output"


def command(
    images: Annotated[
        int, typer.Option(min=2, max=10_000, help="Images of each stream and part.", rich_help_panel=_LOAD)
    ] = 12,
    streams: Annotated[
        list[int] | None,
        typer.Option(
            min=1, max=64, help="Streams at once. Repeatable. Default: 1, 4.", rich_help_panel=_LOAD
        ),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Of the sampler. Default: the model's.", rich_help_panel=_LOAD)
    ] = None,
    prompt: Annotated[str, typer.Option(help="Of all images.", rich_help_panel=_LOAD)] = (
        "an emoji on a blue background, flat style"
    ),
    kind: Annotated[
        str | None, typer.Option(help="Of the condition. Default: the model's first.", rich_help_panel=_LOAD)
    ] = None,
    server: Annotated[
        str | None,
        typer.Option(metavar="HOST:PORT", help="Use this server (no TLS).", rich_help_panel=_SERVER),
    ] = None,
    model: Annotated[str, typer.Option(help="Model of that server.", rich_help_panel=_SERVER)] = "",
    bundle: Annotated[
        str | None, typer.Option(help="Bundle for the own server.", rich_help_panel=_SERVER)
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="The whole result as JSON.", rich_help_panel=_OUTPUT)
    ] = False,
    out: Annotated[
        Path | None, typer.Option(help="Write the result here too.", rich_help_panel=_OUTPUT)
    ] = None,
) -> None:
    """Ask for images as fast as they come; measure rates and delays.

    Each part opens its streams, asks every one of them for all its images at once, with a preview after each
    step, and takes the time from when an image's turn has come: the request for the first one, the image
    before for the others. First without conditions, then with one that is uploaded once, whose first image
    pays for it.

    Example: realtide bench image --json

    Example: realtide bench image --images 30 --streams 1 --streams 8 --out benchmarks/results/image.json
    """
    from realtide.bench import report
    from realtide_client import RealtideError

    if server is not None and bundle is not None:
        raise UsageError("--bundle is for the own server: do not give it with --server")
    load = Load(images, streams or [1, 4], steps, prompt, kind)
    try:
        values = asyncio.run(_run(load, server, model, bundle))
    except RealtideError as error:
        raise CommandError(str(error)) from None
    result = report.envelope("image", values)
    if out is not None:
        report.write(out, result)
    if as_json:
        typer.echo(json.dumps(result))
        return
    for part in values["parts"]:
        image, first = (1000 * part[name]["p50"] for name in ("image_seconds", "first_preview_seconds"))
        typer.echo(
            f"{part['streams']} streams, {part['conditions']} conditions:"
            f" {part['images_per_second']:.2f} images/s, image {image:.0f} ms,"
            f" first preview {first:.0f} ms (medians)"
        )


@dataclass(frozen=True, slots=True)
class Load:
    """What is asked for."""

    images: int
    streams: list[int]
    steps: int | None
    prompt: str
    kind: str | None


@dataclass(slots=True)
class Taken:
    """What one stream saw; times in seconds."""

    previews: list[float] = field(default_factory=list)
    images: list[float] = field(default_factory=list)
    ready: list[tuple[int, int, float]] = field(default_factory=list)  # hits, misses, seconds


async def _run(load: Load, server: str | None, name: str, bundle: str | None) -> dict[str, Any]:
    from realtide.cli.image import find_model
    from realtide.cli.transcribe import start_server
    from realtide_client import connect

    async with contextlib.AsyncExitStack() as stack:
        if server is None:
            server = (await start_server(stack, bundle, "image")).address
        client = await stack.enter_async_context(connect(server))
        model = await find_model(client, name)
        kinds = [kind.name for kind in model.image.kinds]
        kind = load.kind or next(iter(kinds), None)
        if load.kind is not None and load.kind not in kinds:
            raise UsageError(f"--kind {load.kind}: kinds of {model.name}: {', '.join(kinds) or 'none'}")
        await _part(client, model, load, 1, None)  # what is touched for the first time is not measured
        parts = []
        for streams in load.streams:
            for chosen in (None, kind) if kind is not None else (None,):
                parts.append(await _part(client, model, load, streams, chosen))
    size = {"width": model.image.width, "height": model.image.height}
    return {"model": model.name, **size, "steps": load.steps or model.image.steps, "parts": parts}


async def _part(client: Client, model: Model, load: Load, streams: int, kind: str | None) -> dict[str, Any]:
    async with contextlib.AsyncExitStack() as stack:
        opened = [
            await stack.enter_async_context(client.image(model=model.name, encoding="raw_rgb"))
            for _ in range(streams)
        ]
        begun = time.monotonic()
        taken = await asyncio.gather(
            *(_take(stream, load, kind, number) for number, stream in enumerate(opened))
        )
        seconds = time.monotonic() - begun
    ready = [one for each in taken for one in each.ready]
    computed, cached = ([s for _, misses, s in ready if bool(misses) is miss] for miss in (True, False))
    return {
        "streams": streams,
        "conditions": 0 if kind is None else 1,
        "images_per_second": round(streams * load.images / seconds, 3),
        "image_seconds": _quantiles([s for each in taken for s in each.images]),
        "first_preview_seconds": _quantiles([s for each in taken for s in each.previews]),
        "ready_seconds": {"computed": _quantiles(computed), "cached": _quantiles(cached)},
        "hits": sum(hits for hits, _, _ in ready),
        "misses": sum(misses for _, misses, _ in ready),
    }


async def _take(stream: ImageStream, load: Load, kind: str | None, number: int) -> Taken:
    import realtide_client as rt

    conditions = [] if kind is None else [await stream.condition(kind, _picture(number))]
    for index in range(load.images):
        await stream.generate(
            load.prompt,
            conditions=conditions,
            steps=load.steps,
            seed=1000 * number + index,
            preview_interval=1,
        )
    await stream.finish()
    taken, turn, shown = Taken(), time.monotonic(), False
    async for event in stream:
        now = time.monotonic()
        if isinstance(event, rt.Preview) and not shown:
            shown = True
            taken.previews.append(now - turn)
        elif isinstance(event, rt.ConditionsReady):
            taken.ready.append((event.hits, event.misses, event.seconds))
        elif isinstance(event, rt.Image):
            taken.images.append(now - turn)
            turn, shown = now, False
    return taken


def _picture(number: int) -> bytes:
    """A condition image of its own for each stream."""
    import numpy as np
    from PIL import Image

    written = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(pixels).save(written, "PNG")
    return written.getvalue()


def _quantiles(values: list[float]) -> dict[str, float] | None:
    """Median and 99th percentile."""
    import numpy as np

    if not values:
        return None
    p50, p99 = np.percentile(values, (50, 99))
    return {"p50": round(float(p50), 4), "p99": round(float(p99), 4)}
