"""The client of Video against the real server, with the clip engine of its tests: what both promise."""

from __future__ import annotations

import asyncio
import contextlib
import io
from typing import Any

import av
import numpy as np
import pytest

import realtide_client as rt
from tests.clients.test_real_server import EAGER, KEY, ROUND_ROBIN
from tests.clients.test_video import prompts, take
from tests.server.helpers import until
from tests.server.video_engine import BLOCK, FIRST_BLOCK, SIZES, ClipEngine, colour
from tests.server.video_helpers import clips

PATIENT = rt.RetryPolicy(max_retries=40, initial_seconds=0.05, max_seconds=0.2)
REPLICA: dict[str, Any] = {"checkpoint_key": KEY, "drain_seconds": 30.0}


def film(events: list[rt.VideoEvent], start: int = 0) -> list[tuple[int, int, int]]:
    """Colours of raw frames, which come once and in order."""
    colours: list[tuple[int, int, int]] = []
    for event in events:
        if isinstance(event, rt.Frames):
            assert event.position == start + len(colours)
            pixels = event.rgb.reshape(-1, 3)
            assert (pixels == pixels[0]).all()
            red, green, blue = (int(value) for value in pixels[0])
            colours.append((red, green, blue))
    return colours


def wanted(length: int, seed: int, *history: tuple[int, str], start: int = 0) -> list[tuple[int, int, int]]:
    shown = [max(change for change in history if change[0] <= index)[1] for index in range(start, length)]
    return [colour(start + index, prompt, seed) for index, prompt in enumerate(shown)]


def begins_block(frame: int) -> bool:
    return frame == 0 or (frame - FIRST_BLOCK) % BLOCK == 0


async def test_options_frames_and_controls_mean_the_same_on_both_sides() -> None:
    async with clips() as server, rt.connect(f"127.0.0.1:{server.server.port}") as client:
        options = rt.VideoOptions(
            "a cat", width=SIZES[1][0], height=SIZES[1][1], frames_per_second=20.0, seed=9, length_frames=120
        )
        async with client.video(options) as stream:
            info = stream.info
            assert (info.model, info.width, info.height, info.seed) == ("clips", *SIZES[1], 9)
            assert (info.frames_per_second, info.length_frames, info.max_prompt_tokens) == (20.0, 120, 8)
            later = await stream.set_prompt("a fish", at_frame=90)
            events = await take(stream, until=20)
            now = await stream.set_prompt("a dog")
            assert (await now.accepted()).position >= 20
            paused = await (await stream.pause()).applied()
            await (await stream.resume()).applied()
            events += await take(stream)
            places = [(await control.applied()).position for control in (now, later)]
        assert film(events) == wanted(120, 9, (0, "a cat"), (places[0], "a dog"), (places[1], "a fish"))
        assert prompts(events) == [(0, "a cat"), (places[0], "a dog"), (places[1], "a fish")]
        assert places[1] == 91
        assert all(begins_block(place) for place in places)
        assert paused.position >= 20
        models = await client.models()
        assert [(model.name, model.video.block_frames) for model in models] == [("clips", BLOCK)]
        await server.all_free()


async def test_credit_bounds_what_is_generated_for_a_client_that_does_not_take() -> None:
    async with clips() as server, rt.connect(f"127.0.0.1:{server.server.port}") as client:
        async with client.video(prompt="a cat", buffer_seconds=1.0) as stream:
            await until(lambda: stream.received == 16)
            await asyncio.sleep(0.05)
            (session,) = server.engine.opened
            assert session.state.sent == 16
            await take(stream, until=100)
            await until(lambda: stream.received >= 113)  # credit is given by fours
            assert stream.received <= 116
            assert await stream.checkpoint()
        await server.all_free()


async def test_a_session_moves_from_a_draining_server_to_another_one() -> None:
    async with clips(**REPLICA) as one, clips(**REPLICA) as other:
        address = f"ipv4:127.0.0.1:{one.server.port},127.0.0.1:{other.server.port}"
        client = rt.connect(address, channel_options=ROUND_ROBIN)
        async with (
            client,
            client.video(
                prompt="a cat", seed=3, length_frames=200, retry=EAGER, buffer_seconds=0.5
            ) as stream,
        ):
            events = await take(stream, until=40)
            later = await stream.set_prompt("a dog", at_frame=120)
            await later.accepted()
            here, there = (one, other) if one.engine.taken else (other, one)
            assert (here.engine.taken, there.engine.taken) == (1, 0)
            here.server.drain()
            await until(lambda: stream.reconnects == 1, 30)
            events += await take(stream)
            assert (await later.applied()).position == 123
            await until(lambda: here.engine.taken == 0)
        assert film(events) == wanted(200, 3, (0, "a cat"), (123, "a dog"))
        assert prompts(events) == [(0, "a cat"), (123, "a dog")]


@pytest.mark.parametrize("interval", [0, 1000, 2000])
async def test_a_server_that_vanishes_is_replaced_by_one_on_the_same_port(interval: int) -> None:
    """Changes of the prompt before, across and after the break are where they would have been without it."""
    async with clips(checkpoint_key=KEY, grace_seconds=0.0) as first:
        port = first.server.port
        client = rt.connect(f"127.0.0.1:{port}")
        stream = client.video(
            prompt="a cat", seed=4, length_frames=150, retry=PATIENT, checkpoint_interval_ms=interval
        )
        await stream.open()
        controls = [await stream.set_prompt("a cow", at_frame=10)]
        events = await take(stream, until=45)
        controls += [await stream.set_prompt("a dog"), await stream.set_prompt("a fish", at_frame=100)]
        await until(lambda: stream.received >= 45 + 25)  # credit is given by eights
    async with clips(checkpoint_key=KEY, port=port) as second:
        events += await take(stream)
        places = [(await control.applied()).position for control in controls]
        assert stream.reconnects == 1
        await second.all_free()
    await stream.close()
    await client.close()
    history = [(0, "a cat"), *zip(places, ("a cow", "a dog", "a fish"), strict=True)]
    assert film(events) == wanted(150, 4, *history)
    assert prompts(events) == history


class Wire:
    """A line to a server that can be cut."""

    def __init__(self, port: int) -> None:
        self._to = port
        self._writers: list[asyncio.StreamWriter] = []
        self._pumps: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> int:
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        port: int = self._server.sockets[0].getsockname()[1]
        return port

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        self.cut()
        await asyncio.gather(*self._pumps, return_exceptions=True)

    def cut(self) -> None:
        """Break every connection."""
        for writer in self._writers:
            writer.transport.abort()
        self._writers.clear()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        onwards, outwards = await asyncio.open_connection("127.0.0.1", self._to)
        self._writers += [writer, outwards]
        for source, target in ((reader, outwards), (onwards, writer)):
            self._pumps.append(asyncio.create_task(self._pump(source, target)))

    async def _pump(self, source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await source.read(1 << 16):
                target.write(data)
                await target.drain()


async def test_a_film_whose_connection_broke_still_plays() -> None:
    """The seam is where the frames ended, beyond the checkpoint and in the middle of a group of pictures."""
    async with clips() as server:
        wire = Wire(server.server.port)
        async with wire as port, rt.connect(f"127.0.0.1:{port}") as client:
            async with client.video(
                prompt="a cat", encoding="h264", seed=200, length_frames=120, retry=PATIENT,
                checkpoint_interval_ms=4000,
            ) as stream:  # fmt: skip
                events = await take(stream, until=50)
                await until(lambda: stream.received >= 50 + 25)  # credit is given by eights
                await asyncio.sleep(0.05)
                seen, state = stream.received, stream.last_checkpoint
                wire.cut()
                events += await take(stream)
            assert stream.reconnects == 1
        await server.all_free()
    assert state is not None
    assert state.position < seen, "frames in between come again"
    frames = [event for event in events if isinstance(event, rt.Frames)]
    assert [frame.position for frame in frames[1:]] == [frame.end for frame in frames[:-1]]
    assert [bool(frame.initialization) for frame in frames] == [True] + [False] * (len(frames) - 1)
    whole = io.BytesIO(b"".join(frame.payload for frame in frames))
    with av.open(whole, "r") as container:
        decoded = list(container.decode(video=0))
    seam = next(frame.position for frame in frames if frame.position >= seen)
    assert seam == seen, "no fragment holds both old and new frames"
    assert decoded[seam].key_frame, "it does not refer to frames that were dropped"
    assert [round(frame.time * 16) for frame in decoded if frame.time is not None] == list(range(120))
    shown = [frame.to_ndarray(format="rgb24").reshape(-1, 3) for frame in decoded]
    for pixels, colours in zip(shown, wanted(120, 200, (0, "a cat")), strict=True):
        assert (abs(pixels.astype(int) - colours) < 10).all()


async def test_a_broken_connection_loses_and_repeats_nothing() -> None:
    async with clips() as server:
        wire = Wire(server.server.port)
        async with wire as port, rt.connect(f"127.0.0.1:{port}") as client:
            async with client.video(
                prompt="a cat", seed=4, length_frames=150, retry=PATIENT, checkpoint_interval_ms=1000
            ) as stream:
                controls = [await stream.set_prompt("a cow", at_frame=10)]
                events = await take(stream, until=45)
                controls += [
                    await stream.set_prompt("a dog"),
                    await stream.set_prompt("a fish", at_frame=110),
                ]
                await until(lambda: stream.received >= 45 + 25)
                wire.cut()
                events += await take(stream)
                places = [(await control.applied()).position for control in controls]
            assert stream.reconnects == 1
        await server.all_free()
    history = [(0, "a cat"), *zip(places, ("a cow", "a dog", "a fish"), strict=True)]
    assert film(events) == wanted(150, 4, *history)
    assert prompts(events) == history


async def test_a_full_server_refuses_with_a_delay_and_takes_the_session_once_a_slot_is_free() -> None:
    async with clips(ClipEngine(1), queue_limit=0) as server:
        async with rt.connect(f"127.0.0.1:{server.server.port}") as client:
            first = client.video(prompt="a cat")
            await first.open()
            with pytest.raises(rt.ResourceExhausted) as caught:
                await client.video(prompt="a cat", retry=rt.RetryPolicy(max_retries=0)).open()
            assert caught.value.retry_after is not None
            patient = client.video(
                prompt="a cat", retry=rt.RetryPolicy(max_retries=100, initial_seconds=0.01)
            )
            waiting = asyncio.create_task(patient.open())
            await first.close()
            assert (await waiting).model == "clips"
            await patient.close()
        await server.all_free()


async def test_refusals_name_the_field_and_the_range() -> None:
    async with clips() as server, rt.connect(f"127.0.0.1:{server.server.port}") as client:
        refused: list[tuple[dict[str, Any], str]] = [
            ({"prompt": " "}, "open.options.prompt"),
            ({"prompt": "word " * 9}, "open.options.prompt"),
            ({"prompt": "a", "width": 64}, "open.options.width"),
            ({"prompt": "a", "frames_per_second": 0.5}, "open.options.frames_per_second"),
            ({"prompt": "a", "encoding": "jpeg", "jpeg_quality": 0}, "open.options.jpeg_quality"),
            ({"prompt": "a", "encoding": "h264", "h264_crf": 52}, "open.options.h264_crf"),
            ({"prompt": "a", "length_frames": 0}, "open.options.length_frames"),
        ]
        for options, field in refused:
            with pytest.raises(rt.InvalidRequest) as caught:
                await client.video(**options).open()
            assert [violation.field for violation in caught.value.violations] == [field]
        with pytest.raises(rt.NotFound):
            await client.video(prompt="a", model="other").open()
        with pytest.raises(rt.CheckpointRefused):
            await client.video(resume=rt.Checkpoint(b"x" * 100, 0)).open()
        async with client.video(prompt="a cat") as stream:
            await take(stream, until=30)
            control = await stream.set_prompt("a dog", at_frame=3)
            with pytest.raises(rt.InvalidRequest, match="at_frame"):
                await control.applied()
        async with client.video(prompt="a cat", buffer_seconds=None) as stream:
            await stream.grant(stream.info.max_credit_frames + 1)
            with pytest.raises(rt.InvalidRequest, match=r"credit\.position"):
                await take(stream)
        await server.all_free()


async def test_pixels_are_read_only_views_of_what_came() -> None:
    async with (
        clips() as server,
        rt.connect(f"127.0.0.1:{server.server.port}") as client,
        client.video(prompt="a cat", length_frames=1) as stream,
    ):
        (frames,) = [event async for event in stream if isinstance(event, rt.Frames)]
    assert frames.rgb.shape == (1, SIZES[0][1], SIZES[0][0], 3)
    assert not frames.rgb.flags.writeable
    assert np.shares_memory(frames.rgb, np.frombuffer(frames.data, np.uint8))
