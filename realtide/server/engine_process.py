"""An executor in a process of its own: its rounds between two pipes (ours). `remote.py` is the other side.

The parent starts it with the numbers of two descriptors. The first message says what to load, the answer what
it is; from then on messages are those of `_Rounds`. There is one thread: between two steps it takes what has
arrived, and while a step computes, the pipe keeps it. It ends when it is told to, or when its parent is gone.
"""

from __future__ import annotations

import gc
import importlib
import select
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from realtide.engines.ancat.types import Audio
from realtide.engines.engine import Engine, Session
from realtide.server import logs
from realtide.server.handle import Emitted, Failed, Handle
from realtide.server.pipes import Message, Receiver, Sender, portable
from realtide.server.rounds import Rounds

# Of the garbage collector, the server's too: a message makes a dozen objects that it counts.
GC_THRESHOLDS = (10_000, 10, 10)


@dataclass(frozen=True, slots=True)
class Load:
    """What a process is to load: ``module.load(bundle, **arguments)``; and how it logs."""

    module: str
    bundle: Path
    arguments: dict[str, Any]
    log_level: str
    log_format: str


@dataclass(frozen=True, slots=True)
class Facts:
    """What the server needs to know of a loaded engine; see `engine.Engine`."""

    name: str
    model: str
    slots: int
    max_batch: int
    cache_bytes: int
    info: Any


class _Hooks:
    """Metrics are the server's."""

    def __init__(self, outbox: list[Message]) -> None:
        self._outbox = outbox

    def on_stage(self, stage: str, seconds: float, batch: int) -> None:
        """See `rounds.StepHooks`."""
        self._outbox.append(("stage", stage, seconds, batch))

    def on_step(self, waits: Sequence[float], misses: int) -> None:
        """See `rounds.StepHooks`."""
        self._outbox.append(("step", waits, misses))


class _Handle(Handle):
    """The executor's side of a session; what the other side is told goes through the pipe."""

    def __init__(self, rounds: _Rounds, number: int, session_id: str, start: int) -> None:
        super().__init__(rounds, session_id, start, rounds.ahead, rounds.events, lambda: None)
        self.number = number
        self._outbox = rounds.outbox

    def arrive(self, emitted: list[Emitted]) -> None:
        events = [
            (Failed(portable(event.error)) if isinstance(event, Failed) else event, position)
            for event, position in emitted
        ]
        self._outbox.append(("events", self.number, events, self.busy))

    def make_room(self, _: None = None) -> None:
        self._outbox.append(("room", self.number, self.taken))

    def slot_freed(self, _: None = None) -> None:
        if not self.freed.is_set():
            self.freed.set()
            self._outbox.append(("freed", self.number, self.busy))


class _Rounds(Rounds):
    """An executor's rounds between two pipes.

    Args:
        engine: it works in steps only, nothing beside them.
        receiver: from the server.
        sender: to the server; blocking.
        ahead: see `handle.Handle`.
        events: see `handle.Handle`.
        waiting: messages that have arrived already.
    """

    def __init__(
        self,
        engine: Engine,
        receiver: Receiver,
        sender: Sender,
        ahead: float,
        events: int,
        waiting: list[Message],
    ) -> None:
        self.outbox: list[Message] = []
        super().__init__(engine, _Hooks(self.outbox), lambda: self.outbox.append(("failed",)))
        self.ahead = ahead
        self.events = events
        self._receiver = receiver
        self._sender = sender
        self._waiting = waiting
        self._arriving = select.poll()
        self._arriving.register(receiver.descriptor, select.POLLIN)
        self._numbers: dict[int, _Handle] = {}
        self._counts: tuple[int, int, int] = (0, 0, 0)
        self._take: dict[str, Callable[..., _Handle | None]] = {
            "audio": self._on_audio,
            "put": self._on_put,
            "now": self._on_now,
            "read": self._on_read,
            "room": self._on_room,
            "start": self._numbers.get,
            "open": self._on_open,
            "close": self._on_close,
            "stop": self._on_stop,
        }

    def run(self) -> None:
        """Until it is told to stop, the engine breaks, or the server is gone."""
        try:
            self._rounds()
        finally:
            self.engine.close()
        self._hand_over()

    def attend(self, handle: Handle) -> None:
        """See `handle.Inbox`."""
        self._attend(handle)

    def release(self, handle: Handle) -> None:
        """See `handle.Inbox`."""
        self._release(handle)

    def _receive(self) -> None:
        if not self._ready and not self._waiting:
            self._arriving.poll()
        take = self._take
        touched: dict[_Handle, None] = {}
        arrived, self._waiting = self._waiting + self._receiver.read(), []
        for name, *rest in arrived:
            handle = take[name](*rest)
            if handle is not None:
                touched[handle] = None
        for handle in touched:
            self._attend(handle)
        if self._receiver.ended:
            self._on_stop()

    def _hand_over(self) -> None:
        outgoing, self._outgoing = self._outgoing, []
        for call, argument in outgoing:
            call(argument)
        counts = (self.open_sessions, self.parked, self.leaked)
        if counts != self._counts:
            self._counts = counts
            self.outbox.append(("counts", *counts))
        if self.outbox:
            try:
                self._sender.send(self.outbox)
            except BrokenPipeError:
                self._stopping = True  # nobody is left to be told
            self.outbox.clear()

    def _release(self, handle: Handle) -> None:
        super()._release(handle)
        if isinstance(handle, _Handle):
            self._numbers.pop(handle.number, None)

    # -- messages: each returns the handle that has to be looked at --------------------------------------

    def _on_audio(
        self, number: int, samples: bytes, received: float, units: int, cost: float
    ) -> _Handle | None:
        handle = self._numbers.get(number)
        if handle is not None:
            handle.give(Audio(np.frombuffer(samples, np.float32), received), units, cost)
        return handle

    def _on_put(self, number: int, item: Any, units: int, cost: float) -> _Handle | None:
        handle = self._numbers.get(number)
        if handle is not None:
            handle.give(item, units, cost)
        return handle

    def _on_now(self, number: int, item: Any) -> _Handle | None:
        handle = self._numbers.get(number)
        if handle is not None:
            handle.give_now(item)
        return handle

    def _on_read(self, number: int, events: int) -> _Handle | None:
        handle = self._numbers.get(number)
        if handle is not None:
            handle.read_up_to(events)
        return handle

    def _on_room(self, number: int) -> _Handle | None:
        handle = self._numbers.get(number)
        if handle is not None:
            handle.want_room()
        return handle

    def _on_open(self, number: int, session_id: str, start: int, make: Callable[[Engine], Session]) -> None:
        handle = self._numbers[number] = _Handle(self, number, session_id, start)

        def told(error: Exception | None) -> None:
            self.outbox.append(("opened", number, None if error is None else portable(error)))

        self._open(handle, make, told)

    def _on_close(self, number: int) -> None:
        handle = self._numbers.get(number)
        if handle is not None:
            self._release(handle)

    def _on_stop(self) -> None:
        self._stop()


def _no_wake(session: Session) -> None:
    raise RuntimeError("an engine that works beside steps cannot be in a process of its own")


def _load(receiver: Receiver, sender: Sender) -> _Rounds | None:
    """Load what the server says, and hear how it is to be run; None if the server is gone or it failed."""
    waiting: list[Message] = []

    def wait() -> Message | None:
        while not waiting and not receiver.ended:
            select.select([receiver.descriptor], [], [])
            waiting.extend(receiver.read())
        return waiting.pop(0) if waiting else None

    message = wait()
    if message is None:
        return None
    load: Load = message[1]
    logs.configure(load.log_level, load.log_format)
    try:
        engine: Engine = importlib.import_module(load.module).load(load.bundle, **load.arguments)
    except Exception as error:
        sender.send([("refused", portable(error))])
        return None
    info: Any = getattr(engine, "info", None)
    facts = Facts(engine.name, engine.model, engine.slots, engine.max_batch, engine.cache_bytes, info)
    sender.send([("loaded", facts)])
    message = wait()
    if message is None:
        return None
    _, ahead, events = message
    rounds = _Rounds(engine, receiver, sender, ahead, events, waiting)
    engine.attach(_no_wake, _Hooks(rounds.outbox).on_stage)
    return rounds


def main() -> None:
    """Serve one engine to the process at the other end of two pipes."""
    # Signals are the server's, which also reach its children: it drains first and then says so.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    receiver = Receiver(int(sys.argv[1]))
    sender = Sender(int(sys.argv[2]), blocking=True)
    try:
        rounds = _load(receiver, sender)
    except BrokenPipeError:
        return
    if rounds is not None:
        gc.collect()
        gc.freeze()
        gc.set_threshold(*GC_THRESHOLDS)
        rounds.run()
