"""Sessions against a real gRPC server: the grammar, and going on when connections break."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

import realtide_client as rt
from realtide_client.stream import SpeechStream
from tests.clients.conftest import Serve
from tests.clients.scripted import UTTERANCE, Script, checksum

EAGER = rt.RetryPolicy(max_retries=5, initial_seconds=0.01, max_seconds=0.05)


def speech(samples: int, seed: int = 7) -> np.ndarray[tuple[int], np.dtype[np.int16]]:
    return np.random.default_rng(seed).integers(-20000, 20000, samples, dtype=np.int16)


def expected(samples: np.ndarray[tuple[int], np.dtype[np.int16]]) -> list[str]:
    return [checksum(samples[i : i + UTTERANCE].tobytes()) for i in range(0, len(samples), UTTERANCE)]


async def say(
    stream: SpeechStream, samples: np.ndarray[tuple[int], np.dtype[np.int16]], piece: int = 160
) -> list[rt.Result]:
    """Send everything, finish, and return every result."""

    async def speak() -> None:
        for start in range(0, len(samples), piece):
            await stream.send(samples[start : start + piece])
            if start % (piece * 8) == 0:
                await asyncio.sleep(0)  # let results and breaks in between
        await stream.finish()

    async with asyncio.TaskGroup() as group:
        group.create_task(speak())
        return [result async for result in stream]


def finals(results: list[rt.Result]) -> list[rt.Final]:
    return [result for result in results if isinstance(result, rt.Final)]


def assert_told_once_in_order(results: list[rt.Result], samples: int) -> None:
    count = -(-samples // UTTERANCE)
    assert [final.utterance for final in finals(results)] == list(range(count))
    ends = [r.utterance for r in results if isinstance(r, rt.Endpoint)]
    assert ends == list(range(samples // UTTERANCE))
    processed = [r.audio_processed for r in results if isinstance(r, rt.Partial)]
    assert processed == sorted(processed)
    assert len(set(processed)) == len(processed)


async def test_every_sample_arrives_once_and_every_result_comes_back(serve: Serve) -> None:
    address, servicer = await serve(Script())
    samples = speech(16000 + 7)
    async with rt.connect(address) as client, client.speech() as stream:
        results = await say(stream, samples, piece=333)
    assert [final.text for final in finals(results)] == expected(samples)
    assert_told_once_in_order(results, len(samples))
    last = finals(results)[-1]
    assert last.reason == "finish"
    assert last.words[0].end == pytest.approx(len(samples) / 16000)
    assert last.timing.processing_seconds == pytest.approx(0.002)
    assert servicer.calls == 1
    assert servicer.ended == ["ok"]
    assert stream.reconnects == 0


async def test_large_pieces_travel_in_messages_that_the_server_takes(serve: Serve) -> None:
    address, _ = await serve(Script())
    samples = speech(32000)
    async with rt.connect(address) as client, client.speech() as stream:
        results = await say(stream, samples, piece=32000)
    assert [final.text for final in finals(results)] == expected(samples)


@pytest.mark.parametrize("encoding", ["linear16", "float32"])
async def test_samples_are_converted_to_the_encoding_of_the_session(
    serve: Serve, encoding: rt.Encoding
) -> None:
    address, servicer = await serve(Script())
    samples = speech(1600)
    floats = samples.astype(np.float32) / 32768
    async with rt.connect(address) as client, client.speech(encoding=encoding) as stream:
        results = await say(stream, floats)  # type: ignore[arg-type]
    wanted = samples.tobytes() if encoding == "linear16" else floats.tobytes()
    assert [final.text for final in finals(results)] == [checksum(wanted)]
    assert servicer.opens[0].audio.sample_rate_hz == 16000


async def test_unset_choices_stay_unset_and_set_ones_travel(serve: Serve) -> None:
    address, servicer = await serve(Script())
    rules = rt.EndpointingRules(final_silence_ms=600)
    boosts = (rt.PhraseBoost(("flat white", "decaf"), 1.5),)
    async with rt.connect(address, api_key="secret") as client:
        async with client.speech(beam=4, lookahead_bias=-1.0, endpointing=rules, boosts=boosts):
            pass
        async with client.speech(max_lookahead_ms=0, interim_results=False):
            pass
    first, second = (message.options for message in servicer.opens)
    assert (first.beam, first.lookahead_bias) == (4, -1.0)
    assert first.endpointing.final_silence_ms == 600
    assert not first.endpointing.HasField("enabled")
    assert list(first.boosts[0].phrases) == ["flat white", "decaf"]
    assert not first.HasField("max_lookahead_ms")
    assert not first.HasField("interim_results")
    assert second.HasField("max_lookahead_ms")
    assert second.max_lookahead_ms == 0
    assert second.HasField("interim_results")
    assert not second.interim_results
    assert not second.HasField("endpointing")
    assert servicer.metadata[0]["authorization"] == "Bearer secret"


async def test_a_control_gets_both_receipts_with_its_position(serve: Serve) -> None:
    address, _ = await serve(Script())
    async with rt.connect(address) as client, client.speech() as stream:
        await stream.send(speech(480))
        control = await stream.set_lookahead(bias=2.0)
        assert (await control.accepted()).position == 480
        applied = await control.applied()
        assert (applied.control_id, applied.position) == (control.control_id, 480)


async def test_flush_cuts_the_utterance_and_the_session_goes_on(serve: Serve) -> None:
    address, _ = await serve(Script())
    samples = speech(1000)
    async with rt.connect(address) as client, client.speech() as stream:
        await stream.send(samples[:400])
        await (await stream.flush()).applied()
        results = await say(stream, samples[400:])
    told = [(final.text, final.reason) for final in finals(results)]
    assert told == [
        (checksum(samples[:400].tobytes()), "flush"),
        (checksum(samples[400:].tobytes()), "finish"),
    ]


async def test_another_client_continues_from_a_checkpoint(serve: Serve) -> None:
    address, servicer = await serve(Script())
    samples = speech(4000)
    async with rt.connect(address) as client:
        async with client.speech(encoding="float32", sample_rate=8000) as stream:
            await stream.send(samples[:2000])
            state = await stream.checkpoint()
        assert state.position == 2000
        async with client.speech(resume=state) as stream:
            assert stream.position == 2000
            assert (stream.info.encoding, stream.info.sample_rate) == ("float32", 8000)
            results = await say(stream, samples[2000:])
    assert servicer.resumes == [2000]
    assert [final.utterance for final in finals(results)] == [1, 2]


@pytest.mark.parametrize("interval", [0, 500, 4000])
async def test_dropped_connections_lose_and_repeat_nothing(serve: Serve, interval: int) -> None:
    drops = {0: 5000, 1: 300, 2: 2500, 3: 7000}
    address, servicer = await serve(Script(drop_at=drops, checkpoint_every=interval))
    samples = speech(24000)
    async with rt.connect(address) as client, client.speech(retry=EAGER) as stream:
        results = await say(stream, samples)
    assert [final.text for final in finals(results)] == expected(samples)
    assert_told_once_in_order(results, len(samples))
    assert stream.reconnects == 4
    if interval:
        assert servicer.resumes, "a checkpoint was there, so it must have been used"
    else:
        assert (len(servicer.opens), servicer.resumes) == (5, [])


async def test_a_connection_lost_after_finish_still_gives_every_final(serve: Serve) -> None:
    address, _ = await serve(Script(drop_at={0: 8000}, checkpoint_every=3000))
    samples = speech(8000)
    async with rt.connect(address) as client, client.speech(retry=EAGER) as stream:
        results = await say(stream, samples, piece=8000)
    assert [final.text for final in finals(results)] == expected(samples)
    assert stream.reconnects == 1


async def test_controls_that_no_checkpoint_covers_are_sent_again_at_their_place(serve: Serve) -> None:
    address, servicer = await serve(Script(drop_at={0: 3200}, checkpoint_every=1600))
    async with rt.connect(address) as client, client.speech(retry=EAGER) as stream:
        await stream.send(speech(800))
        covered = await stream.set_lookahead(bias=1.0)
        await covered.applied()
        await stream.send(speech(800))  # a checkpoint follows
        await stream.send(speech(400))
        uncovered = await stream.set_lookahead(bias=2.0)
        await uncovered.applied()
        await stream.send(speech(400))
        await stream.send(speech(800))  # the connection drops
        await say(stream, speech(800))
    assert servicer.last.biases == [(800, 1.0), (2000, 2.0)]
    assert servicer.resumes[0] in (1600, 3200)


async def test_a_control_lost_with_its_connection_gets_its_receipts_from_the_next(serve: Serve) -> None:
    address, servicer = await serve(Script(drop_after_applied=True, checkpoint_every=0))
    async with rt.connect(address) as client, client.speech(retry=EAGER) as stream:
        await stream.send(speech(320))
        first = await stream.set_lookahead(bias=3.0)
        second = await stream.set_lookahead(bias=4.0)
        state = asyncio.create_task(stream.checkpoint())
        assert (await first.applied()).position == 320
        assert (await second.applied()).position == 320
        assert (await state).position == 320
    assert servicer.calls == 2
    assert servicer.last.biases == [(320, 3.0), (320, 4.0)]


@pytest.mark.parametrize("refusals", [0, 2])
async def test_a_session_moves_when_its_server_goes_away(serve: Serve, refusals: int) -> None:
    address, servicer = await serve(
        Script(going_away_at={0: 4000}, refuse_while_draining=refusals, checkpoint_every=1000)
    )
    samples = speech(40000)
    async with rt.connect(address) as client, client.speech(retry=EAGER) as stream:
        results: list[rt.Result] = []

        async def listen() -> None:
            async for result in stream:
                results.append(result)

        async with asyncio.TaskGroup() as group:
            group.create_task(listen())
            for start in range(0, 24000, 160):
                await stream.send(samples[start : start + 160])
            while stream.reconnects == 0:
                await asyncio.sleep(0.005)
            await stream.send(samples[24000:])
            await stream.finish()
    assert [final.text for final in finals(results)] == expected(samples)
    assert_told_once_in_order(results, len(samples))
    assert servicer.resumes == [4000]
    assert servicer.calls == 2 + refusals
    assert sorted(servicer.ended) == ["cancelled", "ok"]


async def test_a_server_that_goes_away_alone_is_used_to_its_end(serve: Serve) -> None:
    """No other server takes the session: the old one goes on, and its end is an ordinary one."""
    address, servicer = await serve(
        Script(going_away_at={0: 1600}, refuse_while_draining=1000, checkpoint_every=0)
    )
    samples = speech(8000)
    async with rt.connect(address) as client:
        policy = rt.RetryPolicy(max_retries=1, initial_seconds=0.01)
        async with client.speech(retry=policy) as stream:
            await stream.send(samples[:1600])
            while servicer.calls < 2:
                await asyncio.sleep(0.005)
            results = await say(stream, samples[1600:])
    assert [final.text for final in finals(results)] == expected(samples)
    assert stream.reconnects == 0


async def test_a_full_server_is_tried_again_when_it_said(serve: Serve) -> None:
    delays: list[float] = []

    class Recording(rt.RetryPolicy):
        def delay(self, failures: int, error: rt.RealtideError) -> float | None:
            value = super().delay(failures, error)
            delays.append(-1.0 if value is None else value)
            return value

    address, servicer = await serve(Script(refuse=2, retry_seconds=0.03))
    policy = Recording(max_retries=3, initial_seconds=0.01)
    async with rt.connect(address) as client, client.speech(retry=policy) as stream:
        assert stream.info.model == "scripted"
    assert servicer.calls == 3
    assert len(delays) == 2
    assert all(delay >= 0.03 for delay in delays)


async def test_a_server_that_stays_full_is_reported_with_its_delay(serve: Serve) -> None:
    address, servicer = await serve(Script(refuse=100, retry_seconds=0.01))
    policy = rt.RetryPolicy(max_retries=2, initial_seconds=0.01)
    async with rt.connect(address) as client:
        with pytest.raises(rt.ResourceExhausted) as caught:
            await client.speech(retry=policy).open()
    assert caught.value.retry_after == pytest.approx(0.01)
    assert servicer.calls == 3


async def test_an_invalid_choice_names_its_field_and_is_not_tried_again(serve: Serve) -> None:
    address, servicer = await serve(Script())
    async with rt.connect(address) as client:
        with pytest.raises(rt.InvalidRequest, match="must be 8000 to 48000") as caught:
            await client.speech(sample_rate=4000).open()
    assert caught.value.violations[0].field == "open.audio.sample_rate_hz"
    assert servicer.calls == 1


async def test_an_error_in_the_stream_reaches_everybody_who_waits(serve: Serve) -> None:
    address, _ = await serve(Script())
    async with rt.connect(address) as client, client.speech() as stream:
        from realtide_client.v1 import speech_pb2

        control = stream._control(lambda i: speech_pb2.SpeechControl(control_id=i))  # no action
        with pytest.raises(rt.InvalidRequest, match=r"control\.action"):
            await control.accepted()
        with pytest.raises(rt.InvalidRequest):
            await control.applied()
        with pytest.raises(rt.InvalidRequest):
            await anext(stream)
        with pytest.raises(rt.InvalidRequest):
            await stream.send(speech(160))
        with pytest.raises(rt.InvalidRequest):
            await stream.checkpoint()


async def test_a_damaged_checkpoint_is_refused(serve: Serve) -> None:
    address, _ = await serve(Script())
    async with rt.connect(address) as client:
        with pytest.raises(rt.CheckpointRefused):
            await client.speech(resume=rt.Checkpoint(b"nonsense", 0)).open()


async def test_audio_that_is_no_longer_buffered_ends_the_stream(serve: Serve) -> None:
    address, _ = await serve(Script(drop_at={0: 8000}, checkpoint_every=0))
    async with rt.connect(address) as client, client.speech(retry=EAGER, replay_seconds=0.1) as stream:
        for start in range(0, 8000, 160):
            await stream.send(speech(16000)[start : start + 160])
        with pytest.raises(rt.StreamLost, match="samples"):
            async for _ in stream:
                pass


async def test_without_retries_a_lost_connection_is_an_error(serve: Serve) -> None:
    address, servicer = await serve(Script(drop_at={0: 800}))
    never = rt.RetryPolicy(max_retries=0)
    async with rt.connect(address) as client, client.speech(retry=never) as stream:
        await stream.send(speech(800))
        with pytest.raises(rt.Unavailable, match="dropped by the script"):
            async for _ in stream:
                pass
    assert servicer.calls == 1
    assert not servicer.opens[0].session.HasField("checkpoint_interval_ms")


async def test_no_server_at_all_is_an_error_after_the_retries() -> None:
    policy = rt.RetryPolicy(max_retries=1, initial_seconds=0.01)
    async with rt.connect("127.0.0.1:1") as client:
        with pytest.raises(rt.Unavailable):
            await client.speech(retry=policy).open()


async def test_a_server_that_does_not_answer_is_given_up(serve: Serve) -> None:
    address, servicer = await serve(Script(silent_opens=1))
    async with rt.connect(address) as client, client.speech(retry=EAGER, open_timeout=0.5) as stream:
        assert stream.info.session_id == "s-1"
    assert servicer.calls == 2


async def test_a_stream_that_is_cancelled_while_it_opens_is_dropped(serve: Serve) -> None:
    address, servicer = await serve(Script(silent_opens=1))

    async def enter() -> None:
        async with client.speech():
            pass

    async with rt.connect(address) as client:
        entering = asyncio.create_task(enter())
        while not servicer.calls:
            await asyncio.sleep(0.005)
        entering.cancel()
        with pytest.raises(asyncio.CancelledError):
            await entering
        assert "realtide-speech-stream" not in {task.get_name() for task in asyncio.all_tasks()}


async def test_leaving_early_cancels_the_call(serve: Serve) -> None:
    address, servicer = await serve(Script())
    async with rt.connect(address) as client, client.speech() as stream:
        await stream.send(speech(160))
        await anext(stream)
    while not servicer.ended:
        await asyncio.sleep(0.005)
    assert servicer.ended == ["cancelled"]
    with pytest.raises(rt.StreamClosed):
        await stream.send(speech(160))
    await stream.close()


async def test_nothing_can_be_sent_after_finish(serve: Serve) -> None:
    address, _ = await serve(Script())
    async with rt.connect(address) as client, client.speech() as stream:
        await stream.finish()
        for attempt in (stream.send(speech(160)), stream.flush(), stream.checkpoint()):
            with pytest.raises(rt.StreamClosed, match="finished"):
                await attempt
        assert [result async for result in stream] == []


async def test_the_emission_delay_can_be_computed(serve: Serve) -> None:
    address, _ = await serve(Script())
    async with rt.connect(address) as client, client.speech() as stream:
        for start in range(0, 3200, 160):
            await stream.send(speech(3200)[start : start + 160])
        early, late = stream.sent_at(0.005), stream.sent_at(0.195)
        assert early is not None
        assert late is not None
        assert early <= late
        assert stream.sent_at(0.3) is None, "not sent yet"
        final = await anext(r async for r in stream if isinstance(r, rt.Final))
        sent = stream.sent_at(final.words[0].end)
        assert sent is not None
        assert final.timing.arrived_at >= sent


async def test_models_are_listed_and_described(serve: Serve) -> None:
    address, _ = await serve(Script())
    async with rt.connect(address) as client:
        assert [model.name for model in await client.models()] == ["scripted"]
        assert (await client.describe("scripted")).name == "scripted"
        with pytest.raises(rt.NotFound):
            await client.describe("other")


async def test_an_answered_checkpoint_request_is_not_repeated(serve: Serve) -> None:
    address, servicer = await serve(Script(drop_at={0: 1600}, checkpoint_every=0))
    async with rt.connect(address) as client, client.speech(retry=EAGER) as stream:
        await stream.send(speech(800))
        assert (await stream.checkpoint()).position == 800
        await say(stream, speech(2400))
    assert stream.reconnects == 1
    assert len(servicer.asked) == 1
