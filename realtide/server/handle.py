"""One session as seen from both sides: a bounded queue of input to the executor and one of events back.

`Front` is what the event loop sees of a session, wherever its executor is. `Handle` is both sides of one
whose executor is a thread of this process. There the event loop writes some fields and the executor's thread
the others, never both, so neither side takes a lock: under the interpreter's lock a flag that is set before a
re-check of the other side's counter cannot be missed. The executor wakes the event loop once per round, not
once per event.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from realtide.engines.engine import Session

# What an item costs at least, in seconds of input: bounds the queue's length when items carry no or hardly
# any media.
LEAST_COST = 0.005


class Emitted(NamedTuple):
    """An event and the position (media units) up to which the engine had been fed when it came."""

    event: Any
    position: int


@dataclass(frozen=True, slots=True)
class Export:
    """An input item: export the state at this place of the input. `tag` comes back with `Exported`."""

    tag: Any


@dataclass(frozen=True, slots=True)
class Exported:
    """The session's state after everything that was emitted before; `state` is None if the export failed."""

    state: bytes | None
    tag: Any


@dataclass(frozen=True, slots=True)
class Ended:
    """The session has handed out its last event and given its slot back."""


@dataclass(frozen=True, slots=True)
class Failed:
    """The engine raised `error` for this session; the slot is free again."""

    error: Exception


class Inbox(Protocol):
    """What a handle needs of the executor."""

    def attend(self, handle: Handle) -> None:
        """Have the executor look at `handle` soon."""
        ...

    def release(self, handle: Handle) -> None:
        """Have the executor close `handle` between steps."""
        ...


class Front(ABC):
    """A session in the event loop.

    Args:
        session_id: for logs.
        on_released: called once when the slot is free.
    """

    def __init__(self, session_id: str, on_released: Callable[[], None]) -> None:
        self.session_id = session_id
        self.consumes = True  # input has its place behind the media before it; set before `start`
        self.freed = asyncio.Event()
        self.busy = 0.0  # seconds of step time, each step shared by its batch
        self._on_released = on_released
        self._arrived: deque[Emitted] = deque()
        self._news = asyncio.Event()
        self._room = asyncio.Event()
        self._consumed = 0

    @abstractmethod
    def start(self) -> None:
        """Have the executor look at the session for the first time; a restored one may have work already."""

    @abstractmethod
    async def put(self, item: Any, units: int = 0, seconds: float = 0.0) -> None:
        """Queue input of `units` media units lasting `seconds`; waits while too much is queued."""

    @abstractmethod
    def put_now(self, item: Any) -> None:
        """Queue an item that must not wait for room (the server's own: an export at drain)."""

    @abstractmethod
    def close(self) -> None:
        """Free the slot between steps. Any number of times."""

    @abstractmethod
    def _has_read(self) -> None:
        """One more of the engine's events has been read."""

    async def get(self) -> Emitted:
        """The next event, in order."""
        while not self._arrived:
            self._news.clear()
            await self._news.wait()
        emitted = self._arrived.popleft()
        if emitted.position >= 0:
            self._consumed += 1
            self._has_read()
        return emitted

    def inject(self, event: Any) -> None:
        """Put an event of the event loop's own behind those that have arrived."""
        self._arrived.append(Emitted(event, -1))
        self._news.set()

    def arrive(self, emitted: list[Emitted]) -> None:
        """Events have come from the executor."""
        self._arrived.extend(emitted)
        self._news.set()

    def make_room(self, _: None = None) -> None:
        """The executor has taken input: go on with `put`."""
        self._room.set()

    def slot_freed(self, _: None = None) -> None:
        """The executor has closed the session."""
        if not self.freed.is_set():
            self.freed.set()
            self.make_room()
            self._on_released()


class Handle(Front):
    """A session's two queues.

    Args:
        inbox: the executor.
        session_id: for logs.
        start: position of the first media unit (not 0 after a resume).
        ahead: input that may wait, in seconds of media; `put` then waits.
        events: events that may wait; the session is then not advanced.
        on_released: called once in the event loop when the slot is free.
    """

    def __init__(
        self,
        inbox: Inbox,
        session_id: str,
        start: int,
        ahead: float,
        events: int,
        on_released: Callable[[], None],
    ) -> None:
        super().__init__(session_id, on_released)
        self._inbox = inbox
        self._ahead = ahead
        self._limit = events
        self._items: deque[tuple[Any, int, float]] = deque()
        # Event loop's side.
        self._given = 0.0
        self._wants_room = False
        self._signalled = False
        # Executor's side.
        self.taken = 0.0  # seconds of input
        self._produced = 0
        self.position = start
        self.session: Session | None = None
        self.released = False
        self.blocked = False
        self.deadline = 0.0
        self.key: Hashable = None
        self.ready_since = 0.0

    # -- event loop --------------------------------------------------------------------------------------

    def start(self) -> None:
        """Have the executor look at the session for the first time; a restored one may have work already."""
        self._signal()

    async def put(self, item: Any, units: int = 0, seconds: float = 0.0) -> None:
        """Queue input of `units` media units lasting `seconds`; waits while too much is queued."""
        while self._backlog() >= self._ahead and not self.released:
            self._room.clear()
            self._wants_room = True
            # The executor may have made room before it could see the wish.
            if self._backlog() < self._ahead or self.released:
                break
            await self._room.wait()
        self.give(item, units, max(seconds, LEAST_COST))
        self._signal()

    def put_now(self, item: Any) -> None:
        """Queue an item that must not wait for room (the server's own: an export at drain)."""
        self.give_now(item)
        self._signal()

    def give(self, item: Any, units: int, cost: float) -> None:
        """Queue input that costs `cost` seconds; the executor is not told."""
        self._items.append((item, units, cost))
        self._given += cost

    def give_now(self, item: Any) -> None:
        """Queue an item before all others; the executor is not told."""
        self._items.appendleft((item, 0, 0.0))

    def read_up_to(self, events: int) -> None:
        """The client has read so many events by now; the executor is not told."""
        self._consumed = events

    def want_room(self) -> None:
        """Have `make_room` called once half of what may wait is free; the executor is not told."""
        self._wants_room = True

    def _has_read(self) -> None:
        if self.blocked and self._produced - self._consumed <= self._limit // 2:
            self._signal()

    def close(self) -> None:
        """Free the slot between steps. Any number of times."""
        self._inbox.release(self)

    def _backlog(self) -> float:
        return self._given - self.taken

    def _signal(self) -> None:
        if not self._signalled:
            self._signalled = True
            self._inbox.attend(self)

    # -- executor ----------------------------------------------------------------------------------------

    def noticed(self) -> None:
        """The executor looks at the handle now: what is signalled from here on needs a new message."""
        self._signalled = False

    def take(self) -> Any | None:
        """The next item of input, or None."""
        try:
            item, units, cost = self._items.popleft()
        except IndexError:
            return None
        self.position += units
        self.taken += cost
        return item

    def rests(self) -> bool:
        """True if there is nothing to do until input comes, of which the executor will be told."""
        session = self.session
        return (
            session is not None
            and self.consumes
            and not (self._items or self.blocked or self._wants_room or session.done or session.runnable())
        )

    def media_next(self) -> bool:
        """True if the next item of input is media, which a step may take together with what came before."""
        return bool(self._items) and self._items[0][1] > 0

    def has_room(self) -> bool:
        """True if the producer waits and there is room again."""
        if self._wants_room and self._backlog() <= self._ahead / 2:
            self._wants_room = False
            return True
        return False

    def full(self) -> bool:
        """True if the client has left too many events unread; sets `blocked` accordingly."""
        if self._produced - self._consumed < self._limit:
            self.blocked = False
            return False
        self.blocked = True
        # The client may have read before it could see the flag.
        if self._produced - self._consumed <= self._limit // 2:
            self.blocked = False
        return self.blocked

    def count(self, events: int) -> None:
        """`events` more are on their way to the client."""
        self._produced += events
