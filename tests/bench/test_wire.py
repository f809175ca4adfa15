"""The lean client against grpc's own server: bytes both ways, refusals, windows, lost connections."""

from __future__ import annotations

import selectors
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import grpc
import pytest

from realtide.bench.wire import Call, Connection, framed

BIG = 300_000  # bytes: more than a frame and more than a window


@dataclass
class Service:
    address: str
    go_on: threading.Event


@pytest.fixture
def service() -> Iterator[Service]:
    go_on = threading.Event()
    go_on.set()

    def echo(requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        for request in requests:
            go_on.wait(20)
            yield request

    def refuse(requests: Iterator[bytes], context: grpc.ServicerContext) -> list[bytes]:
        context.set_code(grpc.StatusCode.RESOURCE_EXHAUSTED)
        context.set_details("all slots are taken: 100 %")
        return []

    handlers = {
        name: grpc.stream_stream_rpc_method_handler(call)
        for name, call in (("Echo", echo), ("Refuse", refuse))
    }
    server = grpc.server(ThreadPoolExecutor(8))
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.Test", handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield Service(f"127.0.0.1:{port}", go_on)
    go_on.set()
    server.stop(None).wait(10)


def until(connection: Connection, holds: Callable[[], bool]) -> None:
    """Turn the connection until something holds."""
    end = time.monotonic() + 20
    with selectors.DefaultSelector() as selector:
        selector.register(connection, selectors.EVENT_READ | selectors.EVENT_WRITE)
        while not holds():
            assert time.monotonic() < end, "it never came"
            connection.flush()
            if any(events & selectors.EVENT_READ for _, events in selector.select(1)):
                connection.receive()


def test_messages_of_two_calls_come_back_in_order_whatever_their_size(service: Service) -> None:
    connection = Connection(service.address)
    calls = [connection.call("/test.Test/Echo") for _ in range(2)]
    sent = [[b"", b"a" * 1290, bytes([k]) * BIG, b"end"] for k in range(2)]
    for k, call in enumerate(calls):
        for message in sent[k]:
            connection.send(call, framed(message), end=message == b"end")
    until(connection, lambda: all(call.ended for call in calls))
    assert [list(call.answers) for call in calls] == sent
    assert [call.failure for call in calls] == [None, None]
    connection.close()


def test_what_the_window_does_not_let_go_waits_and_keeps_its_order(service: Service) -> None:
    service.go_on.clear()
    connection = Connection(service.address)
    call = connection.call("/test.Test/Echo")
    # A server that does not read takes what fits its windows, far less than this.
    sent = [bytes([k]) * BIG for k in range(40)]
    for message in sent:
        connection.send(call, framed(message), end=message is sent[-1])
    until(connection, lambda: bool(call._out) and not connection.blocked)
    assert not call.answers
    service.go_on.set()
    until(connection, lambda: call.ended)
    assert list(call.answers) == sent
    connection.close()


def test_a_refusal_has_its_name_and_its_sentence(service: Service) -> None:
    connection = Connection(service.address)
    calls: list[Call] = [connection.call(f"/test.Test/{name}") for name in ("Refuse", "Nothing", "Echo")]
    for call in calls:
        connection.send(call, framed(b"x"), end=True)
    until(connection, lambda: all(call.ended for call in calls))
    assert calls[0].failure == "RESOURCE_EXHAUSTED: all slots are taken: 100 %"
    assert str(calls[1].failure).startswith("UNIMPLEMENTED")
    assert (list(calls[2].answers), calls[2].failure) == ([b"x"], None)
    connection.send(calls[0], framed(b"late"))  # has no effect
    connection.close()


def test_a_cancelled_call_leaves_the_others_alone(service: Service) -> None:
    connection = Connection(service.address)
    first, second = (connection.call("/test.Test/Echo") for _ in range(2))
    connection.cancel(first)
    connection.send(second, framed(b"x"), end=True)
    until(connection, lambda: second.ended)
    assert (first.failure, second.failure) == ("cancelled", None)
    connection.close()


@pytest.mark.parametrize("last", [b"", bytes(9)])
def test_a_lost_connection_ends_its_calls(last: bytes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        connection = Connection(f"127.0.0.1:{listening.getsockname()[1]}")
        call = connection.call("/test.Test/Echo")
        other: Any = listening.accept()[0]
        if last:  # a DATA frame of stream 0
            other.send(last)
        else:
            other.close()
        until(connection, lambda: call.ended)
        assert call.failure
        connection.close()
        other.close()


def test_nobody_there() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
    with pytest.raises(ConnectionRefusedError, match="refused"):
        Connection(f"127.0.0.1:{port}")
