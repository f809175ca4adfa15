"""Statuses with google.rpc details: what a stream ends with when it does not end well."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NoReturn

import grpc
from google.protobuf import any_pb2
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2

from realtide.server.admission import Refused

_DETAILS_KEY = "grpc-status-details-bin"


class StatusError(Exception):
    """Ends a call with `code`, `message` and google.rpc `details`."""

    def __init__(self, code: grpc.StatusCode, message: str, details: Sequence[Message] = ()) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.details = tuple(details)

    async def abort(self, context: grpc.aio.ServicerContext[Any, Any]) -> NoReturn:
        """End the call. Raises grpc.aio.AbortError, as grpc wants it."""
        metadata: tuple[tuple[str, str | bytes], ...] = ()
        if self.details:
            packed = [any_pb2.Any() for _ in self.details]
            for target, detail in zip(packed, self.details, strict=True):
                target.Pack(detail)
            status = status_pb2.Status(code=self.code.value[0], message=self.message, details=packed)
            metadata = ((_DETAILS_KEY, status.SerializeToString()),)
        await context.abort(self.code, self.message, metadata)
        raise AssertionError("abort returned")


def _violation(field: str, problem: str) -> error_details_pb2.BadRequest:
    violation = error_details_pb2.BadRequest.FieldViolation(field=field, description=problem)
    return error_details_pb2.BadRequest(field_violations=[violation])


def invalid(field: str, problem: str) -> StatusError:
    """INVALID_ARGUMENT: `problem` says what is wrong with `field` and what would be accepted."""
    return StatusError(grpc.StatusCode.INVALID_ARGUMENT, f"{field}: {problem}", [_violation(field, problem)])


def misfit(problem: str) -> StatusError:
    """FAILED_PRECONDITION: a checkpoint that cannot be resumed here."""
    field = "resume.checkpoint"
    return StatusError(
        grpc.StatusCode.FAILED_PRECONDITION, f"{field}: {problem}", [_violation(field, problem)]
    )


def too_large(field: str, size: int, limit: int) -> StatusError:
    """RESOURCE_EXHAUSTED: a message over the limit; without RetryInfo, because trying again does not help."""
    problem = f"message of {size} bytes, at most {limit} are accepted"
    return StatusError(
        grpc.StatusCode.RESOURCE_EXHAUSTED, f"{field}: {problem}", [_violation(field, problem)]
    )


def no_model(name: str, known: Sequence[str]) -> StatusError:
    """NOT_FOUND with ResourceInfo."""
    problem = f"no model {name!r}; models: {', '.join(known) or 'none'}"
    info = error_details_pb2.ResourceInfo(
        resource_type="realtide.v1.Model", resource_name=name, description=problem
    )
    return StatusError(grpc.StatusCode.NOT_FOUND, problem, [info])


def unauthenticated() -> StatusError:
    """UNAUTHENTICATED: no key, or one that does not hold. Why is not said."""
    return StatusError(grpc.StatusCode.UNAUTHENTICATED, "authentication failed")


def forbidden() -> StatusError:
    """PERMISSION_DENIED: the key is good, but not for this service."""
    return StatusError(grpc.StatusCode.PERMISSION_DENIED, "not allowed with this key")


def over_quota(seconds: float) -> StatusError:
    """RESOURCE_EXHAUSTED with RetryInfo: the client has, or began, as many sessions as it may."""
    message = f"the client's quota is used up: try again in {seconds:.1f} s"
    return StatusError(grpc.StatusCode.RESOURCE_EXHAUSTED, message, [_retry(seconds)])


def _retry(seconds: float) -> error_details_pb2.RetryInfo:
    retry = error_details_pb2.RetryInfo()
    retry.retry_delay.FromMilliseconds(math.ceil(seconds * 1000))
    return retry


def refused(error: Refused) -> StatusError:
    """What a client without a slot is told."""
    if error.reason in ("draining", "failed"):
        what = "the server is going away" if error.reason == "draining" else "the model has failed"
        return StatusError(grpc.StatusCode.UNAVAILABLE, f"{what}: try another one")
    what = "slots and queue are full" if error.reason == "queue_full" else "no slot came free in time"
    message = f"{what}: try again in {error.retry_after or 0.0:.1f} s"
    return StatusError(grpc.StatusCode.RESOURCE_EXHAUSTED, message, [_retry(error.retry_after or 0.0)])


def idle(seconds: float, what: str) -> StatusError:
    """DEADLINE_EXCEEDED: the client was silent, or did not read, for too long."""
    return StatusError(grpc.StatusCode.DEADLINE_EXCEEDED, f"{what} for {seconds:g} s (the idle limit)")


def internal() -> StatusError:
    """INTERNAL: a bug of the server; the log has the rest under the session's id."""
    return StatusError(grpc.StatusCode.INTERNAL, "internal error; the session's id is in the server's log")
