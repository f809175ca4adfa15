"""What was sent and may have to be sent again: audio and controls that no checkpoint covers yet.

Knows nothing of connections. Entries stay in the order in which the client gave them, so that a control meets
the same audio again. A session that sends no media has only its controls in it, all at position 0.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from realtide_client.errors import StreamLost
from realtide_client.link import Request


@dataclass(slots=True)
class Audio:
    """Consecutive samples, the first of them being number `position` of the session."""

    position: int
    data: bytes


@dataclass(slots=True)
class Message:
    """A control or a checkpoint request. `settled`: its answer has come, so the next checkpoint covers it."""

    key: str
    request: Request
    settled: bool = False


Entry = Audio | Message


class ReplayLog:
    """Bounded log with a cursor between what the present connection has been given and what it has not.

    Args:
        sample_bytes: Bytes of one sample.
        max_bytes: Most audio kept after it has been sent. Beyond it the oldest is dropped, and a connection
            that is lost before the next checkpoint cannot be replaced. Audio that is still to be sent is
            never dropped.
        start: Index of the first sample that will be appended.
    """

    def __init__(self, sample_bytes: int, max_bytes: int, start: int = 0) -> None:
        self._width = sample_bytes
        self._max_bytes = max_bytes
        self._sent: deque[Entry] = deque()
        self._unsent: deque[Entry] = deque()
        self._sent_bytes = 0
        self._unsent_bytes = 0
        self._lost: list[Message] = []
        self.start = start
        self.end = start

    @property
    def unsent_samples(self) -> int:
        """Samples that the present connection has not been given yet."""
        return self._unsent_bytes // self._width

    @property
    def kept_samples(self) -> int:
        """Samples that were sent and are still here."""
        return self._sent_bytes // self._width

    def append_audio(self, data: bytes) -> None:
        """Add whole samples that follow those before."""
        self._unsent.append(Audio(self.end, data))
        self._unsent_bytes += len(data)
        self.end += len(data) // self._width

    def append_message(self, key: str, request: Request) -> None:
        """Add a control (or checkpoint request) that will be answered under `key`."""
        self._unsent.append(Message(key, request))

    def next_unsent(self) -> Entry | None:
        """The next entry to send, now counted as sent; None if there is none."""
        if not self._unsent:
            return None
        entry = self._unsent.popleft()
        self._sent.append(entry)
        if isinstance(entry, Audio):
            self._unsent_bytes -= len(entry.data)
            self._sent_bytes += len(entry.data)
            self._bound()
        return entry

    def settle(self, key: str) -> None:
        """The message `key` has been answered: it belongs to the state of every later checkpoint."""
        for entry in (*self._sent, *self._lost):
            if isinstance(entry, Message) and entry.key == key:
                entry.settled = True

    def forget(self, key: str) -> None:
        """Remove the message `key`: it need not be sent again, whatever the checkpoint."""

        def others(entries: Iterable[Entry]) -> deque[Entry]:
            return deque(e for e in entries if not (isinstance(e, Message) and e.key == key))

        self._sent, self._unsent = others(self._sent), others(self._unsent)

    def cover(self, position: int) -> None:
        """A checkpoint holds all audio before sample `position` and every settled message: drop those."""
        kept: deque[Entry] = deque()
        for entry in self._sent:
            if isinstance(entry, Message):
                if not entry.settled:
                    kept.append(entry)
                continue
            skip = min(max(0, position - entry.position) * self._width, len(entry.data))
            self._sent_bytes -= skip
            if skip < len(entry.data):
                kept.append(Audio(entry.position + skip // self._width, entry.data[skip:]))
        self._sent = kept
        self.start = max(self.start, min(position, self.end))
        self._lost = [message for message in self._lost if not message.settled]

    def rewind(self, position: int) -> None:
        """A new connection continues at sample `position`: everything from there on is to be sent again.

        Raises:
            StreamLost: Something that the connection needs has been dropped.
        """
        if position < self.start or position > self.end or self._lost:
            raise StreamLost(
                f"the server continues at sample {position}, but only samples {self.start} to {self.end}"
                " are still buffered"
            )
        self._sent.extend(self._unsent)
        self._sent_bytes += self._unsent_bytes
        for entry in self._sent:
            if isinstance(entry, Message):
                entry.settled = False  # it has to be sent, and so answered, again
        self.cover(position)
        self._unsent, self._sent = self._sent, deque()
        self._unsent_bytes, self._sent_bytes = self._sent_bytes, 0

    def _bound(self) -> None:
        while self._sent_bytes > self._max_bytes:
            entry = self._sent.popleft()
            if isinstance(entry, Audio):
                self._sent_bytes -= len(entry.data)
                self.start = entry.position + len(entry.data) // self._width
            else:
                self._lost.append(entry)
