"""A thread that decodes latents and encodes pictures while the next steps run (ours)."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from realtide.engines.runtime.memory import HOST, Memory


class Worker:
    """One thread; jobs run in the order in which they were given.

    Args:
        name: of the thread.
        memory: that decoders work in.
    """

    def __init__(self, name: str, memory: Memory = HOST) -> None:
        self.memory = memory
        self._pool = ThreadPoolExecutor(1, thread_name_prefix=name, initializer=memory.enter)

    def submit(self, job: Callable[[], None]) -> Future[None]:
        """Have `job` run."""
        return self._pool.submit(job)

    def close(self) -> None:
        """End the thread after the job under way; jobs that have not begun never run. Any number of times."""
        self._pool.shutdown(wait=True, cancel_futures=True)


class Outbox:
    """What the worker has made for one session.

    Args:
        worker: the thread.
        wake: called there when something can be collected.
    """

    def __init__(self, worker: Worker, wake: Callable[[], None]) -> None:
        self._worker = worker
        self._wake = wake
        self._made: deque[Any] = deque()
        self._error: BaseException | None = None
        self._pending: deque[Future[None]] = deque()
        self._closed = threading.Event()

    @property
    def idle(self) -> bool:
        """True if nothing is under way and everything was collected."""
        return not self.waiting and not self._made and self._error is None

    @property
    def waiting(self) -> int:
        """Jobs that are not done."""
        while self._pending and self._pending[0].done():
            self._pending.popleft()
        return len(self._pending)

    def submit(self, make: Callable[[], Any]) -> None:
        """Have the worker make an event; None is no event."""

        def job() -> None:
            if self._closed.is_set() or self._error is not None:
                return
            try:
                made = make()
            except Exception as error:
                self._error = error
            else:
                if made is not None:
                    self._made.append(made)

        future = self._worker.submit(job)
        self._pending.append(future)
        # Not from the job itself: whoever is woken must find that it is done.
        future.add_done_callback(lambda _: self._wake())

    def collect(self) -> Sequence[Any]:
        """What was made, in order. Raises the error that making it ended with."""
        if self._error is not None:
            raise self._error
        found = []
        while self._made:
            found.append(self._made.popleft())
        return found

    def settle(self) -> Sequence[Any]:
        """Wait for the jobs under way; see `collect`."""
        for future in list(self._pending):
            if not future.cancelled():
                future.result()
        return self.collect()

    def close(self) -> None:
        """Make nothing more. Does not wait."""
        self._closed.set()
        for future in self._pending:
            future.cancel()
