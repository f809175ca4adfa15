"""Every bad input: its status, the field it names, and nobody's slot lost."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import numpy as np
import pytest

from realtide_client.v1 import common_pb2, speech_pb2
from tests.server.engine import BurstEngine, pcm16, quiet, tone
from tests.server.helpers import Request, audio, failure, finish, opening, responses, running, violation

INVALID = grpc.StatusCode.INVALID_ARGUMENT
FLOAT32 = speech_pb2.AUDIO_ENCODING_FLOAT32
Rules = speech_pb2.EndpointingRules
Boost = speech_pb2.PhraseBoost
Session = common_pb2.SessionOptions


def control(**action: Any) -> speech_pb2.SpeechStreamRequest:
    return Request(control=speech_pb2.SpeechControl(control_id="c", **action))


FIRST = [
    (audio(b"\0\0"), "audio", "open"),
    (finish(), "finish", "open"),
    (control(flush=common_pb2.Flush()), "control", "open"),
    (Request(checkpoint_request=common_pb2.CheckpointRequest()), "checkpoint_request", "open"),
    (Request(), "message", "open"),
    (Request(resume=common_pb2.Resume()), "resume.checkpoint", "1 to"),
    (Request(resume=common_pb2.Resume(checkpoint=b"x" * 70000)), "resume.checkpoint", "1 to 65536"),
    (opening(encoding=0), "open.audio.encoding", "1 (LINEAR16) or 2 (FLOAT32)"),
    (opening(encoding=77), "open.audio.encoding", "1 (LINEAR16) or 2 (FLOAT32)"),
    (opening(rate=7999), "open.audio.sample_rate_hz", "8000 to 48000"),
    (opening(rate=48001), "open.audio.sample_rate_hz", "8000 to 48000"),
    (opening(rate=0), "open.audio.sample_rate_hz", "8000 to 48000"),
    (opening(beam=0), "open.options.beam", "1 to 8"),
    (opening(beam=9), "open.options.beam", "1 to 8"),
    (opening(beam=2, max_alternatives=3), "open.options.max_alternatives", "1 to 2"),
    (opening(max_alternatives=0), "open.options.max_alternatives", "1 to 1"),
    (opening(lookahead_bias=8.5), "open.options.lookahead_bias", "-8 to 8"),
    (opening(lookahead_bias=float("nan")), "open.options.lookahead_bias", "-8 to 8"),
    (opening(lookahead_bias=float("-inf")), "open.options.lookahead_bias", "-8 to 8"),
    (opening(max_lookahead_ms=2**31), "open.options.max_lookahead_ms", "0 to"),
    (opening(language_code="xx"), "open.options.language_code", "en-US, en-GB"),
    (
        opening(endpointing=Rules(final_silence_ms=39)),
        "open.options.endpointing.final_silence_ms",
        "40 to 30000",
    ),
    (opening(endpointing=Rules(no_speech_ms=30001)), "open.options.endpointing.no_speech_ms", "40 to 30000"),
    (
        opening(endpointing=Rules(max_utterance_ms=999)),
        "open.options.endpointing.max_utterance_ms",
        "1000 to",
    ),
    (
        opening(endpointing=Rules(likely_silence_ms=500, final_silence_ms=400)),
        "open.options.endpointing.likely_silence_ms",
        "at most final_silence_ms (400)",
    ),
    (opening(boosts=[Boost()]), "open.options.boosts[0].phrases", "at least one"),
    (opening(boosts=[Boost(phrases=["ok", ""])]), "open.options.boosts[0].phrases[1]", "1 to 20"),
    (opening(boosts=[Boost(phrases=["  "])]), "open.options.boosts[0].phrases[0]", "1 to 20"),
    (opening(boosts=[Boost(phrases=["a" * 21])]), "open.options.boosts[0].phrases[0]", "1 to 20"),
    (
        opening(boosts=[Boost(phrases=["naïve"])]),
        "open.options.boosts[0].phrases[0]",
        "'ï' cannot be written",
    ),
    (opening(boosts=[Boost(phrases=["a"] * 3)] * 2), "open.options.boosts", "at most 5"),
    (opening(boosts=[Boost(phrases=["a"], boost=11)]), "open.options.boosts[0].boost", "-10 to 10"),
    (opening(boosts=[Boost(phrases=["a"], boost=float("nan"))]), "open.options.boosts[0].boost", "-10 to 10"),
    (
        opening(session=Session(checkpoint_interval_ms=999)),
        "open.session.checkpoint_interval_ms",
        "least 1000",
    ),
]

LATER = [
    (audio(b""), "audio.data", "at least one sample"),
    (audio(b"\0\0\0"), "audio.data", "multiple of 2"),
    (audio(b"\0\0", position=5), "audio.position", "must be 1600"),
    (opening(), "open", "open already"),
    (Request(resume=common_pb2.Resume(checkpoint=b"x")), "resume", "open already"),
    (Request(), "message", "exactly one"),
    (
        Request(control=speech_pb2.SpeechControl(flush=common_pb2.Flush())),
        "control.control_id",
        "at least one",
    ),
    (
        Request(control=speech_pb2.SpeechControl(control_id="é" * 65, flush=common_pb2.Flush())),
        "control.control_id",
        "at most 128",
    ),
    (control(), "control.action", "exactly one"),
    (
        control(set_lookahead=speech_pb2.SetLookahead(bias=float("inf"))),
        "control.set_lookahead.bias",
        "-8 to 8",
    ),
    (
        control(set_lookahead=speech_pb2.SetLookahead(max_lookahead_ms=-2)),
        "control.set_lookahead.max_lookahead_ms",
        "-1 to",
    ),
    (control(set_endpointing=speech_pb2.SetEndpointing()), "control.set_endpointing.rules", "required"),
    (
        control(set_endpointing=speech_pb2.SetEndpointing(rules=Rules(no_speech_ms=1))),
        "control.set_endpointing.rules.no_speech_ms",
        "40 to 30000",
    ),
    (
        control(set_phrase_boosts=speech_pb2.SetPhraseBoosts(boosts=[Boost()])),
        "control.set_phrase_boosts.boosts[0].phrases",
        "at least one",
    ),
    (
        Request(checkpoint_request=common_pb2.CheckpointRequest(request_id="x" * 129)),
        "checkpoint_request.request_id",
        "at most 128",
    ),
]

SETTINGS: dict[str, Any] = {"max_phrases": 5, "max_phrase_characters": 20, "max_checkpoint_bytes": 65536}


@pytest.mark.parametrize(("request_", "field", "range_"), FIRST, ids=lambda value: str(value)[:50].strip())
async def test_first_message(request_: speech_pb2.SpeechStreamRequest, field: str, range_: str) -> None:
    async with running(**SETTINGS) as server:
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


@pytest.mark.parametrize(("request_", "field", "range_"), LATER, ids=lambda value: str(value)[:50].strip())
async def test_later_message(request_: speech_pb2.SpeechStreamRequest, field: str, range_: str) -> None:
    """The stream at fault ends; the one beside it recognizes what it always does."""
    async with running(**SETTINGS) as server:
        bystander = await server.opened()
        call = await server.opened()
        for stream in (call, bystander):
            await stream.write(audio(pcm16(tone(0.1))))
        await call.write(request_)
        error = await failure(call)
        assert error.code() == INVALID
        named, problem = violation(error)
        assert named == field
        assert range_ in problem
        await bystander.write(finish())
        finals = [
            one.final.text for one in await responses(bystander) if one.WhichOneof("message") == "final"
        ]
        assert finals == ["burst1"]
        await server.all_free()
        assert server.metric("realtide_sessions_closed_total", outcome="client_error") == 1
        assert server.metric("realtide_sessions_closed_total", outcome="ok") == 1


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
async def test_not_a_number(value: float) -> None:
    async with running() as server:
        call = await server.opened(encoding=FLOAT32)
        samples = quiet(0.1)
        samples[1234] = value
        await call.write(audio(samples.tobytes()))
        error = await failure(call)
        assert error.code() == INVALID
        assert violation(error) == ("audio.data", "holds NaN or infinity, samples must be finite")
        await server.all_free()


async def test_part_of_a_float() -> None:
    async with running() as server:
        call = await server.opened(encoding=FLOAT32)
        await call.write(audio(b"\0" * 6))
        error = await failure(call)
        assert "multiple of 4" in violation(error)[1]


@pytest.mark.parametrize(
    "after", [audio(b"\0\0"), control(flush=common_pb2.Flush()), finish()], ids=["audio", "control", "finish"]
)
async def test_after_finish(after: speech_pb2.SpeechStreamRequest) -> None:
    engine = BurstEngine(delay=0.05)
    async with running(engine) as server:
        call = await server.opened()
        await call.write(audio(pcm16(quiet(1.0))))  # so much work that the end has not come when more arrives
        await call.write(finish())
        await call.write(after)
        error = await failure(call)
        assert error.code() == INVALID
        assert "after finish" in violation(error)[1]
        await server.all_free()


async def test_same_control_twice() -> None:
    engine = BurstEngine(delay=0.05)
    async with running(engine) as server:
        call = await server.opened()
        await call.write(audio(pcm16(quiet(1.0))))
        await call.write(control(flush=common_pb2.Flush()))
        await call.write(control(flush=common_pb2.Flush()))
        error = await failure(call)
        assert error.code() == INVALID
        assert violation(error)[0] == "control.control_id"
        await server.all_free()


async def test_message_over_the_limit() -> None:
    async with running(max_message_bytes=4096) as server:
        call = await server.opened()
        await call.write(audio(bytes(5000)))
        error = await failure(call)
        assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        field, problem = violation(error)
        assert field == "audio"
        assert "at most 4096" in problem
        await server.all_free()


async def test_message_far_over_the_limit() -> None:
    """gRPC itself refuses it, before the bytes are kept."""
    async with running(max_message_bytes=4096, max_checkpoint_bytes=4096) as server:
        call = await server.opened()
        await call.write(audio(bytes(1 << 20)))
        error = await failure(call)
        assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        await server.all_free()


async def test_unknown_model() -> None:
    async with running() as server:
        call = server.stream()
        await call.write(opening(session=Session(model="nobody")))
        error = await failure(call)
        assert error.code() == grpc.StatusCode.NOT_FOUND
        assert "bursts" in (error.details() or "")
        assert not server.engine.opened


async def test_no_model_named_where_there_are_two() -> None:
    async with running(more=[BurstEngine(model="other")]) as server:
        call = server.stream()
        await call.write(opening())
        error = await failure(call)
        assert error.code() == INVALID
        assert violation(error) == ("open.session.model", "must be one of bursts, other")
        other = await server.opened(session=Session(model="other"))
        other.cancel()


async def test_bytes_that_are_no_message() -> None:
    async with running() as server:
        call: Any = server.channel.stream_stream(
            "/realtide.v1.Speech/Stream",
            request_serializer=lambda data: data,
            response_deserializer=speech_pb2.SpeechStreamResponse.FromString,
        )(None)
        await call.write(opening().SerializeToString())
        assert (await call.read()).WhichOneof("message") == "opened"
        await call.write(b"\xff\xff\xff\xff\xff")
        error = await failure(call)
        assert error.code() == INVALID
        await server.all_free()


async def test_an_end_that_overtakes_the_first_message() -> None:
    """The status must come though `opened` is still being written."""
    async with running() as server:
        for _ in range(50):
            call = server.stream()
            await call.write(opening())
            await call.write(audio(b"\0"))
            assert (await failure(call)).code() == INVALID
        await server.all_free()


async def test_close_without_a_message() -> None:
    async with running() as server:
        call = server.stream()
        await call.done_writing()
        error = await failure(call)
        assert error.code() == INVALID
        assert violation(error)[0] == "message"


async def test_no_error_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    async with running() as server:
        for request in (audio(b"\0\0"), opening(rate=1)):
            call = server.stream()
            await call.write(request)
            await failure(call)
        await asyncio.sleep(0)
    assert [record for record in caplog.records if record.levelname in ("ERROR", "CRITICAL")] == []
