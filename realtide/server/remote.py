"""The server's side of an executor that is a process of its own; `engine_process.py` is the other (ours).

The interpreter's lock is then the engine's alone: neither does the event loop wait while the executor runs
Python, nor the executor for the loop. It costs a copy of every input and event. The event loop sends what it
has once per turn, and neither side ever waits for the other: how much input was taken and how many events
were read is told now and then, before it would hold anybody up.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import select
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from realtide.engines.ancat.types import Audio
from realtide.engines.engine import Engine, Session
from realtide.engines.runtime.program import ProgramError
from realtide.server.engine_process import Facts, Load
from realtide.server.handle import LEAST_COST, Emitted, Failed, Front
from realtide.server.pipes import Message, Receiver, Sender, pipe
from realtide.server.rounds import ExecutorStopped, StepHooks, answer

log = logging.getLogger(__name__)

_STOP_SECONDS = 10.0
# Not with -m: what is pickled there would be of a module called __main__. Modules come from where the server
# has its own from, not from the working directory.
_CHILD = "import sys; sys.path[:] = {path!r}; from realtide.server.engine_process import main; main()"


class EngineGone(Exception):
    """The engine's process has ended."""


class RemoteEngine:
    """An engine in a process of its own. It knows what `engine.Engine` knows, and can only be stepped there.

    Args:
        load: what the process loads.

    Raises:
        Exception: what loading raised (BundleError, ProgramError, ImportError, ...).
        ProgramError: the process ended.
    """

    def __init__(self, load: Load) -> None:
        reading, given = pipe()
        taken, writing = pipe()
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-c", _CHILD.format(path=sys.path), str(reading), str(writing)],
                pass_fds=(reading, writing),
                stdin=subprocess.DEVNULL,
                stdout=2,  # the server's standard output is for its parent
            )
        finally:
            _close(reading, writing)
        self.receiver = Receiver(taken)
        self.sender = Sender(given, blocking=False)
        self.parked = 0
        self._ended = False
        try:
            facts = self._loaded(load)
        except BaseException:
            self.end()
            raise
        self.name = facts.name
        self.model = facts.model
        self.slots = facts.slots
        self.max_batch = facts.max_batch
        self.cache_bytes = facts.cache_bytes
        self.info: Any = facts.info

    def _loaded(self, load: Load) -> Facts:
        with contextlib.suppress(BrokenPipeError):
            self.sender.send([("load", load)])
        while not self.receiver.ended:
            select.select([self.receiver.descriptor], [], [])
            for name, found in self.receiver.read():
                if name == "refused":
                    raise found
                facts: Facts = found
                return facts
        raise ProgramError(f"the engine's process ended while it loaded: {_status(self.process.wait())}")

    def end(self) -> int:
        """Close the pipes, upon which the process ends, and wait; its exit status. Any number of times.

        Blocks for as long as a step takes; a process that has not ended after 10 s is killed.
        """
        if not self._ended:
            self._ended = True
            self.receiver.close()
            self.sender.close()
            try:
                self.process.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self.process.kill()
        return self.process.wait()


class RemoteHandle(Front):
    """A session in the event loop whose executor is another process.

    Args:
        executor: the executor's side here.
        number: of the session, for both sides.
        session_id: for logs.
        ahead: input that may wait, in seconds of media; `put` then waits.
        events: events that may wait; the session is then not advanced.
        on_released: called once when the slot is free.
    """

    def __init__(
        self,
        executor: RemoteExecutor,
        number: int,
        session_id: str,
        ahead: float,
        events: int,
        on_released: Callable[[], None],
    ) -> None:
        super().__init__(session_id, on_released)
        self.number = number
        self._executor = executor
        self._ahead = ahead
        self._tell_after = max(events // 4, 1)
        self._told = 0
        self._given = 0.0
        self._taken = 0.0  # at least; the executor says so when it is asked
        self._asked = False

    def start(self) -> None:
        """See `Front`."""
        self._executor.send(("start", self.number))

    async def put(self, item: Any, units: int = 0, seconds: float = 0.0) -> None:
        """See `Front`."""
        while self._given - self._taken >= self._ahead and not self.freed.is_set():
            self._room.clear()
            self._ask()
            await self._room.wait()
        cost = max(seconds, LEAST_COST)
        self._given += cost
        if isinstance(item, Audio):
            # As it is would be pickled too, but most of what is sent is audio.
            samples = item.samples.tobytes()
            self._executor.send(("audio", self.number, samples, item.received, units, cost))
        else:
            self._executor.send(("put", self.number, item, units, cost))
        # Long before there is no room: a live stream must not wait for the answer.
        if self._given - self._taken >= self._ahead / 2:
            self._ask()

    def put_now(self, item: Any) -> None:
        """See `Front`."""
        self._executor.send(("now", self.number, item))

    def close(self) -> None:
        """See `Front`."""
        if not self.freed.is_set():
            self._executor.send(("close", self.number))

    def room(self, taken: float) -> None:
        """The executor has taken so many seconds of input."""
        self._taken = taken
        self._asked = False
        self.make_room()

    def _ask(self) -> None:
        """Have the executor say how much it has taken, once half of what may wait is free there."""
        if not self._asked:
            self._asked = True
            self._executor.send(("room", self.number))

    def _has_read(self) -> None:
        if self._consumed - self._told >= self._tell_after:
            self._told = self._consumed
            self._executor.send(("read", self.number, self._consumed))


class RemoteExecutor:
    """What `executor.Executor` is, for an engine in a process of its own. Everything in the event loop.

    Args:
        engine: from `start` on only this reads its pipe.
        hooks: metrics.
        ahead: see `RemoteHandle`.
        events: see `RemoteHandle`.
        on_failure: called if the engine failed as a whole, or its process ended.
    """

    def __init__(
        self,
        engine: RemoteEngine,
        hooks: StepHooks,
        ahead: float,
        events: int,
        on_failure: Callable[[], None] = lambda: None,
    ) -> None:
        self.engine = engine
        self.slots = engine.slots
        self.cache_bytes = engine.cache_bytes
        self.failed = False
        self.open_sessions = 0
        self.parked = 0
        self.leaked = 0
        self._hooks = hooks
        self._ahead = ahead
        self._events = events
        self._on_failure = on_failure
        self._handles: dict[int, RemoteHandle] = {}
        self._opening: dict[int, asyncio.Future[None]] = {}
        self._number = 0
        self._outbox: list[Message] = []
        self._stopping = False
        self._gone = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._take: dict[str, Callable[..., None]] = {
            "events": self._on_events,
            "stage": hooks.on_stage,
            "step": hooks.on_step,
            "room": self._on_room,
            "freed": self._on_freed,
            "opened": self._on_opened,
            "counts": self._on_counts,
            "failed": self._on_failed,
        }

    def start(self) -> None:
        """Begin rounds; events go to the running event loop."""
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self.engine.receiver.descriptor, self._read)
        self.send(("run", self._ahead, self._events))

    async def stop(self) -> None:
        """Close every session and end the process. Any number of times."""
        if self._loop is not None and not self._gone.is_set():
            self._stopping = True
            self.send(("stop",))
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._gone.wait(), _STOP_SECONDS)
            self._lost()
        await asyncio.to_thread(self.engine.end)

    async def open(
        self, make: Callable[[Engine], Session], session_id: str, start: int, on_released: Callable[[], None]
    ) -> RemoteHandle:
        """Open a session with ``make(engine)``, which is pickled and runs in the engine's process.

        `on_released` is called once when the slot is free, also if `make` raises or the caller is cancelled.

        Raises:
            ExecutorStopped: nothing runs there any more.
            Exception: whatever `make` raises (SlotsExhausted, CheckpointMismatch, ...).
        """
        self._number += 1
        handle = RemoteHandle(self, self._number, session_id, self._ahead, self._events, on_released)
        if self._loop is None or self.failed or self._stopping:
            handle.slot_freed()
            raise ExecutorStopped
        opened: asyncio.Future[None] = self._loop.create_future()
        self._handles[handle.number] = handle
        self._opening[handle.number] = opened
        self.send(("open", handle.number, session_id, start, make))
        try:
            await opened
        except BaseException:
            handle.close()
            raise
        return handle

    def send(self, message: Message) -> None:
        """Send at the end of this turn of the event loop; nothing if the process is gone."""
        if self._loop is None or self._gone.is_set():
            return
        if not self._outbox:
            self._loop.call_soon(self._flush)
        self._outbox.append(message)

    def _flush(self) -> None:
        sender, loop = self.engine.sender, self._loop
        if loop is None or self._gone.is_set():
            return
        was_behind = sender.behind
        try:
            if self._outbox:
                outbox, self._outbox = self._outbox, []
                sender.send(outbox)
            else:
                sender.flush()
        except BrokenPipeError:
            return  # the end of the other pipe says so, after what is still in it
        if sender.behind and not was_behind:
            loop.add_writer(sender.descriptor, self._flush)
        elif was_behind and not sender.behind:
            loop.remove_writer(sender.descriptor)

    def _read(self) -> None:
        take = self._take
        for name, *rest in self.engine.receiver.read():
            take[name](*rest)
        if self.engine.receiver.ended:
            self._lost()

    def _lost(self) -> None:
        """The process has ended, or is about to be."""
        if self._gone.is_set() or self._loop is None:
            return
        self._gone.set()
        self._loop.remove_reader(self.engine.receiver.descriptor)
        self._loop.remove_writer(self.engine.sender.descriptor)
        if not self._stopping:
            # It may have closed its pipe before it can be waited for.
            until = time.monotonic() + 1.0
            while self.engine.process.poll() is None and time.monotonic() < until:
                time.sleep(0.01)
            status = self.engine.process.returncode
            if not self.failed:
                log.critical(
                    "the engine's process ended: %s", _status(status), extra={"model": self.engine.model}
                )
        for handle in list(self._handles.values()):
            opened = self._opening.pop(handle.number, None)
            if opened is None:
                error = ExecutorStopped() if self._stopping else EngineGone()
                handle.arrive([Emitted(Failed(error), 0)])
            else:
                answer(opened, ExecutorStopped())
            self._on_freed(handle.number, handle.busy)
        self._on_counts(0, 0, 0)
        if not self._stopping and not self.failed:
            self._on_failed()

    # -- messages ----------------------------------------------------------------------------------------

    def _on_events(self, number: int, events: list[tuple[Any, int]], busy: float) -> None:
        handle = self._handles.get(number)
        if handle is not None:
            handle.busy = busy
            handle.arrive([Emitted(event, position) for event, position in events])

    def _on_room(self, number: int, taken: float) -> None:
        handle = self._handles.get(number)
        if handle is not None:
            handle.room(taken)

    def _on_freed(self, number: int, busy: float) -> None:
        handle = self._handles.pop(number, None)
        if handle is not None:
            handle.busy = busy
            handle.slot_freed()

    def _on_opened(self, number: int, error: Exception | None) -> None:
        answer(self._opening.pop(number), error)

    def _on_counts(self, opened: int, parked: int, leaked: int) -> None:
        self.open_sessions, self.parked, self.leaked = opened, parked, leaked

    def _on_failed(self) -> None:
        self.failed = True
        self._on_failure()


def _status(code: int | None) -> str:
    """An exit status in words."""
    if code is None:
        return "still running"
    return f"signal {-code}" if code < 0 else f"exit status {code}"


def _close(*descriptors: int) -> None:
    for descriptor in descriptors:
        os.close(descriptor)
