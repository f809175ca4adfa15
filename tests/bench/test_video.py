"""`realtide bench video` with a small bundle of random weights. No figure is judged."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from realtide.bench import child
from realtide.bench.video import lines, long_figures, memory_figures
from realtide.bench.video_plan import Meter, VideoPlan
from realtide.cli.errors import CommandError
from realtide.cli.own_server import own_server
from tests.cli.conftest import Run

PLAN = VideoPlan(seconds=1.0, warmup=0.3, prompts=("a dog runs", "the sun sets"))


async def nothing(name: str, pid: int) -> None:
    pass


async def test_clients_measure_videos_switches_and_a_neighbour(video_bundle: Path) -> None:
    async with own_server([video_bundle], ("video_slots=3", "queue_limit=0")) as server:
        plan = replace(PLAN, address=server.address)
        module = "realtide.bench.video_load"
        events: list[str] = []

        async def on_event(name: str, pid: int) -> None:
            events.append(name)

        both = await child.run(module, replace(plan, streams=2, silent=1), on_event)
        assert events == ["begin", "end"]
        assert (both["streams"], both["silent_neighbours"]) == (2, 1)
        assert len(both["of_each"]) == 2
        assert min(both["of_each"]) > 0
        assert both["frames_per_second"] == pytest.approx(sum(both["of_each"]), abs=0.01)
        assert both["arrival_interval"]["count"] > 0
        first = await child.run(module, replace(plan, part="first", count=3), nothing)
        assert first["first_frame"]["count"] == 3
        for pace in (False, True):
            switch = replace(plan, part="switch", count=2, frames=8, buffer_seconds=0.5, pace=pace)
            found = await child.run(module, switch, nothing)
            assert found["prompt_to_first_frame"]["count"] == found["recache"]["count"] == 2
            assert found["recache"]["p50_ms"] > 0
            assert found["frames_in_between"] >= 0
        film = await child.run(module, replace(plan, part="long", frames=60), nothing)
        assert film["arrivals"][-1][1] == 60
        with pytest.raises(CommandError, match="tokens"):
            await child.run(module, replace(plan, prompts=("a dog runs " * 9, "b")), nothing)


@pytest.mark.parametrize("encoding", ["h264", "jpeg", "raw_rgb"])
async def test_the_engine_alone_makes_the_same_videos(video_bundle: Path, encoding: Any) -> None:
    plan = replace(PLAN, bundle=str(video_bundle), streams=2, encoding=encoding)
    found = await asyncio.wait_for(child.run("realtide.bench.video_engine_load", plan, nothing), 120)
    assert min(found["of_each"]) > 0
    assert set(found["stage_share_of_time"]) == {"denoise", "clean_pass", "vae", "encode"}


async def test_an_old_video_and_a_young_one_make_blocks_in_turn(video_bundle: Path) -> None:
    plan = replace(PLAN, bundle=str(video_bundle), frames=60, count=3, warmup_blocks=2)
    found = await asyncio.wait_for(child.run("realtide.bench.video_age", plan, nothing), 120)
    assert found["blocks_of_each"] == 3
    assert found["old_from_frame"] >= 60 > found["young_from_frame"] > 0
    assert min(found["old_block_ms"], found["young_block_ms"]) > 0
    low, middle, high = found["quartiles"]
    assert low <= middle == found["old_by_young"] <= high


def test_the_command_prints_a_result_that_says_all(video_bundle: Path, run: Run, tmp_path: Path) -> None:
    out = tmp_path / "video.json"
    done = run(
        "bench", "video", "--bundle", video_bundle, "--pairs", "1", "--seconds", "1", "--warmup", "0.2",
        "--streams", "1", "--long", "8", "--prompt", "a dog runs", "--prompt", "the sun sets", "--json",
        "--out", out,
    )  # fmt: skip
    assert done.code == 0, done.err
    result = json.loads(done.out)
    assert result == json.loads(out.read_text())
    assert result["benchmark"] == "video"
    assert result["model"]["name"] == "small-video"
    one = result["streams_1"]
    assert len(one["served"]) == len(one["alone"]) == len(one["ratios"]) == 1
    assert one["delivered_by_alone"] == one["ratios"][0]
    view = one["served"][0]["server"]
    assert set(view["frames_per_second"]) == {"denoised", "decoded", "delivered"}
    assert min(view["frames_per_second"].values()) > 0
    assert view["step"]["denoise"]["count"] > 0
    assert set(result["switch"]) == {"as_fast_as_it_comes", "paced"}
    assert result["silent_neighbour"]["frames_per_second"] > 0
    assert result["long"]["frames"] == 128
    ratios = result["long"]["end_by_beginning_of_each"]
    assert result["long"]["end_by_beginning"] == sorted(ratios)[(len(ratios) - 1) // 2]
    assert result["long"]["resident_bytes"][0] > 1 << 24
    assert result["age"]["old_from_frame"] >= 128
    shown = "\n".join(lines(result))
    for words in (
        "delivered by alone",
        "first frame: p50",
        "paced: p50",
        "never reads",
        "128 frames in one",
        "in turn",
    ):
        assert words in shown


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (("--server", "x:1", "--bundle", "b"), 2, "own server"),
        (("--bundle", "none-such"), 1, "there is no bundle"),
        (("--server", "127.0.0.1:1"), 1, "127.0.0.1:1"),
    ],
)
def test_what_cannot_work_is_said(run: Run, arguments: tuple[str, ...], code: int, sentence: str) -> None:
    done = run("bench", "video", *arguments)
    assert done.code == code
    assert sentence in done.err


def test_a_rate_counts_between_the_first_and_the_last_arrival_in_the_window() -> None:
    meter = Meter()
    meter.begin, meter.end = 10.0, 20.0
    for when, end in ((9.0, 4), (11.0, 8), (12.0, 12), (15.0, 16), (21.0, 20)):
        meter.came(when, end)
    assert meter.frames_per_second == 2.0
    assert meter.intervals == [1.0, 3.0]
    assert Meter().frames_per_second == 0.0


def test_a_long_video_that_slows_down_shows_it() -> None:
    """The first block has 9 frames, all others 12; each takes a thousandth longer than the one before."""
    arrivals, now, frames = [], 0.0, 9
    for number in range(320):
        arrivals.append((now, frames))
        now += 0.1 * (1 + number / 1000)
        frames += 12
    found = long_figures(arrivals, 9, 12)
    assert (found["blocks"], found["frames"]) == (320, 9 + 319 * 12)
    # 319 blocks: medians of the blocks from 31 on (64 of them) and of the last 64.
    assert found["end_by_beginning"] == pytest.approx((1 + 0.2865) / (1 + 0.0625), abs=1e-4)
    fragments = [(when, end - cut) for when, end in arrivals for cut in (8, 4, 0)]
    assert long_figures(fragments, 9, 12) == found | {"seconds": found["seconds"]}


def test_memory_that_grows_shows_it() -> None:
    assert memory_figures([50, 100, 100, 100, 110])["resident_growth_percent"] == 10.0
