"""What can go wrong, as exceptions that carry what the server said (google.rpc rich status)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

_DETAILS_KEY = "grpc-status-details-bin"


@dataclass(frozen=True, slots=True)
class FieldViolation:
    """One invalid field of a request: its path, and what is accepted."""

    field: str
    description: str


class RealtideError(Exception):
    """Base of all errors of this client.

    Attributes:
        message: The server's sentence, or this client's.
        code: The gRPC status, or None if the error is this client's own.
        violations: The invalid fields, if the server named any.
        retry_after: Seconds after which the server invites another try, or None.
        reconnectable: Whether the session may go on over a new connection.
    """

    reconnectable = False

    def __init__(
        self,
        message: str,
        *,
        code: grpc.StatusCode | None = None,
        violations: tuple[FieldViolation, ...] = (),
        retry_after: float | None = None,
    ) -> None:
        self.message = message
        self.code = code
        self.violations = violations
        self.retry_after = retry_after
        named = "; ".join(f"{v.field}: {v.description}" for v in violations)
        super().__init__(f"{message} ({named})" if named and named not in message else message)


class InvalidRequest(RealtideError):
    """INVALID_ARGUMENT: `violations` names the fields and their accepted ranges."""


class NotFound(RealtideError):
    """NOT_FOUND: no such model."""


class CheckpointRefused(RealtideError):
    """FAILED_PRECONDITION: the checkpoint does not fit the model, or is damaged."""


class AccessDenied(RealtideError):
    """UNAUTHENTICATED or PERMISSION_DENIED."""


class ResourceExhausted(RealtideError):
    """RESOURCE_EXHAUSTED: the server is full (`retry_after` is set) or a message was too large."""

    @property
    def reconnectable(self) -> bool:  # type: ignore[override]
        """Only if the server said when to try again."""
        return self.retry_after is not None


class IdleTimeout(RealtideError):
    """DEADLINE_EXCEEDED: nothing was sent for too long, or the session or the call lasted too long."""


class Unavailable(RealtideError):
    """UNAVAILABLE: no server, a lost connection, or a server that is stopping."""

    reconnectable = True


class Cancelled(RealtideError):
    """CANCELLED: the call was cancelled on the way.

    Not by the server, which has no such answer: by what stands between, or because the server's connections
    closed in the moment in which the call was begun.
    """

    reconnectable = True


class ServerError(RealtideError):
    """Any other status, INTERNAL for example: a bug of the server or something between."""


class StreamLost(RealtideError):
    """The connection was lost and what the server would need to go on is no longer buffered."""


class StreamClosed(RealtideError):
    """The stream was used after `finish` or `close`."""


_BY_CODE: dict[grpc.StatusCode, type[RealtideError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidRequest,
    grpc.StatusCode.NOT_FOUND: NotFound,
    grpc.StatusCode.FAILED_PRECONDITION: CheckpointRefused,
    grpc.StatusCode.UNAUTHENTICATED: AccessDenied,
    grpc.StatusCode.PERMISSION_DENIED: AccessDenied,
    grpc.StatusCode.RESOURCE_EXHAUSTED: ResourceExhausted,
    grpc.StatusCode.DEADLINE_EXCEEDED: IdleTimeout,
    grpc.StatusCode.UNAVAILABLE: Unavailable,
    grpc.StatusCode.CANCELLED: Cancelled,
}


def from_status(code: grpc.StatusCode, message: str, trailing_metadata: Any) -> RealtideError:
    """Make the exception of a gRPC status.

    Args:
        code: Any status but OK.
        message: The status message.
        trailing_metadata: Pairs of key and value, or None. Rich details that cannot be parsed are left out:
            the status itself still holds.
    """
    violations: list[FieldViolation] = []
    retry_after: float | None = None
    for detail in _details(trailing_metadata):
        bad_request = error_details_pb2.BadRequest()
        retry_info = error_details_pb2.RetryInfo()
        if detail.Unpack(bad_request):
            violations += [FieldViolation(v.field, v.description) for v in bad_request.field_violations]
        elif detail.Unpack(retry_info):
            retry_after = retry_info.retry_delay.seconds + retry_info.retry_delay.nanos / 1e9
    kind = _BY_CODE.get(code, ServerError)
    return kind(message or code.name, code=code, violations=tuple(violations), retry_after=retry_after)


def from_rpc_error(error: grpc.aio.AioRpcError) -> RealtideError:
    """Make the exception of a failed call."""
    return from_status(error.code(), error.details() or "", error.trailing_metadata())


def _details(trailing_metadata: Any) -> list[Any]:
    for key, value in trailing_metadata or ():
        if key == _DETAILS_KEY and isinstance(value, bytes):
            try:
                return list(status_pb2.Status.FromString(value).details)
            except DecodeError:
                return []
    return []
