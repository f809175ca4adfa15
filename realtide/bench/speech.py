"""`realtide bench speech`: streams held in real time, by a server and by the engine alone."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from realtide.cli.errors import CommandError, UsageError

if TYPE_CHECKING:
    from rich.console import Console

    from realtide.bench.plan import Plan

_LOAD, _SERVER, _SEARCH, _OUTPUT = "Load", "Server", "Search", "Output"

Measure = Callable[["Plan"], Awaitable[dict[str, Any]]]


def command(
    streams: Annotated[
        int, typer.Option(min=1, max=4096, help="Streams; where a search starts.", rich_help_panel=_LOAD)
    ] = 8,
    seconds: Annotated[
        float, typer.Option(min=1.0, help="Length of the measured window.", rich_help_panel=_LOAD)
    ] = 30.0,
    warmup: Annotated[float, typer.Option(min=0.0, help="Seconds before it.", rich_help_panel=_LOAD)] = 3.0,
    chunk_ms: Annotated[
        int, typer.Option(min=10, max=1000, help="Length of a message.", rich_help_panel=_LOAD)
    ] = 40,
    probe_ms: Annotated[
        int, typer.Option(min=10, help="Interval of a stream's delay probes.", rich_help_panel=_LOAD)
    ] = 1000,
    rate: Annotated[
        int, typer.Option(min=8000, max=48000, help="Samples per second.", rich_help_panel=_LOAD)
    ] = 16000,
    audio: Annotated[
        list[Path] | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            help="Recording to play. Repeatable. Default: the test clips.",
            rich_help_panel=_LOAD,
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of phases and beginnings.", rich_help_panel=_LOAD)] = 1,
    lookahead_bias: Annotated[
        float | None, typer.Option(help="Lookahead dial of all streams.", rich_help_panel=_LOAD)
    ] = None,
    max_lookahead_ms: Annotated[
        int | None, typer.Option(min=0, help="Hard cap on lookahead.", rich_help_panel=_LOAD)
    ] = None,
    server: Annotated[
        str | None,
        typer.Option(metavar="HOST:PORT", help="Use this server (no TLS).", rich_help_panel=_SERVER),
    ] = None,
    metrics_url: Annotated[
        str | None, typer.Option(help="Metrics of that server, for its own view.", rich_help_panel=_SERVER)
    ] = None,
    model: Annotated[str, typer.Option(help="Model of that server.", rich_help_panel=_SERVER)] = "",
    bundle: Annotated[
        str | None,
        typer.Option(help="Bundle for the own server or the engine alone.", rich_help_panel=_SERVER),
    ] = None,
    precision: Annotated[
        str | None, typer.Option(help="fp32 or int8, for those.", rich_help_panel=_SERVER)
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="NAME=VALUE",
            help="Setting of the own server. Repeatable.",
            rich_help_panel=_SERVER,
        ),
    ] = None,
    engine_only: Annotated[
        bool,
        typer.Option("--engine-only", help="The engine alone: no server, no gRPC.", rich_help_panel=_SEARCH),
    ] = False,
    search: Annotated[
        bool,
        typer.Option("--search", help="Find the most streams within the limit.", rich_help_panel=_SEARCH),
    ] = False,
    compare: Annotated[
        bool,
        typer.Option("--compare", help="Search both ways; served by alone.", rich_help_panel=_SEARCH),
    ] = False,
    limit_ms: Annotated[
        float, typer.Option(min=1.0, help="Limit of p99 processing delay.", rich_help_panel=_SEARCH)
    ] = 100.0,
    trial_seconds: Annotated[
        float, typer.Option(min=1.0, help="Window of a search's trials.", rich_help_panel=_SEARCH)
    ] = 5.0,
    trials: Annotated[
        int,
        typer.Option(min=1, help="Trials that count, after those that come near.", rich_help_panel=_SEARCH),
    ] = 16,
    max_streams: Annotated[
        int, typer.Option(min=1, max=4096, help="Most streams to try.", rich_help_panel=_SEARCH)
    ] = 256,
    as_json: Annotated[
        bool, typer.Option("--json", help="The whole result as JSON.", rich_help_panel=_OUTPUT)
    ] = False,
    out: Annotated[
        Path | None, typer.Option(help="Write the result here too.", rich_help_panel=_OUTPUT)
    ] = None,
) -> None:
    """Keep N streams of real recordings at the pace of speech and measure the processing delay.

    The delay of a chunk runs from the moment its last sample was spoken until every encoder frame that it
    completed has been recognized; docs/benchmarks.md says exactly how it is seen. --search finds the most
    streams whose p99 stays under the limit, the load generator on the same cores; --compare does so with and
    without the server, a trial of each in turn (10 to 15 minutes).

    Example: realtide bench speech --streams 16 --json

    Example: realtide bench speech --compare --out benchmarks/results/speech.json
    """
    from realtide.bench import audio as sound
    from realtide.bench import report
    from realtide.bench.plan import Plan

    if server is not None and (bundle is not None or settings or precision is not None):
        raise UsageError(
            "--bundle, --precision and --set are for the own server: do not give them with --server"
        )
    if server is not None and (engine_only or compare):
        raise UsageError("the engine alone runs here: do not give --server with --engine-only or --compare")
    if engine_only and compare:
        raise UsageError("--compare measures both: leave --engine-only out")
    if (search or compare) and streams > max_streams:
        raise UsageError(f"--streams, where the search starts, is above --max-streams ({max_streams})")
    plan = Plan(
        streams=streams,
        seconds=seconds,
        warmup=warmup,
        chunk_ms=chunk_ms,
        probe_ms=probe_ms,
        rate=rate,
        audio=tuple(str(path) for path in sound.recordings(audio)),
        seed=seed,
        model=model,
        precision=precision or "",
        lookahead_bias=lookahead_bias,
        max_lookahead_ms=max_lookahead_ms,
    )
    bench = Bench(plan, limit_ms, trial_seconds, trials, max_streams, search or compare)
    chosen = [f"precision={precision}"] if precision else []
    found = asyncio.run(
        bench.run(
            served=None if engine_only else Target(server, metrics_url, bundle, (*chosen, *(settings or ()))),
            alone=_bundle(bundle) if engine_only or compare else None,
        )
    )
    load = {
        name: getattr(plan, name)
        for name in ("seconds", "warmup", "chunk_ms", "probe_ms", "rate", "seed", "lookahead_bias",
                     "max_lookahead_ms", "precision")
    }  # fmt: skip
    load["recordings"] = [Path(path).name for path in plan.audio]
    result = report.envelope("speech", {"load": load, "limit_ms": limit_ms, **found})
    if out is not None:
        report.write(out, result)
    typer.echo(json.dumps(result, indent=2) if as_json else "\n".join(lines(result)))


def _bundle(name: str | None) -> str:
    from realtide.bundle import BundleError, find_bundles, resolve

    try:
        if name is not None:
            return str(resolve(name))
    except BundleError as error:
        raise CommandError(str(error)) from None
    found = list(find_bundles().values())
    if len(found) != 1:
        raise CommandError(f"{len(found)} bundles found: name one with --bundle")
    return str(found[0])


@dataclass(frozen=True, slots=True)
class Target:
    """Where to send the load: a server that runs (`address`), or an own one."""

    address: str | None
    metrics_url: str | None
    bundle: str | None
    settings: tuple[str, ...]

    @contextlib.asynccontextmanager
    async def running(self, slots: int) -> AsyncIterator[tuple[str, str | None]]:
        """Address and metrics of the server, started with so many slots if it is the own one."""
        from realtide.cli.own_server import own_server

        if self.address is not None:
            yield self.address, self.metrics_url
            return
        bundles = [Path(_bundle(self.bundle))]
        async with own_server(bundles, (f"slots={slots}", "queue_limit=0", *self.settings)) as own:
            yield own.address, own.metrics_url


@dataclass(slots=True)
class Bench:
    """Runs one load, or searches, with and without a server."""

    plan: Plan
    limit_ms: float
    trial_seconds: float
    trials: int
    max_streams: int
    search: bool
    console: Console = field(init=False)

    def __post_init__(self) -> None:
        from rich.console import Console

        self.console = Console(stderr=True)

    async def run(self, served: Target | None, alone: str | None) -> dict[str, Any]:
        """Results under "served" and "alone"; of a search for both "served_by_alone". Raises CommandError."""
        from realtide.bench import child
        from realtide.bench.served import trial

        async def nothing(name: str, pid: int) -> None:
            pass

        ways: dict[str, Measure] = {}
        async with contextlib.AsyncExitStack() as stack:
            if served is not None:
                slots = self.max_streams if self.search else self.plan.streams
                where, url = await stack.enter_async_context(served.running(slots))

                def sent(given: Plan) -> Awaitable[dict[str, Any]]:
                    # A scrape is work for the server: a search's trials, which are short, go without.
                    whole = given.seconds == self.plan.seconds
                    return trial(replace(given, address=where), url if whole else None)

                ways["served"] = sent
            if alone is not None:
                ways["alone"] = lambda plan: child.run(
                    "realtide.bench.engine_load", replace(plan, bundle=alone), nothing
                )
            if not self.search:
                return {name: await self._once(name, measure, self.plan) for name, measure in ways.items()}
            return await self._search(ways)

    async def _search(self, ways: dict[str, Measure]) -> dict[str, Any]:
        """Staircases of which each takes a trial in turn; then the number that each holds for longer."""
        from realtide.bench.search import Staircase, again, confirmed

        stairs = {name: Staircase(self.plan.streams, self.max_streams) for name in ways}
        tried: dict[str, list[dict[str, Any]]] = {name: [] for name in ways}

        async def passes(name: str, streams: int, seconds: float) -> bool:
            plan = replace(self.plan, streams=streams, seconds=seconds)
            try:
                result = await self._once(name, ways[name], plan)
            except CommandError as error:
                if streams == 1:
                    raise
                result = {"streams": streams, "error": str(error)}
            result["seconds"] = seconds
            result["passed"] = verdict(result, self.limit_ms)
            tried[name].append(result)
            return bool(result["passed"])

        while any(stair.counted < self.trials for stair in stairs.values()):
            for name, stair in stairs.items():
                stair.tell(await passes(name, stair.streams, self.trial_seconds))
        found: dict[str, Any] = {}
        for name, stair in stairs.items():
            estimate = stair.estimate()
            held = again(partial(passes, name, seconds=self.plan.seconds))
            best = await confirmed(held, round(estimate.streams))
            found[name] = {
                "streams": best,
                "half_pass": {
                    "streams": round(estimate.streams, 1),
                    "standard_error": round(estimate.error, 1),
                    "trials": estimate.trials,
                },
                "at_most": self.max_streams,
                "result": tried[name][-1] if best else None,
                "trials": tried[name],
            }
        if len(found) == 2:
            half = {name: one["half_pass"]["streams"] for name, one in found.items()}
            found["served_by_alone"] = round(half["served"] / half["alone"], 3)
        return found

    async def _once(self, name: str, measure: Measure, plan: Plan) -> dict[str, Any]:
        """One load, with a progress bar."""
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,
            refresh_per_second=2,  # it must not be part of the load
        )
        total = plan.warmup + plan.seconds
        with bar:
            task = bar.add_task(f"{name}, {plan.streams} streams", total=total)
            work = asyncio.ensure_future(measure(plan))
            while not work.done():
                await asyncio.wait({work}, timeout=0.5)
                bar.advance(task, 0.5)
            return work.result()


def verdict(result: dict[str, Any], limit_ms: float) -> bool:
    """Whether a load was held: p99 under the limit, no stream lost, and every stream's audio taken in."""
    p99 = result.get("processing_delay", {}).get("p99_ms")
    lost = result.get("failed_streams", 0) or result.get("unfinished_streams", 0)
    return p99 is not None and p99 < limit_ms and not lost


def lines(result: dict[str, Any]) -> list[str]:
    """The figures for people."""
    text = []
    for name in ("served", "alone"):
        if name not in result:
            continue
        found = result[name]
        if "trials" in found:
            half = found["half_pass"]
            text.append(
                f"{name}: {found['streams']} streams with p99 under {result['limit_ms']:g} ms; half of the "
                f"trials pass with {half['streams']} (standard error at least {half['standard_error']})"
            )
            found = found["result"]
            if found is None:
                continue
        delay = found["processing_delay"]
        text.append(
            f"{name}, {found['streams']} streams: processing delay p50 {delay['p50_ms']} ms, "
            f"p95 {delay['p95_ms']} ms, p99 {delay['p99_ms']} ms ({delay['count']} measured)"
        )
        if name == "served":
            late = found["generator"]["late_sends"]
            text.append(f"  generator: sends late by p50 {late['p50_ms']} ms, p99 {late['p99_ms']} ms")
            if found["failed_streams"] or found["unfinished_streams"]:
                text.append(f"  {found['failed_streams']} streams failed: {'; '.join(found['failures'])}")
        own = found.get("server") or found.get("engine")
        if own:
            text.append(
                f"  real-time factor {own['real_time_factor']}, {own['cpu_seconds']} s of processor, "
                f"{own['resident_bytes'] / 1e6:.0f} MB resident"
            )
    if "served_by_alone" in result:
        text.append(f"served by alone, where half of the trials pass: {result['served_by_alone']}")
    return text
