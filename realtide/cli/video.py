"""`realtide video`: a video from prompts, as a file, a pipe, images, or in the terminal while it is made."""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from realtide.cli import connection
from realtide.cli.errors import CommandError, UsageError

if TYPE_CHECKING:
    from realtide.cli.preview import Pipe, Preview
    from realtide.cli.video_display import JsonVideo, PlainVideo
    from realtide.cli.video_out import Sink
    from realtide.cli.video_session import Summary
    from realtide_client import Client, VideoOptions
    from realtide_client.v1.models_pb2 import Model

_SERVER, _VIDEO, _OUTPUT = "Server", "Video", "Output"
_SECONDS = 10.0  # length if none is named
_MARK = "\x1f"  # between the two words of --at


class TwoWords(TyperCommand):
    """A command whose option --at takes two words, any number of times."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Join the words behind each --at."""
        joined, rest = [], list(args)
        while rest:
            word = rest.pop(0)
            joined.append(word)
            if word == "--at" and len(rest) >= 2:
                joined.append(rest.pop(0) + _MARK + rest.pop(0))
            elif word == "--":
                joined += rest
                break
        return list(super().parse_args(ctx, joined))


def command(
    prompt: Annotated[
        str, typer.Option("--prompt", "-p", help="What the video shows first.", rich_help_panel=_VIDEO)
    ],
    at: Annotated[
        list[str] | None,
        typer.Option(
            "--at",
            metavar="SECONDS PROMPT",
            help="Another prompt from there on. Repeatable, in order.",
            rich_help_panel=_VIDEO,
        ),
    ] = None,
    seconds: Annotated[
        float | None, typer.Option(help="Length in seconds. Default: 10.", rich_help_panel=_VIDEO)
    ] = None,
    frames: Annotated[
        int | None, typer.Option(min=1, help="Length in frames instead.", rich_help_panel=_VIDEO)
    ] = None,
    endless: Annotated[bool, typer.Option("--endless", help="Until Ctrl-C.", rich_help_panel=_VIDEO)] = False,
    seed: Annotated[
        int | None,
        typer.Option(min=0, help="The same seed gives the same video. Default: any.", rich_help_panel=_VIDEO),
    ] = None,
    fps: Annotated[
        float | None,
        typer.Option(help="Frames per second of playback. Default: the model's.", rich_help_panel=_VIDEO),
    ] = None,
    width: Annotated[
        int | None, typer.Option(min=1, help="In pixels. Default: the model's.", rich_help_panel=_VIDEO)
    ] = None,
    height: Annotated[int | None, typer.Option(min=1, help="In pixels.", rich_help_panel=_VIDEO)] = None,
    quality: Annotated[
        int | None,
        typer.Option(help="JPEG: 1 to 100. MP4: 51 (worst) to 0 (lossless).", rich_help_panel=_VIDEO),
    ] = None,
    out: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|DIR|-",
            help=".mp4, .y4m, .rgb, a directory or pattern (f-%05d.jpg) for JPEG; - pipes MP4.",
            rich_help_panel=_OUTPUT,
        ),
    ] = None,
    sheet: Annotated[
        Path | None,
        typer.Option(help="Contact sheet of the .mp4 file, as PNG.", rich_help_panel=_OUTPUT),
    ] = None,
    interactive: Annotated[
        bool,
        typer.Option(
            "--interactive", "-i", help="Show it here and take new prompts.", rich_help_panel=_OUTPUT
        ),
    ] = False,
    pace: Annotated[
        bool, typer.Option(help="Take frames as they would be played.", rich_help_panel=_OUTPUT)
    ] = False,
    buffer: Annotated[
        float, typer.Option(help="Seconds of video that may be made ahead.", rich_help_panel=_OUTPUT)
    ] = 2.0,
    as_json: Annotated[
        bool,
        typer.Option(
            "--json",
            help="One object a line, `type` opened, prompt_applied, frames, done.",
            rich_help_panel=_OUTPUT,
        ),
    ] = False,
    stats: Annotated[
        bool, typer.Option("--stats", help="End with rates and delays.", rich_help_panel=_OUTPUT)
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
    """Generate a video that follows its prompts, and change them while it is made.

    A prompt that is given for a time takes effect with the first block of frames that begins there or later.
    MP4 is written in fragments as they come, so a player may read the file, or the pipe, while it grows.

    With --interactive the video plays in the terminal; a line that you type is the next prompt, and /pause,
    /resume and /quit do what they say.

    Without --server a server is started for the command and stopped after it.

    Example: realtide video --prompt "a red apple moves to the right on a blue background" --out apple.mp4

    Example: realtide video -p "a red apple moves up" --at 4 "a red apple stops" --seconds 8 --out a.mp4

    Example: realtide video --prompt "a frog moves clockwise" --endless --out - | ffplay -
    """
    changes = _changes(at or [])
    if sum((seconds is not None, frames is not None, endless)) > 1:
        raise UsageError("give one of --seconds, --frames and --endless")
    if seconds is not None and not 0 < seconds < math.inf:
        raise UsageError(f"--seconds {seconds:g}: must be more than 0")
    if not 0 < buffer < math.inf:
        raise UsageError(f"--buffer {buffer:g}: must be more than 0")
    if out is None and not (interactive or as_json or stats):
        raise UsageError("give --out, or --interactive to see it here")
    if out == "-" and (as_json or interactive):
        raise UsageError("--out - fills standard output: it cannot go with --json or --interactive")
    if interactive and as_json:
        raise UsageError("--json is for programs: it cannot go with --interactive")
    if sheet is not None and not (out or "").lower().endswith(".mp4"):
        raise UsageError("--sheet is made of an MP4 file: it needs --out FILE.mp4")
    if bundle is not None and server is not None:
        raise UsageError("--bundle is for the own server: do not give it with --server")
    from realtide.cli.video_out import sink_for
    from realtide_client import RealtideError, VideoOptions

    credentials = connection.credentials(tls, ca, client_cert, client_key, api_key_file)
    sink = sink_for(out, raw=interactive)
    if quality is not None and sink.encoding == "raw_rgb":
        raise UsageError("--quality is for JPEG and MP4 that the server makes")
    if sheet is not None and not sheet.parent.is_dir():
        raise UsageError(f"--sheet {sheet}: there is no directory {sheet.parent}")
    try:
        options = VideoOptions(
            prompt=prompt,
            encoding=sink.encoding,
            model=model,
            width=width,
            height=height,
            frames_per_second=fps,
            seed=seed,
            jpeg_quality=quality if sink.encoding == "jpeg" else None,
            h264_crf=quality if sink.encoding == "h264" else None,
        )
        length = None if endless or (interactive and seconds is None) else (seconds or _SECONDS)
        run = Run(options, changes, length, frames, sink, interactive, pace or interactive, buffer, as_json)
        summary, written = asyncio.run(run.at(server, credentials, bundle))
    except RealtideError as error:
        raise CommandError(str(error)) from None
    except ValueError as error:  # a number that no message can hold
        raise UsageError(str(error)) from None
    if sheet is not None and written:
        _sheet(Path(written[0]), summary, run.rate, sheet)
    if not as_json and (stats or sys.stderr.isatty()):
        typer.echo(summary.sentence(), err=True)


def _changes(given: list[str]) -> list[tuple[float, str]]:
    """Times and prompts. Raises UsageError."""
    changes: list[tuple[float, str]] = []
    for one in given:
        time, mark, prompt = one.partition(_MARK)
        try:
            seconds = float(time)
        except ValueError:
            seconds = math.nan
        if not mark or not math.isfinite(seconds):
            raise UsageError(f"--at {one.replace(_MARK, ' ')}: must be a number of seconds and a prompt")
        if seconds <= 0:
            raise UsageError(f"--at {time}: must be more than 0; --prompt is for the beginning")
        if changes and seconds <= changes[-1][0]:
            raise UsageError(f"--at {time}: must be later than the one before it ({changes[-1][0]:g} s)")
        changes.append((seconds, prompt))
    return changes


@dataclass(slots=True)
class Run:
    """A video as it was ordered."""

    options: VideoOptions
    changes: list[tuple[float, str]]
    seconds: float | None  # None: endless, or `frames` says
    frames: int | None
    sink: Sink
    interactive: bool
    pace: bool
    buffer: float
    as_json: bool
    rate: float = 0.0  # frames per second, once known

    async def at(
        self, server: str | None, credentials: dict[str, Any], bundle: str | None
    ) -> tuple[Summary, list[str]]:
        """Make it, on this server or an own one; gives its figures and what was written."""
        from realtide.cli.own_server import OwnServer
        from realtide.cli.transcribe import start_server
        from realtide_client import connect

        async with contextlib.AsyncExitStack() as stack:
            own: OwnServer | None = None
            if server is None:
                own = await start_server(stack, bundle, "video")
                server, credentials = own.address, {}  # which asks for nothing
            client = await stack.enter_async_context(connect(server, **credentials))
            return await self._with(client, own.metrics_url if own is not None else None)

    async def _with(self, client: Client, metrics_url: str | None) -> tuple[Summary, list[str]]:
        from dataclasses import replace

        from realtide.cli.video_display import JsonVideo, done_object
        from realtide.cli.video_session import closing, play

        model = await find_model(client, self.options.model)
        self.rate = self.options.frames_per_second or model.video.frames_per_second
        length = self.frames
        if length is None and self.seconds is not None:
            length = max(1, round(self.seconds * self.rate))
        planned = [(round(seconds * self.rate), prompt) for seconds, prompt in self.changes]
        if length is not None and planned and planned[-1][0] >= length:
            raise UsageError(
                f"--at {self.changes[-1][0]:g}: the video ends at {length / self.rate:g} s, before that"
            )
        options = replace(self.options, model=model.name, length_frames=length)
        display, commands = self._display()
        stop = asyncio.Event()
        asyncio.get_running_loop().add_signal_handler(signal.SIGINT, _interrupt, stop)
        written: list[str] = []
        try:
            with closing(self.sink, display, written):
                summary = await play(
                    client, options, planned, self.sink, display,
                    pace=self.pace, buffer_seconds=self.buffer, commands=commands, stop=stop,
                )  # fmt: skip
        except BrokenPipeError:
            # Who reads the pipe has seen enough. What Python still holds must not fail at its exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise CommandError("the pipe was closed by its reader") from None
        finally:
            asyncio.get_running_loop().remove_signal_handler(signal.SIGINT)
        if isinstance(display, JsonVideo):
            rates = await server_rates(metrics_url, summary) if metrics_url is not None else None
            display.write(done_object(summary, rates, written))
        return summary, written

    def _display(self) -> tuple[JsonVideo | PlainVideo | Preview, Preview | Pipe | None]:
        """What is shown, and who is listened to."""
        from realtide.cli.video_display import JsonVideo, PlainVideo

        if self.as_json:
            return JsonVideo(), None
        if not self.interactive:
            return PlainVideo(), None
        from realtide.cli.preview import Pipe, Preview

        if sys.stdin.isatty() and sys.stdout.isatty():
            preview = Preview()
            return preview, preview
        return PlainVideo(), Pipe()


async def find_model(client: Client, name: str) -> Model:
    """The server's video model with this name, or its only one.

    Raises:
        CommandError: There is none.
        UsageError: There are several and none is named.
        RealtideError: The server cannot be reached.
    """
    found = [model for model in await client.models() if model.HasField("video")]
    names = ", ".join(model.name for model in found)
    if name:
        found = [model for model in found if model.name == name]
    if not found:
        raise CommandError(
            f"the server has no video model {name!r}" if name else "the server has no video model"
        )
    if len(found) > 1:
        raise UsageError(f"the server has several video models, name one with --model: {names}")
    return found[0]


async def server_rates(metrics_url: str, summary: Summary) -> dict[str, float] | None:
    """Frames per second from opening to the last frame by stage, of a server that made nothing else."""
    from realtide.cli.demo import read_metrics, total

    if not summary.seconds:
        return None
    exposition = await asyncio.to_thread(read_metrics, metrics_url)
    stages = ("denoised", "decoded", "delivered")
    counts = {stage: total(exposition, "realtide_frames_total", stage=stage) for stage in stages}
    return {stage: round(count / summary.seconds, 2) for stage, count in counts.items()}


def _interrupt(stop: asyncio.Event) -> None:
    """The first Ctrl-C ends the video, whose file is whole; the second one ends the command."""
    if stop.is_set():
        raise KeyboardInterrupt
    stop.set()


def _sheet(video: Path, summary: Summary, rate: float, path: Path) -> None:
    from realtide.cli.sheet import contact_sheet, decoded, write_sheet

    frames = decoded(video)
    if frames:
        write_sheet(contact_sheet(frames, rate, summary.prompts()), path)
