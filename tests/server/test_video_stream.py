"""A video session over the wire: frames in every encoding, credit, prompts, pause, checkpoints, resume."""

from __future__ import annotations

import asyncio
import io
import json
import threading
from dataclasses import replace
from typing import Any

import av
import grpc
import numpy as np
import pytest
from PIL import Image

from realtide.server import sessions
from realtide.server.checkpoint import seal, unseal
from realtide_client.v1 import common_pb2, video_pb2
from tests.server.helpers import failure, responses, until, violation
from tests.server.video_engine import BLOCK, FIRST_BLOCK, ClipEngine, colour
from tests.server.video_helpers import (
    H264,
    JPEG,
    Clips,
    Request,
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

GONE = grpc.StatusCode.UNAVAILABLE


def kinds(found: list[Any]) -> list[str]:
    return [str(one.WhichOneof("message")) for one in found]


def raw(index: int, prompt: str, seed: int, width: int = 32, height: int = 16) -> bytes:
    return bytes(colour(index, prompt, seed)) * (width * height)


def receipts(found: list[Any], control_id: str) -> list[tuple[str, int]]:
    return [
        (kind, getattr(one, kind).position)
        for one in found
        if (kind := str(one.WhichOneof("message"))) in ("accepted", "applied")
        and getattr(one, kind).control_id == control_id
    ]


async def test_opened_says_what_was_negotiated() -> None:
    async with clips(idle_timeout=33.0, max_video_credit=10.0, max_video_frames=500) as server:
        call = server.stream()
        await call.write(opening("two cats", H264, credit=5, frames_per_second=25.0, length_frames=70))
        opened = (await call.read()).opened
        assert opened.session.model == "clips"
        assert opened.session.model_version == "0.3"
        assert opened.session.position == 0
        assert not opened.session.resumed
        assert opened.session.limits.idle_timeout_seconds == 33.0
        assert (opened.credit, opened.paused) == (5, False)
        options = opened.options
        assert (options.prompt, options.width, options.height) == ("two cats", 32, 16)
        assert (options.frames_per_second, options.length_frames, options.h264_crf) == (25.0, 70, 20)
        assert not options.HasField("jpeg_quality")
        limits = opened.limits
        assert (limits.min_frames_per_second, limits.max_frames_per_second) == (1.0, 60.0)
        assert (limits.max_prompt_tokens, limits.max_prompt_characters) == (8, 2000)
        assert (limits.max_credit_frames, limits.max_length_frames) == (250, 500)
        call.cancel()
        seeds = set()
        for _ in range(3):
            call = server.stream()
            await call.write(opening(encoding=JPEG))
            opened = (await call.read()).opened
            assert opened.options.frames_per_second == 16.0
            assert opened.options.jpeg_quality == 90
            assert not opened.options.HasField("length_frames")
            seeds.add(opened.options.seed)
            call.cancel()
        assert len(seeds) == 3
        await server.all_free()


@pytest.mark.parametrize(("width", "height"), [(32, 16), (16, 16)])
async def test_raw_frames(width: int, height: int) -> None:
    async with clips() as server:
        call = await server.opened(
            prompt="a fish", credit=20, seed=7, length_frames=20, width=width, height=height
        )
        found = await responses(call)
        frames = frames_of(found)
        assert [frame.position for frame in frames] == list(range(20))
        for index, frame in enumerate(frames):
            assert (frame.count, frame.initialization) == (1, b"")
            assert frame.data == raw(index, "a fish", 7, width, height)
        # The prompt of the open is in force before the first frame.
        assert kinds(found)[0] == "prompt_applied"
        applied = found[0].prompt_applied
        assert (applied.control_id, applied.prompt, applied.first_frame) == ("", "a fish", 0)
        await server.all_free()


async def test_jpeg_frames() -> None:
    async with clips() as server:
        call = await server.opened(encoding=JPEG, jpeg_quality=100, credit=9, seed=200, length_frames=9)
        frames = frames_of(await responses(call))
        assert len(frames) == 9
        for index, frame in enumerate(frames):
            picture = np.asarray(Image.open(io.BytesIO(frame.data)).convert("RGB"), np.int16)
            assert picture.shape == (16, 32, 3)
            assert np.abs(picture - colour(index, "a fish", 200)).max() <= 3


def play(data: bytes) -> tuple[list[float], list[Any]]:
    """Times in seconds and colours of a film's frames."""
    with av.open(io.BytesIO(data), "r") as container:
        frames = list(container.decode(video=0))
    return [float(frame.time or 0.0) for frame in frames], [
        frame.to_ndarray(format="rgb24").mean((0, 1)) for frame in frames
    ]


@pytest.mark.parametrize("rate", [16.0, 29.97])
async def test_h264_fragments(rate: float) -> None:
    """Written one after the other they are a film with every frame at its time, across a resume too."""
    async with clips() as server:
        call = await server.opened(encoding=H264, credit=30, frames_per_second=rate, length_frames=60)
        found = await until_frame(call, 30)
        await call.write(checkpointing())
        checkpoint = await until_kind(call, "checkpoint")
        assert checkpoint.position == 30
        call.cancel()
        call, opened = await server.resumed(checkpoint.data)
        await call.write(credit(60))
        second = frames_of(await responses(call))
        frames = [*frames_of(found), *second]
        assert 1 < max(frame.count for frame in frames) <= round(0.25 * rate)
        assert [bool(frame.initialization) for frame in frames] == [
            frame in (frames[0], second[0]) for frame in frames
        ]
        times, colours = play(b"".join(frame.initialization + frame.data for frame in frames))
        assert times == pytest.approx([index / rate for index in range(60)])
        for index, shown in enumerate(colours):
            assert np.abs(shown - colour(index, "a fish", opened.options.seed)).max() <= 6
        # What follows the resume is a film of its own.
        times, _ = play(b"".join(frame.initialization + frame.data for frame in second))
        assert times == pytest.approx([index / rate for index in range(30, 60)])
        await server.all_free()


async def test_every_frame_of_the_credit_and_none_beyond() -> None:
    async with clips() as server:
        call = await server.opened()
        end = 0
        for more in (1, 1, 2, 3, 5, 8, 13, 1, 21):
            end += more
            await call.write(credit(end))
            found = await until_frame(call, end)
            assert frames_of(found)[0].position == end - more
            timing = frames_of(found)[-1].timing
            assert timing.received_position == end
            assert timing.processed_position >= end
            assert 0 <= timing.processing_seconds <= timing.session_seconds
        # Nothing was begun that no credit reached into.
        blocks = -(-(end - FIRST_BLOCK) // BLOCK)
        assert server.metric("realtide_frames_total", stage="denoised") == FIRST_BLOCK + blocks * BLOCK
        await call.write(finishing())
        assert await responses(call) == []
        await server.all_free()
        # Counted once written, which the client may see first; so not before the end.
        assert server.metric("realtide_frames_total", stage="delivered") == end


async def test_without_credit_nothing_is_made() -> None:
    async with clips() as server:
        call = await server.opened()
        await call.write(checkpointing("first"))  # answered, so everything before it has happened
        assert (await until_kind(call, "checkpoint")).position == 0
        assert server.metric("realtide_frames_total", stage="denoised") == 0
        await call.write(finishing())
        assert await responses(call) == []


async def test_a_credit_again_is_a_sign_of_life_and_no_more() -> None:
    async with clips() as server:
        call = await server.opened(credit=4)
        await until_frame(call, 4)
        for _ in range(100):
            await call.write(credit(4))
        await call.write(credit(5))
        assert len(frames_of(await until_frame(call, 5))) == 1
        # The engine asserts that no such credit reaches it.
        call.cancel()
        await server.all_free()


async def test_the_end_waits_a_little_for_the_clients_without_a_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions, "_LINGER", 3600.0)
    async with clips() as server:
        call = await server.opened(credit=10, length_frames=5)
        await until_frame(call, 5)
        await server.all_free()
        assert not call.done()
        await call.done_writing()
        await responses(call)


async def test_length_ends_the_stream_whatever_the_credit() -> None:
    async with clips() as server:
        call = await server.opened(credit=100, length_frames=10)
        assert len(frames_of(await responses(call))) == 10
        await until(lambda: server.metric("realtide_sessions_closed_total", outcome="ok") == 1)
        await server.all_free()


@pytest.mark.parametrize("half_close", [False, True])
async def test_finish_sends_what_the_credit_covers(half_close: bool) -> None:
    async with clips() as server:
        call = await server.opened(credit=4)
        await call.write(credit(17))
        await (call.done_writing() if half_close else call.write(finishing()))
        assert len(frames_of(await responses(call))) == 17
        await server.all_free()


async def test_a_prompt_shows_with_the_next_block() -> None:
    async with clips() as server:
        call = await server.opened(prompt="red", credit=5, seed=1)
        found = await until_frame(call, 5)
        await call.write(prompting("p1", "green"))
        await until_kind(call, "accepted", found)
        await call.write(credit(14))
        await call.write(finishing())
        found += await responses(call)
        frames = frames_of(found)
        first = FIRST_BLOCK + BLOCK  # 5 frames reach into the second block
        for index, frame in enumerate(frames):
            assert frame.data == raw(index, "red" if index < first else "green", 1)
        (changed,) = (
            one for one in found if kinds([one]) == ["prompt_applied"] and one.prompt_applied.control_id
        )
        applied = changed.prompt_applied
        assert (applied.control_id, applied.prompt, applied.first_frame) == ("p1", "green", first)
        assert applied.recache_seconds == pytest.approx(0.025)
        assert applied.recached_latent_frames == 2
        # It comes right before its first frame.
        assert found[found.index(changed) + 1].frames.position == first
        assert [one.applied.position for one in found if kinds([one]) == ["applied"]] == [first]
        assert kinds(found).index("accepted") < kinds(found).index("applied") < found.index(changed)
        assert server.metric("realtide_prompt_switch_seconds_count") == 1
        assert server.metric("realtide_recache_seconds_count") == 1


async def test_a_prompt_for_a_frame_waits_for_it_and_holds_up_nobody() -> None:
    async with clips() as server:
        call = await server.opened(prompt="red", seed=1)
        await call.write(prompting("late", "blue", 12))
        await call.write(prompting("now", "green"))
        for _ in range(2):
            await until_kind(call, "accepted")
        await call.write(credit(20))
        await call.write(finishing())
        found = await responses(call)
        late = FIRST_BLOCK + 3 * BLOCK  # the first block that begins at 12 or later
        for index, frame in enumerate(frames_of(found)):
            assert frame.data == raw(index, "green" if index < late else "blue", 1)
        applied = [one.prompt_applied for one in found if kinds([one]) == ["prompt_applied"]]
        assert [(one.control_id, one.first_frame) for one in applied] == [("now", 0), ("late", late)]
        # Who asked for a later frame did not wait for an answer.
        assert server.metric("realtide_prompt_switch_seconds_count") == 1


async def test_pause_and_resume() -> None:
    async with clips() as server:
        call = await server.opened(credit=5, seed=3)
        found = await until_frame(call, 5)
        await call.write(pausing("stop"))
        await until_kind(call, "applied", found)
        await call.write(credit(11))
        await call.write(checkpointing())  # answered, so the credit has been seen
        assert (await until_kind(call, "checkpoint", found)).position == 5
        assert server.metric("realtide_frames_total", stage="delivered") == 5
        await call.write(playing("go"))
        await call.write(playing("on"))  # changes nothing
        await until_frame(call, 11, found)
        assert receipts(found, "go") == [("accepted", 5), ("applied", 5)]
        await call.write(finishing())
        found += await responses(call)
        assert [name for name, _ in receipts(found, "on")] == ["accepted", "applied"]
        assert [frame.data for frame in frames_of(found)] == [raw(index, "a fish", 3) for index in range(11)]


async def test_finish_under_a_pause_sends_no_more() -> None:
    async with clips() as server:
        call = await server.opened()
        await call.write(pausing("stop"))
        await call.write(credit(5))
        await call.write(finishing())
        assert frames_of(await responses(call)) == []
        await server.all_free()


async def whole(server: Clips, **options: Any) -> list[Any]:
    """A film with changing prompts in one go."""
    call = await server.opened(**options)
    await call.write(prompting("x", "green", 6))
    await call.write(prompting("y", "blue", 13))
    for _ in range(2):
        await until_kind(call, "accepted")
    await call.write(credit(24))
    await call.write(finishing())
    return await responses(call)


@pytest.mark.parametrize("at", [0, 1, 3, 7, 9, 16, 24])
@pytest.mark.parametrize("paused", [False, True])
async def test_a_resumed_session_goes_on_as_if_nothing_had_been(at: int, paused: bool) -> None:
    """Also on another server, which only shares the key; controls without their receipt are sent again."""
    key, options = "a key of both servers", {"prompt": "red", "seed": 2**64 - 1}
    changes = {"x": ("green", 6), "y": ("blue", 13)}
    async with clips(checkpoint_key=key) as server:
        wanted = essence(await whole(server, **options))
        call = await server.opened(**options)
        for name, change in changes.items():
            await call.write(prompting(name, *change))
        found: list[Any] = []
        if at:
            await call.write(credit(at))
            await until_frame(call, at, found)
        if paused:
            await call.write(pausing("stop"))
        await call.write(checkpointing("mine"))
        checkpoint = await until_kind(call, "checkpoint", found)
        assert (checkpoint.position, checkpoint.request_id) == (at, "mine")
        call.cancel()
        await server.all_free()
    applied = [one.applied.control_id for one in found if kinds([one]) == ["applied"]]
    async with clips(checkpoint_key=key) as other:
        call, opened = await other.resumed(checkpoint.data)
        assert opened.session.resumed
        assert opened.session.position == opened.credit == at
        assert opened.paused == paused
        assert opened.options.seed == 2**64 - 1
        shown = [one.prompt_applied.prompt for one in found if kinds([one]) == ["prompt_applied"]]
        assert opened.options.prompt == (shown[-1] if shown else "red")
        for name, (prompt, first) in changes.items():
            if name not in applied:
                # No block has begun since, so a frame that has been sent and the next one say the same.
                await call.write(prompting(name, prompt, max(first, at)))
                await until_kind(call, "accepted")
        await call.write(credit(24))
        if paused:
            await call.write(playing("go"))
        await call.write(finishing())
        found += await responses(call)
        await other.all_free()
    assert essence(found) == wanted


async def test_periodic_checkpoints() -> None:
    async with clips(min_checkpoint_interval_ms=100) as server:
        session = common_pb2.SessionOptions(checkpoint_interval_ms=500)
        call = await server.opened(session=session)
        found: list[Any] = []
        for end in range(4, 44, 4):
            await call.write(credit(end))
            await until_frame(call, end, found)
        await call.write(finishing())
        found += await responses(call)
        positions = [one.checkpoint.position for one in found if kinds([one]) == ["checkpoint"]]
        # Every 8 frames at 16 a second; asked for when that frame is sent, made some frames later.
        assert len(positions) >= 2
        assert positions[0] >= 8
        assert min(np.diff(positions), default=8) >= 8
        assert positions[-1] >= 24
        for one in found:
            if kinds([one]) == ["checkpoint"]:
                sent = [frame.position for frame in frames_of(found[: found.index(one)])]
                assert one.checkpoint.position == len(sent)
        resumed, opened = await server.resumed(
            next(one for one in found if kinds([one]) == ["checkpoint"]).checkpoint.data
        )
        assert opened.session.checkpoint_interval_ms == 500
        resumed.cancel()
        await server.all_free()


async def test_checkpoints_that_do_not_fit() -> None:
    async with clips() as server:
        call = await server.opened()
        await call.write(checkpointing())
        checkpoint = await until_kind(call, "checkpoint")
        call.cancel()
        header, state = unseal(checkpoint.data, None)
        cases = {
            "of realtide.v1.Speech": seal(replace(header, service="realtide.v1.Speech"), state, None),
            "of model other": seal(replace(header, model="other"), state, None),
            "not of this engine": seal(header, json.dumps({"state": 1}).encode(), None),
            "damaged setup": seal(replace(header, setup=b"\xff\xff"), state, None),
        }
        for words, data in cases.items():
            call = server.stream()
            await call.write(Request(resume=common_pb2.Resume(checkpoint=data)))
            error = await failure(call)
            assert error.code() == grpc.StatusCode.FAILED_PRECONDITION, words
            field, problem = violation(error)
            assert field == "resume.checkpoint"
            assert words in problem
        # Where no key is configured a seal keeps nobody from writing what he likes.
        setup = video_pb2.VideoOpened.FromString(header.setup)
        setup.options.width = 1 << 30
        call = server.stream()
        forged = seal(replace(header, setup=setup.SerializeToString()), state, None)
        await call.write(Request(resume=common_pb2.Resume(checkpoint=forged)))
        assert violation(await failure(call))[0] == "resume.checkpoint.width"
        await server.all_free()


async def test_a_drain_hands_out_a_checkpoint_to_go_on_from() -> None:
    key = "a key of both servers"
    async with clips(checkpoint_key=key, drain_seconds=0.5) as server:
        call = await server.opened(credit=10, seed=5)
        found = await until_frame(call, 10)
        server.server.drain()
        going = await until_kind(call, "going_away", found)
        assert going.checkpoint.position == 10
        await call.write(credit(12))  # it goes on until the deadline
        await until_frame(call, 12, found)
        error = await failure(call, found)
        assert error.code() == GONE
        last = [one.checkpoint for one in found if kinds([one]) == ["checkpoint"]][-1]
        assert last.position == 12
        await server.all_free()
        late = server.stream()
        await late.write(opening())
        assert (await failure(late)).code() == GONE
    async with clips(checkpoint_key=key) as other:
        call, _ = await other.resumed(last.data)
        await call.write(credit(20))
        await call.write(finishing())
        found += await responses(call)
    assert [frame.data for frame in frames_of(found)] == [raw(index, "a fish", 5) for index in range(20)]


@pytest.mark.parametrize("where", ["poison", "thorn"])
async def test_a_session_of_the_engine_that_fails_is_internal_and_alone(where: str) -> None:
    """In a step, or in the engine's own thread."""
    async with clips() as server:
        bad, good = await server.opened(prompt=where), await server.opened()
        for call in (bad, good):
            await call.write(credit(8))
        assert (await failure(bad)).code() == grpc.StatusCode.INTERNAL
        await good.write(finishing())
        assert len(frames_of(await responses(good))) == 8
        await server.all_free()
        assert server.metric("realtide_sessions_closed_total", outcome="server_error") == 1


async def test_who_never_reads_holds_up_only_itself() -> None:
    """Raw frames of 768 kB: a few fill every buffer on the way; then the session is not advanced any more."""
    engine = ClipEngine(sizes=((512, 512), (32, 16)))
    async with clips(engine, max_pending_frame_bytes=1 << 22) as server:
        slow = await server.opened(credit=300)
        (unread,) = engine.opened

        def held() -> bool:
            """It stands still at the bound: 5 frames are 4 MiB; blocks in work come on top."""
            waiting = (unread.state.sent + len(unread.beside)) - server.metric(
                "realtide_frames_total", stage="decoded"
            )
            return server.metric("realtide_sessions", state="parked") == 1 and 0 < waiting <= 5 + 2 * BLOCK

        await until(held)
        quick = await server.opened(credit=300, width=32, height=16, length_frames=300)
        assert len(frames_of(await responses(quick))) == 300
        # The way to the client may take a few more frames first; then it is full again.
        await until(lambda: server.metric("realtide_sessions", state="parked") == 1)
        assert unread.state.sent < 300
        slow.cancel()
        await server.all_free()
        assert server.metric("realtide_sessions", state="parked") == 0


async def test_who_reads_late_gets_everything() -> None:
    async with clips(max_pending_events=4) as server:
        call = await server.opened(credit=200, length_frames=200)
        await asyncio.sleep(0.1)
        assert len(frames_of(await responses(call))) == 200


async def test_silence_counts_only_while_the_client_is_waited_for() -> None:
    """A client with credit that the engine is slow to use up may be silent; one without may not."""
    engine = ClipEngine(delay=0.2)
    async with clips(engine, idle_timeout=0.3) as server:
        call = await server.opened(credit=11)  # three steps of 0.2 s
        await until_frame(call, 11)
        error = await failure(call)
        assert error.code() == grpc.StatusCode.DEADLINE_EXCEEDED
        assert "nothing came from the client" in (error.details() or "")
        paused = await server.opened(credit=3)
        await until_frame(paused, 3)
        await paused.write(pausing("p"))
        await paused.write(credit(9))
        for _ in range(4):  # a sign of life keeps a paused session
            await asyncio.sleep(0.15)
            await paused.write(credit(9))
        error = await failure(paused)
        assert error.code() == grpc.StatusCode.DEADLINE_EXCEEDED
        await server.all_free()


async def test_controls_and_credit_reach_a_session_at_work() -> None:
    """Not only when its credit is used up."""
    gate = threading.Event()
    engine = ClipEngine(gate=gate)
    async with clips(engine) as server:
        call = await server.opened(prompt="red", credit=100, seed=1)
        await until(lambda: engine.at_gate)
        await call.write(prompting("p", "green"))
        await call.write(credit(120))
        await call.write(pausing("stop"))
        for _ in range(2):
            await until_kind(call, "accepted")
        gate.set()
        found: list[Any] = []
        while (stopped := await until_kind(call, "applied", found)).control_id != "stop":
            pass
        assert stopped.position < 100
        await call.write(playing("go"))
        await until_frame(call, 120, found)
        (applied,) = (
            one.prompt_applied
            for one in found
            if kinds([one]) == ["prompt_applied"] and one.prompt_applied.control_id
        )
        assert applied.first_frame < 100
        call.cancel()
        await server.all_free()


async def test_video_models_are_named_to_who_asks_for_speech_and_the_other_way_round() -> None:
    from tests.server.engine import BurstEngine

    async with clips(more=[BurstEngine()]) as server:
        call = await server.opened(credit=1)  # the only one of its kind
        assert len(frames_of(await until_frame(call, 1))) == 1
        call.cancel()
        call = server.stream()
        await call.write(opening(session=common_pb2.SessionOptions(model="bursts")))
        error = await failure(call)
        assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
        assert violation(error) == ("open.session.model", "'bursts' is a speech model, video models: clips")


async def test_several_executors_share_a_queue() -> None:
    first, second = ClipEngine(slots=1), ClipEngine(slots=1)
    async with clips(first, more=[second]) as server:
        calls = [await server.opened(length_frames=9) for _ in range(2)]
        assert first.free_slots == second.free_slots == 0
        for call in calls:
            await call.write(credit(9))
        for call in calls:
            assert len(frames_of(await responses(call))) == 9
        await server.all_free()


async def test_the_encoder_is_closed_with_the_session(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []

    class Watched:
        group = 2

        def __init__(self, options: video_pb2.VideoOptions) -> None:
            self.closed = 0
            made.append(self)

        def __call__(self, first: int, frames: Any) -> Any:
            from realtide.server.frames import Encoded

            return Encoded(b"x")

        def close(self) -> None:
            self.closed += 1

    monkeypatch.setattr("realtide.server.video_service.encoder_for", Watched)
    async with clips() as server:
        ended = await server.opened(credit=4, length_frames=4)
        await responses(ended)
        cancelled = await server.opened(credit=4)
        cancelled.cancel()
        failed = await server.opened(prompt="poison", credit=4)
        await failure(failed)
        wrong = await server.opened()
        await wrong.write(Request())
        await failure(wrong)
        await until(lambda: [one.closed for one in made] == [1, 1, 1, 1])
        await server.all_free()
