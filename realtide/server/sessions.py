"""The grammar that every stream follows (design: proto/realtide/v1/common.proto), for any kind of media.

A session is two tasks: one reads the client and feeds the engine's queue, one writes what comes out.
Everything that goes to the client, receipts too, takes the one way through the queue of events, so that its
order is the order in which it happened. A kind of stream (speech_service.py, video_service.py) adds what its
media, controls and results are.
"""

from __future__ import annotations

import asyncio
import logging
import random
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import grpc
from google.protobuf.message import DecodeError, Message

from realtide.engines.engine import CheckpointMismatch, Engine, Session, SlotsExhausted
from realtide.server import checkpoint, status
from realtide.server.access import caller
from realtide.server.admission import Refused
from realtide.server.config import ServerConfig
from realtide.server.handle import Ended, Export, Exported, Failed, Front
from realtide.server.host import Host
from realtide.server.logs import session_id as logged_session
from realtide.server.models import ServedModel
from realtide.server.rounds import ExecutorStopped
from realtide.server.status import StatusError, invalid, misfit
from realtide_client.v1 import common_pb2

log = logging.getLogger(__name__)

# Exports that may be under way at once; the next request is not read before one of them is answered.
_EXPORTS = 2
# Ages, in parts of max_connection_age, at which sessions are sent away: those that came together, perhaps
# from a server that stopped, do not go together.
_AGES = (0.9, 1.1)
# Longest wait, in seconds, for a client to take the checkpoint that it gets when the drain's deadline has
# come.
_LAST_CHECKPOINT = 1.0
# Longest wait, in seconds, for a client that has got everything to close its side.
_LINGER = 0.5
_EOF: Any = grpc.aio.EOF  # type: ignore[attr-defined]  # missing in the stubs
_OUTCOMES = {grpc.StatusCode.INTERNAL: "server_error", grpc.StatusCode.UNAVAILABLE: "drained"}


@dataclass(frozen=True, slots=True)
class Plan:
    """A checked first message."""

    model: ServedModel
    make: Callable[[Engine], Session]
    session_id: str
    start: int  # position of the first media unit to come
    resumed: bool
    checkpoint_interval: int  # milliseconds of media; 0: none


@dataclass(frozen=True, slots=True)
class _Wish:
    """Why a checkpoint is made."""

    request_id: str = ""
    asked: bool = True  # by the client or its interval: counts against _EXPORTS
    going_away: float | None = None  # seconds that are left
    periodic: bool = False
    last: bool = False
    reason: str = ""  # of going_away


@dataclass(slots=True)
class _Control:
    received: float
    on_applied: Callable[[], None]


class StreamSession(ABC):
    """One call of a stream. Subclasses say what its media is."""

    service: ClassVar[str]
    response: ClassVar[Callable[..., Message]]
    consumes: ClassVar[bool] = True
    """Whether media comes from the client; otherwise the client gives credit and the media is generated."""

    def __init__(self, host: Host, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        self.host = host
        self.config = host.config
        self.received = 0  # position after the last media unit received; of generated media, the credit
        self.processed = 0  # position after the last one that was processed
        self.opened_at = 0.0
        self.caller = caller.get()
        self._context = context
        self._loop = asyncio.get_running_loop()
        self._stopped: asyncio.Future[StatusError] = self._loop.create_future()
        self._handle: Front | None = None
        self._plan_in_force: Plan | None = None
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._reading_since: float | None = None
        self._writing_since: float | None = None
        self._finished = False
        self._controls: dict[str, _Control] = {}
        self._control_room = asyncio.Event()
        self._exports = asyncio.Semaphore(_EXPORTS)
        self._next_checkpoint: int | None = None
        self._checkpoint_units = 0
        self._periodic = False  # a periodic checkpoint is under way
        self._going_away = False

    # -- what a kind of stream adds ----------------------------------------------------------------------

    @abstractmethod
    def plan_open(self, message: Any) -> Plan:
        """Check an `open` (raises StatusError) and say what to open."""

    @abstractmethod
    def plan_resume(self, header: checkpoint.Header, state: bytes) -> Plan:
        """Check the setup in a checkpoint's header (raises StatusError) and say what to restore."""

    @abstractmethod
    def opened(self, common: common_pb2.Opened) -> Message:
        """The kind's own `opened` message around `common`."""

    @abstractmethod
    async def on_media(self, request: Any) -> None:
        """Check a media message or a credit (raises StatusError), advance `received` and `put` it."""

    @abstractmethod
    def on_control(self, control: Any) -> tuple[Any, Callable[[], None]]:
        """Check a control (raises StatusError): the engine's item, and what to do once it is applied."""

    @abstractmethod
    def on_event(self, event: Any, position: int) -> Iterable[Message]:
        """Translate an engine's event, made when the engine had been fed up to `position`."""

    @abstractmethod
    def finish_item(self) -> Any:
        """The engine's item for the end of input."""

    @abstractmethod
    def setup(self) -> bytes:
        """What `plan_resume` will need."""

    @property
    @abstractmethod
    def rate(self) -> float:
        """Media units per second."""

    @abstractmethod
    def on_close(self, busy: float) -> None:
        """The session is over; its steps took `busy` seconds."""

    # -- what a kind that generates its media changes -----------------------------------------------------

    @property
    def position(self) -> int:
        """Position that a control is accepted at: what has been received."""
        return self.received

    def covered(self, fed: int) -> int:
        """First media unit that an exported state does not cover; the engine had been fed up to `fed`."""
        return fed

    def waiting_since(self, reading: float) -> float | None:
        """Since when the client is expected to send, if it is being read since `reading`; None: it is not."""
        return reading

    async def too_many_controls(self) -> None:
        """As many controls as may await their receipt do: wait until one has it, or raise StatusError."""
        self._control_room.clear()
        await self._control_room.wait()

    # -- for those kinds ---------------------------------------------------------------------------------

    async def put(self, item: Any, units: int = 0, seconds: float = 0.0) -> None:
        """Queue input for the engine; waits while too much is queued."""
        await self.handle.put(item, units, seconds)

    def advanced(self, position: int) -> None:
        """Generated media up to `position` has been sent: ask for a periodic checkpoint where it is time."""
        if self._next_checkpoint is not None and position >= self._next_checkpoint and not self._periodic:
            self._next_checkpoint = position + self._checkpoint_units
            self._periodic = True
            self.handle.put_now(Export(_Wish(asked=False, periodic=True)))

    @property
    def handle(self) -> Front:
        """The session's queues; it must have been opened."""
        if self._handle is None:
            raise RuntimeError("session is not open")
        return self._handle

    def applied(self, control_id: str, position: int) -> Iterable[Message]:
        """The second receipt of a control."""
        control = self._controls.pop(control_id, None)
        if control is None:
            # It came with the checkpoint; the client sends again what had no receipt, and gets it then.
            return []
        control.on_applied()
        self._control_room.set()
        delay = max(time.monotonic() - control.received, 0.0)
        receipt = common_pb2.ControlApplied(control_id=control_id, position=position, delay_seconds=delay)
        return [self.response(applied=receipt)]

    def timing(self, needed: float | None) -> common_pb2.Timing:
        """When a result is sent whose last input arrived at monotonic time `needed` (None: not known)."""
        now = time.monotonic()
        return common_pb2.Timing(
            received_position=self.received,
            processed_position=self.processed,
            processing_seconds=max(now - needed, 0.0) if needed is not None else 0.0,
            session_seconds=now - self.opened_at,
        )

    # -- from outside ------------------------------------------------------------------------------------

    def drain(self, seconds: float, reason: str = "shutting down") -> None:
        """Tell the client to go elsewhere within `seconds`; then end the stream."""
        if self._handle is None:
            # Still before its first message, or in the queue, which admission empties.
            self.stop(status.refused(Refused("draining", None)))
            return
        cut = self._timers.get("cut")
        if cut is not None and cut.when() <= self._loop.time() + seconds:
            return  # it has been told already, and has less time
        self._handle.put_now(Export(_Wish(asked=False, going_away=seconds, reason=reason)))
        self._later("cut", seconds, self._cut)

    def stop(self, error: StatusError) -> None:
        """End the stream with `error` now, whatever it is doing."""
        if not self._stopped.done():
            self._stopped.set_result(error)

    async def run(self) -> None:
        """Serve the call from its first message to its status."""
        self.host.streams.add(self)
        try:
            await self._serve()
        except StatusError as error:
            log.info("stream ended: %s", error.message, extra={"code": error.code.name})
            await error.abort(self._context)
        except grpc.aio.BaseError:
            # The transport is gone and grpc is about to cancel this call: a disconnect, nobody is left to be
            # told.
            log.info("stream lost")
            raise asyncio.CancelledError from None
        except Exception:
            log.exception("stream failed")
            await status.internal().abort(self._context)
        finally:
            self.host.streams.discard(self)
            for timer in self._timers.values():
                timer.cancel()

    # -- the call ----------------------------------------------------------------------------------------

    async def _serve(self) -> None:
        if self.host.drain_until is not None:
            raise status.refused(Refused("draining", None))
        first = await self._first_message()
        arrived = time.monotonic()
        plan = self._plan(first)
        logged_session.set(plan.session_id)
        lease = await plan.model.admit()
        try:
            handle = await plan.model.open(lease, plan.make, plan.session_id, plan.start)
        except CheckpointMismatch as error:
            raise misfit(str(error)) from None
        except (SlotsExhausted, ExecutorStopped):
            plan.model.metrics.refused("failed")
            raise status.refused(Refused("failed", None)) from None
        self._handle = handle
        handle.consumes = self.consumes
        self.opened_at = time.monotonic()
        self.received = self.processed = plan.start
        plan.model.metrics.opened()
        if plan.resumed:
            plan.model.metrics.observe(self.host.metrics.resume, self.opened_at - arrived)
        outcome = "server_error"
        try:
            await self._live(plan, handle)
            outcome = "ok"
        except StatusError as error:
            outcome = _OUTCOMES.get(error.code, "client_error")
            raise
        except (asyncio.CancelledError, grpc.aio.BaseError):
            outcome = "resumed_elsewhere" if self._going_away else "cancelled"
            raise
        finally:
            handle.close()
            plan.model.metrics.closed(outcome, time.monotonic() - self.opened_at)
            self.on_close(handle.busy)

    async def _first_message(self) -> Any:
        self._watch()
        reading = asyncio.create_task(self._next())
        try:
            await asyncio.wait({reading, self._stopped}, return_when=asyncio.FIRST_COMPLETED)
            if not reading.done():
                raise self._stopped.result()
            return reading.result()
        finally:
            await _cancelled(reading)

    async def _next(self) -> Any:
        """The next message, its size checked, or grpc's end of stream."""
        self._reading_since = None if self._finished else time.monotonic()
        try:
            request = await self._context.read()
        except DecodeError:
            raise invalid("message", "cannot be decoded as " + self.service) from None
        self._reading_since = None
        if request is not _EOF:
            which = request.WhichOneof("message") or "message"
            # A resume is as large as its checkpoint, which has a limit of its own.
            limit = self.config.max_message_bytes
            if request.ByteSize() > limit and which != "resume":
                raise status.too_large(which, request.ByteSize(), limit)
        return request

    def _plan(self, first: Any) -> Plan:
        which = None if first is _EOF else first.WhichOneof("message")
        if which == "open":
            return self.plan_open(first.open)
        if which != "resume":
            raise invalid(which or "message", "the first message must be `open` or `resume`")
        data, limit = first.resume.checkpoint, self.config.max_checkpoint_bytes
        if not 0 < len(data) <= limit:
            raise invalid("resume.checkpoint", f"{len(data)} bytes, must be 1 to {limit}")
        try:
            header, state = checkpoint.unseal(data, self.config.checkpoint_key)
        except checkpoint.BadCheckpoint as error:
            raise misfit(str(error)) from None
        model = self.host.models.get(header.model)
        if header.service != self.service:
            raise misfit(f"of {header.service}, not of {self.service}")
        if model is None or model.engine_name != header.engine or model.info.version != header.model_version:
            raise misfit(f"of model {header.model} {header.model_version}, which this server does not have")
        return self.plan_resume(header, state)

    async def _live(self, plan: Plan, handle: Front) -> None:
        common = common_pb2.Opened(
            session_id=plan.session_id,
            model=plan.model.name,
            model_version=plan.model.info.version,
            resumed=plan.resumed,
            position=plan.start,
            checkpoint_interval_ms=plan.checkpoint_interval,
            limits=limits(self.config),
            server_version=self.host.version,
        )
        # On its own and before anything can go wrong: a status cannot be sent while a first message, which
        # would carry the metadata, waits for a client that does not read. Not earlier, or clients could not
        # retry refusals.
        await self._context.send_initial_metadata(())
        opened = {"model": plan.model.name, "resumed": plan.resumed}
        if self.caller is not None:
            opened["client"] = self.caller.name
        log.info("session opened", extra=opened)
        self._plan_in_force = plan
        if plan.checkpoint_interval:
            self._checkpoint_units = max(int(plan.checkpoint_interval * self.rate / 1000), 1)
            self._next_checkpoint = plan.start + self._checkpoint_units
        handle.inject(self.response(opened=self.opened(common)))
        handle.start()
        if self.config.max_session_seconds:
            limit = self.config.max_session_seconds
            problem = f"the session lasted longer than {limit:g} s"
            self._later(
                "length", limit, lambda: self.stop(StatusError(grpc.StatusCode.DEADLINE_EXCEEDED, problem))
            )
        if self.config.max_connection_age:
            age = self.config.max_connection_age * random.uniform(*_AGES)
            grace = self.config.max_connection_grace
            self._later("age", age, lambda: self.drain(grace, "connection age"))
        if self.host.drain_until is not None:  # the drain began while this session was being opened
            self.drain(max(self.host.drain_until - self._loop.time(), 0.0))
        reader = asyncio.create_task(self._read())
        writer = asyncio.create_task(self._write(handle))
        waiting: set[asyncio.Future[Any]] = {reader, writer, self._stopped}
        try:
            while not writer.done():
                done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                if self._stopped in done:
                    raise self._stopped.result()
                if reader in done:
                    reader.result()  # raises what was wrong with the input
                    waiting.discard(reader)
            writer.result()
            handle.close()
            # If the server ends a call whose client may still write, gRPC resets the stream after its status;
            # some balancers (HAProxy 2.6) then drop what they have not handed on yet.
            await asyncio.wait({reader}, timeout=_LINGER)
        finally:
            await _cancelled(reader, writer)

    # -- reading -----------------------------------------------------------------------------------------

    async def _read(self) -> None:
        while (request := await self._next()) is not _EOF:
            await self._on_request(request)
        if not self._finished:  # the client closed its side without saying so: nothing more can come
            await self._finish()

    async def _on_request(self, request: Any) -> None:
        which = request.WhichOneof("message")
        if which is None:
            raise invalid("message", "none set, exactly one is needed")
        if self._finished:
            raise invalid(which, "came after finish, nothing may follow it")
        if which in ("open", "resume"):
            raise invalid(which, "the session is open already; only the first message may open it")
        if which == "control":
            await self._on_control(request.control)
        elif which == "checkpoint_request":
            request_id = request.checkpoint_request.request_id
            self._check_id("checkpoint_request.request_id", request_id)
            await self._ask_checkpoint(request_id)
        elif which == "finish":
            await self._finish()
        else:
            await self.on_media(request)
            if self.consumes and self._next_checkpoint is not None and self.received >= self._next_checkpoint:
                self._next_checkpoint = self.received + self._checkpoint_units
                await self._ask_checkpoint("")

    async def _finish(self) -> None:
        self._finished = True
        await self.put(self.finish_item())

    async def _on_control(self, control: Any) -> None:
        received = time.monotonic()
        control_id = control.control_id
        self._check_id("control.control_id", control_id)
        if not control_id:
            raise invalid("control.control_id", "empty, at least one character is needed")
        if control_id in self._controls:
            raise invalid("control.control_id", f"{control_id!r} awaits its `applied` receipt already")
        item, on_applied = self.on_control(control)
        while len(self._controls) >= self.config.max_pending_controls:
            await self.too_many_controls()
        self._controls[control_id] = _Control(received, on_applied)
        receipt = common_pb2.ControlAccepted(control_id=control_id, position=self.position)
        self.handle.inject(self.response(accepted=receipt))
        await self.put(item)

    def _check_id(self, field: str, value: str) -> None:
        size, limit = len(value.encode()), self.config.max_control_id_bytes
        if size > limit:
            raise invalid(field, f"{size} bytes, at most {limit} are accepted")

    async def _ask_checkpoint(self, request_id: str) -> None:
        await self._exports.acquire()
        await self.put(Export(_Wish(request_id)))

    # -- writing -----------------------------------------------------------------------------------------

    async def _write(self, handle: Front) -> None:
        while True:
            event, position = await handle.get()
            if isinstance(event, Ended):
                return
            if isinstance(event, Failed):
                if isinstance(event.error, ExecutorStopped):
                    raise status.refused(Refused("draining", None))
                raise status.internal()
            if isinstance(event, Message):  # injected: ready to go
                await self._send(event)
            elif isinstance(event, Exported):
                await self._on_exported(event, position)
            else:
                for message in self.on_event(event, position):
                    await self._send(message)

    async def _send(self, message: Message) -> None:
        self._writing_since = time.monotonic()
        await self._context.write(message)
        self._writing_since = None

    async def _on_exported(self, exported: Exported, position: int) -> None:
        wish: _Wish = exported.tag
        sealed = self._seal(exported.state, self.covered(position))
        if sealed is not None:
            sealed.request_id = wish.request_id
        if wish.going_away is not None:
            self._going_away = True
            going = common_pb2.GoingAway(deadline_ms=round(wish.going_away * 1000), reason=wish.reason)
            if sealed is not None:
                going.checkpoint.CopyFrom(sealed)
            await self._send(self.response(going_away=going))
            return
        if sealed is not None:
            await self._send(self.response(checkpoint=sealed))
        if wish.asked:
            self._exports.release()
        if wish.periodic:
            self._periodic = False
        if wish.last:
            raise _gone()
        if sealed is None and wish.request_id:
            raise status.internal()

    def _seal(self, state: bytes | None, position: int) -> common_pb2.Checkpoint | None:
        plan = self._plan_in_force
        if state is None or plan is None:
            return None
        header = checkpoint.Header(
            service=self.service,
            engine=plan.model.engine_name,
            model=plan.model.name,
            model_version=plan.model.info.version,
            session_id=plan.session_id,
            position=position,
            setup=self.setup(),
        )
        data = checkpoint.seal(header, state, self.config.checkpoint_key)
        if len(data) > self.config.max_checkpoint_bytes:
            log.warning("checkpoint of %d bytes is over the limit", len(data))
            return None
        plan.model.metrics.observe(self.host.metrics.checkpoint_bytes, len(data))
        return common_pb2.Checkpoint(data=data, position=position)

    # -- time --------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        """End the stream if the client neither sent nor read for the idle limit; else look again."""
        limit = self.config.idle_timeout
        if not limit:
            return
        now = time.monotonic()
        wait = limit
        reading = None if self._reading_since is None else self.waiting_since(self._reading_since)
        for since, what in (
            (reading, "nothing came from the client"),
            (self._writing_since, "the client did not read"),
        ):
            if since is not None:
                if now - since >= limit:
                    self.stop(status.idle(limit, what))
                    return
                wait = min(wait, since + limit - now)
        self._later("watch", wait, self._watch)

    def _cut(self) -> None:
        """The drain's deadline: one more checkpoint if the client takes it at once, then the end."""
        self.handle.put_now(Export(_Wish(asked=False, last=True)))
        self._later("gone", min(_LAST_CHECKPOINT, self.config.grace_seconds / 2), lambda: self.stop(_gone()))

    def _later(self, name: str, seconds: float, call: Callable[[], None]) -> None:
        if (before := self._timers.get(name)) is not None:
            before.cancel()
        self._timers[name] = self._loop.call_later(seconds, call)


def limits(config: ServerConfig) -> common_pb2.Limits:
    """Limits that every kind of session has."""
    return common_pb2.Limits(
        max_message_bytes=config.max_message_bytes,
        idle_timeout_seconds=config.idle_timeout,
        max_duration_seconds=config.max_session_seconds,
        max_checkpoint_bytes=config.max_checkpoint_bytes,
        min_checkpoint_interval_ms=config.min_checkpoint_interval_ms,
        max_pending_controls=config.max_pending_controls,
        max_control_id_bytes=config.max_control_id_bytes,
    )


def _gone() -> StatusError:
    message = "the server is going away: resume elsewhere from the last checkpoint"
    return StatusError(grpc.StatusCode.UNAVAILABLE, message)


async def _cancelled(*tasks: asyncio.Task[Any]) -> None:
    """Cancel and wait until none of them uses the call any more."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def checkpoint_interval(given: common_pb2.SessionOptions, config: ServerConfig, path: str) -> int:
    """The interval in milliseconds of media; 0: none.

    Raises:
        StatusError: INVALID_ARGUMENT, it is too short.
    """
    interval, least = given.checkpoint_interval_ms, config.min_checkpoint_interval_ms
    if 0 < interval < least:
        raise invalid(
            f"{path}.checkpoint_interval_ms", f"{interval}, must be 0 (none) or at least {least} ms"
        )
    return interval


def new_session_id() -> str:
    """An id for logs; not a secret."""
    return secrets.token_hex(8)
