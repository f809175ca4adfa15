"""The commands. Each one lives in its own module and is described there."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Annotated

import typer

import realtide
from realtide.cli import demo, image, models, replay, serve, transcribe, video
from realtide.cli.errors import CommandError

app = typer.Typer(
    name="realtide",
    help="Live models: serve them, transcribe speech, generate video and images, measure.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode="rich",
)
app.command("serve")(serve.command)
app.command("transcribe")(transcribe.command)
app.command("video", cls=video.TwoWords)(video.command)
app.command("image")(image.command)
app.command("demo")(demo.command)
app.command("replay")(replay.command)
app.add_typer(models.app, name="models")

# Benchmarks are part of a source tree; an installation without them has no such command.
_BENCHMARKS = ("speech", "lookahead", "video", "image", "gpu")


def _bench() -> typer.Typer | None:
    group = typer.Typer(
        help="Measure: speech held in real time, what lookahead costs and gains, video, images, a GPU."
    )
    found = False
    for name in _BENCHMARKS:
        if importlib.util.find_spec("realtide.bench") and importlib.util.find_spec(f"realtide.bench.{name}"):
            group.command(name)(importlib.import_module(f"realtide.bench.{name}").command)
            found = True
    return group if found else None


if (bench := _bench()) is not None:
    app.add_typer(bench, name="bench")


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"realtide {realtide.__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Options before the command."""


def main() -> None:
    """Entry point: runs the command and exits with 0 (done), 1 (failed) or 2 (called wrongly)."""
    try:
        app(prog_name="realtide")
    except CommandError as error:
        typer.echo(f"realtide: {error}", err=True)
        raise SystemExit(error.exit_code) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
