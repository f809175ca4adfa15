"""Rounds of an executor: advance an engine's sessions, earliest deadline first.

It does not know what the sessions compute or who listens. Each round takes what has arrived, feeds sessions
what one step can take of them, steps the most urgent session together with others that can share the step,
and hands all events over at once, before the step those that needed none. Where input comes from and
events go to is the subclass's: a thread's queue (executor.py) or a process's pipes (engine_process.py).
"""

from __future__ import annotations

import asyncio
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from realtide.engines.engine import Engine, Session
from realtide.server.handle import Emitted, Ended, Export, Exported, Failed, Handle

log = logging.getLogger(__name__)


class ExecutorStopped(Exception):
    """The executor takes no more sessions: it was stopped, or the engine failed as a whole."""


def answer(opened: asyncio.Future[None], error: Exception | None) -> None:
    """Tell who waits for a session, if anybody still does, that it is open or what opening it raised."""
    if opened.done():
        return
    if error is None:
        opened.set_result(None)
    else:
        opened.set_exception(error)


class StepHooks(Protocol):
    """Told about steps, in the executor's thread."""

    def on_stage(self, stage: str, seconds: float, batch: int) -> None:
        """A stage of a step took `seconds` for `batch` sessions."""
        ...

    def on_step(self, waits: Sequence[float], misses: int) -> None:
        """A step advanced ``len(waits)`` sessions that had been ready for so many seconds each."""
        ...


class Rounds(ABC):
    """Runs one engine; everything here is called from one thread.

    Args:
        engine: from the first round on only this touches it.
        hooks: metrics.
        on_failure: handed over like an event if the engine failed as a whole.
    """

    def __init__(self, engine: Engine, hooks: StepHooks, on_failure: Callable[[], None]) -> None:
        self.engine = engine
        self.failed = False
        self.open_sessions = 0  # these three are written by the rounds and may be read by any thread
        self.parked = 0
        self.leaked = 0
        self._hooks = hooks
        self._on_failure = on_failure
        self._sessions: set[Handle] = set()
        self._handles: dict[Session, Handle] = {}
        self._ready: set[Handle] = set()
        self._outgoing: list[tuple[Callable[[Any], None], Any]] = []
        self._stopping = False

    @abstractmethod
    def _receive(self) -> None:
        """Take what has arrived, if nothing is ready wait for it, and `_attend` to whom it is for."""

    @abstractmethod
    def _hand_over(self) -> None:
        """Have the calls of `_outgoing` made where the handles' other side is, and empty it."""

    def _rounds(self) -> None:
        """Until `_stopping`, or until the engine breaks."""
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
            found = session.collect()
            if found:
                self._emit(handle, found)
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
            if handle.consumes and session.runnable() and (not handle.media_next() or session.full()):
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
            if events:
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

    def _open(
        self, handle: Handle, make: Callable[[Engine], Session], told: Callable[[Exception | None], None]
    ) -> None:
        """Open a session for `handle`; `told` hears of it, or of what `make` raised."""
        try:
            if self._stopping:
                raise ExecutorStopped
            handle.session = make(self.engine)
        except Exception as error:
            self._release(handle)
            self._outgoing.append((told, error))
            return
        self._sessions.add(handle)
        self._handles[handle.session] = handle
        self._count()
        self._outgoing.append((told, None))

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
        self.leaked = self.engine.slots - self.engine.free_slots - len(self._sessions)

    def _stop(self) -> None:
        self._stopping = True
        for handle in list(self._sessions):
            self._emit(handle, [Failed(ExecutorStopped())])
            self._release(handle)
