"""Messages between the server and a process of its own: batches of tuples, pickled, through a pipe (ours).

Whoever can write to such a pipe can run code at its other end, so pipes are only ever handed to a child when
it is started, never opened by name.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import pickle
import struct
from collections import deque
from collections.abc import Sequence
from typing import Any

Message = tuple[Any, ...]
"""A name and what it needs."""

_LENGTH = struct.Struct("<Q")
_CAPACITY = 1 << 20  # bytes, of a pipe: what arrives in 100 ms from 128 streams of speech
_LEAST_ROOM = 1 << 16


def pipe() -> tuple[int, int]:
    """File descriptors of a pipe's reading and writing end, as large as the system lets it be at once."""
    reading, writing = os.pipe()
    resize = getattr(fcntl, "F_SETPIPE_SZ", None)  # Linux
    if resize is not None:
        # Above what the user may have it stays as it is, which costs wake-ups.
        with contextlib.suppress(OSError):
            fcntl.fcntl(writing, resize, _CAPACITY)
    return reading, writing


class Receiver:
    """The reading end of a pipe; it is set to not blocking, and closed by `close`."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self.ended = False
        os.set_blocking(descriptor, False)
        self._buffer = bytearray(4 * _LEAST_ROOM)
        self._filled = 0

    def read(self) -> list[Message]:
        """What has arrived completely, perhaps nothing; `ended` is set once the other end was closed.

        About a pipe's capacity at once: whoever sends without a pause does not keep the reader from its work.
        """
        until = self._filled + _CAPACITY
        while not self.ended and self._filled < until:
            if len(self._buffer) - self._filled < _LEAST_ROOM:
                self._buffer += bytes(len(self._buffer))
            try:
                got = os.readv(self.descriptor, [memoryview(self._buffer)[self._filled :]])
            except BlockingIOError:
                break
            self.ended = not got
            self._filled += got
        return self._unpack()

    def _unpack(self) -> list[Message]:
        messages: list[Message] = []
        start = 0
        with memoryview(self._buffer) as view:
            while self._filled - start >= _LENGTH.size:
                body = start + _LENGTH.size
                end = body + _LENGTH.unpack_from(view, start)[0]
                if end > self._filled:
                    break
                messages += pickle.loads(view[body:end])
                start = end
            if start:
                view[: self._filled - start] = view[start : self._filled]
                self._filled -= start
        if not self._filled and len(self._buffer) > 4 * _CAPACITY:  # a large message has been through
            self._buffer = bytearray(4 * _LEAST_ROOM)
        return messages

    def close(self) -> None:
        """Close this end."""
        os.close(self.descriptor)


class Sender:
    """The writing end of a pipe. Not for several threads.

    Args:
        descriptor: of the pipe; closed by `close`.
        blocking: whether `send` waits until the pipe has taken everything.
    """

    def __init__(self, descriptor: int, blocking: bool) -> None:
        self.descriptor = descriptor
        os.set_blocking(descriptor, blocking)
        self._unsent: deque[memoryview] = deque()

    @property
    def behind(self) -> bool:
        """Whether the pipe was full: call `flush` when it can be written."""
        return bool(self._unsent)

    def send(self, messages: Sequence[Message]) -> None:
        """Send a batch. Raises BrokenPipeError if nobody reads any more."""
        data = pickle.dumps(messages, pickle.HIGHEST_PROTOCOL)
        self._unsent.append(memoryview(_LENGTH.pack(len(data)) + data))
        self.flush()

    def flush(self) -> None:
        """Write what is left, as far as the pipe takes it. Raises BrokenPipeError."""
        try:
            while self._unsent:
                rest = self._unsent[0][os.write(self.descriptor, self._unsent[0]) :]
                if rest:
                    self._unsent[0] = rest
                else:
                    self._unsent.popleft()
        except BlockingIOError:
            pass

    def close(self) -> None:
        """Close this end; what was not sent is dropped."""
        os.close(self.descriptor)


def portable(error: Exception) -> Exception:
    """`error`, or if it cannot be sent one of the same words."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
