"""Messages through a pipe: whole, in order, however they are cut; neither side blocks unasked."""

from __future__ import annotations

import os
import pickle
import threading
from collections.abc import Iterator

import pytest

from realtide.server.pipes import Message, Receiver, Sender, pipe, portable


@pytest.fixture
def ends() -> Iterator[tuple[Receiver, int]]:
    reading, writing = pipe()
    receiver = Receiver(reading)
    yield receiver, writing
    receiver.close()


def test_batches_arrive_in_order_and_the_end_is_seen(ends: tuple[Receiver, int]) -> None:
    receiver, writing = ends
    sender = Sender(writing, blocking=False)
    assert receiver.read() == []
    sender.send([("one", 1), ("two", b"x" * 1000)])
    sender.send([("three",)])
    assert receiver.read() == [("one", 1), ("two", b"x" * 1000), ("three",)]
    sender.send([("last",)])
    sender.close()
    assert receiver.read() == [("last",)]
    assert receiver.ended
    assert receiver.read() == []


@pytest.mark.parametrize("piece", [1, 7, 4096])
def test_messages_that_arrive_in_pieces(ends: tuple[Receiver, int], piece: int) -> None:
    receiver, writing = ends
    sent = [[("a", n, bytes(range(n % 200)))] for n in range(50)]
    data = b"".join(len(one).to_bytes(8, "little") + one for one in map(pickle.dumps, sent))
    found: list[Message] = []
    for start in range(0, len(data), piece):
        os.write(writing, data[start : start + piece])
        found += receiver.read()
    os.close(writing)
    assert found == [message for batch in sent for message in batch]


def test_a_full_pipe_does_not_hold_up_a_sender_that_does_not_block(ends: tuple[Receiver, int]) -> None:
    receiver, writing = ends
    sender = Sender(writing, blocking=False)
    large = b"y" * (5 << 20)
    for batch in ([("large", large)], [("after",)]):
        sender.send(batch)
        assert sender.behind
    found: list[Message] = []
    while sender.behind:
        found += receiver.read()
        sender.flush()
    found += receiver.read()
    assert found == [("large", large), ("after",)]
    sender.close()


def test_a_sender_that_blocks_waits_for_its_reader(ends: tuple[Receiver, int]) -> None:
    receiver, writing = ends
    sender = Sender(writing, blocking=True)
    large = b"z" * (5 << 20)
    thread = threading.Thread(target=lambda: sender.send([("large", large)]))
    thread.start()
    found: list[Message] = []
    while not found:
        found += receiver.read()
    thread.join()
    assert found == [("large", large)]
    assert not sender.behind
    sender.close()


def test_nobody_reads_any_more() -> None:
    reading, writing = pipe()
    os.close(reading)
    sender = Sender(writing, blocking=False)
    with pytest.raises(BrokenPipeError):
        sender.send([("one",)])
    sender.close()


def test_a_reader_takes_about_a_pipe_at_once_and_keeps_no_large_buffer(ends: tuple[Receiver, int]) -> None:
    receiver, writing = ends
    sender = Sender(writing, blocking=True)
    batch = [("piece", bytes(1 << 16))]

    def send() -> None:
        for _ in range(400):
            sender.send(batch)

    thread = threading.Thread(target=send)
    thread.start()
    found, most = 0, 0
    while found < 400:
        got = len(receiver.read())
        found, most = found + got, max(most, got)
    thread.join()
    assert 1 <= most <= 40  # of which 16 make a mebibyte; not as many as the sender can follow up
    sender = Sender(writing, blocking=False)
    sender.send([("large", bytes(6 << 20))])
    large: list[Message] = []
    while not large:
        large += receiver.read()
        sender.flush()
    assert len(receiver._buffer) < 1 << 20
    sender.close()


class Odd(Exception):
    """Cannot be made again from its arguments."""

    def __init__(self, one: int, two: int) -> None:
        super().__init__(f"{one} and {two}")


def test_errors_that_cannot_be_sent_keep_their_words() -> None:
    plain = portable(ValueError("frames: 3, must be 4"))
    assert isinstance(plain, ValueError)
    odd = portable(Odd(1, 2))
    assert isinstance(odd, RuntimeError)
    assert str(odd) == "Odd: 1 and 2"
