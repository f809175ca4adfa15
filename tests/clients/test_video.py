"""Video sessions against a real gRPC server: the grammar, credit, and going on when connections break."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import numpy as np
import pytest

import realtide_client as rt
from realtide_client.v1 import models_pb2_grpc, video_pb2_grpc
from tests.clients.scripted_video import (
    BLOCK,
    FIRST,
    HEIGHT,
    MAX_CREDIT,
    WIDTH,
    Script,
    ScriptedVideo,
    block_at,
    frame_of,
)

EAGER = rt.RetryPolicy(max_retries=5, initial_seconds=0.01, max_seconds=0.05)
Serve = Callable[[Script], Awaitable[tuple[str, ScriptedVideo]]]


@pytest.fixture
async def serve() -> AsyncIterator[Serve]:
    """Start a server that follows the given script; the answer is its address and the servicer."""
    servers = []

    async def start(script: Script) -> tuple[str, ScriptedVideo]:
        server = grpc.aio.server()
        servicer = ScriptedVideo(script)
        video_pb2_grpc.add_VideoServicer_to_server(servicer, server)
        models_pb2_grpc.add_ModelsServicer_to_server(servicer, server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        servers.append(server)
        return f"127.0.0.1:{port}", servicer

    yield start
    for server in servers:
        await server.stop(None)


async def take(stream: rt.VideoStream, until: int | None = None) -> list[rt.VideoEvent]:
    """Events to the end, or to the frames that reach `until`."""
    events: list[rt.VideoEvent] = []
    async for event in stream:
        events.append(event)
        if until is not None and isinstance(event, rt.Frames) and event.end >= until:
            break
    return events


def joined(events: list[rt.VideoEvent], start: int = 0) -> bytes:
    """All frames' bytes; fails if frames are missing, repeated or out of order."""
    data = b""
    for event in events:
        if isinstance(event, rt.Frames):
            assert event.position == start
            start = event.end
            data += event.data
    return data


def video(length: int, seed: int, *history: tuple[int, str], start: int = 0) -> bytes:
    """What the scripted server shows with these prompts."""
    return b"".join(
        frame_of(index, seed, *(change for change in history if change[0] <= index))
        for index in range(start, length)
    )


def prompts(events: list[rt.VideoEvent]) -> list[tuple[int, str]]:
    return [(e.first_frame, e.prompt) for e in events if isinstance(e, rt.PromptApplied)]


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.005)


async def test_whoever_has_everything_closes_its_side(serve: Serve) -> None:
    """So that the server can end the call without gRPC's resetting the stream after it."""
    address, servicer = await serve(Script(linger=True))
    async with rt.connect(address) as client, client.video(prompt="a", seed=5, length_frames=20) as stream:
        await take(stream)
        assert servicer.half_closed == [0]


async def test_every_frame_comes_once_with_its_pixels_and_what_was_negotiated(serve: Serve) -> None:
    address, servicer = await serve(Script())
    async with rt.connect(address) as client, client.video(prompt="a", seed=5, length_frames=20) as stream:
        info = stream.info
        events = await take(stream)
    assert (info.width, info.height, info.frames_per_second, info.seed) == (WIDTH, HEIGHT, 16.0, 5)
    assert (info.length_frames, info.encoding, info.prompt) == (20, "raw_rgb", "a")
    frames = [event for event in events if isinstance(event, rt.Frames)]
    assert [event.position for event in frames] == list(range(20))
    assert frames[7].rgb.shape == (1, HEIGHT, WIDTH, 3)
    assert frames[7].rgb.dtype == np.uint8
    assert frames[7].rgb.tobytes() == frame_of(7, 5, (0, "a"), encoding=1)
    assert frames[7].timing.processing_seconds == 0.01
    assert isinstance(events[0], rt.PromptApplied), "it comes before its first frame"
    assert (servicer.calls, servicer.ended, stream.reconnects) == (1, ["ok"], 0)


async def test_unset_choices_stay_unset_and_set_ones_travel(serve: Serve) -> None:
    address, servicer = await serve(Script())
    async with rt.connect(address) as client:
        async with client.video(prompt="a", encoding="jpeg", jpeg_quality=70, seed=0, model="m"):
            pass
        async with client.video(rt.VideoOptions(prompt="a", encoding="h264"), frames_per_second=12.5):
            pass
    first, second = servicer.opens
    assert (first.options.jpeg_quality, first.session.model) == (70, "m")
    assert first.options.HasField("seed")
    for name in ("width", "height", "frames_per_second", "length_frames", "h264_crf"):
        assert not first.options.HasField(name)
    assert second.options.frames_per_second == 12.5
    assert not second.options.HasField("seed")
    assert second.session.checkpoint_interval_ms == 5000


async def test_credit_follows_what_was_taken_and_nothing_runs_ahead(serve: Serve) -> None:
    address, servicer = await serve(Script())
    async with rt.connect(address) as client, client.video(prompt="a", buffer_seconds=0.5) as stream:
        await until(lambda: servicer.sent[0] == 8)
        await asyncio.sleep(0.05)
        assert servicer.sent == [8], "half a second of 16 frames each, and the application took nothing"
        await take(stream, until=8)
        await until(lambda: servicer.sent[0] >= 14)
        assert servicer.sent[0] <= 16
        assert stream.position == 8
        await until(lambda: stream.received == servicer.sent[0])
    credits = servicer.credits[0]
    assert credits == sorted(set(credits))
    assert len(credits) <= 5, "not one for every frame"


async def test_a_buffer_beyond_the_servers_limit_is_cut_to_it(serve: Serve) -> None:
    address, servicer = await serve(Script())
    async with rt.connect(address) as client, client.video(prompt="a", buffer_seconds=60.0) as stream:
        await take(stream, until=3 * MAX_CREDIT)
    assert max(servicer.credits[0]) <= 4 * MAX_CREDIT


async def test_manual_credit_is_all_there_is(serve: Serve) -> None:
    address, servicer = await serve(Script())
    async with rt.connect(address) as client, client.video(prompt="a", buffer_seconds=None) as stream:
        await asyncio.sleep(0.05)
        assert servicer.sent == [0]
        await stream.grant(5)
        await take(stream, until=5)
        await stream.grant(4)
        await stream.grant(7)
        await take(stream, until=7)
        await asyncio.sleep(0.05)
        assert servicer.sent == [7]
        assert servicer.credits == [[5, 7]]
        await stream.grant(7 + MAX_CREDIT + 1)
        with pytest.raises(rt.InvalidRequest, match=r"credit\.position"):
            await take(stream)


async def test_finish_gives_what_the_credit_covers_and_ends(serve: Serve) -> None:
    address, servicer = await serve(Script())
    async with rt.connect(address) as client, client.video(prompt="a", buffer_seconds=1.0) as stream:
        await take(stream, until=4)
        await stream.finish()
        rest = await take(stream)
        assert isinstance(rest[-1], rt.Frames)
        assert rest[-1].end == 20, "4 taken and 16 of buffer"
        with pytest.raises(rt.StreamClosed, match="finished"):
            await stream.set_prompt("b")
        with pytest.raises(rt.StreamClosed, match="finished"):
            await stream.grant(100)
    assert servicer.ended == ["ok"]


async def test_a_prompt_changes_at_a_block_with_both_receipts_and_its_event(serve: Serve) -> None:
    address, _ = await serve(Script())
    async with (
        rt.connect(address) as client,
        client.video(prompt="a", encoding="jpeg", seed=1, length_frames=30) as stream,
    ):
        control = await stream.set_prompt("b", at_frame=9)
        assert (await control.accepted()).control_id == control.control_id
        events = await take(stream)
        assert (await control.applied()).position == 11
    assert prompts(events) == [(0, "a"), (11, "b")]
    assert joined(events) == video(30, 1, (0, "a"), (11, "b"))
    changed = next(e for e in events if isinstance(e, rt.PromptApplied) and e.prompt == "b")
    assert (changed.recache_seconds, changed.recached_latent_frames) == (0.5, 3)
    following = events[events.index(changed) + 1]
    assert isinstance(following, rt.Frames)
    assert following.position == 11


async def test_a_pause_holds_frames_back_and_resume_goes_on(serve: Serve) -> None:
    address, servicer = await serve(Script())
    async with rt.connect(address) as client, client.video(prompt="a", buffer_seconds=2.0) as stream:
        await take(stream, until=4)
        paused = await (await stream.pause()).applied()
        if stream.position < paused.position:
            await take(stream, until=paused.position)
        await asyncio.sleep(0.05)
        assert servicer.sent == [paused.position]
        await (await stream.resume()).applied()
        await take(stream, until=paused.position + 20)


@pytest.mark.parametrize("encoding", ["jpeg", "h264"])
@pytest.mark.parametrize("interval", [0, 6, 14])
async def test_dropped_connections_lose_and_repeat_nothing(
    serve: Serve, interval: int, encoding: rt.VideoEncoding
) -> None:
    drops = {0: 17, 1: 20, 2: 9, 3: 40}
    if interval == 0:
        drops = {0: 17, 1: 20, 2: 25, 3: 40}  # each has to begin anew, and to get further
    address, servicer = await serve(Script(drop_at=drops, checkpoint_every=interval))
    async with (
        rt.connect(address) as client,
        client.video(prompt="a", encoding=encoding, length_frames=90, retry=EAGER) as stream,
    ):
        events = await take(stream)
        seed = stream.info.seed
    assert joined(events) == video(90, seed, (0, "a"))
    assert prompts(events) == [(0, "a")]
    assert stream.reconnects == 4
    assert {message.options.seed for message in servicer.opens[1:]} <= {seed}
    assert bool(servicer.resumes) == bool(interval)
    payload = b"".join(event.payload for event in events if isinstance(event, rt.Frames))
    if encoding == "h264":
        assert payload == b"init;" + video(90, seed, (0, "a")), "one file that plays"


async def test_another_initialization_after_a_reconnection_is_given(serve: Serve) -> None:
    script = Script(drop_at={0: 17}, checkpoint_every=6, initialization={0: b"one;", 1: b"two;"})
    address, _ = await serve(script)
    async with (
        rt.connect(address) as client,
        client.video(prompt="a", encoding="h264", length_frames=40, retry=EAGER) as stream,
    ):
        events = await take(stream)
    given = [(e.position, e.initialization) for e in events if isinstance(e, rt.Frames) and e.initialization]
    assert [initialization for _, initialization in given] == [b"one;", b"two;"]
    lost = given[1][0]
    assert 0 < lost <= 17 + BLOCK, "with the first frames that are new, not with those that came again"
    joined(events)


@pytest.mark.parametrize("interval", [0, 5, 6, 8, 14])
async def test_prompts_change_again_where_they_did_the_first_time(serve: Serve, interval: int) -> None:
    """The frames that come again, and those that follow, are those of a session without a break."""
    address, servicer = await serve(Script(drop_at={0: 26, 1: 30}, checkpoint_every=interval))
    async with (
        rt.connect(address) as client,
        client.video(
            prompt="a", encoding="jpeg", seed=3, length_frames=70, retry=EAGER, buffer_seconds=0.3
        ) as stream,
    ):
        later = await stream.set_prompt("e", at_frame=60)
        events = await take(stream, until=5)
        # Due together: "c" counts.
        controls = [await stream.set_prompt(prompt, at_frame=12) for prompt in ("b", "c")]
        events += await take(stream, until=16)
        controls.append(await stream.set_prompt("d"))
        events += await take(stream)
        places = [(await control.applied()).position for control in controls]
        assert (await later.applied()).position == block_at(60)
    assert places[0] == places[1] == block_at(12)
    history = [(0, "a"), (places[0], "c"), (places[2], "d"), (block_at(60), "e")]
    assert prompts(events) == history
    assert joined(events) == video(70, 3, *history)
    assert stream.reconnects == 2
    assert servicer.calls == 3


async def test_a_prompt_whose_frame_has_passed_within_a_block_is_asked_for_again_from_here_on(
    serve: Serve,
) -> None:
    """Frame 4 lies in the block of frames 3 to 6: the prompt waits for frame 7 while frame 4 is sent."""
    address, servicer = await serve(Script(drop_at={0: 5}, checkpoint_every=1))
    async with (
        rt.connect(address) as client,
        client.video(
            prompt="a", encoding="jpeg", seed=3, length_frames=12, retry=EAGER, buffer_seconds=None
        ) as stream,
    ):
        await stream.grant(3)
        events = await take(stream, until=3)
        control = await stream.set_prompt("b", at_frame=4)
        await control.accepted()
        await stream.grant(12)
        events += await take(stream)
        assert (await control.applied()).position == 7
    assert servicer.resumes == [5]
    assert joined(events) == video(12, 3, (0, "a"), (7, "b"))


async def test_a_prompt_that_is_set_while_old_frames_come_again_concerns_new_ones(serve: Serve) -> None:
    address, _ = await serve(Script(drop_at={0: 26}, checkpoint_every=0))
    async with (
        rt.connect(address) as client,
        client.video(prompt="a", encoding="jpeg", seed=3, length_frames=60, retry=EAGER) as stream,
    ):
        events = await take(stream, until=26)
        await until(lambda: stream.reconnects == 1)
        control = await stream.set_prompt("b")
        events += await take(stream)
        place = (await control.applied()).position
    assert place >= 26
    assert joined(events) == video(60, 3, (0, "a"), (place, "b"))


async def test_a_control_lost_with_its_connection_gets_its_receipts_from_the_next(serve: Serve) -> None:
    address, servicer = await serve(Script(drop_before_receipts=True, checkpoint_every=0))
    async with (
        rt.connect(address) as client,
        client.video(prompt="a", encoding="jpeg", seed=3, length_frames=40, retry=EAGER) as stream,
    ):
        events = await take(stream, until=5)
        control = await stream.set_prompt("b")
        state = asyncio.create_task(stream.checkpoint())
        events += await take(stream)
        place = (await control.applied()).position
        await state
    assert servicer.calls == 2
    assert joined(events) == video(40, 3, (0, "a"), (place, "b"))


async def test_a_session_moves_when_its_server_goes_away(serve: Serve) -> None:
    address, servicer = await serve(Script(going_away_at={0: 20}, checkpoint_every=6))
    async with (
        rt.connect(address) as client,
        client.video(prompt="a", encoding="h264", seed=2, length_frames=80, retry=EAGER) as stream,
    ):
        events = await take(stream)
    assert joined(events) == video(80, 2, (0, "a"))
    assert len(servicer.resumes) == 1
    assert servicer.resumes[0] in (19, 23)
    assert stream.reconnects == 1


async def test_the_last_frame_ends_a_video_whatever_becomes_of_the_connection(serve: Serve) -> None:
    address, servicer = await serve(Script(drop_after_last=True))
    async with (
        rt.connect(address) as client,
        client.video(prompt="a", encoding="jpeg", seed=2, length_frames=10, retry=EAGER) as stream,
    ):
        assert joined(await take(stream)) == video(10, 2, (0, "a"))
    assert servicer.calls == 1


async def test_a_connection_lost_after_finish_still_gives_what_the_credit_covered(serve: Serve) -> None:
    address, servicer = await serve(Script(drop_at={0: 12}, checkpoint_every=6))
    async with (
        rt.connect(address) as client,
        client.video(prompt="a", encoding="jpeg", seed=2, retry=EAGER, buffer_seconds=1.0) as stream,
    ):
        await stream.finish()
        assert joined(await take(stream)) == video(16, 2, (0, "a"))
    assert servicer.ended[-1] == "ok"
    assert stream.reconnects == 1


async def test_another_client_continues_from_a_checkpoint(serve: Serve) -> None:
    address, servicer = await serve(Script())
    async with rt.connect(address) as client:
        async with client.video(
            prompt="a", encoding="jpeg", seed=9, length_frames=40, frames_per_second=8
        ) as stream:
            await take(stream, until=5)
            state = await stream.checkpoint()
        async with client.video(resume=state) as stream:
            assert stream.position == stream.received == state.position
            assert (stream.info.encoding, stream.info.seed, stream.info.frames_per_second) == ("jpeg", 9, 8.0)
            events = await take(stream)
    assert joined(events, state.position) == video(40, 9, (0, "a"), start=state.position)
    assert servicer.resumes == [state.position]


async def test_without_retries_a_lost_connection_is_an_error(serve: Serve) -> None:
    address, servicer = await serve(Script(drop_at={0: 4}))
    never = rt.RetryPolicy(max_retries=0)
    async with rt.connect(address) as client, client.video(prompt="a", retry=never) as stream:
        with pytest.raises(rt.Unavailable, match="dropped by the script"):
            await take(stream)
    assert servicer.calls == 1
    assert not servicer.opens[0].session.HasField("checkpoint_interval_ms")


async def test_a_server_that_cannot_be_reached_at_first_is_tried_again(serve: Serve) -> None:
    address, servicer = await serve(Script(refuse=2))
    async with rt.connect(address) as client, client.video(prompt="a", retry=EAGER) as stream:
        await take(stream, until=3)
    assert servicer.calls == 3


@pytest.mark.parametrize(
    ("choices", "field"),
    [({}, "open.options.prompt"), ({"prompt": "a", "frames_per_second": 99.0}, "frames_per_second")],
)
async def test_an_invalid_choice_names_its_field_and_is_not_tried_again(
    serve: Serve, choices: dict[str, Any], field: str
) -> None:
    address, servicer = await serve(Script())
    async with rt.connect(address) as client:
        with pytest.raises(rt.InvalidRequest, match=field):
            await client.video(**choices).open()
    assert servicer.calls == 1


async def test_a_change_in_the_past_ends_the_session_with_its_reason(serve: Serve) -> None:
    address, _ = await serve(Script())
    async with rt.connect(address) as client, client.video(prompt="a") as stream:
        await take(stream, until=FIRST)
        control = await stream.set_prompt("b", at_frame=0)
        with pytest.raises(rt.InvalidRequest, match="at_frame"):
            await control.accepted()
        with pytest.raises(rt.InvalidRequest, match="at_frame"):
            await take(stream)


async def test_what_cannot_be_sent_at_all_is_refused_here() -> None:
    async with rt.connect("127.0.0.1:1") as client:
        with pytest.raises(ValueError, match="raw_rgb, jpeg, h264"):
            client.video(prompt="a", encoding="webm")
        with pytest.raises(ValueError, match="buffer_seconds"):
            client.video(prompt="a", buffer_seconds=0)
        with pytest.raises(ValueError, match="-1"):
            client.video(prompt="a", seed=-1)


async def test_pixels_need_raw_frames(serve: Serve) -> None:
    address, _ = await serve(Script())
    async with (
        rt.connect(address) as client,
        client.video(prompt="a", encoding="jpeg", length_frames=1) as stream,
    ):
        (frames,) = [event async for event in stream if isinstance(event, rt.Frames)]
    with pytest.raises(ValueError, match="jpeg have to be decoded"):
        _ = frames.rgb


async def test_leaving_early_cancels_the_call(serve: Serve) -> None:
    address, servicer = await serve(Script())
    async with rt.connect(address) as client, client.video(prompt="a") as stream:
        await anext(stream)
    await until(lambda: bool(servicer.ended))
    assert servicer.ended == ["cancelled"]
    with pytest.raises(rt.StreamClosed):
        await stream.set_prompt("b")
