"""`realtide transcribe`: a file, standard input or the microphone, live."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from realtide.cli import connection
from realtide.cli.errors import CommandError, UsageError

if TYPE_CHECKING:
    from realtide.cli.audio import Source
    from realtide.cli.display import Display
    from realtide.cli.models import Kind
    from realtide.cli.own_server import OwnServer
    from realtide_client import SpeechOptions

_SERVER, _AUDIO, _MODEL, _OUTPUT = "Server", "Audio", "Recognition", "Output"


def command(
    source: Annotated[
        str | None,
        typer.Argument(metavar="FILE|-", help="Audio file; - reads WAV or raw samples from a pipe."),
    ] = None,
    mic: Annotated[
        bool, typer.Option("--mic", help="Listen to the microphone.", rich_help_panel=_AUDIO)
    ] = False,
    device: Annotated[
        str | None, typer.Option(help="Name of the microphone.", rich_help_panel=_AUDIO)
    ] = None,
    pace: Annotated[
        bool, typer.Option(help="Send audio as if it were being spoken.", rich_help_panel=_AUDIO)
    ] = False,
    block_ms: Annotated[
        int, typer.Option(min=5, max=1000, help="Length of a message.", rich_help_panel=_AUDIO)
    ] = 40,
    rate: Annotated[
        int, typer.Option(help="Samples per second of raw audio from a pipe.", rich_help_panel=_AUDIO)
    ] = 16000,
    raw_format: Annotated[
        str, typer.Option("--format", help="Raw audio from a pipe: s16le or f32le.", rich_help_panel=_AUDIO)
    ] = "s16le",
    server: connection.Server = None,
    tls: connection.Tls = False,
    ca: connection.Ca = None,
    client_cert: connection.Certificate = None,
    client_key: connection.Key = None,
    api_key_file: connection.ApiKeyFile = None,
    bundle: Annotated[
        str | None, typer.Option(help="Bundle for the own server.", rich_help_panel=_SERVER)
    ] = None,
    model: Annotated[str, typer.Option(help="Model of the server.", rich_help_panel=_MODEL)] = "",
    lookahead_bias: Annotated[
        float | None,
        typer.Option(help="Lookahead dial: higher waits for more audio.", rich_help_panel=_MODEL),
    ] = None,
    max_lookahead_ms: Annotated[
        int | None, typer.Option(min=0, help="Hard cap on lookahead; 0: none.", rich_help_panel=_MODEL)
    ] = None,
    beam: Annotated[
        int | None, typer.Option(min=1, help="Search width; 1: greedy.", rich_help_panel=_MODEL)
    ] = None,
    alternatives: Annotated[
        int | None, typer.Option(min=1, help="Most texts per utterance.", rich_help_panel=_MODEL)
    ] = None,
    boost: Annotated[
        list[str] | None, typer.Option(help="Phrase to favour. Repeatable.", rich_help_panel=_MODEL)
    ] = None,
    boost_weight: Annotated[
        float | None, typer.Option(help="Nats per token of those phrases.", rich_help_panel=_MODEL)
    ] = None,
    likely_silence_ms: Annotated[
        int | None, typer.Option(min=0, help="Silence that announces an end.", rich_help_panel=_MODEL)
    ] = None,
    final_silence_ms: Annotated[
        int | None, typer.Option(min=0, help="Silence that ends an utterance.", rich_help_panel=_MODEL)
    ] = None,
    endpointing: Annotated[
        bool, typer.Option(help="Whether silence ends utterances.", rich_help_panel=_MODEL)
    ] = True,
    interim: Annotated[
        bool, typer.Option(help="Show text while it is spoken.", rich_help_panel=_OUTPUT)
    ] = True,
    words: Annotated[bool, typer.Option(help="Words with their times.", rich_help_panel=_OUTPUT)] = True,
    as_json: Annotated[
        bool,
        typer.Option("--json", help="One object a line, `type` partial or final.", rich_help_panel=_OUTPUT),
    ] = False,
    stats: Annotated[
        bool, typer.Option("--stats", help="End with delays and lookahead.", rich_help_panel=_OUTPUT)
    ] = False,
) -> None:
    """Transcribe a file, a pipe or the microphone, and show the text while it forms.

    Without --server a server is started for the command and stopped after it.

    Example: realtide transcribe order.wav --pace --boost "flat white"

    Example: arecord -q -f S16_LE -r 16000 -c 1 | realtide transcribe - --json
    """
    if (source is None) == (not mic):
        raise UsageError("give either a file (or - for standard input) or --mic")
    if boost_weight is not None and not boost:
        raise UsageError("--boost-weight needs --boost")
    if bundle is not None and server is not None:
        raise UsageError("--bundle is for the own server: do not give it with --server")
    from realtide.cli import audio
    from realtide_client import EndpointingRules, PhraseBoost, RealtideError, SpeechOptions

    seconds = block_ms / 1000
    if mic:
        heard = audio.from_microphone(seconds, device)
    elif source == "-":
        # Unbuffered: blocks go out as they come, and a read that waits holds no lock when the program ends.
        pipe = getattr(sys.stdin.buffer, "raw", sys.stdin.buffer)
        heard = audio.from_stream(pipe, seconds, audio.check_raw_format(raw_format), rate)
    else:
        heard = audio.from_file(Path(source or ""), seconds)
    credentials = connection.credentials(tls, ca, client_cert, client_key, api_key_file)
    try:
        options = SpeechOptions(
            model=model,
            interim_results=interim,
            word_times=words,
            beam=beam,
            max_alternatives=alternatives,
            lookahead_bias=lookahead_bias,
            max_lookahead_ms=max_lookahead_ms,
            endpointing=EndpointingRules(
                enabled=endpointing, likely_silence_ms=likely_silence_ms, final_silence_ms=final_silence_ms
            ),
            boosts=(PhraseBoost(tuple(boost), boost_weight),) if boost else (),
        )
        work = _run(heard, options, server, credentials, bundle, pace=pace, as_json=as_json, stats=stats)
        asyncio.run(work)
    except RealtideError as error:
        raise CommandError(str(error)) from None


async def _run(
    source: Source,
    options: SpeechOptions,
    server: str | None,
    credentials: dict[str, Any],
    bundle: str | None,
    *,
    pace: bool,
    as_json: bool,
    stats: bool,
) -> None:
    from realtide.cli.session import transcribe
    from realtide_client import connect

    async with contextlib.AsyncExitStack() as stack:
        if server is None:  # its own one, which asks for nothing
            server, credentials = (await start_server(stack, bundle, "speech")).address, {}
        client = await stack.enter_async_context(connect(server, **credentials))
        display = _display(source, as_json)
        stop = asyncio.Event()
        asyncio.get_running_loop().add_signal_handler(signal.SIGINT, _interrupt, stop)
        try:
            summary = await transcribe(client, source, options, display, pace=pace, stop=stop)
        finally:
            asyncio.get_running_loop().remove_signal_handler(signal.SIGINT)
            display.close()
    if stats or (sys.stdout.isatty() and not as_json):
        typer.echo(summary.sentence(), err=True)


def _interrupt(stop: asyncio.Event) -> None:
    """The first Ctrl-C ends the audio, so that the last words still come; the second one ends the command."""
    if stop.is_set():
        raise KeyboardInterrupt
    stop.set()


async def start_server(stack: contextlib.AsyncExitStack, bundle: str | None, kind: Kind) -> OwnServer:
    """Start an own server that lives as long as `stack`, with this bundle or the first one of the kind."""
    from rich.console import Console

    from realtide.cli import models
    from realtide.cli.own_server import own_server

    served = models.resolve(bundle) if bundle else models.default(kind)
    with Console(stderr=True).status(f"Starting a server with {served.name} …"):
        return await stack.enter_async_context(own_server([served]))


def _display(source: Source, as_json: bool) -> Display:
    from realtide.cli import display

    if as_json:
        return display.JsonDisplay()
    if sys.stdout.isatty():
        return display.LiveDisplay(source.seconds)
    return display.PlainDisplay(source.seconds)
