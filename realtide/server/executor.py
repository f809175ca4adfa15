"""The executor: one thread that owns an engine and makes its rounds.

With nothing to do it sleeps on its queue; all events of a round reach the event loop with a single wake-up.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

from realtide.engines.engine import Engine, Session
from realtide.server.handle import Handle
from realtide.server.rounds import ExecutorStopped, Rounds, StepHooks, answer
from realtide.server.turns import TURNS, Turns


class Executor(Rounds):
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
        super().__init__(engine, hooks, on_failure)
        self.slots = engine.slots
        self.cache_bytes = engine.cache_bytes
        self._ahead = ahead
        self._events = events
        self._turns = Turns() if engine.computes is None else turns
        self._computes = engine.computes or ("", "")
        self._mail: queue.SimpleQueue[Handle | Callable[[], None]] = queue.SimpleQueue()
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
        self._mail.put(lambda: self._open(handle, make, partial(answer, opened)))
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
            self._rounds()
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

    def _on_stage(self, stage: str, seconds: float, batch: int) -> None:
        super()._on_stage(stage, seconds, batch)
        if stage == self._computes[0]:
            self._turns.end()
        elif stage == self._computes[1]:
            self._turns.begin()

    def _hand_over(self) -> None:
        """One wake-up of the event loop for everything of this round."""
        if self._outgoing and self._loop is not None:
            outgoing, self._outgoing = self._outgoing, []
            try:
                self._loop.call_soon_threadsafe(_deliver, outgoing)
            except RuntimeError:
                # The loop is closed: nobody is left to be told.
                self._stopping = True

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
