"""Every bad input of a video session: its status, the field it names, and nobody's slot lost."""

from __future__ import annotations

from typing import Any

import grpc
import pytest

from realtide_client.v1 import common_pb2, video_pb2
from tests.server.helpers import failure, responses, until, violation
from tests.server.video_engine import ClipEngine
from tests.server.video_helpers import (
    H264,
    JPEG,
    RAW,
    Request,
    checkpointing,
    clips,
    control,
    credit,
    finishing,
    frames_of,
    opening,
    pausing,
    prompting,
    until_frame,
    until_kind,
)

INVALID = grpc.StatusCode.INVALID_ARGUMENT
Session = common_pb2.SessionOptions
SETTINGS: dict[str, Any] = {
    "max_prompt_characters": 40,
    "max_video_credit": 2.0,
    "max_video_frames": 1000,
    "max_checkpoint_bytes": 65536,
}
NAN, INFINITE = float("nan"), float("inf")

FIRST = [
    (credit(1), "credit", "open"),
    (finishing(), "finish", "open"),
    (prompting("c", "a cat"), "control", "open"),
    (checkpointing(), "checkpoint_request", "open"),
    (Request(), "message", "open"),
    (Request(resume=common_pb2.Resume()), "resume.checkpoint", "1 to 65536"),
    (Request(resume=common_pb2.Resume(checkpoint=b"x" * 70000)), "resume.checkpoint", "1 to 65536"),
    (Request(open=video_pb2.VideoOpen()), "open.options", "required"),
    (opening(prompt=""), "open.options.prompt", "1 to 40"),
    (opening(prompt=" \n"), "open.options.prompt", "1 to 40"),
    (opening(prompt="a" * 41), "open.options.prompt", "41 characters, must be 1 to 40"),
    (opening(prompt="a b c d e f g h"), "open.options.prompt", "9 tokens, at most 8"),
    (opening(width=64), "open.options.width", "64x16, must be one of 32x16, 16x16"),
    (opening(width=0), "open.options.width", "0x16, must be one of 32x16, 16x16"),
    (opening(height=32), "open.options.height", "32x32, must be one of 32x16, 16x16"),
    (opening(width=16, height=17), "open.options.height", "16x17, must be one of"),
    (opening(width=16, height=2**32 - 1), "open.options.height", "must be one of"),
    (opening(frames_per_second=0.5), "open.options.frames_per_second", "0.5, must be 1 to 60"),
    (opening(frames_per_second=0.0), "open.options.frames_per_second", "1 to 60"),
    (opening(frames_per_second=60.5), "open.options.frames_per_second", "1 to 60"),
    (opening(frames_per_second=NAN), "open.options.frames_per_second", "1 to 60"),
    (opening(frames_per_second=INFINITE), "open.options.frames_per_second", "1 to 60"),
    (opening(length_frames=0), "open.options.length_frames", "0, must be 1 to 1000"),
    (opening(length_frames=1001), "open.options.length_frames", "1001, must be 1 to 1000"),
    (opening(encoding=0), "open.options.encoding", "1 (RAW_RGB), 2 (JPEG), 3 (H264_FMP4)"),
    (opening(encoding=9), "open.options.encoding", "1 (RAW_RGB), 2 (JPEG), 3 (H264_FMP4)"),
    (opening(encoding=JPEG, jpeg_quality=0), "open.options.jpeg_quality", "0, must be 1 to 100"),
    (opening(encoding=JPEG, jpeg_quality=101), "open.options.jpeg_quality", "1 to 100"),
    (opening(encoding=RAW, jpeg_quality=90), "open.options.jpeg_quality", "only for JPEG, not for RAW_RGB"),
    (opening(encoding=H264, h264_crf=52), "open.options.h264_crf", "52, must be 0 to 51"),
    (opening(encoding=JPEG, h264_crf=20), "open.options.h264_crf", "only for H264_FMP4, not for JPEG"),
    (opening(credit=33), "open.credit", "33, must be 0 (the credit before) to 32"),
    (opening(credit=2**64 - 1), "open.credit", "to 32"),
    (opening(session=Session(checkpoint_interval_ms=999)), "open.session.checkpoint_interval_ms", "1000"),
]

# After 7 frames of a video of 20; the credit is 7.
LATER = [
    (opening(), "open", "open already"),
    (Request(resume=common_pb2.Resume(checkpoint=b"x")), "resume", "open already"),
    (Request(), "message", "exactly one"),
    (credit(6), "credit.position", "6, must be 7 (the credit before) to 39 (7 frames were sent)"),
    (credit(0), "credit.position", "must be 7"),
    (credit(40), "credit.position", "40, must be 7 (the credit before) to 39"),
    (control("c"), "control.action", "exactly one"),
    (pausing(""), "control.control_id", "at least one"),
    (pausing("é" * 65), "control.control_id", "at most 128"),
    (prompting("c", ""), "control.set_prompt.prompt", "1 to 40"),
    (prompting("c", "a" * 41), "control.set_prompt.prompt", "1 to 40"),
    (prompting("c", "a b c d e f g h"), "control.set_prompt.prompt", "at most 8"),
    (
        prompting("c", "cat", 6),
        "control.set_prompt.at_frame",
        "6, must be 7 (the next frame to be sent) to 19",
    ),
    (prompting("c", "cat", 20), "control.set_prompt.at_frame", "20, must be 7"),
    (checkpointing("x" * 129), "checkpoint_request.request_id", "at most 128"),
]


@pytest.mark.parametrize(("request_", "field", "range_"), FIRST, ids=lambda value: str(value)[:60].strip())
async def test_first_message(request_: video_pb2.VideoStreamRequest, field: str, range_: str) -> None:
    async with clips(**SETTINGS) as server:
        call = server.stream()
        await call.write(request_)
        error = await failure(call)
        assert error.code() == INVALID
        named, problem = violation(error)
        assert named == field
        assert range_ in problem
        # Refused before a slot was taken.
        assert not server.engine.opened
        assert server.metric("realtide_sessions_opened_total") == 0


@pytest.mark.parametrize(("request_", "field", "range_"), LATER, ids=lambda value: str(value)[:60].strip())
async def test_later_message(request_: video_pb2.VideoStreamRequest, field: str, range_: str) -> None:
    """The stream at fault ends; the one beside it gets its frames."""
    async with clips(**SETTINGS) as server:
        bystander = await server.opened(length_frames=20)
        call = await server.opened(credit=6, length_frames=20)
        await call.write(credit(7))
        await until_frame(call, 7)
        await call.write(request_)
        error = await failure(call)
        assert error.code() == INVALID
        named, problem = violation(error)
        assert named == field
        assert range_ in problem
        await bystander.write(credit(20))
        assert len(frames_of(await responses(bystander))) == 20
        await server.all_free()
        assert server.metric("realtide_sessions_closed_total", outcome="client_error") == 1
        assert server.metric("realtide_sessions_closed_total", outcome="ok") == 1


async def test_the_latest_frame_of_an_endless_video() -> None:
    async with clips(**SETTINGS) as server:
        call = await server.opened()
        await call.write(prompting("last", "cat", 999))
        await until_kind(call, "accepted")
        await call.write(prompting("beyond", "cat", 1000))
        assert violation(await failure(call))[0] == "control.set_prompt.at_frame"


@pytest.mark.parametrize("after", [credit(9), pausing("c"), finishing()], ids=["credit", "control", "finish"])
async def test_after_finish(after: video_pb2.VideoStreamRequest) -> None:
    async with clips(ClipEngine(delay=0.05)) as server:
        call = await server.opened(credit=40)  # so much work that the end has not come when more arrives
        await call.write(finishing())
        await call.write(after)
        error = await failure(call)
        assert error.code() == INVALID
        assert "after finish" in violation(error)[1]
        await server.all_free()


async def test_same_control_twice() -> None:
    async with clips() as server:
        call = await server.opened()
        for _ in range(2):
            await call.write(prompting("again", "cat"))  # without credit no block is begun
        error = await failure(call)
        assert error.code() == INVALID
        assert violation(error)[0] == "control.control_id"
        await server.all_free()


async def test_one_control_too_many_is_refused_and_holds_up_no_credit() -> None:
    async with clips(max_pending_controls=8) as server:
        call = await server.opened()
        for index in range(8):
            await call.write(prompting(str(index), "cat", 100 + index))
        await call.write(credit(12))
        await until_frame(call, 12)
        await call.write(pausing("one more"))
        error = await failure(call)
        assert error.code() == INVALID
        assert violation(error) == (
            "control",
            "8 controls await their `applied` receipt already, no more are accepted",
        )
        await server.all_free()


async def test_message_over_the_limit() -> None:
    async with clips(max_message_bytes=4096) as server:
        call = await server.opened()
        await call.write(prompting("c", "x" * 5000))
        error = await failure(call)
        assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert violation(error)[0] == "control"
        await server.all_free()


async def test_models_that_are_not_there() -> None:
    async with clips(more=[ClipEngine(model="other")]) as server:
        call = server.stream()
        await call.write(opening(session=Session(model="nobody")))
        error = await failure(call)
        assert error.code() == grpc.StatusCode.NOT_FOUND
        assert "clips, other" in (error.details() or "")
        call = server.stream()
        await call.write(opening())
        error = await failure(call)
        assert violation(error) == ("open.session.model", "must be one of clips, other")


async def test_a_server_without_video() -> None:
    from tests.server.engine import BurstEngine
    from tests.server.helpers import connected
    from tests.server.video_helpers import Clips

    async with connected([BurstEngine()]) as (server, channel):
        call = Clips(server, ClipEngine(), channel).stream()
        await call.write(opening())
        assert (await failure(call)).code() == grpc.StatusCode.NOT_FOUND
        call = Clips(server, ClipEngine(), channel).stream()
        await call.write(opening(session=Session(model="bursts")))
        error = await failure(call)
        assert violation(error) == (
            "open.session.model",
            "'bursts' is a speech model, video models: none is served here",
        )


async def test_bytes_that_are_no_message() -> None:
    async with clips() as server:
        call: Any = server.channel.stream_stream(
            "/realtide.v1.Video/Stream",
            request_serializer=lambda data: data,
            response_deserializer=video_pb2.VideoStreamResponse.FromString,
        )(None)
        await call.write(opening().SerializeToString())
        assert (await call.read()).WhichOneof("message") == "opened"
        await call.write(b"\xff\xff\xff\xff\xff")
        assert (await failure(call)).code() == INVALID
        await server.all_free()


async def test_full_slots_are_refused_with_a_time_to_come_back() -> None:
    async with clips(ClipEngine(slots=1), queue_limit=0) as server:
        held = await server.opened()
        call = server.stream()
        await call.write(opening())
        error = await failure(call)
        assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        held.cancel()
        await until(lambda: server.engine.free_slots == 1)
