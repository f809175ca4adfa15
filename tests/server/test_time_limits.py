"""Idle limits, longest session, client deadlines, and the drain."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import numpy as np

from realtide_client.v1 import common_pb2
from tests.server.engine import BurstEngine, pcm16, quiet, tone
from tests.server.helpers import (
    Request,
    audio,
    failure,
    finish,
    opening,
    responses,
    running,
    until,
)

LATE = grpc.StatusCode.DEADLINE_EXCEEDED
GONE = grpc.StatusCode.UNAVAILABLE


async def test_half_open_clients_are_closed_without_a_slot() -> None:
    async with running(idle_timeout=0.1) as server:
        call = server.stream()
        await call.wait_for_connection()
        error = await failure(call)
        assert error.code() == LATE
        assert "nothing came from the client for 0.1 s" in (error.details() or "")
        assert not server.engine.opened


async def test_silent_clients_are_closed() -> None:
    async with running(idle_timeout=0.15) as server:
        call = await server.opened()
        for _ in range(5):  # longer than the limit in all, never silent for so long
            await call.write(audio(pcm16(quiet(0.05))))
            await asyncio.sleep(0.05)
        error = await failure(call)
        assert error.code() == LATE
        await server.all_free()
        assert server.metric("realtide_sessions_closed_total", outcome="client_error") == 1


async def test_the_server_being_slow_is_not_the_client_being_idle() -> None:
    engine = BurstEngine(delay=0.02)
    async with running(engine, idle_timeout=0.1, max_audio_ahead=0.2) as server:
        call = await server.opened()
        await call.write(audio(pcm16(quiet(1.0))))  # half a second of steps
        await call.write(finish())
        await responses(call)
        await server.all_free()


async def test_clients_that_never_read_are_closed() -> None:
    engine = BurstEngine(chatty=True)
    async with running(engine, idle_timeout=0.3) as server:
        call = await server.opened()
        words = np.concatenate([np.concatenate([tone(0.04), quiet(0.04)])] * 1500)

        async def send() -> None:
            for start in range(0, len(words), 16000):
                await call.write(audio(pcm16(words[start : start + 16000])))

        sending = asyncio.create_task(send())
        await server_free_after_opening(server.engine)
        await asyncio.gather(sending, return_exceptions=True)
        assert server.metric("realtide_sessions_closed_total", outcome="client_error") == 1
        call.cancel()


async def server_free_after_opening(engine: BurstEngine) -> None:
    await until(lambda: engine.opened and engine.free_slots == engine.slots)


async def test_no_idle_limit() -> None:
    async with running(idle_timeout=0.0) as server:
        call = await server.opened()
        await asyncio.sleep(0.1)
        await call.write(finish())
        await responses(call)


async def test_longest_session() -> None:
    async with running(max_session_seconds=0.2) as server:
        call = await server.opened()

        async def talk() -> None:
            while True:
                await call.write(audio(pcm16(quiet(0.02))))
                await asyncio.sleep(0.02)

        talking = asyncio.create_task(talk())
        error = await failure(call)
        assert error.code() == LATE
        assert "0.2 s" in (error.details() or "")
        await server.all_free()
        talking.cancel()
        await asyncio.gather(talking, return_exceptions=True)


async def test_deadline_of_the_client() -> None:
    async with running() as server:
        call = server.stream(timeout=0.2)
        await call.write(opening())
        error = await failure(call)
        assert error.code() == LATE
        await server.all_free()
        await until(lambda: server.metric("realtide_sessions_closed_total", outcome="cancelled") == 1)


async def test_cancel_frees_the_slot() -> None:
    async with running() as server:
        call = await server.opened()
        await call.write(audio(pcm16(tone(0.2))))
        call.cancel()
        await server.all_free()
        await until(lambda: server.metric("realtide_sessions_closed_total", outcome="cancelled") == 1)


async def test_disconnect_frees_the_slots() -> None:
    async with running() as server:
        for _ in range(3):
            await server.opened()
        await server.channel.close(None)
        await server.all_free()


async def test_drain_hands_out_checkpoints_and_a_session_may_finish() -> None:
    async with running(drain_seconds=5.0) as server:
        call = await server.opened()
        await call.write(audio(pcm16(tone(0.2))))
        await until(lambda: server.metric("realtide_audio_seconds_total") > 0)
        half_open = server.stream()
        await half_open.wait_for_connection()
        await until(lambda: len(server.server.host.streams) == 2)
        server.server.drain()
        server.server.drain()  # any number of times
        going = None
        while going is None:
            response = await call.read()
            if response.WhichOneof("message") == "going_away":
                going = response.going_away
        assert going.deadline_ms == 5000
        assert going.checkpoint.position == 3200
        assert (await failure(half_open)).code() == GONE
        late = server.stream()
        await late.write(opening())
        error = await failure(late)
        assert error.code() == GONE
        await call.write(audio(pcm16(quiet(1.0))))
        await call.write(finish())
        texts = [one.final.text for one in await responses(call) if one.WhichOneof("message") == "final"]
        assert texts[0] == "burst1"
        await server.all_free()
        assert server.metric("realtide_sessions_closed_total", outcome="ok") == 1
    async with running() as other:  # the checkpoint continues there
        resumed = other.stream()
        await resumed.write(Request(resume=common_pb2.Resume(checkpoint=going.checkpoint.data)))
        opened = (await resumed.read()).opened
        assert opened.session.position == 3200
        await resumed.write(finish())
        texts = [one.final.text for one in await responses(resumed) if one.WhichOneof("message") == "final"]
        assert texts == ["burst1"]


async def test_drain_ends_with_unavailable_after_one_more_checkpoint() -> None:
    async with running(drain_seconds=0.2) as server:
        call = await server.opened()
        server.server.drain()
        assert (await call.read()).WhichOneof("message") == "going_away"
        await call.write(audio(pcm16(tone(0.04))))
        found: list[Any] = []
        assert (await failure(call, found)).code() == GONE
        assert found[-1].checkpoint.position == 640
        await server.all_free()
        assert server.metric("realtide_sessions_closed_total", outcome="drained") == 1


async def test_drain_cuts_even_those_that_do_not_read() -> None:
    engine = BurstEngine(chatty=True)
    async with running(engine, drain_seconds=0.2, max_pending_events=8) as server:
        call = await server.opened()
        words = np.concatenate([np.concatenate([tone(0.04), quiet(0.04)])] * 1500)

        async def send() -> None:
            for start in range(0, len(words), 16000):
                await call.write(audio(pcm16(words[start : start + 16000])))

        sending = asyncio.create_task(send())
        await until(lambda: server.metric("realtide_sessions", state="parked") == 1, 30)
        server.server.drain()
        await server.all_free()
        assert server.metric("realtide_sessions_closed_total", outcome="drained") == 1
        sending.cancel()
        await asyncio.gather(sending, return_exceptions=True)
        call.cancel()


async def test_leaving_after_going_away_is_not_a_cancel() -> None:
    async with running(drain_seconds=5.0) as server:
        call = await server.opened()
        server.server.drain()
        assert (await call.read()).WhichOneof("message") == "going_away"
        call.cancel()
        await server.all_free()
        outcome = {"outcome": "resumed_elsewhere"}
        await until(lambda: server.metric("realtide_sessions_closed_total", **outcome) == 1)


async def test_drain_empties_the_queue() -> None:
    async with running(BurstEngine(slots=1), drain_seconds=5.0) as server:
        held = await server.opened()
        waiting = server.stream()
        await waiting.write(opening())
        await until(lambda: server.server.host.models["bursts"].admission.queued == 1)
        server.server.drain()
        assert (await failure(waiting)).code() == GONE
        assert server.metric("realtide_admission_refused_total", reason="draining") == 1
        held.cancel()
        await server.all_free()


async def test_hurry_does_not_wait() -> None:
    async with running(drain_seconds=3600.0) as server:
        call = await server.opened()
        stopping = asyncio.create_task(server.server.stop())
        assert (await call.read()).WhichOneof("message") == "going_away"
        assert not stopping.done()
        server.server.hurry()
        async with asyncio.timeout(20):
            await stopping
        await failure(call)


async def test_sessions_of_a_certain_age_are_sent_away_with_a_checkpoint() -> None:
    async with running(max_connection_age=0.2, max_connection_grace=3600.0) as server:
        call = await server.opened()
        going = (await call.read()).going_away
        assert (going.deadline_ms, going.reason) == (3600_000, "connection age")
        # The server is well: whoever leaves may come back at once.
        again = server.stream()
        await again.write(Request(resume=common_pb2.Resume(checkpoint=going.checkpoint.data)))
        assert (await again.read()).opened.session.resumed
        call.cancel()
        await until(lambda: server.metric("realtide_sessions_closed_total", outcome="resumed_elsewhere") == 1)
        again.cancel()
        await server.all_free()
    async with running(max_connection_age=0.1, max_connection_grace=0.1) as server:
        call = await server.opened()
        found: list[Any] = []
        assert (await failure(call, found)).code() == GONE
        assert [one.WhichOneof("message") for one in found] == ["going_away", "checkpoint"]
        await server.all_free()
        assert server.metric("realtide_sessions_closed_total", outcome="drained") == 1


async def test_a_drain_gives_no_more_time_than_an_age_gave_and_may_give_less() -> None:
    async with running(max_connection_age=0.2, max_connection_grace=3600.0, drain_seconds=0.3) as server:
        call = await server.opened()
        assert (await call.read()).going_away.deadline_ms == 3600_000
        server.server.drain()
        assert (await call.read()).going_away.deadline_ms == 300
        assert (await failure(call)).code() == GONE
    async with running(max_connection_age=0.2, max_connection_grace=0.3, drain_seconds=3600.0) as server:
        call = await server.opened()
        assert (await call.read()).going_away.deadline_ms == 300
        server.server.drain()
        found: list[Any] = []
        assert (await failure(call, found)).code() == GONE
        assert [one.WhichOneof("message") for one in found] == ["checkpoint"]
        await server.all_free()
