"""The log of what may have to be sent again."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from realtide_client.errors import StreamLost
from realtide_client.replay import Audio, ReplayLog
from realtide_client.v1 import speech_pb2

REQUEST = speech_pb2.SpeechStreamRequest()


def drain(log: ReplayLog) -> list[str | tuple[int, bytes]]:
    out: list[str | tuple[int, bytes]] = []
    while (entry := log.next_unsent()) is not None:
        out.append((entry.position, entry.data) if isinstance(entry, Audio) else entry.key)
    return out


def joined(items: list[str | tuple[int, bytes]], width: int = 2) -> tuple[int, bytes]:
    """Audio of consecutive entries as one; fails if they do not follow each other."""
    pieces = [item for item in items if isinstance(item, tuple)]
    for (position, data), (following, _) in itertools.pairwise(pieces):
        assert following == position + len(data) // width
    return pieces[0][0], b"".join(data for _, data in pieces)


def test_rewinding_sends_again_from_the_middle_of_a_piece_with_controls_at_their_place() -> None:
    log = ReplayLog(2, 1000)
    log.append_audio(b"aabbcc")
    log.append_message("x", REQUEST)
    log.append_audio(b"ddee")
    assert drain(log) == [(0, b"aabbcc"), "x", (3, b"ddee")]
    log.rewind(2)
    assert drain(log) == [(2, b"cc"), "x", (3, b"ddee")]


def test_a_checkpoint_covers_only_controls_that_were_applied_before_it() -> None:
    log = ReplayLog(2, 1000)
    log.append_message("applied", REQUEST)
    log.append_message("pending", REQUEST)
    log.append_audio(b"aabb")
    drain(log)
    log.settle("applied")
    log.cover(2)
    log.rewind(2)
    assert drain(log) == ["pending"]


def test_a_control_applied_after_the_checkpoint_is_sent_again() -> None:
    log = ReplayLog(2, 1000)
    log.append_audio(b"aa")
    log.append_message("x", REQUEST)
    drain(log)
    log.cover(1)
    log.settle("x")
    log.rewind(1)
    assert drain(log) == ["x"]
    log.rewind(1)
    assert drain(log) == ["x"], "on the new connection it has not been applied yet"


def test_forgotten_messages_are_not_sent_again() -> None:
    log = ReplayLog(2, 1000)
    log.append_message("x", REQUEST)
    drain(log)
    log.rewind(0)
    log.forget("x")
    assert drain(log) == []


def test_the_oldest_sent_audio_is_dropped_and_then_missed() -> None:
    log = ReplayLog(2, 4)
    for data in (b"aa", b"bb", b"cc"):
        log.append_audio(data)
    assert log.start == 0, "unsent audio is never dropped"
    drain(log)
    assert (log.start, log.end, log.kept_samples) == (1, 3, 2)
    with pytest.raises(StreamLost, match="continues at sample 0"):
        log.rewind(0)
    log.rewind(1)
    assert joined(drain(log)) == (1, b"bbcc")


def test_a_dropped_control_that_was_not_applied_is_missed_until_it_is() -> None:
    log = ReplayLog(2, 2)
    log.append_message("x", REQUEST)
    log.append_audio(b"aa")
    log.append_audio(b"bb")
    drain(log)
    log.cover(2)
    with pytest.raises(StreamLost):
        log.rewind(2)
    log.settle("x")
    log.cover(2)
    log.rewind(2)


def test_a_position_beyond_the_end_is_refused() -> None:
    log = ReplayLog(2, 100)
    log.append_audio(b"aa")
    with pytest.raises(StreamLost):
        log.rewind(2)


@given(st.lists(st.tuples(st.sampled_from(["append", "send", "cover", "rewind"]), st.integers(0, 9))))
def test_whatever_happens_the_server_can_rebuild_the_audio(steps: list[tuple[str, int]]) -> None:
    """Model: a server that holds all samples up to its position, and checkpoints that hold a prefix of it."""
    log = ReplayLog(2, 1 << 20)
    truth = b""
    server, checkpoint = b"", b""
    for kind, n in steps:
        if kind == "append":
            data = bytes([len(truth) % 251, n]) * (n + 1)
            truth += data
            log.append_audio(data)
        elif kind == "send":
            for _ in range(n):
                entry = log.next_unsent()
                if entry is None:
                    break
                assert isinstance(entry, Audio)
                assert entry.position == len(server) // 2
                server += entry.data
        elif kind == "cover":
            checkpoint = server[: len(server) // 2 * n // 9 * 2]
            if len(checkpoint) // 2 < log.start:
                checkpoint = server
            log.cover(len(checkpoint) // 2)
        else:
            server = checkpoint
            log.rewind(len(server) // 2)
        assert log.unsent_samples == (len(truth) - len(server)) // 2
    while (entry := log.next_unsent()) is not None:
        assert isinstance(entry, Audio)
        server += entry.data
    assert server == truth
