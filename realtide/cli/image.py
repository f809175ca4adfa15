"""`realtide image`: images from a prompt and condition images, as files."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from realtide.cli import connection
from realtide.cli.errors import CommandError, UsageError

if TYPE_CHECKING:
    from realtide_client import Client, ImageStream
    from realtide_client.v1.models_pb2 import Model

_SERVER, _IMAGE, _OUTPUT = "Server", "Image", "Output"
_ENCODINGS = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".rgb": "raw_rgb"}


def command(
    prompt: Annotated[
        str, typer.Option("--prompt", "-p", help="What the image shows.", rich_help_panel=_IMAGE)
    ],
    out: Annotated[
        Path,
        typer.Option(
            metavar="FILE", help=".png, .jpg or .rgb. With --count: FILE-1, FILE-2 …", rich_help_panel=_OUTPUT
        ),
    ],
    condition: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KIND=PATH[:WEIGHT]",
            help="An image that guides it, for example canny=sketch.png:0.8. Repeatable.",
            rich_help_panel=_IMAGE,
        ),
    ] = None,
    size: Annotated[
        str | None,
        typer.Option(metavar="WxH", help="In pixels. Default: the model's.", rich_help_panel=_IMAGE),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Of the sampler. Default: the model's.", rich_help_panel=_IMAGE)
    ] = None,
    guidance: Annotated[
        float | None, typer.Option(help="Scale, for models that take one.", rich_help_panel=_IMAGE)
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(min=0, help="The same seed gives the same image. Default: any.", rich_help_panel=_IMAGE),
    ] = None,
    count: Annotated[
        int, typer.Option(min=1, max=1000, help="Images, with seeds that follow.", rich_help_panel=_IMAGE)
    ] = 1,
    preview: Annotated[
        bool,
        typer.Option("--preview", help="Write FILE while it forms, as it would be.", rich_help_panel=_OUTPUT),
    ] = False,
    preview_interval: Annotated[
        int | None,
        typer.Option(
            min=1, help="Steps between previews. Default: 1 with --preview.", rich_help_panel=_OUTPUT
        ),
    ] = None,
    quality: Annotated[int | None, typer.Option(help="JPEG: 1 to 100.", rich_help_panel=_OUTPUT)] = None,
    as_json: Annotated[
        bool,
        typer.Option(
            "--json",
            help="One object a line, `type` opened, conditions, preview, image.",
            rich_help_panel=_OUTPUT,
        ),
    ] = False,
    server: connection.Server = None,
    tls: connection.Tls = False,
    ca: connection.Ca = None,
    client_cert: connection.Certificate = None,
    client_key: connection.Key = None,
    api_key_file: connection.ApiKeyFile = None,
    bundle: Annotated[
        str | None, typer.Option(help="Bundle for the own server.", rich_help_panel=_SERVER)
    ] = None,
    model: Annotated[str, typer.Option(help="Model of the server.", rich_help_panel=_SERVER)] = "",
) -> None:
    """Make an image from a prompt, guided by other images.

    Which kinds of conditions there are is the model's; one that it does not have is an error that names those
    it has. Conditions are sent once and serve all images of --count. With --preview the file holds what the
    image would be after each step, until it holds the image itself.

    Without --server a server is started for the command and stopped after it.

    Example: realtide image --prompt "a red apple on a blue background, flat style" --out apple.png

    Example: realtide image -p "a fox on pink, noto style" --condition canny=sketch.png:0.9 --out fox.png
    """
    encoding = _ENCODINGS.get(out.suffix.lower())
    if encoding is None:
        raise UsageError(f"--out {out}: must end in {', '.join(_ENCODINGS)}")
    if not out.parent.is_dir():
        raise UsageError(f"--out {out}: there is no directory {out.parent}")
    if quality is not None and encoding != "jpeg":
        raise UsageError("--quality is for JPEG")
    if bundle is not None and server is not None:
        raise UsageError("--bundle is for the own server: do not give it with --server")
    if seed is not None and seed + count > 1 << 64:
        raise UsageError(f"--seed {seed}: must be at most {(1 << 64) - count}")
    width, height = _size(size)
    given = [parse_condition(one) for one in condition or []]
    every = preview_interval if preview_interval is not None else int(preview)
    credentials = connection.credentials(tls, ca, client_cert, client_key, api_key_file)
    from realtide_client import RealtideError

    choices: dict[str, Any] = {
        "width": width, "height": height, "steps": steps, "guidance": guidance, "preview_interval": every,
    }  # fmt: skip
    run = Run(prompt, out, given, choices, seed, count, encoding, quality, preview, as_json)
    try:
        asyncio.run(run.at(server, credentials, bundle, model))
    except RealtideError as error:
        raise CommandError(str(error)) from None
    except ValueError as error:  # a number that no message can hold
        raise UsageError(str(error)) from None


@dataclass(frozen=True, slots=True)
class Given:
    """A condition as it was named on the command line."""

    kind: str
    path: Path
    weight: float | None


def parse_condition(text: str) -> Given:
    """KIND=PATH[:WEIGHT]. Raises UsageError."""
    kind, mark, rest = text.partition("=")
    if not mark or not kind or not rest:
        raise UsageError(f"--condition {text}: must be KIND=PATH or KIND=PATH:WEIGHT")
    path, colon, last = rest.rpartition(":")
    weight: float | None = None
    if colon and not Path(rest).exists():
        try:
            weight = float(last)
        except ValueError:
            weight = math.nan
        if not math.isfinite(weight):
            raise UsageError(f"--condition {text}: {last!r} is no weight")
    else:
        path = rest
    if not Path(path).is_file():
        raise UsageError(f"--condition {text}: there is no file {path}")
    return Given(kind, Path(path), weight)


def _size(text: str | None) -> tuple[int | None, int | None]:
    if text is None:
        return None, None
    width, mark, height = text.lower().partition("x")
    if not mark or not width.isdecimal() or not height.isdecimal():
        raise UsageError(f"--size {text}: must be WxH, for example 64x64")
    return int(width), int(height)


@dataclass(slots=True)
class Run:
    """Images as they were ordered."""

    prompt: str
    out: Path
    conditions: list[Given]
    choices: dict[str, Any]
    seed: int | None
    count: int
    encoding: str
    quality: int | None
    preview: bool
    as_json: bool
    _names: dict[str, Path] = field(default_factory=dict)  # by control

    async def at(
        self, server: str | None, credentials: dict[str, Any], bundle: str | None, model: str
    ) -> None:
        """Make them, on this server or an own one."""
        from realtide.cli.transcribe import start_server
        from realtide_client import connect

        async with contextlib.AsyncExitStack() as stack:
            if server is None:
                own = await start_server(stack, bundle, "image")
                server, credentials = own.address, {}  # which asks for nothing
            client = await stack.enter_async_context(connect(server, **credentials))
            found = await find_model(client, model)
            kinds = [kind.name for kind in found.image.kinds]
            for given in self.conditions:
                if given.kind not in kinds:
                    known = ", ".join(kinds) or "none"
                    raise UsageError(f"--condition {given.kind}=…: kinds of {found.name}: {known}")
            options: dict[str, Any] = {"encoding": self.encoding, "jpeg_quality": self.quality}
            stream = client.image(model=found.name, **options)
            began = time.monotonic()
            async with stream:
                await self._with(stream, began)

    async def _with(self, stream: ImageStream, began: float) -> None:
        import realtide_client as rt

        self._tell({"type": "opened", "session": stream.info.session_id, "model": stream.info.model})
        conditions = []
        for given in self.conditions:
            made = await stream.condition(given.kind, given.path.read_bytes())
            conditions.append(made if given.weight is None else (made, given.weight))
        for number in range(self.count):
            seed = None if self.seed is None else self.seed + number
            control = await stream.generate(self.prompt, conditions=conditions, seed=seed, **self.choices)
            self._names[control.control_id] = (
                self.out if self.count == 1 else self.out.with_stem(f"{self.out.stem}-{number + 1}")
            )
        await stream.finish()
        async for event in stream:
            since = round(time.monotonic() - began, 4)
            match event:
                case rt.ConditionsReady():
                    self._tell(
                        {
                            "type": "conditions",
                            "hits": event.hits,
                            "misses": event.misses,
                            "seconds": round(event.seconds, 4),
                        }
                    )
                case rt.Preview():
                    path = self._names[event.control_id]
                    if self.preview:
                        self._write(path, event.data)
                    size = {"width": event.width, "height": event.height}
                    self._tell({"type": "preview", "step": event.step, **size, "seconds": since})
                case rt.Image():
                    path = self._names[event.control_id]
                    self._write(path, event.data)
                    self._tell(
                        {
                            "type": "image",
                            "path": str(path),
                            "width": event.width,
                            "height": event.height,
                            "seed": event.seed,
                            "seconds": since,
                        }
                    )
                    if not self.as_json and sys.stderr.isatty():
                        typer.echo(f"{path}: seed {event.seed}, after {since:.2f} s", err=True)

    def _tell(self, values: dict[str, Any]) -> None:
        if self.as_json:
            typer.echo(json.dumps(values))

    @staticmethod
    def _write(path: Path, data: bytes) -> None:
        """At once: whoever shows the file sees a whole picture."""
        draft = path.with_name(f".{path.name}.part")
        try:
            draft.write_bytes(data)
            draft.replace(path)
        except OSError as error:
            raise CommandError(f"{path}: {error.strerror}") from None


async def find_model(client: Client, name: str) -> Model:
    """The server's image model with this name, or its only one.

    Raises:
        CommandError: There is none.
        UsageError: There are several and none is named.
        RealtideError: The server cannot be reached.
    """
    found = [model for model in await client.models() if model.HasField("image")]
    names = ", ".join(model.name for model in found)
    if name:
        found = [model for model in found if model.name == name]
    if not found:
        raise CommandError(
            f"the server has no image model {name!r}" if name else "the server has no image model"
        )
    if len(found) > 1:
        raise UsageError(f"the server has several image models, name one with --model: {names}")
    return found[0]
