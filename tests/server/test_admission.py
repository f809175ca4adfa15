"""Slots, queue, refusals with a time to come back."""

from __future__ import annotations

import asyncio

import grpc
import pytest

from realtide.server.admission import Admission, Refused
from tests.server.engine import BurstEngine
from tests.server.helpers import failure, finish, opening, responses, retry_seconds, running, until


async def test_slots_then_queue_then_refusal() -> None:
    admission = Admission(slots=2, queue_limit=1, queue_timeout=10)
    first, second = await admission.acquire(), await admission.acquire()
    assert admission.full
    waiting = asyncio.create_task(admission.acquire())
    await until(lambda: admission.queued == 1)
    with pytest.raises(Refused) as refusal:
        await admission.acquire()
    assert refusal.value.reason == "queue_full"
    assert refusal.value.retry_after is not None
    first.release()
    lease = await waiting
    assert (admission.used, admission.queued) == (2, 0)
    for one in (first, first, second, lease):  # the first counts once however often
        one.release()
    assert admission.used == 0


async def test_first_come_first_served() -> None:
    admission = Admission(slots=1, queue_limit=5, queue_timeout=10)
    held = await admission.acquire()
    order: list[int] = []

    async def visit(number: int) -> None:
        lease = await admission.acquire()
        order.append(number)
        lease.release()

    visits = []
    for number in range(4):
        visits.append(asyncio.create_task(visit(number)))
        await until(lambda number=number: admission.queued == number + 1)
    held.release()
    await asyncio.gather(*visits)
    assert order == [0, 1, 2, 3]
    assert admission.used == 0


async def test_timeout_and_cancel_leave_the_queue() -> None:
    admission = Admission(slots=1, queue_limit=5, queue_timeout=0.02)
    held = await admission.acquire()
    with pytest.raises(Refused) as refusal:
        await admission.acquire()
    assert refusal.value.reason == "queue_timeout"
    waiting = asyncio.create_task(admission.acquire())
    await until(lambda: admission.queued == 1)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert admission.queued == 0
    held.release()
    assert admission.used == 0


async def test_cancelled_at_the_moment_its_turn_comes() -> None:
    admission = Admission(slots=1, queue_limit=5, queue_timeout=10)
    held = await admission.acquire()
    waiting = asyncio.create_task(admission.acquire())
    await until(lambda: admission.queued == 1)
    held.release()  # the slot has been passed on...
    waiting.cancel()  # ...to one who is gone before noticing
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert admission.used == 0


async def test_drain_sends_the_queue_away() -> None:
    admission = Admission(slots=1, queue_limit=5, queue_timeout=10)
    held = await admission.acquire()
    waiting = asyncio.create_task(admission.acquire())
    await until(lambda: admission.queued == 1)
    admission.drain()
    for attempt in (waiting, admission.acquire()):
        with pytest.raises(Refused, match="draining"):
            await attempt
    held.release()
    assert admission.used == 0


async def test_the_delay_follows_the_length_of_sessions_and_of_the_queue(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    admission = Admission(slots=2, queue_limit=50, queue_timeout=10)
    loop = asyncio.get_running_loop()
    clock = [loop.time()]
    monkeypatch.setattr(loop, "time", lambda: clock[0])
    for _ in range(200):
        lease = await admission.acquire()
        clock[0] += 8.0
        lease.release()
    # Sessions of 8 s on two slots: one comes free every 4 s.
    assert admission.retry_after() == pytest.approx(4.0, rel=0.01)
    held = [await admission.acquire() for _ in range(2)]
    waiting = [asyncio.create_task(admission.acquire()) for _ in range(3)]
    await asyncio.sleep(0)
    assert admission.retry_after() == pytest.approx(16.0, rel=0.01)
    for one in waiting:
        one.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)
    for lease in held:
        lease.release()


async def test_over_the_wire() -> None:
    async with running(BurstEngine(slots=1), queue_limit=1) as server:
        held = await server.opened()
        waiting = server.stream()
        await waiting.write(opening())
        admission = server.server.host.models["bursts"].admission
        await until(lambda: admission.queued == 1)
        assert server.metric("realtide_sessions", state="queued") == 1
        refused = server.stream()
        await refused.write(opening())
        error = await failure(refused)
        assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert 0.5 <= retry_seconds(error) <= 60
        assert server.metric("realtide_admission_refused_total", reason="queue_full") == 1
        await held.write(finish())
        await responses(held)
        assert (await waiting.read()).WhichOneof("message") == "opened"
        await waiting.write(finish())
        await responses(waiting)
        await server.all_free()


async def test_too_long_in_the_queue_over_the_wire() -> None:
    async with running(BurstEngine(slots=1), queue_timeout=0.05) as server:
        held = await server.opened()
        late = server.stream()
        await late.write(opening())
        error = await failure(late)
        assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert retry_seconds(error) >= 0.5
        assert server.metric("realtide_admission_refused_total", reason="queue_timeout") == 1
        held.cancel()
        await server.all_free()


async def test_who_leaves_the_queue_takes_no_slot() -> None:
    async with running(BurstEngine(slots=1)) as server:
        held = await server.opened()
        waiting = server.stream()
        await waiting.write(opening())
        admission = server.server.host.models["bursts"].admission
        await until(lambda: admission.queued == 1)
        waiting.cancel()
        await until(lambda: admission.queued == 0)
        held.cancel()
        await server.all_free()
        assert len(server.engine.opened) == 1
