"""Who may call what, and how much of it: keys, services, quotas. Decided before a first message is read.

A call that is refused has neither a slot nor a place in a queue, and is told no more than it must know:
whatever is wrong with a key, the answer is the same.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc

from realtide.server import keyfile, status
from realtide.server.config import ConfigError, ServerConfig
from realtide.server.interceptor import rewrapped
from realtide.server.metrics import Metrics
from realtide.server.status import StatusError

if TYPE_CHECKING:
    from realtide.server.sessions import StreamSession

log = logging.getLogger(__name__)

_WATCH_SECONDS = 2.0
_PACKAGE = "realtide.v1."
# Answers anybody, because those who probe it cannot hold keys.
_OPEN = "grpc.health.v1.Health"
_SCHEME = "bearer "
# Until a client at its limit of sessions should try again: nobody knows when one of them ends.
_SESSIONS_RETRY = 1.0
_MINUTE = 60.0


@dataclass(frozen=True, slots=True)
class Caller:
    """Who calls: the name by which quotas count and logs tell, and the key, if keys are asked for."""

    name: str
    service: str
    key: keyfile.Entry | None = None


# Set for the task that serves a call, and for those that it starts.
caller: ContextVar[Caller | None] = ContextVar("caller", default=None)


@dataclass(slots=True)
class _Usage:
    """One client's sessions, and a bucket of opens that refills steadily and holds a minute's worth."""

    at: float
    a_minute: float = 0.0
    sessions: int = 0
    spent: float = 0.0

    def settle(self, now: float) -> None:
        """Refill until `now`."""
        self.spent = max(self.spent - (now - self.at) * self.a_minute / _MINUTE, 0.0)
        self.at = now

    def wait(self) -> float:
        """Seconds until one more may be begun; 0: now."""
        if not self.a_minute:
            return 0.0
        missing = self.spent + 1.0 - max(self.a_minute, 1.0)
        return max(missing, 0.0) * _MINUTE / self.a_minute


@dataclass(slots=True)
class Ticket:
    """A call that was let in; to be used with `with`, for as long as it lasts."""

    caller: Caller
    _usage: _Usage | None

    def __enter__(self) -> None:
        caller.set(self.caller)

    def __exit__(self, *error: object) -> None:
        if self._usage is not None:
            self._usage.sessions -= 1
            self._usage = None


@dataclass(slots=True)
class Access:
    """The server's door. Everything runs on the event loop.

    Args:
        config: which keys there are, and the quotas of those that say nothing.
        metrics: count refused calls and files that cannot be used.
        clock: monotonic time in seconds.
        now: the time, for what expires.

    Raises:
        ConfigError: the file of keys cannot be used.
    """

    config: ServerConfig
    metrics: Metrics
    clock: Callable[[], float] = time.monotonic
    now: Callable[[], datetime] = lambda: datetime.now(UTC)
    _keys: keyfile.Keys | None = field(default=None, init=False)
    _stamp: object = field(default=None, init=False)
    _usage: dict[str, _Usage] = field(default_factory=dict, init=False)
    _refusals: Counter[str] = field(default_factory=Counter, init=False)

    def __post_init__(self) -> None:
        if (path := self.config.api_key_file) is not None:
            self._stamp = _stamp(path)
            self._keys = keyfile.read(path, self.config.api_key_pepper)

    @property
    def clients(self) -> int:
        """Clients that something is known of."""
        return len(self._usage)

    # -- one call ----------------------------------------------------------------------------------------

    def enter(self, method: str, streams: bool, context: Any) -> Ticket:
        """Let a call of `method` in; `streams` says whether it is a session.

        Raises:
            StatusError: UNAUTHENTICATED, PERMISSION_DENIED, or RESOURCE_EXHAUSTED with RetryInfo.
        """
        who = self._identify(method, context)
        return Ticket(who, self._count(who) if streams and who.service in keyfile.SERVICES else None)

    def _identify(self, method: str, context: Any) -> Caller:
        full = method.split("/")[1]
        service = full.removeprefix(_PACKAGE).lower() if full.startswith(_PACKAGE) else full
        if self._keys is None:
            return Caller(_peer(context), service)
        given = [
            value for name, value in context.invocation_metadata() or () if name.lower() == "authorization"
        ]
        if not given:
            raise self._refused("no_key", status.unauthenticated())
        text = given[0] if len(given) == 1 and isinstance(given[0], str) else ""
        entry = None
        if text[: len(_SCHEME)].lower() == _SCHEME:
            entry = self._keys.find(text[len(_SCHEME) :].strip())
        if entry is None:
            raise self._refused("wrong_key", status.unauthenticated())
        if entry.expired(self.now()):
            raise self._refused("expired_key", status.unauthenticated(), entry.id)
        if service in keyfile.SERVICES and service not in entry.services:
            raise self._refused("forbidden_service", status.forbidden(), entry.id)
        return Caller(f"key:{entry.id}", service, entry)

    def _count(self, who: Caller) -> _Usage:
        most, a_minute = self._quota(who.key)
        now = self.clock()
        usage = self._usage.setdefault(who.name, _Usage(now))
        usage.settle(now)
        usage.a_minute = a_minute
        key = "" if who.key is None else who.key.id
        if most and usage.sessions >= most:
            raise self._refused("client_sessions", status.over_quota(_SESSIONS_RETRY), key)
        if wait := usage.wait():
            raise self._refused("client_rate", status.over_quota(wait), key)
        usage.sessions += 1
        usage.spent += 1.0
        return usage

    def _quota(self, key: keyfile.Entry | None) -> tuple[int, float]:
        """Most sessions at once and most begun a minute; 0: no limit."""
        sessions = None if key is None else key.sessions
        opens = None if key is None else key.opens_per_minute
        return (
            self.config.max_client_sessions if sessions is None else sessions,
            self.config.client_opens_per_minute if opens is None else opens,
        )

    def _refused(self, reason: str, error: StatusError, key: str = "") -> StatusError:
        self.metrics.calls_refused.labels(reason).inc()
        self._refusals[f"{reason} {key}".rstrip()] += 1
        return error

    # -- from time to time -------------------------------------------------------------------------------

    async def watch(self, streams: Callable[[], Iterable[StreamSession]]) -> None:
        """Until cancelled: follow the file of keys and end the streams of those that hold no longer."""
        while True:
            await asyncio.sleep(_WATCH_SECONDS)
            try:
                self.look(streams())
            except Exception:  # keys must go on being followed whatever happens once
                log.exception("looking after keys failed")

    def look(self, streams: Iterable[StreamSession]) -> None:
        """Do what is to be done from time to time."""
        self._reload()
        if self._keys is not None:
            now = self.now()
            for stream in list(streams):
                who = stream.caller
                if who is not None and who.key is not None and not self._keys.holds(who.key, now):
                    stream.stop(status.unauthenticated())
        if self._refusals:
            # One line, however many there were: strangers must not be able to fill the log.
            log.warning("calls refused", extra={"refused": dict(self._refusals)})
            self._refusals.clear()
        clock = self.clock()
        for name, usage in list(self._usage.items()):
            usage.settle(clock)
            if not usage.sessions and not (usage.a_minute and usage.spent):
                del self._usage[name]  # it knows no more than a new one

    def _reload(self) -> None:
        path = self.config.api_key_file
        if path is None or (stamp := _stamp(path)) == self._stamp:
            return
        self._stamp = stamp
        try:
            self._keys = keyfile.read(path, self.config.api_key_pepper)
        except ConfigError as error:
            log.error("the file of keys has changed and cannot be used, the old keys hold: %s", error)
            self.metrics.reload_failures.labels("api_keys").inc()
            return
        log.info("the file of keys has changed", extra={"keys": len(self._keys.entries)})


def _stamp(path: Path) -> tuple[int, int, int] | None:
    """What changes when the file does; None: there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size


def _peer(context: Any) -> str:
    """The client without a key: its certificate's name, else its address without the port."""
    shown = context.auth_context() or {}
    for kind in ("x509_subject_alternative_name", "x509_common_name"):
        for value in shown.get(kind, ()):
            return f"certificate:{value.decode(errors='replace')}"
    peer = str(context.peer())
    return "address:" + (peer.rpartition(":")[0] if peer.startswith(("ipv4:", "ipv6:")) else peer)


class AccessInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]  # generic only in the stubs
    """Puts the door in front of every handler, once per method."""

    def __init__(self, access: Access) -> None:
        self._access = access

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """The method's handler behind the door; None if there is no such method."""
        method = handler_call_details.method
        handler = await continuation(handler_call_details)
        if handler is None or method.split("/")[1] == _OPEN:
            return handler
        streams = handler.request_streaming and handler.response_streaming
        return rewrapped(handler, lambda behaviour: self._guarded(behaviour, method, streams))

    def _guarded(self, behaviour: Callable[..., Any], method: str, streams: bool) -> Callable[..., Any]:
        if inspect.isasyncgenfunction(behaviour):

            async def generator(request: Any, context: Any) -> AsyncIterator[Any]:
                with await self._enter(method, streams, context):
                    async for response in behaviour(request, context):
                        yield response

            return generator

        async def coroutine(request: Any, context: Any) -> Any:
            with await self._enter(method, streams, context):
                return await behaviour(request, context)

        return coroutine

    async def _enter(self, method: str, streams: bool, context: Any) -> Ticket:
        try:
            return self._access.enter(method, streams, context)
        except StatusError as error:
            await error.abort(context)
