"""Counts calls and messages under the grpc-ecosystem's metric names."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc

from realtide.server.metrics import GrpcMetrics

_EOF: Any = grpc.aio.EOF  # type: ignore[attr-defined]  # missing in the stubs
_NAMES = {code.value[0]: "".join(part.title() for part in code.name.split("_")) for code in grpc.StatusCode}
_NAMES[grpc.StatusCode.OK.value[0]] = "OK"


class _Context:
    """A servicer's context that counts what passes through; everything else is the context's own."""

    def __init__(self, context: Any, call: _Call) -> None:
        self._context = context
        self._call = call

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)

    async def read(self) -> Any:
        message = await self._context.read()
        if message is not _EOF:
            self._call.received.inc()
        return message

    async def write(self, message: Any) -> None:
        await self._context.write(message)
        self._call.sent.inc()


class _Call:
    """One method's metrics and the wrapping of its handler."""

    def __init__(self, metrics: GrpcMetrics, kind: str, method: str) -> None:
        _, service, name = method.split("/")
        self._metrics = metrics
        self._labels = (kind, service, name)
        self._started = metrics.started.labels(*self._labels)
        self._handling = metrics.handling.labels(*self._labels)
        self.received = metrics.received.labels(*self._labels)
        self.sent = metrics.sent.labels(*self._labels)

    def done(self, code: str, began: float) -> None:
        self._metrics.handled.labels(*self._labels, code).inc()
        self._handling.observe(time.monotonic() - began)

    async def requests(self, iterator: AsyncIterator[Any]) -> AsyncIterator[Any]:
        async for request in iterator:
            self.received.inc()
            yield request

    def wrap(self, behaviour: Callable[..., Any], streams_in: bool) -> Callable[..., Any]:
        """The handler `behaviour` with its call counted."""

        def incoming(request: Any) -> Any:
            if streams_in:
                return self.requests(request)
            self.received.inc()
            return request

        if inspect.isasyncgenfunction(behaviour):

            async def generator(request: Any, context: Any) -> AsyncIterator[Any]:
                with _Measured(self, context):
                    async for response in behaviour(incoming(request), _Context(context, self)):
                        self.sent.inc()
                        yield response

            return generator

        async def coroutine(request: Any, context: Any) -> Any:
            with _Measured(self, context):
                response = await behaviour(incoming(request), _Context(context, self))
                if response is not None:
                    self.sent.inc()
                return response

        return coroutine


class _Measured:
    """Records how a call ended."""

    def __init__(self, call: _Call, context: Any) -> None:
        self._call = call
        self._context = context

    def __enter__(self) -> None:
        self._call._started.inc()
        self._began = time.monotonic()

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, (asyncio.CancelledError, GeneratorExit)):
            code = grpc.StatusCode.CANCELLED.value[0]
        else:
            given = self._context.code()
            code = given.value[0] if isinstance(given, grpc.StatusCode) else int(given or 0)
            if error is not None and code == 0:
                code = grpc.StatusCode.UNKNOWN.value[0]
        self._call.done(_NAMES.get(code, "Unknown"), self._began)


_KINDS = {
    (False, False): ("unary", "unary_unary", grpc.unary_unary_rpc_method_handler),
    (False, True): ("server_stream", "unary_stream", grpc.unary_stream_rpc_method_handler),
    (True, False): ("client_stream", "stream_unary", grpc.stream_unary_rpc_method_handler),
    (True, True): ("bidi_stream", "stream_stream", grpc.stream_stream_rpc_method_handler),
}


def rewrapped(handler: Any, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Any:
    """A method's handler with its behaviour, whatever its kind, replaced by `wrap` of it."""
    _, attribute, make = _KINDS[handler.request_streaming, handler.response_streaming]
    behaviour = wrap(getattr(handler, attribute))
    return make(behaviour, handler.request_deserializer, handler.response_serializer)


class MetricsInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]  # generic only in the stubs
    """Wraps every handler, once per method."""

    def __init__(self, metrics: GrpcMetrics) -> None:
        self._metrics = metrics
        self._handlers: dict[str, Any] = {}

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """The method's handler, counted; None if there is no such method."""
        method = handler_call_details.method
        if method not in self._handlers:
            handler = await continuation(handler_call_details)
            if handler is None:
                return None
            kind = _KINDS[handler.request_streaming, handler.response_streaming][0]
            call = _Call(self._metrics, kind, method)
            streams_in = handler.request_streaming
            self._handlers[method] = rewrapped(handler, lambda behaviour: call.wrap(behaviour, streams_in))
        return self._handlers[method]
