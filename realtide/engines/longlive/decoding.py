"""From latents to encoded frames, beside the denoising of what follows (ours).

One `FrameWorker` thread serves all sessions of an engine: it decodes a latent frame or encodes a few frames
of the most urgent one, then looks again. A session's part in this is its `Decoding`. The executor's thread
gives it latents and a limit and collects events; whatever both sides touch is exchanged piece by piece under
the interpreter's lock, and `rest` waits until the worker has put the session down.
"""

from __future__ import annotations

import itertools
import math
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from realtide.engines.engine import StageTimer
from realtide.engines.longlive.programs import FrameDecoder, HalfPrograms
from realtide.engines.longlive.timeline import Clock, Timeline
from realtide.engines.longlive.types import Encode, Frames, Frames8, PromptApplied, VideoEvent
from realtide.engines.runtime.memory import HOST, Memory, Values


class FrameWorker:
    """A thread that does one piece of work after another, the most urgent first. Starts with the first.

    Args:
        name: of the thread.
        memory: that decoders work in.
    """

    def __init__(self, name: str, memory: Memory = HOST) -> None:
        self.memory = memory
        self._queue: queue.PriorityQueue[tuple[float, int, Decoding | None]] = queue.PriorityQueue()
        self._count = itertools.count()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._closed = False

    def submit(self, due: float, decoding: Decoding) -> None:
        """Have `decoding.work()` called; pieces that are due earlier go first."""
        if not self._thread.is_alive() and not self._closed:
            self._thread.start()
        self._queue.put((due, next(self._count), decoding))

    def close(self) -> None:
        """End the thread after the piece of work at hand. Any number of times."""
        self._closed = True
        self._queue.put((-math.inf, next(self._count), None))
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        self.memory.enter()
        while True:
            _, _, decoding = self._queue.get()
            if decoding is None:
                return
            decoding.work()


class Decoding:
    """One session's way from latents to frames.

    Without a decoder (`bind`) latents wait. A decoder that takes up a stream in its middle is first run over
    latents that were decoded before, for the sake of its feature caches.

    Args:
        timeline: latent frames to frames.
        clock: says what is urgent, and is told when frames came.
        worker: does the work.
        wake: called in the worker's thread when there is something to collect.
        on_stage: told of ``vae`` and ``encode``, in the worker's thread.
        encode: see `types.Encode`; None: frames as bytes of RGB.
        group: most frames of one event.
        sent: frames that were handed out before, where a session is resumed.
    """

    def __init__(
        self,
        timeline: Timeline,
        clock: Clock,
        worker: FrameWorker,
        wake: Callable[[], None],
        on_stage: StageTimer,
        encode: Encode | None,
        group: int,
        sent: int = 0,
    ) -> None:
        self._timeline = timeline
        self._clock = clock
        self._worker = worker
        self._wake = wake
        self._on_stage = on_stage
        self._encode = encode or _plain
        self._group = group
        self.sent = sent  # frames encoded; those collected are `collected`
        self.collected = sent
        self._decoder: FrameDecoder | None = None
        self._prime: deque[Values] = deque()
        self._latents: deque[Values] = deque()
        self._done = timeline.latent(sent)  # latent frames decoded
        self._held: Frames8 | None = None  # decoded, not encoded yet: from frame `sent` on
        self._marks: deque[PromptApplied] = deque()
        self._limit = sent
        self._opened = time.monotonic()
        self._last = self._opened
        self._outbox: deque[VideoEvent] = deque()
        self._error: Exception | None = None
        self._busy = threading.Lock()  # held by the worker for one piece of work
        self._flags = threading.Lock()  # guards the next three for an instant
        self._scheduled = False
        self._resting = False
        self._closed = False

    # -- executor's thread -------------------------------------------------------------------------------

    @property
    def waiting(self) -> int:
        """Latent frames that are not decoded."""
        return len(self._latents)

    @property
    def marks(self) -> list[PromptApplied]:
        """Changes of the prompt whose frames were not handed out."""
        return list(self._marks)

    @property
    def idle(self) -> bool:
        """True if nothing is to be done for as long as neither latents nor a higher limit come."""
        return not self._scheduled and not self._outbox

    def mark(self, applied: PromptApplied) -> None:
        """Hand out `applied` right before its frame."""
        self._marks.append(applied)

    def put(self, latents: Values) -> None:
        """Decode latents [n, C, h, w], which follow those put before."""
        self._latents.extend(latents)
        self.schedule()

    def allow(self, limit: int, when: float) -> None:
        """Hand out frames below `limit` only; it was raised at monotonic time `when`."""
        if self._limit <= self.sent < limit:
            self._opened = when
        self._limit = limit
        self.schedule()

    def bind(self, programs: HalfPrograms, before: Values) -> None:
        """Decode with `programs`, after running them over the latents before the first that waits.

        Args:
            programs: the decoder's, over feature caches that are this session's now.
            before: latents [n, C, h, w], oldest first.
        """
        self._prime = deque(before)
        self._decoder = FrameDecoder(programs)
        self.schedule()

    def adopt(self, programs: HalfPrograms, ran: int, held: Frames8) -> None:
        """Go on with a decoder's own feature caches: see `taken`."""
        self._decoder = FrameDecoder(programs, ran)
        if len(held):
            self._held = held
            self._done += 1

    def taken(self) -> tuple[int, Frames8 | None]:
        """While at rest: latent frames that the decoder ran over, and frames that are decoded but held."""
        return (self._decoder.done if self._decoder is not None and not self._prime else 0), self._held

    def unbind(self) -> None:
        """Give up the decoder and its feature caches."""
        self.rest()
        self._decoder = None
        self._prime.clear()
        self.resume()

    def collect(self) -> list[VideoEvent]:
        """What has been made. Raises the error that decoding or encoding ended with, if one did."""
        if self._error is not None:
            raise self._error
        events = []
        while self._outbox:
            event = self._outbox.popleft()
            if isinstance(event, Frames):
                self.collected = event.first + event.count
            events.append(event)
        return events

    def rest(self) -> None:
        """Wait for the piece of work at hand, and have the worker begin no other before `resume`."""
        with self._flags:
            self._resting = True
        with self._busy:
            pass

    def resume(self) -> None:
        """End the rest."""
        with self._flags:
            self._resting = False
        self.schedule()

    def close(self) -> None:
        """Nothing more is done, and nothing is under way when this returns. Any number of times."""
        with self._flags:
            self._closed = True
        with self._busy:
            self._decoder = None

    # -- both --------------------------------------------------------------------------------------------

    def schedule(self) -> None:
        """Have the worker look at this session, if there is something to do."""
        with self._flags:
            if self._scheduled or self._resting or self._closed or self._next() is None:
                return
            self._scheduled = True
        self._worker.submit(self._clock.due(self.sent), self)

    def _next(self) -> Callable[[], bool] | None:
        """The next piece of work, which says whether somebody is to be told; None: there is none."""
        if self._error is not None:
            return None
        if self._held is not None:
            return self._encode_some if self.sent < self._limit else None
        if self._decoder is None:
            return None
        if self._prime:
            return self._prime_one
        if self._latents and self.sent < self._limit:
            return self._decode_one
        return None

    # -- worker's thread ---------------------------------------------------------------------------------

    def work(self) -> None:
        """Do one piece of work, and ask for the next."""
        with self._busy:
            with self._flags:
                piece = None if self._resting or self._closed else self._next()
            told = False
            if piece is not None:
                try:
                    told = piece()
                except Exception as error:
                    self._error = error
                    told = True
        # Decided at once: between two pieces of work nobody may take this session for idle.
        with self._flags:
            again = not self._resting and not self._closed and self._next() is not None
            self._scheduled = again
        if again:
            self._worker.submit(self._clock.due(self.sent), self)
        # Last: others wait for the caches of a session that becomes idle, and look when they are woken.
        if told:
            self._wake()

    def _prime_one(self) -> bool:
        assert self._decoder is not None
        self._decode(self._decoder, self._prime[0])
        self._prime.popleft()
        return not self._prime  # the last makes the session idle if it has no credit

    def _decode_one(self) -> bool:
        assert self._decoder is not None
        frames = self._decode(self._decoder, self._latents[0])
        pixels = self._worker.memory.pixels(frames)
        # A session that was resumed in the middle of a latent frame has handed out some of its frames.
        skipped = self.sent - self._timeline.first(self._done)
        self._held = pixels[skipped:]
        self._done += 1
        self._latents.popleft()
        return True  # there may be room for another block

    def _decode(self, decoder: FrameDecoder, latents: Values) -> Values:
        begun = time.perf_counter()
        frames = decoder.decode(latents)
        self._worker.memory.wait()
        self._on_stage("vae", time.perf_counter() - begun, 1)
        return frames

    def _encode_some(self) -> bool:
        assert self._held is not None
        count = min(len(self._held), self._group, self._limit - self.sent)
        begun = time.perf_counter()
        data = self._encode(self.sent, self._held[:count])
        self._on_stage("encode", time.perf_counter() - begun, 1)
        while self._marks and self._marks[0].first <= self.sent:
            self._outbox.append(self._marks.popleft())
        decoded = self.sent + len(self._held)
        self._outbox.append(Frames(self.sent, count, data, decoded, max(self._opened, self._last)))
        self._last = time.monotonic()
        self._clock.came(self.sent, self._last)
        self._held = self._held[count:] if count < len(self._held) else None
        self.sent += count
        return True


def _plain(first: int, frames: Frames8) -> Any:
    return frames.tobytes()
