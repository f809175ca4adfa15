"""The load generator: a process that keeps N streams at a server, each at the pace of speech (ours).

    python -m realtide.bench.client_load < plan.json       lines of JSON on standard output

**Processing delay** is measured with probes. Partials come only when text changes, so they cannot tell when a
given piece of audio has been worked through. A control can: the contract says that it takes effect before the
first frame that was not processed when it was read, and its second receipt, `applied`, is sent when that
frame's turn has come. A control right after a chunk (one that sets what is set already) is therefore answered
once every encoder frame that the chunk completed has gone through front end, encoder and search. The delay is
counted from the moment when the chunk was *due*, not from when this process got round to sending it, so it
holds the generator's own lateness, both ways through gRPC and all queues. A probe that is not answered by the
end counts with the time it has waited so far.

Messages are serialized and framed beforehand, answers are told apart by their first byte, only results are
parsed, and the transport is as lean as it gets (wire.py): the generator runs on the processors of the server
that it measures, and real clients do not.
"""

from __future__ import annotations

import gc
import selectors
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from realtide.bench import audio, plan, stats
from realtide.bench.wire import Call, Connection, framed
from realtide_client.v1 import common_pb2
from realtide_client.v1 import speech_pb2 as pb

METHOD = "/realtide.v1.Speech/Stream"
PROBES = 8  # of one stream on their way; servers take at least 16
STREAMS_PER_CONNECTION = 8
_DRAIN = 10.0  # seconds for the last results
_OPEN = 30.0
# First byte of a response: field number and wire type 2.
_TAGS = {number: bytes([number << 3 | 2])[0] for number in (1, 3, 10, 11)}
_OPENED, _APPLIED, _PARTIAL, _FINAL = (_TAGS[number] for number in (1, 3, 10, 11))


class LoadError(Exception):
    """The load cannot be made; the message says why."""


@dataclass(frozen=True, slots=True)
class Messages:
    """What streams send, serialized and framed."""

    open: bytes
    chunks: list[bytes]
    probes: list[bytes]
    finish: bytes


def messages(load: plan.Plan) -> Messages:
    """Serialize everything. Raises CommandError if a recording cannot be read."""
    sound = audio.loop([Path(path) for path in load.audio], load.rate)
    options = pb.SpeechOptions(lookahead_bias=load.lookahead_bias, max_lookahead_ms=load.max_lookahead_ms)
    opening = pb.SpeechOpen(
        session=common_pb2.SessionOptions(model=load.model),
        audio=pb.AudioFormat(encoding=pb.AUDIO_ENCODING_LINEAR16, sample_rate_hz=load.rate),
        options=options,
    )

    def request(**fields: Any) -> bytes:
        return framed(pb.SpeechStreamRequest(**fields).SerializeToString())

    def probe(number: int) -> bytes:
        same = pb.SetInterimResults(enabled=True)
        control = pb.SpeechControl(control_id=str(number), set_interim_results=same)
        return request(control=control)

    return Messages(
        request(open=opening),
        [
            request(audio=pb.AudioChunk(data=audio.linear16(piece)))
            for piece in audio.chunks(sound, load.size)
        ],
        [probe(number) for number in range(PROBES)],
        request(finish=common_pb2.Finish()),
    )


@dataclass(slots=True)
class Window:
    """The measured time on the monotonic clock, and what was seen in it. Times are in seconds."""

    begin: float = float("inf")
    end: float = float("inf")
    late: list[float] = field(default_factory=list)
    delays: list[float] = field(default_factory=list)
    unanswered: int = 0
    skipped: int = 0  # probes that were not sent because PROBES were on their way
    partials: int = 0
    finals: int = 0
    behind: list[float] = field(default_factory=list)  # results: since the newest audio in them was spoken
    server: list[float] = field(default_factory=list)  # results: as the server counts it

    def holds(self, moment: float) -> bool:
        """Whether `moment` is inside."""
        return self.begin <= moment < self.end


class Live:
    """One stream."""

    def __init__(
        self, connection: Connection, load: plan.Plan, member: plan.Stream, sends: Messages, seen: Window
    ) -> None:
        self.call: Call = connection.call(METHOD)
        self.connection = connection
        self._load = load
        self._member = member
        self._sends = sends
        self._seen = seen
        self._start = 0.0
        self._probes: deque[float] = deque()  # when the chunks before them were due
        self._number = 0
        connection.send(self.call, sends.open)

    def opened(self) -> float | None:
        """Seconds of an encoder frame once the session is open. Raises LoadError."""
        if self.call.answers:
            answer = self.call.answers.popleft()
            if answer[0] != _OPENED:
                raise LoadError("a session was refused: no `opened`")
            return pb.SpeechStreamResponse.FromString(answer).opened.frame_seconds
        if self.call.ended:
            raise LoadError(f"a session was refused: {self.call.failure}")
        return None

    def begin(self, start: float) -> None:
        """The common start of all streams."""
        self._start = start

    def send(self, k: int, due: float) -> None:
        """Send chunk `k`, which is due now, and a probe where its turn has come."""
        load, member, seen, sends = self._load, self._member, self._seen, self._sends
        send, call = self.connection.send, self.call
        if seen.holds(due):
            seen.late.append(time.monotonic() - due)
        send(call, sends.chunks[(member.first + k) % len(sends.chunks)])
        if k % load.probe_every == member.probe:
            if len(self._probes) < PROBES:
                self._probes.append(due)
                send(call, sends.probes[self._number])
                self._number = (self._number + 1) % PROBES
            elif seen.holds(due):
                seen.skipped += 1
        if k == load.count - 1:
            send(call, sends.finish, end=True)

    def receive(self) -> None:
        """Take the answers that have come."""
        answers, seen, now = self.call.answers, self._seen, time.monotonic()
        while answers:
            answer = answers.popleft()
            tag = answer[0]
            if tag == _APPLIED:
                due = self._probes.popleft()
                if seen.holds(due):
                    seen.delays.append(now - due)
            elif tag in (_PARTIAL, _FINAL) and seen.holds(now):
                self._result(answer, tag, now)

    def _result(self, answer: bytes, tag: int, now: float) -> None:
        seen, message = self._seen, pb.SpeechStreamResponse.FromString(answer)
        if tag == _PARTIAL:
            seen.partials += 1
            result: Any = message.partial
        else:
            seen.finals += 1
            result = message.final
        seen.behind.append(now - self._start - self._member.spoken(result.audio_processed_seconds))
        seen.server.append(result.timing.processing_seconds)

    def close(self) -> None:
        """Count what was not answered, and end the call."""
        now = time.monotonic()
        for due in self._probes:
            if self._seen.holds(due):
                self._seen.unanswered += 1
                self._seen.delays.append(now - due)
        self.connection.cancel(self.call)


class Loop:
    """All streams of a load, on as many connections as they need."""

    def __init__(self, load: plan.Plan, sends: Messages, members: list[plan.Stream], seen: Window) -> None:
        self._selector = selectors.DefaultSelector()
        # Connections of their own, as different clients would have them.
        self._connections: list[Connection] = []
        self._writing: set[Connection] = set()
        self.live: dict[int, Live] = {}
        self._of: dict[Call, Live] = {}
        try:
            for first in range(0, len(members), STREAMS_PER_CONNECTION):
                connection = Connection(load.address)
                self._connections.append(connection)
                self._selector.register(connection, selectors.EVENT_READ, connection)
                for member in members[first : first + STREAMS_PER_CONNECTION]:
                    stream = Live(connection, load, member, sends, seen)
                    self.live[member.index] = self._of[stream.call] = stream
                connection.flush()
        except OSError as error:
            self.close()
            raise LoadError(f"no server at {load.address}: {error}") from None

    def open(self) -> float:
        """Wait until all sessions are open. Returns the seconds of an encoder frame. Raises LoadError."""
        until, waiting, frame = time.monotonic() + _OPEN, list(self.live.values()), 0.0
        while waiting:
            left = until - time.monotonic()
            if left <= 0:
                raise LoadError(f"a session did not open within {_OPEN:g} s")
            self._turn(left, ())
            for stream in list(waiting):
                seconds = stream.opened()
                if seconds is not None:
                    frame = max(frame, seconds)
                    waiting.remove(stream)
        return frame

    def turn(self, until: float) -> None:
        """Wait for answers, at most until the monotonic time `until`, and take them."""
        for call in self._turn(max(until - time.monotonic(), 0.0), self._connections):
            self._of[call].receive()

    def _turn(self, seconds: float, flushed: list[Connection] | tuple[()]) -> list[Call]:
        for connection in flushed:
            connection.flush()
        for connection in self._connections:
            if connection.blocked != (connection in self._writing):
                self._writing ^= {connection}
                wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if connection.blocked else 0)
                self._selector.modify(connection, wanted, connection)
        touched: list[Call] = []
        for key, events in self._selector.select(seconds):
            if events & selectors.EVENT_WRITE:
                key.data.flush()
            if events & selectors.EVENT_READ:
                touched += key.data.receive()
        return touched

    @property
    def unfinished(self) -> int:
        """Streams that have not ended."""
        return sum(not stream.call.ended for stream in self.live.values())

    def close(self) -> None:
        """End everything."""
        for connection in self._connections:
            connection.close()
        self._selector.close()


def run(load: plan.Plan, tell: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Make the load; `tell` hears of the window's begin and end. Raises LoadError, CommandError."""
    sends = messages(load)
    members = plan.streams(load, len(sends.chunks))
    seen = Window()
    loop = Loop(load, sends, members, seen)
    try:
        frame = loop.open()
        if frame > load.chunk + 1e-9:
            raise LoadError(f"chunks must be at least an encoder frame ({frame * 1000:g} ms) long")
        gc.collect()
        gc.freeze()
        gc.disable()
        used = _play(load, members, loop, seen, tell)
        until = time.monotonic() + _DRAIN
        while loop.unfinished and time.monotonic() < until:
            loop.turn(until)
        unfinished = loop.unfinished
        failures = [stream.call.failure for stream in loop.live.values() if stream.call.failure]
        for stream in loop.live.values():
            stream.close()
    finally:
        gc.enable()
        loop.close()
    return {
        "streams": load.streams,
        "processing_delay": stats.summary(seen.delays),
        "probes": {"answered": len(seen.delays) - seen.unanswered, "unanswered": seen.unanswered,
                   "skipped": seen.skipped},
        "results": {
            "partials": seen.partials,
            "finals": seen.finals,
            "behind_audio": stats.summary(seen.behind),
            "processing_by_server": stats.summary(seen.server),
        },
        "generator": {
            "late_sends": stats.summary(seen.late),
            "cpu_seconds": round(used, 3),
            "chunks": len(seen.late),
        },
        "unfinished_streams": unfinished,
        "failed_streams": len(failures),
        "failures": sorted(set(failures))[:3],
    }  # fmt: skip


def _play(
    load: plan.Plan,
    members: list[plan.Stream],
    loop: Loop,
    seen: Window,
    tell: Callable[[dict[str, Any]], None],
) -> float:
    """Send every chunk when it is due. Returns the processor seconds used in the window."""
    start = time.monotonic() + 0.1
    seen.begin, seen.end = start + load.warmup, start + load.warmup + load.seconds
    for stream in loop.live.values():
        stream.begin(start)
    moments = deque([(seen.begin, "begin"), (seen.end, "end")])
    cpu: list[float] = []
    schedule = plan.schedule(load, members)
    coming = next(schedule, None)
    while coming is not None or moments:
        now = time.monotonic()
        while moments and now >= moments[0][0]:
            cpu.append(time.process_time())
            tell({"event": moments.popleft()[1]})
        while coming is not None and start + coming[0] <= now:
            due, member, k = coming
            loop.live[member.index].send(k, start + due)
            coming = next(schedule, None)
        wakes = [start + coming[0]] if coming is not None else []
        loop.turn(min([*wakes, *(moment for moment, _ in moments)], default=now))
    return cpu[1] - cpu[0]


def main() -> None:
    """Read a plan from standard input, make the load, write lines of JSON."""
    from realtide.bench.child import serve

    serve(lambda text, tell: run(plan.Plan.from_json(text), tell))


if __name__ == "__main__":
    main()
