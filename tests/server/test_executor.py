"""The executor thread: order, batches, isolation of failures, back-pressure."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import threading
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

import numpy as np
import pytest

from realtide.engines.ancat import types
from realtide.engines.engine import SlotsExhausted, StageTimer
from realtide.server import turns as turns_module
from realtide.server.executor import Executor
from realtide.server.handle import Ended, Export, Exported, Failed, Handle
from realtide.server.rounds import ExecutorStopped
from realtide.server.turns import Turns, TurnSelector
from tests.server.engine import POISON, BurstEngine, quiet, tone
from tests.server.helpers import until

OPTIONS = types.SpeechOptions()
FRAME = 640


class Hooks:
    def __init__(self) -> None:
        self.stages: list[str] = []
        self.batches: list[int] = []
        self.waits: list[float] = []
        self.misses = 0

    def on_stage(self, stage: str, seconds: float, batch: int) -> None:
        self.stages.append(stage)

    def on_step(self, waits: Sequence[float], misses: int) -> None:
        self.batches.append(len(waits))
        self.waits += waits
        self.misses += misses


class Rig:
    def __init__(self, engine: BurstEngine, ahead: float, events: int) -> None:
        self.engine = engine
        self.hooks = Hooks()
        self.released: list[str] = []
        self.executor = Executor(engine, self.hooks, ahead, events)

    async def open(self, name: str = "s") -> Handle:
        handle = await self.executor.open(
            lambda engine: engine.open(OPTIONS), name, 0, lambda: self.released.append(name)
        )
        handle.start()
        return handle


@contextlib.asynccontextmanager
async def rig(engine: BurstEngine, ahead: float = 5.0, events: int = 64) -> AsyncIterator[Rig]:
    made = Rig(engine, ahead, events)
    made.executor.start()
    try:
        yield made
    finally:
        if engine.gate is not None:
            engine.gate.set()
        await made.executor.stop()


def sound(samples: Any, due: float | None = None) -> types.Audio:
    return types.Audio(samples, time.monotonic() if due is None else due)


async def put(handle: Handle, samples: Any, due: float | None = None) -> None:
    await handle.put(sound(samples, due), len(samples), len(samples) / 16000)


async def drained(handle: Handle) -> list[Any]:
    """All events to the end."""
    events = []
    async with asyncio.timeout(10):
        while True:
            event, _ = await handle.get()
            events.append(event)
            if isinstance(event, (Ended, Failed)):
                return events


async def test_a_session_from_open_to_end() -> None:
    engine = BurstEngine()
    async with rig(engine) as made:
        handle = await made.open()
        assert engine.free_slots == engine.slots - 1
        await put(handle, tone(0.1))
        await handle.put(types.Finish())
        events = await drained(handle)
        assert [event.text for event in events if isinstance(event, types.Final)] == ["burst1"]
        assert isinstance(events[-1], Ended)
        await handle.freed.wait()
        assert engine.free_slots == engine.slots
        assert made.released == ["s"]
        assert handle.position == 1600
        assert set(made.hooks.stages) == {"encoder"}


class Computing(BurstEngine):
    """Notes, at the beginning and the end of what it says it computes, whether the event loop may run."""

    def __init__(self, turns: Turns) -> None:
        super().__init__()
        self.computes = ("features", "encoder")
        self.turns = turns
        self.free: list[bool] = []

    def step(self, sessions: Sequence[Any], on_stage: StageTimer) -> list[list[Any]]:
        self.free.append(self.turns.free)
        on_stage("features", 0.0, len(sessions))
        self.free.append(self.turns.free)
        events = super().step(sessions, on_stage)
        self.free.append(self.turns.free)
        return events


@pytest.mark.parametrize("breaks", [False, True])
async def test_the_event_loop_has_its_turn_while_the_engine_computes_and_while_there_is_nothing_to_do(
    breaks: bool,
) -> None:
    turns = Turns()
    engine = Computing(turns)
    executor = Executor(engine, Hooks(), 5.0, 64, turns=turns)
    executor.start()
    try:
        handle = await executor.open(lambda engine: engine.open(OPTIONS), "s", 0, lambda: None)
        handle.start()
        for steps in (1, 2):
            await put(handle, quiet(0.04))
            await until(lambda: turns.free and len(engine.free) == 3 * steps)  # noqa: B023  # used at once
        assert engine.free == [False, True, False] * 2
        if breaks:
            executor._hooks.on_step = None  # type: ignore[assignment]  # the executor itself breaks
            await put(handle, quiet(0.04))
            await until(lambda: executor.failed)
    finally:
        await executor.stop()
    assert turns.free


def test_the_selector_waits_for_its_turn_but_not_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    turns = Turns()
    with TurnSelector(turns) as selector:
        turns.begin()
        assert selector.select(0) == []  # nobody ends the turn
        monkeypatch.setattr(turns_module, "_LONGEST", 60.0)
        waiting = threading.Thread(target=selector.select, args=(0,))
        waiting.start()
        waiting.join(0.05)
        assert waiting.is_alive()
        turns.end()
        waiting.join()


async def test_earliest_deadline_first() -> None:
    gate = threading.Event()
    engine = BurstEngine(gate=gate, max_batch=2)
    async with rig(engine) as made:
        handles = [await made.open(str(index)) for index in range(5)]
        await put(handles[0], quiet(0.04))  # its step waits at the gate while the others get ready
        await until(lambda: engine.at_gate)
        now = time.monotonic()
        for index, due in ((1, 4.0), (2, 1.0), (3, 3.0), (4, 2.0)):
            await put(handles[index], quiet(0.04), now + due)
        gate.set()
        await until(lambda: len(engine.batches) == 3)
        assert engine.batches == [["s0"], ["s2", "s4"], ["s3", "s1"]]


async def test_only_equal_keys_share_a_step() -> None:
    gate = threading.Event()
    engine = BurstEngine(gate=gate, key=lambda session: int(session.label[1:]) % 2)
    async with rig(engine) as made:
        handles = [await made.open() for _ in range(5)]
        await put(handles[0], quiet(0.04))
        await until(lambda: engine.at_gate)
        now = time.monotonic()
        for index in range(1, 5):
            await put(handles[index], quiet(0.04), now + index)
        gate.set()
        await until(lambda: len(engine.batches) == 3)
        assert engine.batches == [["s0"], ["s1", "s3"], ["s2", "s4"]]


async def test_one_poisoned_session_fails_alone(caplog: pytest.LogCaptureFixture) -> None:
    gate = threading.Event()
    engine = BurstEngine(gate=gate)
    async with rig(engine) as made:
        handles = [await made.open(f"id{index}") for index in range(4)]
        poisoned = tone(0.04)
        poisoned[7] = POISON
        await put(handles[3], quiet(0.04))
        await until(lambda: engine.at_gate)
        for index in range(3):
            await put(handles[index], poisoned if index == 1 else tone(0.04))
        gate.set()
        for handle in handles:
            await handle.put(types.Finish())
        ends = [await drained(handle) for handle in handles]
        assert isinstance(ends[1][-1], Failed)
        for index in (0, 2):
            finals = [event for event in ends[index] if isinstance(event, types.Final)]
            assert [final.text for final in finals] == ["burst1"]
        assert max(made.hooks.batches) >= 3
        await until(lambda: engine.free_slots == engine.slots)
    errors = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert [getattr(record, "session", None) for record in errors] == ["id1"]


async def test_a_broken_batch_costs_nobody_anything() -> None:
    """A batched step that raises though each session alone is well."""
    gate = threading.Event()
    engine = BurstEngine(gate=gate)
    engine.break_batches = 1
    async with rig(engine) as made:
        handles = [await made.open() for _ in range(3)]
        await put(handles[2], tone(0.04))
        await until(lambda: engine.at_gate)
        for handle in handles[:2]:
            await put(handle, tone(0.04))
        gate.set()
        for handle in handles:
            await handle.put(types.Finish())
        for handle in handles:
            events = await drained(handle)
            assert [event.text for event in events if isinstance(event, types.Final)] == ["burst1"]
        assert engine.break_batches == 0


@pytest.mark.parametrize("method", ["push", "runnable", "deadline"])
async def test_a_session_that_raises_anywhere_fails_alone(method: str) -> None:
    engine = BurstEngine()
    async with rig(engine) as made:
        bad, good = await made.open("bad"), await made.open("good")

        def raises(*_: Any) -> None:
            raise ValueError(method)

        setattr(engine.opened[0], method, raises)
        for handle in (bad, good):
            await put(handle, tone(0.1))
            await handle.put(types.Finish())
        assert isinstance((await drained(bad))[-1], Failed)
        assert isinstance((await drained(good))[-1], Ended)
        await until(lambda: engine.free_slots == engine.slots)
        assert sorted(made.released) == ["bad", "good"]


async def test_a_failed_export_is_told_and_the_session_goes_on() -> None:
    engine = BurstEngine()
    async with rig(engine) as made:
        handle = await made.open()

        def raises() -> bytes:
            raise ValueError

        engine.opened[0].export = raises  # type: ignore[method-assign]
        await handle.put(Export("tag"))
        event, _ = await handle.get()
        assert event == Exported(None, "tag")
        await handle.put(types.Finish())
        assert isinstance((await drained(handle))[-1], Ended)


async def test_export_covers_exactly_the_input_before_it() -> None:
    engine = BurstEngine()
    async with rig(engine) as made:
        handle = await made.open()
        await put(handle, tone(0.1))
        await handle.put(Export("here"))
        await put(handle, tone(0.1))
        await handle.put(types.Finish())
        events: list[Any] = []
        while not isinstance((emitted := await handle.get()).event, Exported):
            events.append(emitted.event)
        assert emitted.position == 1600
        # Every event of the frames before has been handed out before.
        assert any(isinstance(event, types.Partial) for event in events)


async def held_up(engine: BurstEngine, made: Rig) -> None:
    """Another session's step waits at the gate."""
    await put(await made.open("other"), quiet(0.04))
    await until(lambda: engine.at_gate)


async def test_what_waits_goes_into_one_step_as_far_as_the_session_can_take_it() -> None:
    gate = threading.Event()
    engine = BurstEngine(gate=gate, step_frames=4)
    async with rig(engine) as made:
        handle = await made.open()
        await held_up(engine, made)
        for _ in range(6):
            await put(handle, tone(0.04))
        gate.set()
        await until(lambda: handle.position == 6 * FRAME and engine.opened[0].state.frames == 6)
        assert engine.batches == [["s1"], ["s0"], ["s0"]]


async def test_a_control_keeps_its_place_behind_media_that_waits() -> None:
    gate = threading.Event()
    engine = BurstEngine(gate=gate, step_frames=12, chatty=True)
    async with rig(engine) as made:
        handle = await made.open()
        await held_up(engine, made)
        for _ in range(3):
            await put(handle, tone(0.04))
        await handle.put(types.SetInterim("off", enabled=False))
        for _ in range(2):
            await put(handle, tone(0.04))
        await handle.put(Export("here"))
        await put(handle, tone(0.04))
        await handle.put(types.Finish())
        gate.set()
        emitted: list[Any] = []
        async with asyncio.timeout(10):
            while not emitted or not isinstance(emitted[-1].event, Ended):
                emitted.append(await handle.get())
        partials = [one for one in emitted if isinstance(one.event, types.Partial)]
        # Those of the frames before it, and none of the frames behind it.
        assert len(partials) == 3
        assert {one.position for one in partials} == {3 * FRAME}
        (applied,) = [one for one in emitted if isinstance(one.event, types.Applied)]
        assert (applied.event.position, applied.position) == (3 * FRAME, 3 * FRAME)
        (exported,) = [one for one in emitted if isinstance(one.event, Exported)]
        assert exported.position == 5 * FRAME
        assert json.loads(exported.event.state)["state"]["frames"] == 5


async def test_what_needs_no_step_does_not_wait_for_one() -> None:
    gate = threading.Event()
    engine = BurstEngine(gate=gate)
    async with rig(engine) as made:
        handle = await made.open()
        other = await made.open("other")
        await held_up(engine, made)
        # Both are in the mail when the step that is held up ends: a control, and work for another step.
        await handle.put(types.SetInterim("off", enabled=False))
        await put(other, quiet(0.04))
        engine.at_gate = False
        engine.gate = threading.Event()
        gate.set()
        await until(lambda: engine.at_gate)
        async with asyncio.timeout(5):
            applied = (await handle.get()).event
        assert isinstance(applied, types.Applied)
        assert other.session is not None
        assert other.session.runnable()  # its step is still to come


async def test_input_waits_when_too_much_is_queued() -> None:
    gate = threading.Event()
    engine = BurstEngine(gate=gate)
    async with rig(engine, ahead=1.0) as made:
        handle = await made.open()
        sent = 0

        async def send() -> None:
            nonlocal sent
            for _ in range(100):
                await put(handle, quiet(0.1))
                sent += 1

        sending = asyncio.create_task(send())
        await until(lambda: sent >= 10)
        for _ in range(20):
            await asyncio.sleep(0.005)
        # 1 s may wait, beside what the engine has taken for the step at the gate.
        assert 10 <= sent <= 13
        gate.set()
        await sending
        await until(lambda: handle.position == 160000)


async def test_a_reader_that_stops_is_not_stepped_and_goes_on_later() -> None:
    engine = BurstEngine(chatty=True)
    async with rig(engine, events=8) as made:
        slow, quick = await made.open("slow"), await made.open("quick")
        for handle in (slow, quick):
            await put(handle, quiet(0.04 * 50))
        for _ in range(50):
            await quick.get()
        await until(lambda: made.executor.parked == 1)
        stepped = sum("s0" in batch for batch in engine.batches)
        assert 8 <= stepped < 50
        for _ in range(50):
            async with asyncio.timeout(5):
                await slow.get()
        await until(lambda: made.executor.parked == 0)
        assert sum("s0" in batch for batch in engine.batches) == 50


async def test_close_frees_the_slot_once_and_any_number_of_times() -> None:
    engine = BurstEngine(slots=1)
    async with rig(engine) as made:
        handle = await made.open("a")
        with pytest.raises(SlotsExhausted):
            await made.open("b")
        assert made.released == ["b"]
        for _ in range(3):
            handle.close()
        await handle.freed.wait()
        assert engine.free_slots == 1
        assert made.released == ["b", "a"]
        await put(handle, tone(1.0))  # nobody is there any more: neither an error nor a wait
        again = await made.open("c")
        assert engine.free_slots == 0
        again.close()
        await again.freed.wait()
        assert made.executor.leaked == 0


async def test_close_unblocks_who_waits_for_room() -> None:
    gate = threading.Event()
    async with rig(BurstEngine(gate=gate), ahead=0.2) as made:
        handle = await made.open()
        sending = asyncio.create_task(put(handle, quiet(0.1)))
        for _ in range(8):
            await asyncio.wait({sending}, timeout=0.02)
            if not sending.done():
                break
            sending = asyncio.create_task(put(handle, quiet(0.1)))
        assert not sending.done()
        handle.close()
        gate.set()
        async with asyncio.timeout(5):
            await sending


async def test_a_cancelled_open_gives_its_slot_back() -> None:
    gate = threading.Event()
    engine = BurstEngine(gate=gate)
    async with rig(engine) as made:
        first = await made.open("first")
        await put(first, quiet(0.04))
        await until(lambda: engine.at_gate)
        opening = asyncio.create_task(made.open("second"))
        await asyncio.sleep(0)
        opening.cancel()
        with pytest.raises(asyncio.CancelledError):
            await opening
        gate.set()
        await until(lambda: made.released == ["second"])
        assert engine.free_slots == engine.slots - 1


async def test_engine_that_breaks_as_a_whole(caplog: pytest.LogCaptureFixture) -> None:
    engine = BurstEngine()
    async with rig(engine) as made:
        handles = [await made.open(str(index)) for index in range(2)]

        def raises(waits: Sequence[float], misses: int) -> None:
            raise ValueError("not in any session's own code")

        made.hooks.on_step = raises  # type: ignore[method-assign]
        for handle in handles:
            await put(handle, tone(0.04))
        for handle in handles:
            assert isinstance((await drained(handle))[-1], Failed)
        assert made.executor.failed
        assert sorted(made.released) == ["0", "1"]
        with pytest.raises(ExecutorStopped):
            await made.open("late")
        assert "late" in made.released
    assert "executor failed" in caplog.text


async def test_stop_ends_every_session() -> None:
    engine = BurstEngine()
    async with rig(engine) as made:
        handle = await made.open()
        await made.executor.stop()
        (last,) = await drained(handle)
        assert isinstance(last, Failed)
        assert isinstance(last.error, ExecutorStopped)
        assert engine.free_slots == engine.slots
        with pytest.raises(ExecutorStopped):
            await made.open()


async def test_a_thread_with_nothing_to_do_sleeps() -> None:
    """An open session without work costs no CPU: the thread blocks until it gets mail."""
    engine = BurstEngine()
    async with rig(engine) as made:
        await made.open()
        calls = 0
        original = engine.opened[0].runnable

        def counted() -> bool:
            nonlocal calls
            calls += 1
            return original()

        engine.opened[0].runnable = counted  # type: ignore[method-assign]
        for _ in range(10):
            await asyncio.sleep(0.01)
        # At most the look at the session's start.
        assert calls <= 1


async def test_misses_and_waits_are_reported() -> None:
    engine = BurstEngine(budget=-1.0)
    async with rig(engine) as made:
        handle = await made.open()
        await put(handle, np.zeros(3 * FRAME, np.float32))
        await handle.put(types.Finish())
        await drained(handle)
        assert made.hooks.misses >= 3
        assert len(made.hooks.waits) == sum(made.hooks.batches)
        assert min(made.hooks.waits) >= 0
        assert handle.busy > 0


async def test_events_made_beside_steps_are_handed_on_without_a_step() -> None:
    engine = BurstEngine()
    async with rig(engine) as made:
        handle = await made.open()
        engine.opened[0].work_beside(types.Applied("first", 1), types.Applied("second", 2))
        async with asyncio.timeout(10):
            assert [(await handle.get()).event.control_id for _ in range(2)] == ["first", "second"]
        assert not made.hooks.batches
    assert engine.closed == 1


async def test_an_export_settles_first_and_what_that_gives_comes_before_it() -> None:
    engine = BurstEngine()
    async with rig(engine) as made:
        handle = await made.open()
        engine.opened[0].beside.append(types.Applied("made", 1))
        await handle.put(Export("tag"))
        async with asyncio.timeout(10):
            events = [(await handle.get()).event for _ in range(2)]
        assert isinstance(events[0], types.Applied)
        assert isinstance(events[1], Exported)
        assert engine.opened[0].settled == 1


async def test_who_fails_beside_steps_fails_alone(caplog: pytest.LogCaptureFixture) -> None:
    engine = BurstEngine()
    async with rig(engine) as made:
        handles = [await made.open(name) for name in ("bad", "good")]
        engine.opened[0].work_beside(RuntimeError("no frames"))
        assert isinstance((await drained(handles[0]))[-1], Failed)
        await put(handles[1], tone(0.1))
        await handles[1].put(types.Finish())
        assert isinstance((await drained(handles[1]))[-1], Ended)
        # A session that is gone may still be woken by a thread that does not know yet.
        engine.opened[0].work_beside(types.Applied("late", 1))
        await until(lambda: engine.free_slots == engine.slots)
    assert [record.message for record in caplog.records] == ["session failed"]
