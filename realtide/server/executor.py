"""The executor: one thread that owns an engine and advances its sessions, earliest deadline first.

It does not know what the sessions compute or who listens. Each round it takes what has arrived, feeds
sessions what one step can take of them, steps the most urgent session together with others that can
share the step, and hands all events to the event loop with a single wake-up. With nothing to do it sleeps on
its queue.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from realtide.engines.engine import Engine, Session
from realtide.server.handle import Emitted, Ended, Export, Exported, Failed, Handle
from realtide.server.turns import TURNS, Turns

log = logging.getLogger(__name__)


class ExecutorStopped(Exception):
    """The executor takes no more sessions: it was stopped, or the engine failed as a whole."""


class StepHooks(Protocol):
    """Told about steps, in the executor's thread."""

    def on_stage(self, stage: str, seconds: float, batch: int) -> None:
        """A stage of a step took `seconds` for `batch` sessions."""
        ...

    def on_step(self, waits: Sequence[float], misses: int) -> None:
        """A step advanced ``len(waits)`` sessions that had been ready for so many seconds each."""
        ...


class Executor:
    """Runs one engine in one thread.

    Args:
        engine: from `start` on only the executor's thread touches it.
        hooks: metrics.
        ahead: seconds of media that a session may have waiting.
        events: events that a session's client may leave unread.
        on_failure: called in the event loop if the engine failed as a whole.
        turns: between this thread and the event loop.
    """

    def __init__(
        self,
        engine: Engine,
        hooks: StepHooks,
        ahead: float,
        events: int,
        on_failure: Callable[[], None] = lambda: None,
        turns: Turns = TURNS,
    ) -> None:
        self.engine = engine
        self.slots = engine.slots
        self.cache_bytes = engine.cache_bytes
        self.failed = False
        self.open_sessions = 0  # these three are written by the thread and may be read by any
        self.parked = 0
        self.leaked = 0
        self._hooks = hooks
        self._ahead = ahead
        self._events = events
        self._on_failure = on_failure
        self._turns = Turns() if engine.computes is None else turns
        self._computes = engine.computes or ("", "")
        self._mail: queue.SimpleQueue[Handle | Callable[[], None]] = queue.SimpleQueue()
        self._sessions: set[Handle] = set()
        self._handles: dict[Session, Handle] = {}
        self._ready: set[Handle] = set()
        self._outgoing: list[tuple[Callable[[Any], None], Any]] = []
        self._stopping = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name=f"executor-{engine.model}", daemon=True)

    # -- event loop --------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the thread; events go to the running event loop."""
        self._loop = asyncio.get_running_loop()
        self.engine.attach(lambda session: self._mail.put(lambda: self._woken(session)), self._hooks.on_stage)
        self._thread.start()

    async def stop(self) -> None:
        """Close every session and end the thread. Any number of times."""
        if self._thread.is_alive():
            self._mail.put(self._stop)
            await asyncio.to_thread(self._thread.join)

    async def open(
        self, make: Callable[[Engine], Session], session_id: str, start: int, on_released: Callable[[], None]
    ) -> Handle:
        """Open a session with ``make(engine)``, which runs in the executor's thread.

        `on_released` is called once when the slot is free, also if `make` raises or the caller is cancelled.

        Raises:
            ExecutorStopped: nothing runs here any more.
            Exception: whatever `make` raises (SlotsExhausted, CheckpointMismatch, ...).
        """
        handle = Handle(self, session_id, start, self._ahead, self._events, on_released)
        if self.failed or not self._thread.is_alive():
            handle.slot_freed()
            raise ExecutorStopped
        opened: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._mail.put(lambda: self._open(handle, make, opened))
        if self._stopping:
            # The thread may have looked at its mail for the last time.
            handle.slot_freed()
            raise ExecutorStopped
        try:
            await opened
        except BaseException:
            handle.close()
            raise
        return handle

    def attend(self, handle: Handle) -> None:
        """Look at `handle` soon: it has input, or room for events."""
        self._mail.put(handle)

    def release(self, handle: Handle) -> None:
        """Close `handle` between steps."""
        self._mail.put(lambda: self._release(handle))

    # -- executor's thread -------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._stopping:
                self._receive()
                # What came without a step does not wait for one.
                self._hand_over()
                if self._ready:
                    self._step(self._choose())
                    self._hand_over()
        except Exception as error:
            log.critical("executor failed", exc_info=True, extra={"model": self.engine.model})
            self.failed = True
            self._outgoing.append((lambda _: self._on_failure(), None))
            for handle in list(self._sessions):
                self._fail(handle, error)
        finally:
            self._turns.end()
            self._empty()

    def _receive(self) -> None:
        """Take all mail; sleep for the first piece if there is nothing else to do."""
        wait = not self._ready
        if wait:
            self._turns.end()
        while True:
            try:
                message = self._mail.get(block=wait)
            except queue.Empty:
                return
            if wait:
                wait = False
                self._turns.begin()
            if isinstance(message, Handle):
                self._attend(message)
            else:
                message()

    def _woken(self, session: Session) -> None:
        """The engine has worked for `session` beside steps."""
        handle = self._handles.get(session)
        if handle is not None:
            self._attend(handle)

    def _attend(self, handle: Handle) -> None:
        """Hand on what a session has, feed it until it has work, and note how urgent that is."""
        handle.noticed()
        session = handle.session
        if session is None:
            return
        was_blocked = handle.blocked
        try:
            self._emit(handle, session.collect())
            runnable = self._feed(handle, session)
            self.parked += handle.blocked - was_blocked
            if session.done:
                self._emit(handle, [Ended()])
                self._release(handle)
            elif runnable:
                handle.deadline = session.deadline()
                handle.key = self.engine.batch_key(session)
                if handle not in self._ready:
                    handle.ready_since = time.monotonic()
                    self._ready.add(handle)
            else:
                self._ready.discard(handle)
        except Exception as error:
            self._fail(handle, error)
        if handle.has_room():
            self._outgoing.append((handle.make_room, None))

    def _feed(self, handle: Handle, session: Session) -> bool:
        """Hand over input until a step has all that it can use. Returns whether it has work.

        Stops as well when input is used up or the client leaves events unread. Media that one step can take
        goes into one step: the more frames it has, the less each costs. Anything else (a control, an export)
        has its place behind the media before it, so it waits until that was worked through. Input beyond the
        next step stays in the queue: that is where it is bounded. A session that generates its media has none
        before a control, and takes everything at once.
        """
        while not handle.full():
            if handle.consumes and session.runnable() and (session.full() or not handle.media_next()):
                return True
            item = handle.take()
            if item is None:
                return not handle.consumes and session.runnable()
            if isinstance(item, Export):
                self._emit(handle, session.settle())
                self._emit(handle, [Exported(self._export(handle, session), item.tag)])
            else:
                self._emit(handle, session.push(item))
        return False

    def _choose(self) -> list[Handle]:
        """The most urgent session and, by urgency, those that can share its step."""
        ready = sorted(self._ready, key=lambda handle: handle.deadline)
        key = ready[0].key
        return [handle for handle in ready if handle.key == key][: self.engine.max_batch]

    def _step(self, batch: list[Handle]) -> None:
        start = time.monotonic()
        waits = [start - handle.ready_since for handle in batch]
        try:
            results = self._advance(batch)
        except Exception as error:
            results = self._isolate(batch, error)
        end = time.monotonic()
        share = (end - start) / len(batch)
        self._hooks.on_step(waits, sum(end > handle.deadline for handle in batch))
        for handle, events in zip(batch, results, strict=True):
            handle.busy += share
            self._emit(handle, events)
            # Whether it stays ready is decided anew; its wait starts now.
            self._ready.discard(handle)
            if not handle.rests():
                self._attend(handle)

    def _advance(self, batch: Sequence[Handle]) -> list[list[Any]]:
        sessions = [handle.session for handle in batch if handle.session is not None]
        results = self.engine.step(sessions, self._on_stage)
        if len(results) != len(batch):
            raise RuntimeError(f"engine gave {len(results)} results for {len(batch)} sessions")
        return results

    def _on_stage(self, stage: str, seconds: float, batch: int) -> None:
        self._hooks.on_stage(stage, seconds, batch)
        if stage == self._computes[0]:
            self._turns.end()
        elif stage == self._computes[1]:
            self._turns.begin()

    def _isolate(self, batch: Sequence[Handle], error: Exception) -> list[list[Any]]:
        """A step raised `error`: run its sessions one by one, so that only those at fault are lost."""
        if len(batch) == 1:
            self._fail(batch[0], error)
            return [[]]
        results: list[list[Any]] = []
        for handle in batch:
            try:
                runnable = handle.session is not None and handle.session.runnable()
                results.append(self._advance([handle])[0] if runnable else [])
            except Exception as own:
                self._fail(handle, own)
                results.append([])
        return results

    def _open(self, handle: Handle, make: Callable[[Engine], Session], opened: asyncio.Future[None]) -> None:
        try:
            if self._stopping:
                raise ExecutorStopped
            handle.session = make(self.engine)
        except Exception as error:
            self._release(handle)
            self._outgoing.append((_reject(opened), error))
            return
        self._sessions.add(handle)
        self._handles[handle.session] = handle
        self._count()
        self._outgoing.append((_resolve(opened), None))

    def _export(self, handle: Handle, session: Session) -> bytes | None:
        try:
            return session.export()
        except Exception:
            log.exception("export failed", extra={"session": handle.session_id})
            return None

    def _emit(self, handle: Handle, events: Sequence[Any]) -> None:
        if events:
            handle.count(len(events))
            position = handle.position
            self._outgoing.append((handle.arrive, [Emitted(event, position) for event in events]))

    def _fail(self, handle: Handle, error: Exception) -> None:
        log.error("session failed", exc_info=error, extra={"session": handle.session_id})
        self._emit(handle, [Failed(error)])
        self._release(handle)

    def _release(self, handle: Handle) -> None:
        """Give the slot back, once."""
        if handle.released:
            return
        handle.released = True
        self._ready.discard(handle)
        self._sessions.discard(handle)
        if handle.session is not None:
            self._handles.pop(handle.session, None)
            self.parked -= handle.blocked
            try:
                handle.session.close()
            except Exception:
                log.exception("close failed", extra={"session": handle.session_id})
            handle.session = None
        self._count()
        self._outgoing.append((handle.slot_freed, None))

    def _count(self) -> None:
        self.open_sessions = len(self._sessions)
        self.leaked = self.slots - self.engine.free_slots - len(self._sessions)

    def _hand_over(self) -> None:
        """One wake-up of the event loop for everything of this round."""
        if self._outgoing and self._loop is not None:
            outgoing, self._outgoing = self._outgoing, []
            try:
                self._loop.call_soon_threadsafe(_deliver, outgoing)
            except RuntimeError:
                # The loop is closed: nobody is left to be told.
                self._stopping = True

    def _stop(self) -> None:
        self._stopping = True
        for handle in list(self._sessions):
            self._emit(handle, [Failed(ExecutorStopped())])
            self._release(handle)

    def _empty(self) -> None:
        """Nothing runs any more: answer what is still in the mail, so that nobody waits for ever."""
        self._stopping = True
        self.engine.close()
        while not self._mail.empty():
            message = self._mail.get()
            if not isinstance(message, Handle):
                message()
        self._hand_over()


def _deliver(outgoing: list[tuple[Callable[[Any], None], Any]]) -> None:
    for call, argument in outgoing:
        call(argument)


def _resolve(future: asyncio.Future[None]) -> Callable[[None], None]:
    return lambda _: None if future.done() else future.set_result(None)


def _reject(future: asyncio.Future[None]) -> Callable[[Exception], None]:
    return lambda error: None if future.done() else future.set_exception(error)
