"""The contract between the server and an engine (ours; architecture rules 1, 3 and 5).

An engine advances many *sessions* in batched steps. The executor thread owns the engine and every session
of it: all
methods below are called from that one thread, so engines need no locks. An engine knows nothing of gRPC or
asyncio:
inputs and events are the engine's own plain dataclasses, which the server's services translate.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol


class SlotsExhausted(Exception):
    """No slot is free; the caller decides whether to queue or to refuse."""


class CheckpointMismatch(Exception):
    """A checkpoint was made by another model or format version, or is damaged; the message says which."""


@dataclass(frozen=True, slots=True)
class Opening:
    """Opens a session; to be called where the engine is."""

    options: Any

    def __call__(self, engine: Engine) -> Session:
        """See `Engine.open`."""
        return engine.open(self.options)


@dataclass(frozen=True, slots=True)
class Restoring:
    """Continues an exported session; to be called where the engine is."""

    checkpoint: bytes
    options: Any

    def __call__(self, engine: Engine) -> Session:
        """See `Engine.restore`."""
        return engine.restore(self.checkpoint, self.options)


class Session(Protocol):
    """One live stream's state.

    Every method may be called at any time, also after an error and after `close`.
    """

    @property
    def done(self) -> bool:
        """True once the session has finished its input and handed out its last event."""
        ...

    def push(self, item: Any) -> Sequence[Any]:
        """Take one input (media or control; already validated). Cheap: no model work.

        Returns events that follow at once (for example the *applied* receipt of a control).
        """
        ...

    def runnable(self) -> bool:
        """True if a step would do work for this session. A session with nothing ready costs nothing."""
        ...

    def full(self) -> bool:
        """True if a runnable session wants no more media before its step: it would not be part of it.

        A session that is not runnable is never full.
        """
        ...

    def deadline(self) -> float:
        """Monotonic time in seconds at which the oldest unprocessed input should have been processed."""
        ...

    def collect(self) -> Sequence[Any]:
        """Events that arose beside steps (see `Engine.attach`), in order; they are handed out once.

        Raises whatever that work ended with: the session is lost then.
        """
        ...

    def settle(self) -> Sequence[Any]:
        """Have work beside steps rest until `export` has been called; the last of its events."""
        ...

    def export(self) -> bytes:
        """Serialize the whole state (versioned, self-describing); the session goes on unchanged.

        The state is that after all events that were handed out. Called right after `settle`.
        """
        ...

    def close(self) -> None:
        """Free the slot. Idempotent: the slot is freed exactly once."""
        ...


class Engine(Protocol):
    """Model logic on slots."""

    @property
    def name(self) -> str:
        """Engine name as used in metric labels, for example ``ancat``."""
        ...

    @property
    def model(self) -> str:
        """Name of the loaded bundle."""
        ...

    @property
    def slots(self) -> int:
        """Number of sessions that can be open at once."""
        ...

    @property
    def free_slots(self) -> int:
        """Slots that no session holds."""
        ...

    @property
    def max_batch(self) -> int:
        """Most sessions that one step may advance."""
        ...

    @property
    def cache_bytes(self) -> int:
        """Bytes of the preallocated state of all slots (the metric ``kv_cache_bytes``)."""
        ...

    @property
    def parked(self) -> int:
        """Sessions whose cache was given to another one, and which will come back (metric ``sessions``)."""
        ...

    @property
    def computes(self) -> tuple[str, str] | None:
        """Two stages of a step between whose ends it computes without the interpreter's lock; None: never so.

        Only for engines that hold the lock for milliseconds in the rest of a step (see server/turns.py).
        """
        ...

    def attach(self, wake: Callable[[Session], None], on_stage: StageTimer) -> None:
        """Called once, before the first session.

        An engine that works beside steps, in threads of its own, calls `wake(session)` there when a session
        has something to collect, or may have become runnable or done; and `on_stage` for that work.
        """
        ...

    def close(self) -> None:
        """End the engine's own threads. Called after the last session was closed; any number of times."""
        ...

    def open(self, options: Any) -> Session:
        """Take a slot. Raises SlotsExhausted."""
        ...

    def restore(self, checkpoint: bytes, options: Any | None = None) -> Session:
        """Take a slot and continue an exported session. Raises SlotsExhausted, CheckpointMismatch."""
        ...

    def batch_key(self, session: Session) -> Hashable:
        """Sessions with equal keys can share a step."""
        ...

    def step(self, sessions: Sequence[Session], on_stage: StageTimer) -> list[list[Any]]:
        """Advance runnable sessions (at most `max_batch`, equal keys) by one step.

        Returns the events of each session, in order. A failure of one session's data must not harm the
        others.
        `on_stage` is told how long each stage of the step took.
        """
        ...


class StageTimer(Protocol):
    """Receives `step_seconds{stage}` observations."""

    def __call__(self, stage: str, seconds: float, batch: int) -> None:
        """Record that `stage` took `seconds` for `batch` sessions."""
        ...
