"""`realtide bench video`: frames delivered, how soon, and what a neighbour or four minutes do to it."""

from __future__ import annotations

import asyncio
import itertools
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from realtide.cli.errors import CommandError, UsageError

if TYPE_CHECKING:
    from rich.console import Console

    from realtide.bench.stats import Reading
    from realtide.bench.video_plan import VideoPlan
    from realtide_client.v1.models_pb2 import VideoModel

_LOAD, _SERVER, _OUTPUT = "Load", "Server", "Output"
_SLOTS = 3  # two streams and a neighbour
_BLOCKS = 60  # of an old video and of a young one, in turn
_YOUNG = 16  # blocks of the young one before that: they fill the window of every bundle so far
_SETTLED = 0.2  # of a long video: where its beginning is compared, with the window full
_SWITCHES, _PACED, _OPENS = 8, 4, 5


class Encoding(StrEnum):
    """How frames come; see `realtide_client.VideoEncoding`."""

    H264 = "h264"
    JPEG = "jpeg"
    RAW_RGB = "raw_rgb"


def command(
    pairs: Annotated[
        int, typer.Option(min=1, help="Runs with and without server, in turn.", rich_help_panel=_LOAD)
    ] = 3,
    seconds: Annotated[
        float, typer.Option(min=1.0, help="Length of a measured window.", rich_help_panel=_LOAD)
    ] = 8.0,
    warmup: Annotated[float, typer.Option(min=0.0, help="Seconds before it.", rich_help_panel=_LOAD)] = 2.0,
    streams: Annotated[
        list[int] | None,
        typer.Option(min=1, max=64, help="Videos at once. Repeatable. Default: 1, 2.", rich_help_panel=_LOAD),
    ] = None,
    long: Annotated[
        float, typer.Option(min=0.0, help="Also videos of so many seconds.", rich_help_panel=_LOAD)
    ] = 0.0,
    encoding: Annotated[
        Encoding, typer.Option(help="How frames come.", rich_help_panel=_LOAD)
    ] = Encoding.H264,
    prompt: Annotated[
        list[str] | None,
        typer.Option(help="First prompt; more: what switches change to.", rich_help_panel=_LOAD),
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
        typer.Option(help="Bundle for the own server and the engine alone.", rich_help_panel=_SERVER),
    ] = None,
    precision: Annotated[
        str | None, typer.Option(help="fp32, fp16 or int8, for those.", rich_help_panel=_SERVER)
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
    as_json: Annotated[
        bool, typer.Option("--json", help="The whole result as JSON.", rich_help_panel=_OUTPUT)
    ] = False,
    out: Annotated[
        Path | None, typer.Option(help="Write the result here too.", rich_help_panel=_OUTPUT)
    ] = None,
) -> None:
    """Generate videos as fast as they come; measure delivered frames per second and delays.

    With an own server (no --server) the engine alone makes the same videos in between, and delivered by alone
    is the median of the ratios of neighbouring runs. Then: time to the first frame, from a new prompt to its
    first frame, and what a neighbour that never reads costs. --long 240 adds videos of four minutes, as many
    as pairs: time per block at the end over that at the beginning, and the server's memory;
    and blocks of an old video and of a young one in turn.
    docs/benchmarks.md has the details.

    Example: realtide bench video --json

    Example: realtide bench video --long 240 --out benchmarks/results/video.json
    """
    from realtide.bench import report
    from realtide.bench.video_plan import PROMPTS, VideoPlan

    if server is not None and (bundle is not None or settings or precision is not None):
        raise UsageError(
            "--bundle, --precision and --set are for the own server: do not give them with --server"
        )
    prompts = tuple(prompt or PROMPTS)
    plan = VideoPlan(
        seconds=seconds,
        warmup=warmup,
        encoding=encoding.value,
        prompts=prompts if len(prompts) > 1 else (*prompts, *prompts),
        model=model,
        precision=precision or "",
    )
    bench = Bench(plan, pairs, tuple(streams or (1, 2)), long, metrics_url)
    chosen = [f"precision={precision}"] if precision else []
    found = asyncio.run(bench.run(server, bundle, (*chosen, *(settings or ()))))
    load = {name: getattr(plan, name) for name in ("seconds", "warmup", "buffer_seconds", "encoding", "seed")}
    load |= {"pairs": pairs, "prompts": list(prompts), "precision": precision}
    result = report.envelope("video", {"load": load, **found})
    if out is not None:
        report.write(out, result)
    typer.echo(json.dumps(result, indent=2) if as_json else "\n".join(lines(result)))


@dataclass(slots=True)
class Bench:
    """All parts of the benchmark."""

    plan: VideoPlan
    pairs: int
    streams: Sequence[int]
    long: float
    metrics_url: str | None
    pid: int | None = None
    console: Console = field(init=False)

    def __post_init__(self) -> None:
        from rich.console import Console

        self.console = Console(stderr=True)

    async def run(self, server: str | None, bundle: str | None, settings: tuple[str, ...]) -> dict[str, Any]:
        """Every part, on this server or an own one. Raises CommandError."""
        from realtide.cli import models
        from realtide.cli.own_server import own_server

        if server is not None:
            self.plan = replace(self.plan, address=server)
            return await self._parts(alone=False)
        directory = models.resolve(bundle) if bundle else models.default("video")
        slots = f"video_slots={max(_SLOTS, *self.streams)}"
        async with own_server([directory], (slots, "queue_limit=0", *settings)) as own:
            self.metrics_url, self.pid = own.metrics_url, own.pid
            self.plan = replace(self.plan, address=own.address, bundle=str(directory))
            return await self._parts(alone=True)

    async def _parts(self, alone: bool) -> dict[str, Any]:
        from realtide.cli.video import find_model
        from realtide_client import RealtideError, connect

        try:
            async with connect(self.plan.address) as client:
                model = await find_model(client, self.plan.model)
        except RealtideError as error:
            raise CommandError(str(error)) from None
        self.plan = replace(self.plan, model=model.name)
        found: dict[str, Any] = {"model": {"name": model.name, "version": model.version}}
        for count in self.streams:
            found[f"streams_{count}"] = await self._paired(replace(self.plan, streams=count), alone)
        found |= await self._once("first frames", replace(self.plan, part="first", count=_OPENS))
        fast = replace(self.plan, part="switch", count=_SWITCHES, frames=36, buffer_seconds=1.0)
        found["switch"] = {
            "as_fast_as_it_comes": await self._once("prompt switches", fast),
            "paced": await self._once(
                "prompt switches, paced", replace(fast, pace=True, count=_SWITCHES // 2)
            ),
        }
        found["silent_neighbour"] = await self._neighbour()
        if self.long:
            found["long"] = await self._long(model.video)
            if alone:
                found["age"] = await self._age(model.video)
        return found

    async def _paired(self, plan: VideoPlan, alone: bool) -> dict[str, Any]:
        """Runs with and without the server in turn; who begins changes."""
        served: list[dict[str, Any]] = []
        by_itself: list[dict[str, Any]] = []
        name = f"{plan.streams} videos" if plan.streams > 1 else "1 video"
        for number in range(self.pairs):
            for turn in (0, 1):
                if (number + turn) % 2 == 0:
                    served.append(await self._once(f"{name}, served", plan))
                elif alone:
                    by_itself.append(
                        await self._once(f"{name}, engine alone", plan, "realtide.bench.video_engine_load")
                    )
        result: dict[str, Any] = {
            "delivered_frames_per_second": _median(served),
            "served": served,
        }
        if by_itself:
            ratios = [
                one["frames_per_second"] / other["frames_per_second"]
                for one, other in zip(served, by_itself, strict=True)
            ]
            result |= {
                "alone_frames_per_second": _median(by_itself),
                "delivered_by_alone": round(statistics.median(ratios), 4),
                "ratios": [round(ratio, 4) for ratio in ratios],
                "alone": by_itself,
            }
        return result

    async def _neighbour(self) -> dict[str, Any]:
        """A video with and without a neighbour that never reads, in turn."""
        plan = replace(self.plan, streams=1)
        free: list[dict[str, Any]] = []
        beside: list[dict[str, Any]] = []
        for number in range(self.pairs):
            for turn in (0, 1):
                if (number + turn) % 2 == 0:
                    free.append(await self._once("1 video by itself", plan))
                else:
                    beside.append(await self._once("beside a silent neighbour", replace(plan, silent=1)))
        ratios = [
            one["frames_per_second"] / other["frames_per_second"]
            for one, other in zip(beside, free, strict=True)
        ]
        return {
            "slowed_by_percent": round(100 * (1 - statistics.median(ratios)), 2),
            "frames_per_second": _median(beside),
            "without": _median(free),
            "ratios": [round(ratio, 4) for ratio in ratios],
        }

    async def _long(self, video: VideoModel) -> dict[str, Any]:
        """As many long videos as pairs: the one whose end over its beginning is the median, and all ratios.

        On a shared machine a minute's drift of the processor looks like one of the model.
        """
        found = [await self._long_one(video) for _ in range(self.pairs)]
        ratios = [one["end_by_beginning"] for one in found]
        middle = found[ratios.index(statistics.median_low(ratios))]
        return middle | {"end_by_beginning_of_each": ratios}

    async def _age(self, video: VideoModel) -> dict[str, Any]:
        """Blocks at the end of a long video and of a young one whose window is full, in turn."""
        frames = round(self.long * video.frames_per_second)
        plan = replace(self.plan, frames=frames, count=_BLOCKS, warmup_blocks=_YOUNG)
        return await self._once("an old video and a young one", plan, "realtide.bench.video_age")

    async def _long_one(self, video: VideoModel) -> dict[str, Any]:
        """One long video; the server's resident memory beside it, if it is the own one."""
        frames = round(self.long * video.frames_per_second)
        memory: list[int] = []
        watching = asyncio.create_task(_watch(self.pid, memory)) if self.pid is not None else None
        try:
            found = await self._once("a long video", replace(self.plan, part="long", frames=frames))
        finally:
            if watching is not None:
                watching.cancel()
        return long_figures(found["arrivals"], video.first_block_frames, video.block_frames) | (
            memory_figures(memory) if memory else {}
        )

    async def _once(
        self, name: str, plan: VideoPlan, module: str = "realtide.bench.video_load"
    ) -> dict[str, Any]:
        """One load, with a progress bar; the server's view over its window if there are metrics."""
        from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        from realtide.bench import child
        from realtide.bench.served import scrape

        readings: list[Reading] = []
        served = module.endswith("video_load") and plan.part == "rate"

        async def on_event(event: str, pid: int) -> None:
            if served and self.metrics_url is not None:
                readings.append(await scrape(self.metrics_url))

        bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            TimeElapsedColumn(),
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,
            refresh_per_second=2,  # it must not be part of the load
        )
        with bar:
            bar.add_task(name)
            result = await child.run(module, plan, on_event)
        if len(readings) == 2:
            result["server"] = server_view(readings[0], readings[1], plan.seconds)
        return result


def server_view(before: Reading, after: Reading, seconds: float) -> dict[str, Any]:
    """What the server says of the window between two readings `seconds` apart."""
    from realtide.bench.stats import Gained

    def difference(name: str, **labels: str) -> float:
        gained: float = after.total(name, **labels) - before.total(name, **labels)
        return gained

    stages = after.values("realtide_step_seconds_count", "stage")
    return {
        "frames_per_second": {
            stage: round(difference("realtide_frames_total", stage=stage) / seconds, 2)
            for stage in ("denoised", "decoded", "delivered")
        },
        "step": {
            stage: Gained.between(before, after, "realtide_step_seconds", stage=stage).summary()
            for stage in stages
        },
        "frame_interval": Gained.between(before, after, "realtide_frame_interval_seconds").summary(),
        "deadline_misses": int(difference("realtide_deadline_misses_total")),
        "cpu_seconds": round(difference("process_cpu_seconds_total"), 3),
        "resident_bytes": int(after.total("process_resident_memory_bytes")),
    }


def long_figures(arrivals: Sequence[Sequence[float]], first: int, block: int) -> dict[str, Any]:
    """Seconds per block at the beginning and the end of a long video, from (seconds, frames so far).

    A block has come when its last frame has. The beginning is the fifth of the video after its first tenth,
    when the window has long been full; the end is the last fifth. Medians, and means, which a drift of rare
    blocks would move too.
    """
    done: list[float] = []  # when each block had come
    wanted = first
    for when, frames in arrivals:
        while frames >= wanted:
            done.append(when)
            wanted += block
    spent = [after - before for before, after in itertools.pairwise(done)]
    tenth, fifth = len(spent) // 10, max(1, round(len(spent) * _SETTLED))
    start, end = spent[tenth : tenth + fifth], spent[-fifth:]
    return {
        "frames": int(arrivals[-1][1]),
        "seconds": round(arrivals[-1][0], 2),
        "blocks": len(done),
        "block_ms_at_the_beginning": round(1000 * statistics.median(start), 3),
        "block_ms_at_the_end": round(1000 * statistics.median(end), 3),
        "end_by_beginning": round(statistics.median(end) / statistics.median(start), 4),
        "end_by_beginning_of_means": round(statistics.mean(end) / statistics.mean(start), 4),
    }


def memory_figures(resident: Sequence[int]) -> dict[str, Any]:
    """Resident bytes over time: after a fifth of the samples, at the end, and all of them."""
    settled = resident[len(resident) // 5]
    return {
        "resident_bytes_settled": settled,
        "resident_bytes_at_the_end": resident[-1],
        "resident_growth_percent": round(100 * (resident[-1] / settled - 1), 2),
        "resident_bytes": list(resident),
    }


async def _watch(pid: int, memory: list[int]) -> None:
    import psutil

    process = psutil.Process(pid)
    while True:
        memory.append(process.memory_info().rss)
        await asyncio.sleep(1.0)


def _median(runs: Sequence[dict[str, Any]]) -> float:
    return round(float(statistics.median(run["frames_per_second"] for run in runs)), 2)


def lines(result: dict[str, Any]) -> list[str]:
    """The figures for people."""
    text = []
    for name, found in result.items():
        if not name.startswith("streams_"):
            continue
        count = name.removeprefix("streams_")
        line = f"{count} at once: {found['delivered_frames_per_second']} frames/s delivered"
        if "delivered_by_alone" in found:
            line += (
                f", {found['alone_frames_per_second']} by the engine alone,"
                f" delivered by alone {found['delivered_by_alone']} ({', '.join(map(str, found['ratios']))})"
            )
        text.append(line)
    first = result["first_frame"]
    text.append(f"first frame: p50 {first['p50_ms']} ms, most {first['max_ms']} ms ({first['count']} videos)")
    for name, found in result["switch"].items():
        switch, recache = found["prompt_to_first_frame"], found["recache"]
        text.append(
            f"new prompt to its first frame, {name.replace('_', ' ')}: p50 {switch['p50_ms']} ms,"
            f" most {switch['max_ms']} ms; recache p50 {recache['p50_ms']} ms"
        )
    neighbour = result["silent_neighbour"]
    text.append(
        f"beside a neighbour that never reads: {neighbour['frames_per_second']} frames/s,"
        f" {neighbour['slowed_by_percent']} % slower"
    )
    if "long" in result:
        found = result["long"]
        text.append(
            f"{found['frames']} frames in one session: a block takes"
            f" {found['block_ms_at_the_beginning']} ms at the beginning, {found['block_ms_at_the_end']} ms at"
            f" the end, ratio {found['end_by_beginning']}"
            f" ({', '.join(map(str, found['end_by_beginning_of_each']))})"
        )
        if "resident_growth_percent" in found:
            text.append(
                f"  resident {found['resident_bytes_at_the_end'] / 1e6:.0f} MB at the end,"
                f" {found['resident_growth_percent']} % more than when it had settled"
            )
    if "age" in result:
        found = result["age"]
        text.append(
            f"a block after {found['old_from_frame']} frames and one after {found['young_from_frame']}, in"
            f" turn: {found['old_block_ms']} and {found['young_block_ms']} ms, ratio {found['old_by_young']}"
            f" (quartiles {', '.join(map(str, found['quartiles']))})"
        )
    return text
