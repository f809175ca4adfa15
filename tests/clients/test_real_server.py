"""The client against the real server (with the burst engine of its tests): what both sides promise."""

from __future__ import annotations

import asyncio
import itertools
from typing import Any

import numpy as np
import pytest

import realtide_client as rt
from tests.server.engine import BurstEngine, quiet, tone
from tests.server.helpers import running, until

KEY = "a key that all replicas share"
ROUND_ROBIN = (("grpc.service_config", '{"loadBalancingConfig": [{"round_robin": {}}]}'),)
EAGER = rt.RetryPolicy(max_retries=10, initial_seconds=0.01, max_seconds=0.1)
UTTERANCE = np.concatenate([quiet(0.2), tone(0.2), quiet(0.2), tone(0.2), quiet(1.0)])


async def send(stream: rt.SpeechStream, samples: Any) -> None:
    for start in range(0, len(samples), 640):
        await stream.send(samples[start : start + 640])


class Listener:
    """Collects results beside the test."""

    def __init__(self, stream: rt.SpeechStream) -> None:
        self.results: list[rt.Result] = []
        self._task = asyncio.create_task(self._listen(stream))

    async def _listen(self, stream: rt.SpeechStream) -> None:
        async for result in stream:
            self.results.append(result)

    @property
    def finals(self) -> list[tuple[int, str]]:
        return [(r.utterance, r.text) for r in self.results if isinstance(r, rt.Final)]

    async def end(self) -> None:
        await asyncio.wait_for(self._task, 60)


async def test_options_results_and_controls_mean_the_same_on_both_sides() -> None:
    async with running(BurstEngine()) as server, rt.connect(f"127.0.0.1:{server.server.port}") as client:
        options = rt.SpeechOptions(
            encoding="float32", endpointing=rt.EndpointingRules(final_silence_ms=400), lookahead_bias=0.5
        )
        async with client.speech(options) as stream:
            assert (stream.info.model, stream.info.frame_seconds) == ("bursts", 0.04)
            listener = Listener(stream)
            await send(stream, UTTERANCE)
            applied = await (await stream.set_lookahead(max_lookahead_ms=-1)).applied()
            assert applied.position == len(UTTERANCE)
            await send(stream, tone(0.2))
            flushed = await stream.flush()
            assert (await flushed.accepted()).position == len(UTTERANCE) + 3200
            await flushed.applied()
            await stream.finish()
            await listener.end()
        assert [text for _, text in listener.finals if text] == ["burst1 burst2", "burst1"]
        words = [w for r in listener.results if isinstance(r, rt.Final) for w in r.words]
        assert [(round(w.start, 3), round(w.end, 3)) for w in words] == [(0.2, 0.4), (0.6, 0.8), (1.8, 2.0)]
        assert {w.lookahead_ms for w in words} == {80.0}
        kinds = [r.kind for r in listener.results if isinstance(r, rt.Endpoint)]
        assert kinds[:2] == ["speech_start", "end"]
        assert all(r.timing.processed_position <= r.timing.received_position for r in listener.results)
        models = await client.models()
        assert [model.name for model in models] == ["bursts"]
        await server.all_free()


async def test_a_session_moves_from_a_draining_server_to_another_one() -> None:
    replica: dict[str, Any] = {"checkpoint_key": KEY, "drain_seconds": 30.0}
    async with running(**replica) as one, running(**replica) as other:
        address = f"ipv4:127.0.0.1:{one.server.port},127.0.0.1:{other.server.port}"
        client = rt.connect(address, channel_options=ROUND_ROBIN)
        async with client, client.speech(retry=EAGER, checkpoint_interval_ms=1000) as stream:
            listener = Listener(stream)
            await send(stream, np.concatenate([UTTERANCE, UTTERANCE[:9600]]))
            await until(lambda: len(listener.finals) == 1)
            here, there = (one, other) if one.engine.taken else (other, one)
            assert (here.engine.taken, there.engine.taken) == (1, 0)
            session = stream.info.session_id
            here.server.drain()
            await until(lambda: stream.reconnects == 1, 30)
            await until(lambda: here.engine.taken == 0)
            assert there.engine.taken == 1
            assert stream.info.session_id == session
            await send(stream, np.concatenate([UTTERANCE[9600:], UTTERANCE]))
            await stream.finish()
            await listener.end()
        spoken = [(number, text) for number, text in listener.finals if text]
        assert spoken == [(0, "burst1 burst2"), (1, "burst1 burst2"), (2, "burst1 burst2")]
        numbers = [number for number, _ in listener.finals]
        assert all(b == a + 1 for a, b in itertools.pairwise(numbers)), "each final once, in order"


@pytest.mark.parametrize("interval", [0, 1000])
async def test_a_server_that_vanishes_is_replaced_by_one_on_the_same_port(interval: int) -> None:
    retry = rt.RetryPolicy(max_retries=40, initial_seconds=0.05, max_seconds=0.2)
    async with running(checkpoint_key=KEY, grace_seconds=0.0) as first:
        port = first.server.port
        client = rt.connect(f"127.0.0.1:{port}")
        stream = client.speech(retry=retry, checkpoint_interval_ms=interval)
        await stream.open()
        listener = Listener(stream)
        await send(stream, np.concatenate([UTTERANCE, UTTERANCE[:9600]]))
        await until(lambda: len(listener.finals) == 1)
    async with running(checkpoint_key=KEY, port=port) as second:
        await send(stream, UTTERANCE[9600:])
        control = await stream.set_interim_results(False)
        await asyncio.wait_for(control.applied(), 60)
        assert stream.reconnects >= 1
        await stream.finish()
        await listener.end()
        await second.all_free()
    await stream.close()
    await client.close()
    assert [text for _, text in listener.finals if text] == ["burst1 burst2"] * 2


async def test_a_full_server_refuses_with_a_delay_and_takes_the_session_once_a_slot_is_free() -> None:
    async with running(BurstEngine(1), queue_limit=0) as server:
        client = rt.connect(f"127.0.0.1:{server.server.port}")
        async with client:
            first = client.speech()
            await first.open()
            with pytest.raises(rt.ResourceExhausted) as caught:
                await client.speech(retry=rt.RetryPolicy(max_retries=0)).open()
            assert caught.value.retry_after is not None
            patient = client.speech(retry=rt.RetryPolicy(max_retries=100, initial_seconds=0.01))
            waiting = asyncio.create_task(patient.open())
            await first.close()
            assert (await waiting).model == "bursts"
            await patient.close()
        await server.all_free()


async def test_refusals_name_the_field_and_the_range() -> None:
    async with running() as server, rt.connect(f"127.0.0.1:{server.server.port}") as client:
        for options, field in (
            ({"sample_rate": 4000}, "open.audio.sample_rate_hz"),
            ({"beam": 0}, "open.options.beam"),
            ({"lookahead_bias": 99.0}, "open.options.lookahead_bias"),
            ({"boosts": (rt.PhraseBoost(()),)}, "open.options.boosts[0].phrases"),
        ):
            with pytest.raises(rt.InvalidRequest) as caught:
                await client.speech(**options).open()
            assert [violation.field for violation in caught.value.violations] == [field]
        with pytest.raises(rt.NotFound):
            await client.speech(model="other").open()
        with pytest.raises(rt.CheckpointRefused):
            await client.speech(resume=rt.Checkpoint(b"x" * 100, 0)).open()
        await server.all_free()


async def test_an_idle_session_ends_with_its_reason() -> None:
    async with running(idle_timeout=0.2) as server, rt.connect(f"127.0.0.1:{server.server.port}") as client:
        async with client.speech() as stream:
            with pytest.raises(rt.IdleTimeout):
                async for _ in stream:
                    pass
        await server.all_free()


async def test_a_session_that_is_sent_away_by_its_age_goes_on_as_if_nothing_had_been() -> None:
    async with (
        running(BurstEngine(slots=2), max_connection_age=0.4, max_connection_grace=30.0) as server,
        rt.connect(f"127.0.0.1:{server.server.port}") as client,
        client.speech(encoding="float32", retry=EAGER) as stream,
    ):
        listener = Listener(stream)
        await send(stream, UTTERANCE)
        await until(lambda: stream.reconnects >= 2)
        await send(stream, UTTERANCE)
        await stream.finish()
        await listener.end()
        assert [text for _, text in listener.finals if text] == ["burst1 burst2"] * 2
