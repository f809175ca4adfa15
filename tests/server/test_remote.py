"""An executor in a process of its own: the same sessions, and what can happen to the process."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest

from realtide.bundle import BundleError
from realtide.engines.ancat import types
from realtide.engines.engine import CheckpointMismatch, Opening, Restoring, SlotsExhausted
from realtide.engines.runtime.program import ProgramError
from realtide.server.handle import Emitted, Ended, Export, Exported, Failed
from realtide.server.remote import EngineGone, RemoteEngine, RemoteExecutor, RemoteHandle
from realtide.server.rounds import ExecutorStopped
from realtide_client.v1 import common_pb2
from tests.server.burst_process import loading
from tests.server.engine import POISON, pcm16, quiet, tone
from tests.server.helpers import (
    Request,
    Running,
    audio,
    connected,
    failure,
    finish,
    opening,
    responses,
    until,
)

OPTIONS = types.SpeechOptions()
FRAME = 640


class Hooks:
    def __init__(self) -> None:
        self.stages: list[str] = []
        self.batches: list[int] = []
        self.misses = 0

    def on_stage(self, stage: str, seconds: float, batch: int) -> None:
        assert seconds >= 0
        self.stages.append(stage)

    def on_step(self, waits: Sequence[float], misses: int) -> None:
        assert all(wait >= 0 for wait in waits)
        self.batches.append(len(waits))
        self.misses += misses


class Rig:
    def __init__(self, engine: RemoteEngine, ahead: float, events: int) -> None:
        self.engine = engine
        self.hooks = Hooks()
        self.failures = 0
        self.released: list[str] = []
        self.executor = RemoteExecutor(engine, self.hooks, ahead, events, self._failed)

    def _failed(self) -> None:
        self.failures += 1

    async def open(self, name: str = "s", make: Any = Opening(OPTIONS)) -> RemoteHandle:  # noqa: B008  # frozen
        handle = await self.executor.open(make, name, 0, lambda: self.released.append(name))
        handle.start()
        return handle


@contextlib.asynccontextmanager
async def rig(ahead: float = 5.0, events: int = 64, **options: Any) -> AsyncIterator[Rig]:
    made = Rig(await asyncio.to_thread(RemoteEngine, loading(**options)), ahead, events)
    made.executor.start()
    try:
        yield made
    finally:
        await made.executor.stop()
        assert made.engine.process.returncode is not None


async def put(handle: RemoteHandle, samples: Any) -> None:
    await handle.put(types.Audio(samples, time.monotonic()), len(samples), len(samples) / 16000)


async def drained(handle: RemoteHandle) -> list[Emitted]:
    """All events to the end."""
    found: list[Emitted] = []
    async with asyncio.timeout(10):
        while not found or not isinstance(found[-1].event, (Ended, Failed)):
            found.append(await handle.get())
    return found


async def test_a_session_from_open_to_end() -> None:
    async with rig(slots=3) as made:
        assert (made.engine.model, made.engine.slots, made.engine.max_batch) == ("bursts", 3, 3)
        assert made.engine.cache_bytes == 300
        handle = await made.open()
        await until(lambda: made.executor.open_sessions == 1)
        await put(handle, tone(0.1))
        await handle.put(types.SetInterim("off", enabled=False))
        await put(handle, quiet(0.1))
        await handle.put(types.Finish())
        found = await drained(handle)
        finals = [one for one in found if isinstance(one.event, types.Final)]
        assert [one.event.text for one in finals] == ["burst1"]
        (applied,) = [one for one in found if isinstance(one.event, types.Applied)]
        assert (applied.event, applied.position) == (types.Applied("off", 1600), 1600)
        assert isinstance(found[-1].event, Ended)
        assert found[-1].position == 3200
        async with asyncio.timeout(5):
            await handle.freed.wait()
        assert made.released == ["s"]
        assert handle.busy > 0
        await until(lambda: made.executor.open_sessions == 0)
        assert made.executor.leaked == 0
        assert set(made.hooks.stages) == {"encoder"}
        assert sum(made.hooks.batches) >= 5


async def test_neither_torch_nor_grpc_is_in_it() -> None:
    async with rig(goes_wrong="imports torch"):
        pass


async def test_sessions_share_steps() -> None:
    async with rig(delay=0.05) as made:
        handles = [await made.open(f"s{n}") for n in range(4)]
        for _ in range(4):
            for handle in handles:
                await put(handle, quiet(0.04))
        for handle in handles:
            await handle.put(types.Finish())
        for handle in handles:
            assert isinstance((await drained(handle))[-1].event, Ended)
        assert max(made.hooks.batches) == 4


async def test_an_exported_session_goes_on_elsewhere() -> None:
    async with rig() as made:
        handle = await made.open()
        await put(handle, tone(0.1))
        await handle.put(Export("here"))
        await put(handle, tone(0.1))
        handle.put_now(Export("now"))
        async with asyncio.timeout(5):
            emitted = await handle.get()
            while not (isinstance(emitted.event, Exported) and emitted.event.tag == "here"):
                emitted = await handle.get()
        assert emitted.position == 1600
        handle.close()
        state = emitted.event.state
        assert state is not None
        other = await made.open("other", Restoring(state, OPTIONS))
        await other.put(types.Finish())
        finals = [one.event for one in await drained(other) if isinstance(one.event, types.Final)]
        assert [final.text for final in finals] == ["burst1"]


async def test_what_opening_raises_is_raised_here() -> None:
    async with rig(slots=1) as made:
        with pytest.raises(CheckpointMismatch, match="not of this engine"):
            await made.open("damaged", Restoring(b"{}", OPTIONS))
        handle = await made.open()
        with pytest.raises(SlotsExhausted):
            await made.open("second")
        handle.close()
        handle.close()
        async with asyncio.timeout(5):
            await handle.freed.wait()
        await made.open("third")
        assert made.released == ["damaged", "second", "s"]


async def test_a_cancelled_open_gives_its_slot_back() -> None:
    async with rig(slots=1, delay=0.2) as made:
        first = await made.open("first")
        await put(first, quiet(0.04))
        first.close()
        opening_ = asyncio.create_task(made.open("cancelled"))
        await asyncio.sleep(0)
        opening_.cancel()
        with pytest.raises(asyncio.CancelledError):
            await opening_
        await until(lambda: sorted(made.released) == ["cancelled", "first"])
        await made.open("next")


async def test_input_waits_when_too_much_is_queued_and_never_for_a_live_stream() -> None:
    async with rig(ahead=1.0, delay=0.01) as made:
        handle = await made.open()
        sent = 0

        async def feed() -> None:
            nonlocal sent
            for _ in range(100):
                await put(handle, quiet(0.04))
                sent += 1

        task = asyncio.create_task(feed())
        await until(lambda: sent >= 25)
        # A second is taken in, the rest only as it is worked through.
        assert sent < 100
        async with asyncio.timeout(10):
            await task
        await handle.put(types.Finish())
        assert (await drained(handle))[-1].position == 100 * FRAME
        # One that is worked through as it comes hears of room long before it has none.
        live = await made.open("live")
        for _ in range(40):
            await asyncio.wait_for(put(live, quiet(0.04)), 5)
            await asyncio.sleep(0.02)
            assert live._given - live._taken < 1.0


async def test_room_is_asked_for_again_if_the_answer_did_not_make_enough() -> None:
    async with rig(ahead=1.0) as made:
        handle = await made.open()
        while handle._given < 0.5:
            await put(handle, quiet(0.04))
        await until(lambda: not handle._asked)
        # As if it had been answered when hardly anything was taken, and more was put since.
        handle._taken = handle._given - 1.0
        async with asyncio.timeout(5):
            await put(handle, quiet(0.04))


async def test_close_unblocks_who_waits_for_room() -> None:
    async with rig(ahead=0.2, delay=0.3) as made:
        handle = await made.open()

        async def feed() -> None:
            while not handle.freed.is_set():
                await put(handle, quiet(0.04))

        task = asyncio.create_task(feed())
        await asyncio.sleep(0.1)
        handle.close()
        async with asyncio.timeout(10):
            await task


async def test_a_reader_that_stops_is_not_stepped_and_goes_on_later() -> None:
    async with rig(events=8, chatty=True) as made:
        handle, other = await made.open(), await made.open("other")
        for _ in range(40):
            await put(handle, tone(0.04))
        await until(lambda: made.executor.parked == 1)
        steps = len(made.hooks.batches)
        assert steps < 20
        await put(other, tone(0.04))  # the other one is not held up
        async with asyncio.timeout(5):
            await other.get()
        await handle.put(types.Finish())
        found = await drained(handle)
        assert len([one for one in found if isinstance(one.event, types.Partial)]) == 40
        await until(lambda: made.executor.parked == 0)


async def test_one_poisoned_session_fails_alone() -> None:
    async with rig() as made:
        good, bad = await made.open("good"), await made.open("bad")
        poisoned = quiet(0.04)
        poisoned[3] = POISON
        await put(bad, poisoned)
        await put(good, tone(0.1))
        await good.put(types.Finish())
        (failed,) = [one.event for one in await drained(bad) if isinstance(one.event, Failed)]
        assert isinstance(failed.error, RuntimeError)
        assert "poisoned" in str(failed.error)
        assert isinstance((await drained(good))[-1].event, Ended)
        assert not made.executor.failed


async def test_an_executor_that_breaks_as_a_whole() -> None:
    async with rig(goes_wrong="breaks") as made:
        handle = await made.open()
        await put(handle, quiet(0.04))
        assert isinstance((await drained(handle))[-1].event, Failed)
        await until(lambda: made.executor.failed)
        await until(lambda: made.engine.process.poll() == 0)
        assert made.failures == 1
        with pytest.raises(ExecutorStopped):
            await made.open("late")
        assert made.released == ["s", "late"]


async def test_a_process_that_is_killed_takes_its_sessions_with_it_and_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with rig(delay=0.1) as made:
        handle = await made.open()
        await put(handle, quiet(0.04))
        coming = asyncio.create_task(made.open("coming"))
        await asyncio.sleep(0)
        os.kill(made.engine.process.pid, signal.SIGKILL)
        with pytest.raises(ExecutorStopped):
            await coming
        (failed,) = [one.event for one in await drained(handle) if isinstance(one.event, Failed)]
        assert isinstance(failed.error, EngineGone)
        await put(handle, quiet(0.04))  # nobody takes it, nobody waits
        handle.close()
        assert made.executor.failed
        assert made.failures == 1
        assert (made.executor.open_sessions, made.executor.leaked) == (0, 0)
        assert sorted(made.released) == ["coming", "s"]
        with pytest.raises(ExecutorStopped):
            await made.open("late")
    (record,) = [one for one in caplog.records if one.levelno >= logging.ERROR]
    assert "signal 9" in record.getMessage()


async def test_stop_ends_every_session_and_the_process() -> None:
    async with rig() as made:
        handle = await made.open()
        await made.executor.stop()
        (failed,) = [one.event for one in await drained(handle) if isinstance(one.event, Failed)]
        assert isinstance(failed.error, ExecutorStopped)
        assert made.engine.process.returncode == 0
        assert made.released == ["s"]
        assert not made.executor.failed
        with pytest.raises(ExecutorStopped):
            await made.open("late")
        await made.executor.stop()


async def test_stopped_before_it_was_started() -> None:
    engine = await asyncio.to_thread(RemoteEngine, loading())
    executor = RemoteExecutor(engine, Hooks(), 5.0, 64)
    await executor.stop()
    assert engine.process.returncode == 0


def test_what_loading_raises_is_raised_here() -> None:
    with pytest.raises(BundleError, match="bursts: weights: none"):
        RemoteEngine(loading(goes_wrong="refuses"))
    with pytest.raises(ProgramError, match="ended while it loaded: exit status 7"):
        RemoteEngine(loading(goes_wrong="dies"))


def test_it_ends_with_its_parent_and_not_with_a_signal_to_both() -> None:
    """Ctrl-C reaches the whole group: the server drains then, for which it needs the engine."""
    script = (
        "import os, signal, sys, time\n"
        "from realtide.server.remote import RemoteEngine\n"
        "from tests.server.burst_process import loading\n"
        "engine = RemoteEngine(loading())\n"
        "for number in (signal.SIGINT, signal.SIGTERM):\n"
        "    engine.process.send_signal(number)\n"
        "time.sleep(0.2)\n"
        "assert engine.process.poll() is None\n"
        "print(engine.process.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    root = Path(__file__).resolve().parents[2]
    parent = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, cwd=root, env=environment
    )
    assert parent.stdout is not None
    engine = psutil.Process(int(parent.stdout.readline()))
    parent.kill()
    parent.communicate()
    engine.wait(10)


@contextlib.asynccontextmanager
async def serving(count: int = 1, **options: Any) -> AsyncIterator[Running]:
    """A server whose executors are processes."""
    engines = [await asyncio.to_thread(RemoteEngine, loading(**options)) for _ in range(count)]
    async with connected(engines) as (server, channel):
        yield Running(server, engines[0], channel)


async def test_speech_through_a_server() -> None:
    async with serving(2, slots=2) as live:
        model = live.server.host.models["bursts"]
        calls = [await live.opened() for _ in range(4)]
        assert sorted(one.open_sessions for one in model.executors) == [2, 2]
        occupancy = model.occupancy()
        assert (occupancy.active, occupancy.capacity, len(occupancy.processes)) == (4, 4, 2)
        assert live.metric("realtide_executor_process_resident_bytes") > 1e7
        assert live.metric("realtide_executor_process_cpu_seconds_total") > 0
        for call in calls:
            await call.write(audio(pcm16(tone(0.2))))
            await call.write(Request(checkpoint_request=common_pb2.CheckpointRequest()))
            await call.write(finish())
            found = await responses(call)
            assert [one.final.text for one in found if one.HasField("final")] == ["burst1"]
            assert [one for one in found if one.HasField("checkpoint")]
        await until(lambda: not model.admission.used)
        await until(lambda: model.occupancy().active == 0)
        assert live.metric("realtide_step_batch_size_count") >= 4
        assert live.metric("realtide_slots_leaked") == 0


async def test_a_server_whose_engine_is_killed_is_not_healthy() -> None:
    async with serving() as live:
        call = await live.opened()
        await call.write(audio(pcm16(tone(0.2))))
        health = live.server._health
        assert health.state()[""]
        (executor,) = live.server.host.models["bursts"].executors
        assert isinstance(executor, RemoteExecutor)
        executor.engine.process.kill()
        assert (await failure(call)).code() == grpc.StatusCode.INTERNAL
        assert not health.state()[""]
        # A new session is refused and not left to wait.
        late = live.stream()
        await late.write(opening())
        assert (await failure(late)).code() == grpc.StatusCode.UNAVAILABLE
