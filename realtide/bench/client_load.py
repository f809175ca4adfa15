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

Messages are serialized beforehand, answers are told apart by their first byte, and only results are parsed.
"""

from __future__ import annotations

import asyncio
import gc
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc

from realtide.bench import audio, plan, stats
from realtide_client.v1 import common_pb2
from realtide_client.v1 import speech_pb2 as pb

METHOD = "/realtide.v1.Speech/Stream"
PROBES = 8  # of one stream on their way; servers take at least 16
STREAMS_PER_CONNECTION = 8
_DRAIN = 10.0  # seconds for the last results
_OPEN = 30.0
_EOF: Any = grpc.aio.EOF  # type: ignore[attr-defined]  # missing in the stubs
# First byte of a response: field number and wire type 2.
_TAGS = {number: bytes([number << 3 | 2])[0] for number in (1, 3, 10, 11)}
_OPENED, _APPLIED, _PARTIAL, _FINAL = (_TAGS[number] for number in (1, 3, 10, 11))


class LoadError(Exception):
    """The load cannot be made; the message says why."""


@dataclass(frozen=True, slots=True)
class Messages:
    """What streams send, serialized."""

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

    def probe(number: int) -> bytes:
        same = pb.SetInterimResults(enabled=True)
        control = pb.SpeechControl(control_id=str(number), set_interim_results=same)
        return pb.SpeechStreamRequest(control=control).SerializeToString()

    return Messages(
        pb.SpeechStreamRequest(open=opening).SerializeToString(),
        [
            pb.SpeechStreamRequest(audio=pb.AudioChunk(data=audio.linear16(piece))).SerializeToString()
            for piece in audio.chunks(sound, load.size)
        ],
        [probe(number) for number in range(PROBES)],
        pb.SpeechStreamRequest(finish=common_pb2.Finish()).SerializeToString(),
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
        self, call: Any, load: plan.Plan, member: plan.Stream, sends: Messages, seen: Window
    ) -> None:
        self._call = call
        self._load = load
        self._member = member
        self._sends = sends
        self._seen = seen
        self._start = 0.0
        self._probes: deque[float] = deque()  # when the chunks before them were due
        self._number = 0
        self.failure: str | None = None
        self.frame_seconds = 0.0

    async def open(self) -> None:
        """Open the session. Raises LoadError."""
        try:
            async with asyncio.timeout(_OPEN):
                await self._call.write(self._sends.open)
                answer = await self._call.read()
        except TimeoutError:
            raise LoadError(f"a session did not open within {_OPEN:g} s") from None
        except grpc.aio.AioRpcError as error:
            raise LoadError(f"a session was refused: {error.code().name}: {error.details()}") from None
        if answer is _EOF or not answer or answer[0] != _OPENED:
            detail = await self._call.details() if answer is _EOF else "no `opened`"
            raise LoadError(f"a session was refused: {detail}")
        self.frame_seconds = pb.SpeechStreamResponse.FromString(answer).opened.frame_seconds

    async def send(self, start: float) -> None:
        """Send every chunk when it is due, and probes."""
        self._start = start
        load, member, seen, sends = self._load, self._member, self._seen, self._sends
        write, monotonic = self._call.write, time.monotonic
        try:
            for k in range(load.count):
                due = start + member.due(load, k)
                if (wait := due - monotonic()) > 0:
                    await asyncio.sleep(wait)
                if seen.holds(due):
                    seen.late.append(monotonic() - due)
                await write(sends.chunks[(member.first + k) % len(sends.chunks)])
                if k % load.probe_every == member.probe:
                    if len(self._probes) < PROBES:
                        self._probes.append(due)
                        await write(sends.probes[self._number])
                        self._number = (self._number + 1) % PROBES
                    elif seen.holds(due):
                        seen.skipped += 1
            await write(sends.finish)
            await self._call.done_writing()
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError) as error:
            self.failure = self.failure or str(error)

    async def receive(self) -> None:
        """Take answers until the stream ends."""
        read, seen = self._call.read, self._seen
        try:
            while (answer := await read()) is not _EOF:
                tag, now = answer[0], time.monotonic()
                if tag == _APPLIED:
                    due = self._probes.popleft()
                    if seen.holds(due):
                        seen.delays.append(now - due)
                elif tag in (_PARTIAL, _FINAL) and seen.holds(now):
                    self._result(answer, tag, now)
        except grpc.aio.AioRpcError as error:
            self.failure = f"{error.code().name}: {error.details()}"

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
        self._call.cancel()


async def run(load: plan.Plan, tell: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Make the load; `tell` hears of the window's begin and end. Raises LoadError, CommandError."""
    sends = messages(load)
    members = plan.streams(load, len(sends.chunks))
    seen = Window()
    channels: list[Any] = [  # the stubs want serializers, and an argument to close()
        # Connections of their own, as different clients would have them.
        grpc.aio.insecure_channel(load.address, options=[("grpc.use_local_subchannel_pool", 1)])
        for _ in range(-(-load.streams // STREAMS_PER_CONNECTION))
    ]
    live = [
        Live(
            channels[member.index // STREAMS_PER_CONNECTION].stream_stream(METHOD)(),
            load, member, sends, seen,
        )
        for member in members
    ]  # fmt: skip
    try:
        await asyncio.gather(*(stream.open() for stream in live))
        if live[0].frame_seconds > load.chunk + 1e-9:
            least = live[0].frame_seconds * 1000
            raise LoadError(f"chunks must be at least an encoder frame ({least:g} ms) long")
        gc.collect()
        gc.freeze()
        gc.disable()
        start = time.monotonic() + 0.1
        seen.begin, seen.end = start + load.warmup, start + load.warmup + load.seconds
        receivers = [asyncio.create_task(stream.receive()) for stream in live]
        senders = [asyncio.create_task(stream.send(start)) for stream in live]
        await asyncio.sleep(seen.begin - time.monotonic())
        tell({"event": "begin"})
        used = time.process_time()
        await asyncio.sleep(seen.end - time.monotonic())
        used = time.process_time() - used
        tell({"event": "end"})
        # A stream that the server holds back cannot finish sending: what it waits for counts as it is.
        await asyncio.wait(senders, timeout=_DRAIN)
        _, unfinished = await asyncio.wait(receivers, timeout=_DRAIN)
        for stream in live:
            stream.close()
        for task in (*senders, *receivers):
            task.cancel()
        await asyncio.gather(*senders, *receivers, return_exceptions=True)
    finally:
        for channel in channels:
            await channel.close()
    failures = [stream.failure for stream in live if stream.failure]
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
        "unfinished_streams": len(unfinished),
        "failed_streams": len(failures),
        "failures": sorted(set(failures))[:3],
    }  # fmt: skip


def main() -> None:
    """Read a plan from standard input, make the load, write lines of JSON."""
    from realtide.bench.child import serve

    serve(lambda text, tell: asyncio.run(run(plan.Plan.from_json(text), tell)))


if __name__ == "__main__":
    main()
