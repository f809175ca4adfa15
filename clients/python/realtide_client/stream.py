"""A speech session that outlives its connections (ours).

The application talks to one `SpeechStream`; behind it, one connection after the other carries the session.
Everything sent is kept until a checkpoint covers it; when a connection is lost, or the server announces that
it goes away, the session is resumed from the last checkpoint over a new connection and the rest is sent
again.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from enum import Enum
from types import TracebackType
from typing import Self

from realtide_client import errors, wire
from realtide_client import types as t
from realtide_client.audio import Samples, encode, sample_bytes
from realtide_client.link import Link, Target
from realtide_client.progress import Progress
from realtide_client.replay import Audio, Entry, ReplayLog
from realtide_client.retry import RetryPolicy
from realtide_client.v1 import common_pb2, speech_pb2

log = logging.getLogger("realtide_client")

_CHUNK_BYTES = 64 << 10  # larger pieces of audio travel as several messages
_ENVELOPE_BYTES = 64  # room for what a message holds besides its samples
_RESULTS = 1024  # results waiting for the application before reading stops


class _Ended(Enum):
    OK = 1
    GOING_AWAY = 2


class Control:
    """A control on its way. Await `accepted()` and `applied()` for its two receipts."""

    def __init__(self, control_id: str) -> None:
        self.control_id = control_id
        loop = asyncio.get_running_loop()
        self._accepted: asyncio.Future[t.Accepted] = loop.create_future()
        self._applied: asyncio.Future[t.Applied] = loop.create_future()

    async def accepted(self) -> t.Accepted:
        """Wait until the server has validated it. Raises what ended the stream, if it ended before."""
        return await asyncio.shield(self._accepted)

    async def applied(self) -> t.Applied:
        """Wait until it has taken effect. Raises what ended the stream, if it ended before."""
        return await asyncio.shield(self._applied)


class SpeechStream:
    """One speech session. Use it as an asynchronous context manager and iterate over its results.

    Results must be read: when many wait, the stream stops reading, and the server slows the session.

    Args:
        target: Where the server is.
        options: The session's choices. With `resume` only `encoding` and `sample_rate` of the checkpoint
            count, and they are taken from the server's answer.
        resume: A checkpoint to continue from.
        retry: When to connect again.
        open_timeout: Seconds to wait for the server's first message.
        checkpoint_interval_ms: Milliseconds of audio between checkpoints; 0: none but those asked for.
        replay_seconds: Most audio kept for being sent again.
        send_ahead_seconds: Audio that may wait for being sent before `send` waits.
    """

    def __init__(
        self,
        target: Target,
        options: t.SpeechOptions,
        *,
        resume: t.Checkpoint | None = None,
        retry: RetryPolicy | None = None,
        open_timeout: float = 30.0,
        checkpoint_interval_ms: int = 5000,
        replay_seconds: float = 60.0,
        send_ahead_seconds: float = 10.0,
    ) -> None:
        self._target = target
        self._options = options
        self._retry = retry or RetryPolicy()
        self._open_timeout = open_timeout
        self._interval_ms = checkpoint_interval_ms if self._retry.max_retries else 0
        self._replay_seconds = replay_seconds if self._retry.max_retries else 0.0
        self._send_ahead_seconds = send_ahead_seconds
        self._checkpoint = resume
        self._ids = itertools.count(1)
        self._failures = 0
        self._moving = False
        self._finishing = False
        self._closed = False
        self._ended = False
        self._error: errors.RealtideError | None = None
        self._info: t.SessionInfo | None = None
        self._log: ReplayLog | None = None
        self._progress = Progress()
        self._controls: dict[str, Control] = {}
        self._checkpoints: dict[str, asyncio.Future[t.Checkpoint]] = {}
        self._results: deque[t.Result] = deque()
        self._sent_times: deque[tuple[int, float]] = deque(maxlen=20_000)
        self._result_ready = asyncio.Event()
        self._result_room = asyncio.Event()
        self._to_send = asyncio.Event()
        self._send_room = asyncio.Event()
        self._opened = asyncio.Event()
        self._pump_task: asyncio.Task[None] | None = None
        self._link: Link | None = None
        self.reconnects = 0

    # Opening and closing

    async def open(self) -> t.SessionInfo:
        """Connect and wait until the server has opened the session.

        Raises:
            RealtideError: It refused, or cannot be reached within the retry policy.
        """
        if self._pump_task is None:
            self._pump_task = asyncio.create_task(self._pump(), name="realtide-speech-stream")
        await self._opened.wait()
        if self._info is None:
            raise self._error or errors.StreamClosed("the stream was closed before it opened")
        return self._info

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Drop the session unless it has ended; its slot is free at once. Idempotent."""
        self._closed = True
        if self._pump_task is not None:
            self._pump_task.cancel()
            await asyncio.wait({self._pump_task})
        self._end(errors.StreamClosed("the stream is closed"))

    @property
    def info(self) -> t.SessionInfo:
        """What was negotiated. Raises StreamClosed before the stream is open."""
        if self._info is None:
            raise errors.StreamClosed("the stream is not open")
        return self._info

    @property
    def position(self) -> int:
        """Index of the next sample that `send` will take."""
        return self._buffer.end

    @property
    def last_checkpoint(self) -> t.Checkpoint | None:
        """The newest checkpoint, asked for or not."""
        return self._checkpoint

    # Input

    async def send(self, samples: Samples) -> None:
        """Send mono audio that follows what was sent before; waits while too much waits to be sent.

        Args:
            samples: int16 or float arrays of shape [n], converted to the session's encoding; or bytes in it.

        Raises:
            ValueError: The samples are not mono, finite and whole.
            StreamClosed: After `finish` or `close`.
            RealtideError: What ended the stream.
        """
        self._check_input()
        data = encode(samples, self.info.encoding)
        if not data:
            return
        limit = self._send_ahead_seconds * self.info.sample_rate
        while self._buffer.unsent_samples > limit:
            self._send_room.clear()
            await self._send_room.wait()
            self._check_input()
        self._buffer.append_audio(data)
        self._sent_times.append((self._buffer.end, time.monotonic()))
        self._to_send.set()

    async def set_lookahead(
        self, *, bias: float | None = None, max_lookahead_ms: int | None = None
    ) -> Control:
        """Turn the lookahead dial. None leaves a value as it is; a cap of 0 is causal, -1 removes it."""
        action = speech_pb2.SetLookahead(bias=bias, max_lookahead_ms=max_lookahead_ms)
        return self._control(lambda i: speech_pb2.SpeechControl(control_id=i, set_lookahead=action))

    async def set_interim_results(self, enabled: bool) -> Control:
        """Turn partials on or off."""
        action = speech_pb2.SetInterimResults(enabled=enabled)
        return self._control(lambda i: speech_pb2.SpeechControl(control_id=i, set_interim_results=action))

    async def set_endpointing(self, rules: t.EndpointingRules) -> Control:
        """Replace all endpointing rules; None takes the server's default, not the value before."""
        action = speech_pb2.SetEndpointing(rules=wire.rules_message(rules))
        return self._control(lambda i: speech_pb2.SpeechControl(control_id=i, set_endpointing=action))

    async def set_phrase_boosts(self, boosts: tuple[t.PhraseBoost, ...]) -> Control:
        """Replace the phrases to favour."""
        action = speech_pb2.SetPhraseBoosts(boosts=wire.boost_messages(boosts))
        return self._control(lambda i: speech_pb2.SpeechControl(control_id=i, set_phrase_boosts=action))

    async def flush(self) -> Control:
        """Cut the utterance now; its final follows and the session goes on."""
        return self._control(lambda i: speech_pb2.SpeechControl(control_id=i, flush=common_pb2.Flush()))

    async def checkpoint(self) -> t.Checkpoint:
        """Ask for the session's state and wait for it.

        Raises:
            StreamClosed: After `finish` or `close`.
            RealtideError: What ended the stream before the answer came.
        """
        self._check_input()
        key = f"checkpoint-{next(self._ids)}"
        future: asyncio.Future[t.Checkpoint] = asyncio.get_running_loop().create_future()
        self._checkpoints[key] = future
        request = common_pb2.CheckpointRequest(request_id=key)
        self._buffer.append_message(key, speech_pb2.SpeechStreamRequest(checkpoint_request=request))
        self._to_send.set()
        return await asyncio.shield(future)

    async def finish(self) -> None:
        """End the input. The remaining results follow, then iteration ends. Idempotent."""
        if self._error is not None:
            raise self._error
        self.info  # noqa: B018  raises if the stream was never opened
        self._finishing = True
        self._to_send.set()

    # Output

    def __aiter__(self) -> AsyncIterator[t.Result]:
        return self

    async def __anext__(self) -> t.Result:
        while not self._results:
            if self._ended:
                if self._error is not None and not self._closed:
                    raise self._error
                raise StopAsyncIteration
            self._result_ready.clear()
            await self._result_ready.wait()
        result = self._results.popleft()
        self._result_room.set()
        return result

    def sent_at(self, seconds: float) -> float | None:
        """When the audio at `seconds` was given to `send`, on `time.monotonic()`; None if that is not known.

        With `Word.end` and `Timing.arrived_at` this is all that is needed for the emission delay of a word.
        """
        sample = seconds * self.info.sample_rate
        found: float | None = None
        for end, when in reversed(self._sent_times):
            if end < sample:
                break
            found = when
        return found

    # The session's machinery

    @property
    def _buffer(self) -> ReplayLog:
        if self._log is None:
            raise errors.StreamClosed("the stream is not open")
        return self._log

    def _check_input(self) -> None:
        if self._error is not None:
            raise self._error
        if self._finishing or self._ended:
            raise errors.StreamClosed("the input has been finished")
        self.info  # noqa: B018  raises if the stream was never opened

    def _control(self, make: Callable[[str], speech_pb2.SpeechControl]) -> Control:
        self._check_input()
        key = f"control-{next(self._ids)}"
        control = self._controls[key] = Control(key)
        self._buffer.append_message(key, speech_pb2.SpeechStreamRequest(control=make(key)))
        self._to_send.set()
        return control

    def _end(self, error: errors.RealtideError | None) -> None:
        """The session is over: wake everybody who waits."""
        if self._ended:
            return
        self._ended = True
        self._error = error
        reason = error or errors.StreamClosed("the stream ended before the answer came")
        waiting: list[asyncio.Future[t.Accepted] | asyncio.Future[t.Applied] | asyncio.Future[t.Checkpoint]]
        waiting = [f for c in self._controls.values() for f in (c._accepted, c._applied)]
        waiting += self._checkpoints.values()
        for future in waiting:
            if not future.done():
                future.set_exception(reason)
                future.exception()  # nobody need wait for it
        for event in (self._result_ready, self._result_room, self._to_send, self._send_room, self._opened):
            event.set()

    async def _pump(self) -> None:
        """Carry the session over one connection after the other, to its end."""
        try:
            self._link = await self._connect()
            while self._link is not None:
                self._link = await self._serve(self._link)
            self._end(None)
        except errors.RealtideError as error:
            self._end(error)
        except (Exception, asyncio.CancelledError) as error:
            # A fault of this client, or the application's cancelling: nobody may wait forever.
            self._end(errors.StreamClosed(f"the stream was stopped: {error!r}"))
            raise
        finally:
            if self._link is not None:
                await self._link.close()

    def _first_request(self) -> speech_pb2.SpeechStreamRequest:
        if self._checkpoint is not None:
            return wire.resume_request(self._checkpoint)
        return wire.open_request(self._options, self._interval_ms)

    async def _connect(self, error: errors.RealtideError | None = None) -> Link:
        """A new connection, tried as often as the policy allows; `error` is why the one before was lost."""
        while True:
            if error is not None:
                delay = self._retry.delay(self._failures, error)
                if delay is None:
                    raise error
                self._failures += 1
                log.info("connecting again in %.2f s: %s", delay, error.message)
                await asyncio.sleep(delay)
            try:
                return await self._dial()
            except errors.RealtideError as failure:
                error = failure

    async def _dial(self) -> Link:
        link = Link(self._target)
        try:
            await link.open(self._first_request(), self._open_timeout)
        except BaseException:
            await link.close()
            raise
        return link

    def _adopt(self, link: Link) -> None:
        """Continue over `link`: send again what its checkpoint does not cover."""
        info = wire.session_info(link.opened)
        position = link.opened.session.position
        if self._log is None:
            width = sample_bytes(info.encoding)
            keep = int(self._replay_seconds * info.sample_rate) * width
            self._log = ReplayLog(width, keep, start=position)
        else:
            self.reconnects += 1
            self._log.rewind(position)
        self._info = info
        self._opened.set()

    async def _serve(self, link: Link) -> Link | None:
        """Use a connection until it ends (None) or another takes its place."""
        writer: asyncio.Task[None] | None = None
        reader: asyncio.Task[_Ended] | None = None
        successor: asyncio.Task[Link] | None = None
        adopted: Link | None = None
        try:
            self._adopt(link)
            writer = asyncio.create_task(self._write(link))
            reader = asyncio.create_task(self._read(link))
            while True:
                tasks = {task for task in (reader, successor) if task is not None}
                await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                if successor is not None and successor.done():
                    if successor.exception() is None:
                        self._link = adopted = successor.result()
                        return adopted
                    successor = None  # no other server: this one goes on until its deadline
                    self._moving = False
                if not reader.done():
                    continue
                lost = reader.exception()
                if lost is None and reader.result() is _Ended.OK:
                    return None
                if lost is None:
                    if successor is None and not link.finished:
                        self._moving = True  # later checkpoints would drop what the successor needs
                        successor = asyncio.create_task(self._connect())
                    reader = asyncio.create_task(self._read(link))
                    continue
                if not isinstance(lost, errors.RealtideError):
                    raise lost
                self._link = adopted = await (successor or self._connect(lost))
                return adopted
        finally:
            self._moving = False
            await _stop(writer, reader)
            if successor is not None and adopted is None:
                await _stop(successor)
                if not successor.cancelled() and successor.exception() is None:
                    await successor.result().close()
            await link.close()

    async def _write(self, link: Link) -> None:
        """Send what is to be sent. A failing call is the reader's to report."""
        room = max(link.opened.session.limits.max_message_bytes or _CHUNK_BYTES, 2 * _ENVELOPE_BYTES)
        width = sample_bytes(self.info.encoding)
        step = min(_CHUNK_BYTES, room - _ENVELOPE_BYTES) // width * width
        while True:
            entry = self._buffer.next_unsent()
            if entry is not None:
                for request in _requests(entry, step, width):
                    if not await link.write(request):
                        return
                self._send_room.set()
            elif self._finishing:
                await link.finish()
                return
            else:
                self._to_send.clear()
                await self._to_send.wait()

    async def _read(self, link: Link) -> _Ended:
        """Hand on what the server sends, until it goes away or ends the stream.

        Raises:
            RealtideError: The stream failed.
        """
        while True:
            response = await link.read()
            if response is None:
                return _Ended.OK
            self._failures = 0
            if response.WhichOneof("message") == "going_away":
                if response.going_away.HasField("checkpoint"):
                    self._on_checkpoint(response.going_away.checkpoint)
                return _Ended.GOING_AWAY
            await self._on_response(response)

    async def _on_response(self, response: speech_pb2.SpeechStreamResponse) -> None:
        arrived = time.monotonic()
        match response.WhichOneof("message"):
            case "partial":
                await self._publish(wire.partial(response.partial, arrived))
            case "final":
                await self._publish(wire.final(response.final, arrived))
            case "endpoint":
                await self._publish(wire.endpoint(response.endpoint, arrived))
            case "accepted":
                accepted = response.accepted
                control = self._controls.get(accepted.control_id)
                if control is not None and not control._accepted.done():
                    control._accepted.set_result(t.Accepted(accepted.control_id, accepted.position))
            case "applied":
                applied = response.applied
                self._buffer.settle(applied.control_id)
                control = self._controls.pop(applied.control_id, None)
                if control is not None and not control._applied.done():
                    control._applied.set_result(
                        t.Applied(applied.control_id, applied.position, applied.delay_seconds)
                    )
            case "checkpoint":
                self._on_checkpoint(response.checkpoint)
            case _:
                log.debug("a message of a kind that this client does not know")

    def _on_checkpoint(self, message: common_pb2.Checkpoint) -> None:
        checkpoint = t.Checkpoint(message.data, message.position)
        if not self._moving:
            self._checkpoint = checkpoint
            self._buffer.cover(checkpoint.position)
        self._buffer.forget(message.request_id)
        future = self._checkpoints.pop(message.request_id, None)
        if future is not None and not future.done():
            future.set_result(checkpoint)

    async def _publish(self, result: t.Result) -> None:
        while len(self._results) >= _RESULTS and not self._ended:
            self._result_room.clear()
            await self._result_room.wait()
        if self._progress.is_new(result):
            self._results.append(result)
            self._result_ready.set()


def _requests(entry: Entry, step: int, width: int) -> list[speech_pb2.SpeechStreamRequest]:
    """The messages of one entry: audio in pieces of at most `step` bytes, each with its position."""
    if not isinstance(entry, Audio):
        return [entry.request]
    return [
        speech_pb2.SpeechStreamRequest(
            audio=speech_pb2.AudioChunk(
                data=entry.data[offset : offset + step], position=entry.position + offset // width
            )
        )
        for offset in range(0, len(entry.data), step)
    ]


async def _stop(*tasks: asyncio.Task[None] | asyncio.Task[_Ended] | asyncio.Task[Link] | None) -> None:
    """Cancel the tasks and wait for their end, whatever it is."""
    running = [task for task in tasks if task is not None]
    for task in running:
        task.cancel()
    await asyncio.gather(*running, return_exceptions=True)
