"""The small parts: audio, arrivals, checkpoint envelopes, logs."""

from __future__ import annotations

import json
import logging
import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from realtide.server import logs
from realtide.server.arrivals import Arrivals
from realtide.server.audio import decode, pieces
from realtide.server.checkpoint import BadCheckpoint, Header, seal, unseal
from realtide_client.v1 import speech_pb2

LINEAR16, FLOAT32 = speech_pb2.AUDIO_ENCODING_LINEAR16, speech_pb2.AUDIO_ENCODING_FLOAT32


def test_linear16_is_little_endian_and_full_scale_is_one() -> None:
    samples = decode(b"\x00\x80\xff\x7f\x01\x00\x00\x00", LINEAR16)
    assert samples.dtype == np.float32
    np.testing.assert_array_equal(samples, np.array([-32768, 32767, 1, 0], np.float32) / 32768)


def test_float32_is_not_copied_unless_it_must_be_clipped() -> None:
    data = np.array([0.5, -1.0, 1.0], "<f4").tobytes()
    samples = decode(data, FLOAT32)
    assert samples.base is not None
    assert np.shares_memory(samples, np.frombuffer(data, np.uint8))
    loud = decode(np.array([0.5, -3.0, 1.5], "<f4").tobytes(), FLOAT32)
    np.testing.assert_array_equal(loud, np.array([0.5, -1.0, 1.0], np.float32))


@given(st.integers(1, 500), st.integers(1, 100))
def test_pieces_are_all_of_it_and_small(length: int, size: int) -> None:
    samples = np.arange(length, dtype=np.float32)
    found = list(pieces(samples, size))
    assert all(len(piece) <= size and np.shares_memory(piece, samples) for piece in found)
    np.testing.assert_array_equal(np.concatenate(found), samples)


def test_arrivals_are_exact_while_they_fit() -> None:
    arrivals = Arrivals(start=1000)
    for index in range(100):
        arrivals.add(1000 + (index + 1) * 10, float(index))
    assert arrivals.of(1000) is None  # before this stream
    assert arrivals.of(1001) == arrivals.of(1010) == 0.0
    assert arrivals.of(1011) == 1.0
    assert arrivals.of(2000) == 99.0
    assert arrivals.of(2001) is None  # not yet
    arrivals.forget(1905)
    assert arrivals.of(1905) == 90.0
    assert arrivals.of(2000) == 99.0


def test_arrivals_stay_bounded_and_err_to_the_later() -> None:
    arrivals = Arrivals(start=0, limit=64)
    for index in range(10_000):
        arrivals.add(index + 1, float(index))
        assert len(arrivals._ends) <= 64
    for position in range(1, 10_001):
        found = arrivals.of(position)
        assert found is not None
        assert found >= position - 1
    assert arrivals.of(10_000) == 9999.0


HEADER = Header("realtide.v1.Speech", "ancat", "m", "1", "abc", 123456, b"\x00setup\xff")


@pytest.mark.parametrize("key", [None, "sixteen characters"])
def test_checkpoint_round_trip(key: str | None) -> None:
    assert unseal(seal(HEADER, b"state" * 100, key), key) == (HEADER, b"state" * 100)


@given(st.integers(0, 10_000), st.integers(1, 255))
def test_a_checkpoint_with_any_byte_changed_is_refused(place: int, change: int) -> None:
    data = bytearray(seal(HEADER, b"state", "sixteen characters"))
    data[place % len(data)] ^= change
    with pytest.raises(BadCheckpoint):
        unseal(bytes(data), "sixteen characters")


@given(st.binary(max_size=200))
def test_noise_is_refused(data: bytes) -> None:
    with pytest.raises(BadCheckpoint):
        unseal(data, None)


def test_a_checkpoint_of_another_deployment_is_refused() -> None:
    plain, keyed = seal(HEADER, b"state", None), seal(HEADER, b"state", "sixteen characters")
    for data, key in ((plain, "sixteen characters"), (keyed, None), (keyed, "other characters")):
        with pytest.raises(BadCheckpoint, match="not made by this deployment"):
            unseal(data, key)


def test_a_cut_checkpoint_is_refused() -> None:
    data = seal(HEADER, b"state", None)
    for length in range(len(data)):
        with pytest.raises(BadCheckpoint):
            unseal(data[:length], None)


def test_header_says_what_it_fits() -> None:
    header, _ = unseal(seal(replace(HEADER, model_version="2"), b"", None), None)
    assert header.model_version == "2"


def _record(**extra: Any) -> logging.LogRecord:
    record = logging.LogRecord("realtide.x", logging.INFO, "", 0, "got %d", (3,), None)
    record.__dict__.update(extra)
    return record


def test_json_lines_carry_session_and_extras() -> None:
    line = json.loads(logs.JsonFormatter().format(_record(session="s1", model="m")))
    assert line["message"] == "got 3"
    assert (line["level"], line["session"], line["model"]) == ("info", "s1", "m")
    assert line["time"].endswith("Z")


def test_exceptions_are_in_the_same_line() -> None:
    record = _record()
    try:
        raise ValueError("why")
    except ValueError:
        record.exc_info = sys.exc_info()
    text = logs.JsonFormatter().format(record)
    assert "\n" not in text
    assert "ValueError: why" in json.loads(text)["exception"]


def test_configured_logs_take_the_session_from_the_context(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = logging.getLogger()
    kept = SimpleNamespace(handlers=list(root.handlers), level=root.level)
    token = logs.session_id.set("from-context")
    try:
        root.handlers = []
        logs.configure("info", "console")
        logging.getLogger("realtide.y").info("hello", extra={"code": "X"})
        logging.getLogger("realtide.y").debug("not this")
        logging.getLogger("realtide.y").info("own", extra={"session": "given"})
    finally:
        logs.session_id.reset(token)
        root.handlers, root.level = kept.handlers, kept.level
    first, second = capsys.readouterr().err.splitlines()
    assert "[from-context] hello code=X" in first
    assert "[given] own" in second
