"""What sessions of every kind share: one grammar, and outliving their connections (ours).

The application talks to one stream; behind it, one connection after the other carries the session. Controls
(and the media of kinds that send some) are kept until a checkpoint covers them; when a connection is lost, or
the server announces that it goes away, the session is resumed from the last checkpoint over a new connection
and the rest is sent again.
"""

from __future__ import annotations

import asyncio
import logging
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from enum import Enum
from types import TracebackType
from typing import Any, ClassVar, Generic, Self, TypeVar

from realtide_client import errors
from realtide_client import types as t
from realtide_client.link import Kind, Link, Request, Response, Target
from realtide_client.receipts import Control, Receipts
from realtide_client.replay import Entry, ReplayLog
from realtide_client.retry import RetryPolicy
from realtide_client.v1 import common_pb2

log = logging.getLogger("realtide_client")

Item = TypeVar("Item")
Info = TypeVar("Info")


class _Ended(Enum):
    OK = 1
    GOING_AWAY = 2


class Session(ABC, Generic[Item, Info]):
    """One session of any kind. What is particular to a kind stands in its subclass.

    Args:
        target: Where the server is.
        resume: A checkpoint to continue from.
        retry: When to connect again.
        open_timeout: Seconds to wait for the server's first message.
        checkpoint_interval_ms: Milliseconds of media between checkpoints; 0: none but those asked for.
    """

    _kind: ClassVar[Kind]
    _queue: ClassVar[float] = 1024  # items waiting for the application before reading stops

    def __init__(
        self,
        target: Target,
        *,
        resume: t.Checkpoint | None = None,
        retry: RetryPolicy | None = None,
        open_timeout: float = 30.0,
        checkpoint_interval_ms: int = 5000,
    ) -> None:
        self._target = target
        self._retry = retry or RetryPolicy()
        self._open_timeout = open_timeout
        self._interval_ms = checkpoint_interval_ms if self._retry.max_retries else 0
        self._checkpoint = resume
        self._failures = 0
        self._moving = False
        self._finishing = False
        self._closed = False
        self._ended = False
        self._error: errors.RealtideError | None = None
        self._info: Info | None = None
        self._log: ReplayLog | None = None
        self._receipts = Receipts()
        self._results: deque[Item] = deque()
        self._result_ready = asyncio.Event()
        self._result_room = asyncio.Event()
        self._to_send = asyncio.Event()
        self._send_room = asyncio.Event()
        self._opened = asyncio.Event()
        self._pump_task: asyncio.Task[None] | None = None
        self._link: Link | None = None
        self.reconnects = 0

    # Of the kind

    @abstractmethod
    def _opening(self) -> Request:
        """The first message of a new session."""

    @abstractmethod
    def _begin(self, opened: Any) -> tuple[Info, ReplayLog]:
        """What the first connection's `opened` says, and the log that fits it."""

    @abstractmethod
    def _continue(self, opened: Any) -> Info:
        """What a later connection's `opened` says; the log is rewound to where it continues."""

    @abstractmethod
    def _requests(self, entry: Entry) -> Sequence[Request]:
        """The messages of one entry of the log."""

    @abstractmethod
    def _item(self, response: Any, arrived: float) -> Item | None:
        """What the application is told of a message that only this kind has; None: nothing."""

    def _is_new(self, item: Item) -> bool:
        """Whether the application was not told it before; it counts as told from then on."""
        return True

    def _on_applied(self, control_id: str, position: int) -> None:
        """A control has taken effect."""

    def _taken(self, item: Item) -> None:
        """The application has taken an item."""

    def _extra(self) -> Request | None:
        """A message that is due besides the log's; counts as sent."""
        return None

    def _may_finish(self) -> bool:
        """Whether `finish` may be sent once the log is."""
        return True

    def _complete(self) -> bool:
        """Whether all that the session can give has come: a lost connection then does not matter."""
        return False

    def _cover(self, checkpoint: t.Checkpoint) -> None:
        """Drop from the log what a checkpoint covers."""
        self._buffer.cover(checkpoint.position)

    # Opening and closing

    async def open(self) -> Info:
        """Connect and wait until the server has opened the session.

        The session goes on opening if this is cancelled; `close` drops it, as `async with` does by itself.

        Raises:
            RealtideError: It refused, or cannot be reached within the retry policy.
        """
        if self._pump_task is None:
            self._pump_task = asyncio.create_task(self._pump(), name=f"realtide-{self._kind.name}-stream")
        await self._opened.wait()
        if self._info is None:
            raise self._error or errors.StreamClosed("the stream was closed before it opened")
        return self._info

    async def __aenter__(self) -> Self:
        try:
            await self.open()
        except BaseException:
            await self.close()  # there is no `__aexit__` without an `__aenter__`
            raise
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
    def info(self) -> Info:
        """What was negotiated. Raises StreamClosed before the stream is open."""
        if self._info is None:
            raise errors.StreamClosed("the stream is not open")
        return self._info

    @property
    def last_checkpoint(self) -> t.Checkpoint | None:
        """The newest checkpoint, asked for or not."""
        return self._checkpoint

    async def checkpoint(self) -> t.Checkpoint:
        """Ask for the session's state and wait for it.

        Raises:
            StreamClosed: After `finish` or `close`.
            RealtideError: What ended the stream before the answer came.
        """
        self._check_input()
        key, future = self._receipts.checkpoint()
        request = common_pb2.CheckpointRequest(request_id=key)
        self._buffer.append_message(key, self._kind.request(checkpoint_request=request))
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

    def __aiter__(self) -> AsyncIterator[Item]:
        return self

    async def __anext__(self) -> Item:
        while not self._results:
            if self._ended:
                if self._error is not None and not self._closed:
                    raise self._error
                raise StopAsyncIteration
            self._result_ready.clear()
            await self._result_ready.wait()
        result = self._results.popleft()
        self._result_room.set()
        self._taken(result)
        return result

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

    def _control(self, make: Callable[[str], Any]) -> Control:
        self._check_input()
        control = self._receipts.control()
        key = control.control_id
        self._buffer.append_message(key, self._kind.request(control=make(key)))
        self._to_send.set()
        return control

    def _end(self, error: errors.RealtideError | None) -> None:
        """The session is over: wake everybody who waits."""
        if self._ended:
            return
        self._ended = True
        self._error = error
        self._receipts.fail(error or errors.StreamClosed("the stream ended before the answer came"))
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

    def _first_request(self) -> Request:
        if self._checkpoint is not None:
            return self._kind.request(resume=common_pb2.Resume(checkpoint=self._checkpoint.data))
        return self._opening()

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
        link = Link(self._target, self._kind)
        try:
            await link.open(self._first_request(), self._open_timeout)
        except BaseException:
            await link.close()
            raise
        return link

    def _adopt(self, link: Link) -> None:
        """Continue over `link`: send again what its checkpoint does not cover."""
        if self._log is None:
            self._info, self._log = self._begin(link.opened)
        else:
            self.reconnects += 1
            self._info = self._continue(link.opened)
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
                if self._complete():
                    return None
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
        while True:
            entry = self._buffer.next_unsent()
            if entry is not None:
                for request in self._requests(entry):
                    if not await link.write(request):
                        return
                self._send_room.set()
            elif (extra := self._extra()) is not None:
                if not await link.write(extra):
                    return
            elif self._finishing and self._may_finish():
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
            if self._complete():
                await link.half_close()

    async def _on_response(self, response: Response) -> None:
        arrived = time.monotonic()
        match response.WhichOneof("message"):
            case "accepted":
                self._receipts.on_accepted(response.accepted)
            case "applied":
                applied = response.applied
                self._buffer.settle(applied.control_id)
                self._on_applied(applied.control_id, applied.position)
                self._receipts.on_applied(applied)
            case "checkpoint":
                self._on_checkpoint(response.checkpoint)
            case None:
                log.debug("a message of a kind that this client does not know")
            case _:
                item = self._item(response, arrived)
                if item is not None:
                    await self._publish(item)

    def _on_checkpoint(self, message: common_pb2.Checkpoint) -> None:
        checkpoint = t.Checkpoint(message.data, message.position)
        if not self._moving:
            self._checkpoint = checkpoint
            self._cover(checkpoint)
        self._buffer.forget(message.request_id)
        self._receipts.on_checkpoint(message.request_id, checkpoint)

    async def _publish(self, item: Item) -> None:
        while len(self._results) >= self._queue and not self._ended:
            self._result_room.clear()
            await self._result_room.wait()
        if self._is_new(item):
            self._results.append(item)
            self._result_ready.set()


async def _stop(*tasks: asyncio.Task[None] | asyncio.Task[_Ended] | asyncio.Task[Link] | None) -> None:
    """Cancel the tasks and wait for their end, whatever it is."""
    running = [task for task in tasks if task is not None]
    for task in running:
        task.cancel()
    await asyncio.gather(*running, return_exceptions=True)
