"""`realtide demo`: everything once, in half a minute: serve, transcribe, generate, draw, measure."""

from __future__ import annotations

import asyncio
import contextlib
import statistics
import tempfile
import time
import urllib.request
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from realtide.cli.errors import CommandError

if TYPE_CHECKING:
    from rich.console import Console

    from realtide.cli.own_server import OwnServer
    from realtide_client import Client, Final, Frames, Partial, PromptApplied, VideoInfo

_PROMPTS = (
    "a red apple moves to the right on a blue background",
    "a red apple moves up on a blue background",
)
_SECONDS = 6.0
_ASK_AT = 0.375  # of the clip: the new prompt shows about half way
_AHEAD = 1.0  # seconds of video that may be made ahead of what was taken
_SEED = 2

# Shown at the end: name of the metric, labels that its samples must have, and what to say.
_Figures = tuple[tuple[str, dict[str, str], str], ...]
_SPEECH: _Figures = (
    ("realtide_audio_seconds_total", {}, "audio received, s"),
    ("grpc_server_msg_sent_total", {"grpc_service": "realtide.v1.Speech"}, "messages sent"),
)
_VIDEO: _Figures = (
    ("realtide_frames_total", {"stage": "denoised"}, "frames denoised"),
    ("realtide_frames_total", {"stage": "delivered"}, "frames delivered"),
    ("realtide_deadline_misses_total", {}, "deadlines missed"),
)
_IMAGE: _Figures = (
    ("realtide_images_total", {}, "images made"),
    ("realtide_condition_cache_misses_total", {}, "conditions computed"),
)
_BOTH: _Figures = (
    ("realtide_session_capacity", {}, "slots"),
    ("realtide_slots_leaked", {}, "slots leaked"),
    ("realtide_device_memory_bytes", {"kind": "host_resident"}, "resident memory, bytes"),
)
# Means of histograms.
_HISTOGRAMS = (
    ("realtide_step_seconds", "mean step (each stage), s"),
    ("realtide_final_delay_seconds", "mean final delay inside the server, s"),
    ("realtide_real_time_factor", "real-time factor of speech"),
    ("realtide_first_frame_seconds", "first frame inside the server, s"),
    ("realtide_prompt_switch_seconds", "prompt to first frame inside the server, s"),
    ("realtide_recache_seconds", "recache, s"),
)


def command(
    file: Annotated[
        Path | None, typer.Argument(help="Recording to stream. Default: one of the source tree's test clips.")
    ] = None,
    bundle: Annotated[
        list[str] | None,
        typer.Option(help="Model bundle. Repeatable. Default: the first of each kind in ./models."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Directory for the clip. Default: a new temporary one.")
    ] = None,
) -> None:
    """Start a server, transcribe a recording as it is spoken, generate a clip, draw from a sketch; measure.

    The clip is written as MP4 and as a contact sheet, images beside their sketch. Kinds without a bundle are
    left out.

    Example: realtide demo tests/data/audio/coffee-mocha.flac --out /tmp
    """
    from realtide_client import RealtideError

    try:
        asyncio.run(_run(file, bundle or [], out))
    except RealtideError as error:
        raise CommandError(str(error)) from None


def _recording() -> Path:
    import realtide

    audio = Path(realtide.__file__).resolve().parent.parent / "tests" / "data" / "audio"
    clips = sorted(audio.glob("coffee-*.flac"))
    if not clips:
        raise CommandError(f"there is no recording in {audio}: name a file")
    return clips[-1]


def _bundles(named: list[str]) -> list[Path]:
    """The bundles named, or the first one of each kind. Raises CommandError if there is none at all."""
    from realtide.cli import models

    if named:
        return [models.resolve(name) for name in named]
    found = []
    for kind in models.KINDS:
        with contextlib.suppress(CommandError):
            found.append(models.default(kind))
    return found or [models.default()]


async def _run(file: Path | None, named: list[str], directory: Path | None) -> None:
    from rich.console import Console

    from realtide.cli.demo_image import draw
    from realtide.cli.own_server import own_server
    from realtide_client import connect

    out = Console(highlight=False)
    served = _bundles(named)
    *others, last = (bundle.name for bundle in served)
    names = f"{', '.join(others)} and {last}" if others else last
    began = time.monotonic()
    async with contextlib.AsyncExitStack() as stack:
        with out.status(f"Starting a server with {names} …"):
            server = await stack.enter_async_context(own_server(served))
        out.print(f"Serving [bold]{names}[/] on {server.address} after {time.monotonic() - began:.1f} s.")
        client = await stack.enter_async_context(connect(server.address))
        kinds = {model.WhichOneof("kind") for model in await client.models()}
        if "speech" in kinds:
            await _speech(out, client, file or _recording())
        if kinds & {"video", "image"}:
            if directory is None:
                directory = Path(tempfile.mkdtemp(prefix="realtide-demo-"))
            directory.mkdir(parents=True, exist_ok=True)
            if "video" in kinds:
                await _video(out, client, server, directory)
            if "image" in kinds:
                _rows(out, *((what, _ms(seconds)) for what, seconds in await draw(out, client, directory)))
        metrics = await asyncio.to_thread(read_metrics, server.metrics_url)
    out.print(f"\n[dim]From {server.metrics_url}:[/]")
    parts = {"speech": _SPEECH, "video": _VIDEO, "image": _IMAGE}
    shown = tuple(figure for kind, part in parts.items() if kind in kinds for figure in part) + _BOTH
    for name, value in figures(metrics, shown):
        out.print(f"[dim]  {name:<44}{value:>16}[/]")


async def _speech(out: Console, client: Client, file: Path) -> None:
    from realtide.cli import audio
    from realtide.cli.session import transcribe
    from realtide_client import SpeechOptions

    source = audio.from_file(file, 0.04)
    out.print(f"\nStreaming {file.name} ({source.seconds or 0:.1f} s of speech) as it is spoken:\n")
    summary = await transcribe(client, source, SpeechOptions(), _Partials(out), pace=True)
    out.print(f"\n[bold]{' '.join(summary.texts) or '(nothing was recognized)'}[/]\n")
    lookahead = "-" if not summary.lookahead_ms else f"{_mean(summary.lookahead_ms):.0f} ms"
    _rows(
        out,
        ("first partial, after its first word began", _ms(summary.first_partial)),
        ("final, after the last word ended", _ms(_mean(summary.final_delays))),
        ("mean lookahead", lookahead),
    )


async def _video(out: Console, client: Client, server: OwnServer, directory: Path) -> None:
    from realtide.cli.sheet import contact_sheet, decoded, write_sheet
    from realtide.cli.video import find_model, server_rates
    from realtide.cli.video_out import Mp4
    from realtide.cli.video_session import closing, play
    from realtide_client import VideoOptions

    model = await find_model(client, "")
    rate = model.video.frames_per_second
    length = round(_SECONDS * rate)
    options = VideoOptions(prompt=_PROMPTS[0], model=model.name, seed=_SEED, length_frames=length)
    clip, picture = directory / "clip.mp4", directory / "clip.png"
    out.print(
        f"\nGenerating {_SECONDS:g} s of video as fast as it comes; the prompt changes about half way:\n"
    )
    director = _Director(out, round(_ASK_AT * length), _PROMPTS[1])
    sink = Mp4(clip, raw=False)
    with closing(sink, director, []):
        summary = await play(client, options, (), sink, director, buffer_seconds=_AHEAD, commands=director)
    rates = await server_rates(server.metrics_url, summary) or {}
    switch = summary.switches[-1] if summary.switches else None
    out.print()
    _rows(
        out,
        ("frames/s denoised / decoded / delivered", " / ".join(f"{value:.0f}" for value in rates.values())),
        ("first frame, after the session was asked for", _ms(summary.first_frame)),
        ("new prompt, from asking to its first frame", _ms(switch.after_request if switch else None)),
        ("  of that, recaching", _ms(switch.recache_seconds if switch else None)),
    )
    write_sheet(contact_sheet(decoded(clip), rate, summary.prompts()), picture)
    out.print(f"\nThe clip: [bold]{clip}[/], at a glance: [bold]{picture}[/]", soft_wrap=True)


class _Director:
    """Prints prompts and every second of video, and asks for a new prompt once a frame has come."""

    def __init__(self, out: Console, frame: int, prompt: str) -> None:
        self._out = out
        self._frame, self._prompt = frame, prompt
        self._now = asyncio.Event()
        self._began = time.monotonic()
        self._rate = 1.0
        self._told = 0

    def opened(self, info: VideoInfo) -> None:
        self._rate = info.frames_per_second
        size = f"{info.width}x{info.height}, {info.frames_per_second:g} frames/s"
        self._out.print(f"  [dim]{info.model}: {size}, seed {info.seed}[/]")

    def prompt(self, event: PromptApplied) -> None:
        self._line(event.first_frame, f"[bold]{event.prompt}[/]")

    def frames(self, frames: Frames) -> None:
        second = int(frames.end / self._rate)
        if second > self._told:
            self._told = second
            self._line(frames.end, f"[dim]here after {time.monotonic() - self._began:.2f} s[/]")
        if frames.end >= self._frame and not self._now.is_set():
            self._line(frames.end, f"[dim]asking for: {self._prompt}[/]")
            self._now.set()

    def close(self) -> None:
        """Nothing to do."""

    async def lines(self) -> AsyncIterator[str]:
        await self._now.wait()
        yield self._prompt

    def say(self, text: str) -> None:
        """Shown when it is in force."""

    def _line(self, frame: int, text: str) -> None:
        self._out.print(f"  [dim]{frame / self._rate:6.2f} s[/]  {text}")


class _Partials:
    """Prints a line per changed hypothesis with the time it came."""

    def __init__(self, out: Console) -> None:
        self._out = out
        self._sent = 0.0
        self._last = ""

    def partial(self, result: Partial, delay: float | None) -> None:
        if result.text and result.text != self._last:
            self._last = result.text
            self._out.print(f"  [dim]{self._sent:6.2f} s[/]  {result.text} [dim]…[/]")

    def final(self, result: Final, delay: float | None) -> None:
        if result.text:
            self._last = ""
            self._out.print(f"  [dim]{self._sent:6.2f} s[/]  [bold]{result.text}[/]")

    def sent(self, seconds: float) -> None:
        self._sent = seconds

    def close(self) -> None:
        """Nothing to do."""


def figures(exposition: str, shown: _Figures = _SPEECH) -> list[tuple[str, str]]:
    """A few figures of a Prometheus text exposition, ready to be shown."""
    rows = [(text, f"{total(exposition, name, **labels):,.6g}") for name, labels, text in shown]
    for name, text in _HISTOGRAMS:
        count = total(exposition, f"{name}_count")
        if count:
            rows.append((text, f"{total(exposition, f'{name}_sum') / count:.4f}"))
    return rows


def total(exposition: str, name: str, **labels: str) -> float:
    """Sum of a metric's samples that have `labels`, of a Prometheus text exposition; 0 if there are none."""
    from prometheus_client.parser import text_string_to_metric_families

    samples = [s for family in text_string_to_metric_families(exposition) for s in family.samples]
    return sum(s.value for s in samples if s.name == name and labels.items() <= s.labels.items())


def read_metrics(url: str) -> str:
    """A server's metrics as text. Raises OSError."""
    with urllib.request.urlopen(url, timeout=10) as reply:
        return str(reply.read().decode())


def _rows(out: Console, *rows: tuple[str, str]) -> None:
    for name, value in rows:
        out.print(f"  {name:<44}{value:>16}")


def _mean(values: list[float]) -> float | None:
    return statistics.mean(values) if values else None


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1000:.0f} ms"
