"""The real engine behind the real service: a small bundle with random weights, every encoding, over gRPC."""

from __future__ import annotations

import asyncio
import io
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import av
import grpc
import numpy as np
import pytest
from PIL import Image

from realtide.engines.longlive.engine import load
from realtide.server.metrics import FRAME_STAGES
from tests.server.helpers import failure, responses, until, violation
from tests.server.video_helpers import (
    H264,
    JPEG,
    RAW,
    Clips,
    checkpointing,
    clips,
    credit,
    essence,
    finishing,
    frames_of,
    opening,
    pausing,
    playing,
    prompting,
    until_frame,
    until_kind,
)

PROMPTS = ("a dog runs", "the sun sets")


@pytest.fixture
def bundle(video_bundle: Path) -> Path:
    return video_bundle


@asynccontextmanager
async def serving(
    bundle: Path, slots: int = 2, resident: int | None = None, **settings: Any
) -> AsyncIterator[Clips]:
    engine: Any = load(bundle, slots=slots, resident=resident)
    async with clips(engine, **settings) as server:
        yield server


async def film(server: Clips, encoding: int, length: int, **options: Any) -> list[Any]:
    call = await server.opened(prompt=PROMPTS[0], encoding=encoding, seed=5, length_frames=length, **options)
    await call.write(prompting("p", PROMPTS[1], length // 2))
    await until_kind(call, "accepted")
    await call.write(credit(length))
    return await responses(call)


async def test_every_encoding_shows_the_same_frames(bundle: Path) -> None:
    async with serving(bundle) as server:
        size = server.engine.info.sizes[0]
        shape = (size[1], size[0], 3)
        found = await film(server, RAW, 30)
        raw = [np.frombuffer(frame.data, np.uint8).reshape(shape) for frame in frames_of(found)]
        assert len(raw) == 30
        assert len({frame.tobytes() for frame in raw}) == 30
        prompts = [one.prompt_applied for one in found if one.WhichOneof("message") == "prompt_applied"]
        assert [(one.control_id, one.prompt) for one in prompts] == [("", PROMPTS[0]), ("p", PROMPTS[1])]
        assert prompts[0].first_frame == 0
        assert prompts[1].first_frame >= 15
        assert prompts[1].recached_latent_frames > 0
        assert prompts[1].recache_seconds > 0
        jpeg = [
            np.asarray(Image.open(io.BytesIO(frame.data)).convert("RGB"))
            for frame in frames_of(await film(server, JPEG, 30, jpeg_quality=100))
        ]
        data = b"".join(
            frame.initialization + frame.data for frame in frames_of(await film(server, H264, 30, h264_crf=0))
        )
        with av.open(io.BytesIO(data), "r") as container:
            h264 = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        for wanted, *others in zip(raw, jpeg, h264, strict=True):
            assert np.abs(others[0].astype(np.int16) - wanted).max() <= 12
            # Nothing is lost but the resolution of colour.
            halved = av.VideoFrame.from_ndarray(wanted, format="rgb24").reformat(
                format="yuv420p", dst_colorspace="ITU709", dst_color_range="MPEG"
            )
            np.testing.assert_array_equal(others[1], halved.to_ndarray(format="rgb24"))
        await server.all_free()
        stages = ("text", "denoise", "clean_pass", "recache", "vae", "encode")
        assert all(server.metric("realtide_step_seconds_count", stage=stage) > 0 for stage in stages)
        # The last latent frame has one frame more than the length.
        counts = {stage: server.metric("realtide_frames_total", stage=stage) for stage in FRAME_STAGES}
        assert counts["denoised"] >= counts["decoded"] == counts["delivered"] + 3 == 93
        assert server.metric("realtide_kv_cache_bytes") == server.engine.cache_bytes > 0


async def test_credit_pause_and_checkpoints(bundle: Path) -> None:
    async with serving(bundle) as server:
        wanted = essence(await film(server, RAW, 40))
        call = await server.opened(prompt=PROMPTS[0], seed=5, length_frames=40)
        await call.write(prompting("p", PROMPTS[1], 20))
        found: list[Any] = []
        for end in (1, 2, 9, 17):
            await call.write(credit(end))
            await until_frame(call, end, found)
        await call.write(pausing("stop"))
        await until_kind(call, "applied", found)
        await call.write(credit(30))
        await call.write(playing("go"))
        await until_frame(call, 30, found)
        await call.write(checkpointing())
        checkpoint = await until_kind(call, "checkpoint", found)
        assert checkpoint.position == 30
        await call.write(credit(40))
        whole = found + await responses(call)
        assert essence(whole) == wanted
        resumed, opened = await server.resumed(checkpoint.data)
        assert opened.options.prompt == PROMPTS[1]
        await resumed.write(credit(40))
        rest = frames_of(await responses(resumed))
        assert [frame.position for frame in rest] == list(range(30, 40))
        await server.all_free()


async def test_two_sessions_on_one_cache_take_turns(bundle: Path) -> None:
    async with serving(bundle, slots=2, resident=1) as server:
        first = await server.opened(prompt=PROMPTS[0], credit=9)
        await until_frame(first, 9)
        second = await server.opened(prompt=PROMPTS[1], credit=9)
        await until_frame(second, 9)
        # Whose credit is used up has given its cache away, and is told apart.
        await until(lambda: server.metric("realtide_sessions", state="parked") == 1)
        assert server.metric("realtide_sessions", state="active") == 1
        await first.write(credit(20))
        await until_frame(first, 20)
        for call in (first, second):
            await call.write(finishing())
            await responses(call)
        await server.all_free()


async def test_cancel_in_every_state(bundle: Path) -> None:
    async with serving(bundle, slots=2) as server:
        for encoding in (RAW, H264):
            for reads in (0, 1, 3):
                call = await server.opened(prompt=PROMPTS[0], encoding=encoding, credit=60)
                await call.write(prompting("p", PROMPTS[1]))
                for _ in range(reads):
                    await call.read()
                call.cancel()
        asked = await server.opened(prompt=PROMPTS[0], credit=60)
        await asked.write(checkpointing())
        await asked.write(pausing("p"))
        asked.cancel()
        await server.all_free()
        ended = await server.opened(prompt=PROMPTS[0], credit=5, length_frames=5)
        assert len(frames_of(await responses(ended))) == 5


async def test_tokens_are_counted_by_the_model(bundle: Path) -> None:
    async with serving(bundle) as server:
        call = server.stream()
        await call.write(opening("a dog runs " * 20))
        error = await failure(call)
        assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
        field, problem = violation(error)
        assert field == "open.options.prompt"
        assert f"at most {server.engine.info.max_prompt_tokens} are accepted" in problem


async def test_a_drain_goes_on_elsewhere(bundle: Path) -> None:
    async with serving(bundle, drain_seconds=0.3) as server:
        call = await server.opened(prompt=PROMPTS[0], seed=5, credit=100)
        await until_kind(call, "frames")
        server.server.drain()
        going = await until_kind(call, "going_away")
        assert going.HasField("checkpoint")
        found: list[Any] = []
        assert (await failure(call, found)).code() == grpc.StatusCode.UNAVAILABLE
    async with serving(bundle) as other:
        call, opened = await other.resumed(going.checkpoint.data)
        start = opened.session.position
        await call.write(credit(start + 12))
        await call.write(finishing())
        assert len(frames_of(await responses(call))) == 12
        await asyncio.sleep(0)
