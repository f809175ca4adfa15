"""A speech session over the wire: results, controls with two receipts, checkpoints, resume, back-pressure."""

from __future__ import annotations

import asyncio
import json
import threading
from dataclasses import replace
from typing import Any

import grpc
import numpy as np
import pytest

from realtide.server.checkpoint import seal, unseal
from realtide_client.v1 import common_pb2, speech_pb2
from tests.server.engine import BurstEngine, pcm16, quiet, tone
from tests.server.helpers import (
    Request,
    Running,
    audio,
    failure,
    finish,
    opening,
    responses,
    running,
    until,
    violation,
)

SPEECH = np.concatenate([quiet(0.2), tone(0.32), quiet(0.2), tone(0.2), quiet(1.2), tone(0.4), quiet(0.2)])
FLOAT32 = speech_pb2.AUDIO_ENCODING_FLOAT32


def kinds(found: list[Any]) -> list[str]:
    return [str(one.WhichOneof("message")) for one in found]


def finals(found: list[Any]) -> list[str]:
    return [one.final.text for one in found if one.WhichOneof("message") == "final"]


async def send(call: Any, samples: Any, chunk: int = 1600) -> None:
    for start in range(0, len(samples), chunk):
        await call.write(audio(pcm16(samples[start : start + chunk])))


def control(control_id: str, **action: Any) -> speech_pb2.SpeechStreamRequest:
    return Request(control=speech_pb2.SpeechControl(control_id=control_id, **action))


async def test_opened_says_what_was_negotiated() -> None:
    settings: dict[str, Any] = {"idle_timeout": 33.0, "max_message_bytes": 65536, "max_audio_ahead": 2.5}
    async with running(**settings) as server:
        call = server.stream()
        boosts = [speech_pb2.PhraseBoost(phrases=["flat white"])]
        await call.write(opening(rate=8000, beam=4, max_lookahead_ms=320, boosts=boosts))
        opened = (await call.read()).opened
        assert opened.session.model == "bursts"
        assert opened.session.model_version == "1.2"
        assert opened.session.session_id
        assert not opened.session.resumed
        assert opened.session.limits.idle_timeout_seconds == 33.0
        assert opened.session.limits.max_message_bytes == 65536
        assert opened.limits.max_audio_ahead_seconds == 2.5
        assert (opened.limits.min_sample_rate_hz, opened.limits.max_sample_rate_hz) == (8000, 48000)
        assert opened.audio.sample_rate_hz == 8000
        assert opened.frame_seconds == 0.04
        options = opened.options
        assert options.interim_results
        assert options.word_times
        assert (options.beam, options.max_alternatives, options.max_lookahead_ms) == (4, 1, 320)
        assert options.endpointing.final_silence_ms == 800
        assert options.boosts[0].boost == 2.0
        assert options.language_code == "en-US"
        call.cancel()


@pytest.mark.parametrize("rate", [8000, 16000, 44100, 48000])
@pytest.mark.parametrize("encoding", [speech_pb2.AUDIO_ENCODING_LINEAR16, FLOAT32])
async def test_words_come_out(rate: int, encoding: int) -> None:
    async with running() as server:
        call = await server.opened(rate=rate, encoding=encoding)
        speech = np.concatenate([quiet(0.2, rate), tone(0.32, rate), quiet(1.0, rate)])
        for start in range(0, len(speech), 1111):
            chunk = speech[start : start + 1111]
            await call.write(audio(chunk.tobytes() if encoding == FLOAT32 else pcm16(chunk), start))
        await call.write(finish())
        found = await responses(call)
        assert finals(found) == ["burst1", ""]
        final = next(one.final for one in found if one.WhichOneof("message") == "final")
        assert final.words[0].start_seconds == pytest.approx(0.2, abs=0.05)
        assert final.words[0].end_seconds == pytest.approx(0.52, abs=0.05)
        assert final.words[0].lookahead_ms == pytest.approx(80)
        assert final.reason == speech_pb2.UTTERANCE_END_REASON_ENDPOINT
        timing = final.timing
        assert timing.processed_position <= timing.received_position <= len(speech)
        assert timing.processed_position == pytest.approx(1.32 * rate, rel=0.05)
        assert 0 <= timing.processing_seconds <= timing.session_seconds
        await server.all_free()
        assert server.metric("realtide_audio_seconds_total") == pytest.approx(len(speech) / rate)


async def test_options_are_obeyed() -> None:
    async with running() as server:
        call = await server.opened(interim_results=False, word_times=False)
        await send(call, SPEECH)
        await call.write(finish())
        found = await responses(call)
        assert "partial" not in kinds(found)
        assert finals(found) == ["burst1 burst2", "burst1"]
        assert all(not one.final.words for one in found)


async def test_closing_the_client_side_is_a_finish() -> None:
    async with running() as server:
        call = await server.opened()
        await send(call, SPEECH)
        await call.done_writing()
        assert finals(await responses(call)) == ["burst1 burst2", "burst1"]
        await server.all_free()


async def test_controls_get_two_receipts_in_order() -> None:
    async with running() as server:
        call = await server.opened()
        await send(call, tone(0.4))
        await call.write(control("lower", set_interim_results=speech_pb2.SetInterimResults(enabled=False)))
        rules = speech_pb2.EndpointingRules(final_silence_ms=200)
        await call.write(control("rules", set_endpointing=speech_pb2.SetEndpointing(rules=rules)))
        await send(call, quiet(0.4))
        await call.write(control("cut", flush=common_pb2.Flush()))
        await call.write(finish())
        found = await responses(call)
        receipts = [
            (kind, getattr(one, kind).control_id, getattr(one, kind).position)
            for one in found
            if (kind := one.WhichOneof("message")) in ("accepted", "applied")
        ]
        for name, position in (("lower", 6400), ("rules", 6400), ("cut", 12800)):
            mine = [(kind, at) for kind, control_id, at in receipts if control_id == name]
            assert mine == [("accepted", position), ("applied", position)]
        assert all(one.applied.delay_seconds >= 0 for one in found)
        # 200 ms of silence cut what 800 would not have; the flush then cut the rest.
        reasons = [one.final.reason for one in found if one.WhichOneof("message") == "final"]
        assert reasons[:2] == [
            speech_pb2.UTTERANCE_END_REASON_ENDPOINT,
            speech_pb2.UTTERANCE_END_REASON_FLUSH,
        ]


async def test_more_controls_than_may_be_pending_wait_and_all_are_applied() -> None:
    engine = BurstEngine(delay=0.005)
    async with running(engine, max_pending_controls=2) as server:
        call = await server.opened()
        await send(call, quiet(0.4))
        for index in range(10):
            await call.write(control(str(index), flush=common_pb2.Flush()))
        await call.write(finish())
        found = await responses(call)
        assert [one.applied.control_id for one in found if one.WhichOneof("message") == "applied"] == [
            str(index) for index in range(10)
        ]


async def checkpointed(server: Running, at: int) -> tuple[list[Any], Any]:
    """Send SPEECH up to sample `at`, get a checkpoint, drop the call: what came, and the checkpoint."""
    call = await server.opened()
    await send(call, SPEECH[:at])
    await call.write(Request(checkpoint_request=common_pb2.CheckpointRequest(request_id="mine")))
    found = []
    while (response := await call.read()).WhichOneof("message") != "checkpoint":
        found.append(response)
    call.cancel()
    await server.all_free()
    return found, response.checkpoint


@pytest.mark.parametrize("at", [0, 1600, 5000, 20000, len(SPEECH)])
async def test_a_resumed_session_goes_on_as_if_nothing_had_been(at: int) -> None:
    """Also on another server, which only shares the key."""
    key = "a key of both servers"
    async with running(checkpoint_key=key) as server:
        call = await server.opened()
        await send(call, SPEECH)
        await call.write(finish())
        whole = await responses(call)
        before, checkpoint = await checkpointed(server, at)
        assert checkpoint.position == at
        assert checkpoint.request_id == "mine"
    async with running(checkpoint_key=key) as other:
        call = other.stream()
        await call.write(Request(resume=common_pb2.Resume(checkpoint=checkpoint.data)))
        opened = (await call.read()).opened
        assert opened.session.resumed
        assert opened.session.position == at
        for start in range(at, len(SPEECH), 1000):
            await call.write(audio(pcm16(SPEECH[start : start + 1000]), start))
        await call.write(finish())
        after = await responses(call)
        await other.all_free()
        assert other.metric("realtide_resume_seconds_count") == 1

    def essence(found: list[Any]) -> list[Any]:
        return [
            (kind, getattr(one, kind).utterance, getattr(one, kind).text)
            for one in found
            if (kind := one.WhichOneof("message")) in ("partial", "final")
        ]

    assert essence(before) + essence(after) == essence(whole)


async def test_a_resumed_session_has_its_options_and_later_controls_count() -> None:
    async with running() as server:
        call = await server.opened(beam=3, word_times=False, boosts=[speech_pb2.PhraseBoost(phrases=["hi"])])
        dial = speech_pb2.SetLookahead(bias=1.5, max_lookahead_ms=80)
        await call.write(control("dial", set_lookahead=dial))
        await call.write(control("none", set_phrase_boosts=speech_pb2.SetPhraseBoosts()))
        await call.write(Request(checkpoint_request=common_pb2.CheckpointRequest()))
        while (response := await call.read()).WhichOneof("message") != "checkpoint":
            pass
        resumed = server.stream()
        await resumed.write(Request(resume=common_pb2.Resume(checkpoint=response.checkpoint.data)))
        options = (await resumed.read()).opened.options
        assert (options.beam, options.lookahead_bias, options.max_lookahead_ms) == (3, 1.5, 80)
        assert not options.word_times
        assert not options.boosts
        await resumed.write(control("off", set_lookahead=speech_pb2.SetLookahead(max_lookahead_ms=-1)))
        await resumed.write(Request(checkpoint_request=common_pb2.CheckpointRequest()))
        while (response := await resumed.read()).WhichOneof("message") != "checkpoint":
            pass
        setup = speech_pb2.SpeechOpened.FromString(unseal(response.checkpoint.data, None)[0].setup)
        assert not setup.options.HasField("max_lookahead_ms")
        for one in (call, resumed):
            one.cancel()
        await server.all_free()


async def test_periodic_checkpoints() -> None:
    async with running(min_checkpoint_interval_ms=100) as server:
        call = await server.opened(session=common_pb2.SessionOptions(checkpoint_interval_ms=500))
        await send(call, SPEECH)
        await call.write(finish())
        found = await responses(call)
        positions = [one.checkpoint.position for one in found if one.WhichOneof("message") == "checkpoint"]
        assert positions == [8000, 16000, 24000, 32000, 40000]
        assert server.metric("realtide_checkpoint_bytes_count") == 5


async def test_checkpoints_that_do_not_fit() -> None:
    async with running() as server:
        _, checkpoint = await checkpointed(server, 1600)
        header, state = unseal(checkpoint.data, None)
        damaged = bytearray(checkpoint.data)
        damaged[len(damaged) // 2] ^= 1
        cases = {
            "seal does not match": bytes(damaged),
            "of model other": seal(replace(header, model="other"), state, None),
            "of model bursts 0.9": seal(replace(header, model_version="0.9"), state, None),
            "not of realtide.v1.Speech": seal(replace(header, service="realtide.v1.Video"), state, None),
            "not of this engine": seal(header, json.dumps({"state": 1}).encode(), None),
            "damaged setup": seal(replace(header, setup=b"\xff\xff"), state, None),
            "version 9": checkpoint.data[:4] + b"\x09" + checkpoint.data[5:],
        }
        for words, data in cases.items():
            call = server.stream()
            await call.write(Request(resume=common_pb2.Resume(checkpoint=data)))
            error = await failure(call)
            assert error.code() == grpc.StatusCode.FAILED_PRECONDITION, words
            field, problem = violation(error)
            assert field == "resume.checkpoint"
            assert words.removeprefix("not ") in problem
        await server.all_free()


async def test_far_faster_than_real_time_is_slowed_not_lost() -> None:
    """10 minutes of audio at once: the server takes in its bound, then stops reading, and nothing is lost."""
    gate = threading.Event()
    engine = BurstEngine(gate=gate)
    async with running(engine, max_audio_ahead=1.0) as server:
        call = await server.opened(interim_results=False)
        speech = np.concatenate([SPEECH, quiet(1.0)] * 140)
        sending = asyncio.create_task(send(call, speech, 16000))
        await until(lambda: engine.at_gate)
        taken = -1.0
        while taken != (taken := server.metric("realtide_audio_seconds_total")):
            await asyncio.sleep(0.1)
        # What waits is the bound, the piece that was to be added and the one at the engine.
        assert taken <= 1.0 + 1.0 + 0.2
        gate.set()
        await sending
        await call.write(finish())
        assert finals(await responses(call)) == [*["burst1 burst2", "burst1"] * 140, ""]
        await server.all_free()


async def test_who_reads_slowly_slows_only_itself() -> None:
    engine = BurstEngine(chatty=True)
    async with running(engine, max_pending_events=8) as server:
        slow = await server.opened()
        quick = await server.opened()
        # Each result holds its utterance's words: enough of them fill every buffer on the way to a client,
        # however far gRPC lets its windows grow.
        words = np.concatenate([np.concatenate([tone(0.04), quiet(0.04)])] * 250)
        lazy = asyncio.create_task(send(slow, np.concatenate([words] * 40)))
        await until(lambda: server.metric("realtide_sessions", state="parked") == 1, 30)
        await send(quick, SPEECH)
        await quick.write(finish())
        assert finals(await responses(quick)) == ["burst1 burst2", "burst1"]
        # The way to the client may take a few more results first; then it is full again.
        await until(lambda: server.metric("realtide_sessions", state="parked") == 1, 30)
        assert not lazy.done()  # it is held by flow control
        slow.cancel()
        await asyncio.gather(lazy, return_exceptions=True)
        await server.all_free()
        assert server.metric("realtide_sessions", state="parked") == 0


async def test_who_reads_late_gets_everything() -> None:
    engine = BurstEngine(chatty=True)
    async with running(engine, max_pending_events=4) as server:
        call = await server.opened()
        speech = np.concatenate([SPEECH, quiet(1.0)] * 3)
        await send(call, speech)
        await call.write(finish())
        # The transport's own buffers hold some; the server has gone no further than it may.
        await until(lambda: server.metric("realtide_audio_seconds_total") > 0)
        found = await responses(call)
        assert finals(found) == [*["burst1 burst2", "burst1"] * 3, ""]
        assert kinds(found).count("partial") == len(speech) // 640


async def test_a_session_of_the_engine_that_fails_is_internal_and_alone() -> None:
    async with running() as server:
        bad, good = await server.opened(encoding=FLOAT32), await server.opened()
        poisoned = tone(0.1)
        poisoned[3] = 0.777
        await bad.write(audio(poisoned.tobytes()))
        error = await failure(bad)
        assert error.code() == grpc.StatusCode.INTERNAL
        assert "poison" not in (error.details() or "")  # the log has it, the client does not
        await send(good, SPEECH)
        await good.write(finish())
        assert finals(await responses(good)) == ["burst1 burst2", "burst1"]
        await server.all_free()
        assert server.metric("realtide_sessions_closed_total", outcome="server_error") == 1


async def test_several_executors_share_a_queue() -> None:
    first, second = BurstEngine(slots=1), BurstEngine(slots=1)
    async with running(first, more=[second]) as server:
        calls = [await server.opened() for _ in range(2)]
        assert first.free_slots == second.free_slots == 0
        for call in calls:
            await send(call, SPEECH)
            await call.write(finish())
        for call in calls:
            assert finals(await responses(call)) == ["burst1 burst2", "burst1"]
        await server.all_free()
