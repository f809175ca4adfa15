"""`realtide demo`: everything once, in half a minute: serve, stream a recording as it is spoken, measure."""

from __future__ import annotations

import asyncio
import contextlib
import statistics
import time
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from realtide.cli.errors import CommandError

if TYPE_CHECKING:
    from rich.console import Console

    from realtide_client import Final, Partial

# Shown at the end: name of the metric, labels that its samples must have, and what to say.
_FIGURES: tuple[tuple[str, dict[str, str], str], ...] = (
    ("realtide_audio_seconds_total", {}, "audio received, s"),
    ("realtide_session_capacity", {}, "slots"),
    ("realtide_slots_leaked", {}, "slots leaked"),
    ("grpc_server_msg_sent_total", {"grpc_service": "realtide.v1.Speech"}, "messages sent"),
    ("process_resident_memory_bytes", {}, "resident memory, bytes"),
)
_HISTOGRAMS = (
    ("realtide_step_seconds", "mean step (each stage), s"),
    ("realtide_final_delay_seconds", "mean final delay inside the server, s"),
    ("realtide_real_time_factor", "real-time factor"),
)


def command(
    file: Annotated[
        Path | None, typer.Argument(help="Recording to stream. Default: one of the source tree's test clips.")
    ] = None,
    bundle: Annotated[str | None, typer.Option(help="Model bundle. Default: the one in ./models.")] = None,
) -> None:
    """Start a server, stream a real recording at the pace of speech, and show text, delays and live metrics.

    Example: realtide demo tests/data/audio/coffee-mocha.flac
    """
    from realtide_client import RealtideError

    try:
        asyncio.run(_run(file or _recording(), bundle))
    except RealtideError as error:
        raise CommandError(str(error)) from None


def _recording() -> Path:
    import realtide

    audio = Path(realtide.__file__).resolve().parent.parent / "tests" / "data" / "audio"
    clips = sorted(audio.glob("coffee-*.flac"))
    if not clips:
        raise CommandError(f"there is no recording in {audio}: name a file")
    return clips[-1]


async def _run(file: Path, bundle: str | None) -> None:
    from rich.console import Console

    from realtide.cli import audio, models
    from realtide.cli.own_server import own_server
    from realtide.cli.session import transcribe
    from realtide_client import SpeechOptions, connect

    out = Console(highlight=False)
    source = audio.from_file(file, 0.04)
    served = models.resolve(bundle) if bundle else models.default()
    began = time.monotonic()
    async with contextlib.AsyncExitStack() as stack:
        with out.status(f"Starting a server with {served.name} …"):
            server = await stack.enter_async_context(own_server([served]))
        out.print(
            f"Serving [bold]{served.name}[/] on {server.address} after {time.monotonic() - began:.1f} s."
        )
        out.print(f"Streaming {file.name} ({source.seconds or 0:.1f} s of speech) as it is spoken:\n")
        display = _Partials(out)
        async with connect(server.address) as client:
            summary = await transcribe(client, source, SpeechOptions(), display, pace=True)
        metrics = await asyncio.to_thread(read_metrics, server.metrics_url)
    out.print(f"\n[bold]{' '.join(summary.texts) or '(nothing was recognized)'}[/]\n")
    rows = [
        ("first partial, after its first word began", _ms(summary.first_partial)),
        ("final, after the last word ended", _ms(_mean(summary.final_delays))),
        ("mean lookahead", "-" if not summary.lookahead_ms else f"{_mean(summary.lookahead_ms):.0f} ms"),
    ]
    for name, value in rows:
        out.print(f"  {name:<44}{value:>12}")
    out.print(f"\n[dim]From {server.metrics_url}:[/]")
    for name, value in figures(metrics):
        out.print(f"[dim]  {name:<44}{value:>12}[/]")


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


def figures(exposition: str) -> list[tuple[str, str]]:
    """A few figures of a Prometheus text exposition, ready to be shown."""
    rows = [(text, f"{total(exposition, name, **labels):,.6g}") for name, labels, text in _FIGURES]
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


def _mean(values: list[float]) -> float | None:
    return statistics.mean(values) if values else None


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1000:.0f} ms"
