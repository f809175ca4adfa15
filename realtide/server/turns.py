"""Who runs Python: an executor between its graphs, or the event loop (ours).

Both need the interpreter's lock. Left to themselves they take it from each other every switch interval for as
long as both have work, and each time costs two thread switches. But an executor needs it for a few
milliseconds of a step only and is then long in a graph that does not; the loop's work fits in there. So the
loop, before it handles what has come, waits until no executor is between its graphs, for some milliseconds
at most. Advice, not a lock: nothing depends on it but time.
"""

from __future__ import annotations

import selectors
import threading

_LONGEST = 0.02  # seconds that the loop waits; the executor needs 10 ms between graphs for 200 streams


class Turns:
    """Shared by the executors of a process and its event loop; of several executors the last one counts."""

    def __init__(self) -> None:
        self._free = threading.Event()
        self._free.set()

    @property
    def free(self) -> bool:
        """Whether the loop may run."""
        return self._free.is_set()

    def begin(self) -> None:
        """An executor: I am going to run Python."""
        self._free.clear()

    def end(self) -> None:
        """An executor: I am going to wait, or to compute without the interpreter."""
        self._free.set()

    def wait(self) -> None:
        """The event loop: before work."""
        if not self.free:
            self._free.wait(_LONGEST)


# A process has one interpreter's lock.
TURNS = Turns()


class TurnSelector(selectors.DefaultSelector):
    """A selector for the event loop that takes its turn after every wait."""

    def __init__(self, turns: Turns = TURNS) -> None:
        super().__init__()
        self._turns = turns

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        """Wait for events, then for the turn."""
        found = super().select(timeout)
        self._turns.wait()
        return found
