"""Admission: who gets a slot, who waits, who is sent away with a time to come back."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

# Weight of the newest session in the running mean of session lengths.
_WEIGHT = 0.1
_FIRST_GUESS = 10.0
_LEAST_RETRY, _MOST_RETRY = 0.5, 60.0


class Refused(Exception):
    """No slot. `reason` is one of metrics.REFUSALS; `retry_after` is in seconds, None if it is of no use."""

    def __init__(self, reason: str, retry_after: float | None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.retry_after = retry_after


class Lease:
    """A slot's place, held until `release`."""

    def __init__(self, admission: Admission, opened: float) -> None:
        self._admission = admission
        self._opened = opened
        self._held = True

    def release(self) -> None:
        """Give the place to the next in the queue. Any number of times; counts once."""
        if self._held:
            self._held = False
            self._admission._released(self._opened)


class Admission:
    """A counter of slots and a first-come-first-served queue of bounded length in front of it.

    Args:
        slots: sessions at once.
        queue_limit: sessions that may wait.
        queue_timeout: longest wait in seconds.
        on_change: called whenever a slot was taken or freed, or the drain began.
    """

    def __init__(
        self, slots: int, queue_limit: int, queue_timeout: float, on_change: Callable[[], None] = lambda: None
    ) -> None:
        self.slots = slots
        self.queue_limit = queue_limit
        self.used = 0
        self.draining = False
        self._timeout = queue_timeout
        self._on_change = on_change
        self._queue: deque[asyncio.Future[None]] = deque()
        self._mean = _FIRST_GUESS

    @property
    def queued(self) -> int:
        """Sessions that wait."""
        return len(self._queue)

    @property
    def full(self) -> bool:
        """True if a new session would have to wait."""
        return self.used >= self.slots

    async def acquire(self) -> Lease:
        """Take a slot's place, at once or after waiting.

        Raises:
            Refused: the queue is full, the wait was too long, or the server drains.
        """
        loop = asyncio.get_running_loop()
        if self.draining:
            raise Refused("draining", None)
        if self.used >= self.slots or self._queue:
            if len(self._queue) >= self.queue_limit:
                raise Refused("queue_full", self.retry_after())
            await self._wait(loop)
        else:
            self.used += 1
            self._on_change()
        return Lease(self, loop.time())

    async def _wait(self, loop: asyncio.AbstractEventLoop) -> None:
        turn: asyncio.Future[None] = loop.create_future()
        self._queue.append(turn)
        try:
            # `_released` passes the slot on by resolving the future: `used` stays as it is.
            async with asyncio.timeout(self._timeout):
                await turn
        except BaseException as error:
            if turn in self._queue:
                self._queue.remove(turn)
            elif turn.done() and not turn.cancelled() and turn.exception() is None:
                self._pass_on()  # the slot came at the very moment the wait was given up
            if isinstance(error, TimeoutError):
                raise Refused("queue_timeout", self.retry_after()) from None
            raise

    def drain(self) -> None:
        """Admit nobody any more and send away who waits."""
        self.draining = True
        while self._queue:
            turn = self._queue.popleft()
            if not turn.done():
                turn.set_exception(Refused("draining", None))
        self._on_change()

    def retry_after(self) -> float:
        """Seconds until a slot will probably be free for one more behind those who wait already.

        Slots come free every (mean length of a session) / slots; sessions longer than the mean so far are not
        known.
        """
        estimate = self._mean / self.slots * (len(self._queue) + 1)
        return min(max(estimate, _LEAST_RETRY), _MOST_RETRY)

    def _released(self, opened: float) -> None:
        length = asyncio.get_running_loop().time() - opened
        self._mean += _WEIGHT * (length - self._mean)
        self._pass_on()

    def _pass_on(self) -> None:
        while self._queue:
            turn = self._queue.popleft()
            if not turn.done():
                turn.set_result(None)
                return
        self.used -= 1
        self._on_change()
