"""Audio conversion, back-off, errors, what is new after a resume, and that the client stands alone."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import grpc
import numpy as np
import pytest
from google.rpc import error_details_pb2

import realtide_client as rt
from realtide_client.audio import encode
from realtide_client.errors import from_status
from realtide_client.progress import Progress
from tests.clients.scripted import rich_status

TIMING = rt.Timing(0, 0, 0.0, 0.0, 0.0)


def test_conversions_agree_and_keep_16_bit_samples_exactly() -> None:
    every = np.arange(-32768, 32768).astype(np.int16)
    as_float = every.astype(np.float32) / 32768
    assert encode(every, "linear16") == every.astype("<i2").tobytes()
    assert encode(as_float, "linear16") == encode(every, "linear16")
    assert encode(as_float.astype(np.float64), "linear16") == encode(every, "linear16")
    assert encode(every, "float32") == as_float.astype("<f4").tobytes()
    assert encode(every[:, None], "linear16") == encode(every, "linear16")
    assert encode(every.astype(">i2").astype(np.int16)[::2], "linear16") == every[::2].tobytes()


def test_full_scale_is_clipped_and_not_wrapped() -> None:
    loud = np.array([1.0, 1.5, -1.0, -7.0], dtype=np.float32)
    assert np.frombuffer(encode(loud, "linear16"), "<i2").tolist() == [32767, 32767, -32768, -32768]


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        (np.zeros((4, 2), np.int16), "mono"),
        (np.zeros(4, np.int32), "int32"),
        (np.array([0.0, np.nan], np.float32), "NaN"),
        (np.array([0.0, np.inf], np.float64), "NaN or infinity"),
        (b"abc", "whole linear16 samples of 2 bytes"),
    ],
)
def test_what_is_not_audio_is_refused(samples: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        encode(samples, "linear16")


def test_back_off_grows_with_full_jitter_and_respects_the_server() -> None:
    lost = rt.Unavailable("lost")
    top = rt.RetryPolicy(initial_seconds=0.5, max_seconds=3.0, max_retries=4, random=lambda: 1.0)
    assert [top.delay(n, lost) for n in range(5)] == [0.5, 1.0, 2.0, 3.0, None]
    bottom = rt.RetryPolicy(random=lambda: 0.0)
    assert bottom.delay(3, lost) == 0.0
    full = rt.ResourceExhausted("full", retry_after=1.5)
    assert bottom.delay(0, full) == 1.5
    assert top.delay(0, full) == 2.0
    assert top.delay(0, rt.ResourceExhausted("message too large")) is None
    assert top.delay(0, rt.InvalidRequest("bad")) is None


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (grpc.StatusCode.INVALID_ARGUMENT, rt.InvalidRequest),
        (grpc.StatusCode.NOT_FOUND, rt.NotFound),
        (grpc.StatusCode.FAILED_PRECONDITION, rt.CheckpointRefused),
        (grpc.StatusCode.UNAUTHENTICATED, rt.AccessDenied),
        (grpc.StatusCode.PERMISSION_DENIED, rt.AccessDenied),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, rt.ResourceExhausted),
        (grpc.StatusCode.DEADLINE_EXCEEDED, rt.IdleTimeout),
        (grpc.StatusCode.UNAVAILABLE, rt.Unavailable),
        (grpc.StatusCode.CANCELLED, rt.Cancelled),
        (grpc.StatusCode.INTERNAL, rt.ServerError),
        (grpc.StatusCode.UNIMPLEMENTED, rt.ServerError),
    ],
)
def test_every_status_has_its_exception(code: grpc.StatusCode, kind: type[rt.RealtideError]) -> None:
    error = from_status(code, "why", ())
    assert type(error) is kind
    assert (error.code, str(error)) == (code, "why")
    assert error.reconnectable == (code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED))


def test_rich_details_are_parsed_and_damaged_ones_left_out() -> None:
    violation = error_details_pb2.BadRequest.FieldViolation(field="open.audio", description="is required")
    details = rich_status(
        grpc.StatusCode.INVALID_ARGUMENT, "bad", error_details_pb2.BadRequest(field_violations=[violation])
    )
    error = from_status(grpc.StatusCode.INVALID_ARGUMENT, "bad", details)
    assert error.violations == (rt.FieldViolation("open.audio", "is required"),)
    assert str(error) == "bad (open.audio: is required)"
    told = from_status(grpc.StatusCode.INVALID_ARGUMENT, "open.audio: is required", details)
    assert str(told) == "open.audio: is required", "not twice"
    damaged = from_status(grpc.StatusCode.INTERNAL, "bug", (("grpc-status-details-bin", b"\xff\xff"),))
    assert (damaged.violations, str(damaged)) == ((), "bug")


def partial(utterance: int, processed: float, text: str = "a", end_likely: bool = False) -> rt.Partial:
    return rt.Partial(text, (), 0.5, processed, 0.0, utterance, end_likely, TIMING)


def final(utterance: int) -> rt.Final:
    return rt.Final("a", (), 1.0, 0.0, 1.0, 1.0, 1.0, 0.0, 0.0, utterance, "endpoint", (), TIMING)


def test_after_a_resume_only_what_goes_further_is_new() -> None:
    progress = Progress()
    end = rt.Endpoint("end", 1.0, 0, TIMING)
    story: list[rt.Result] = [partial(0, 0.5), partial(0, 0.5, "a", True), final(0), end, partial(1, 1.5)]
    assert [progress.is_new(result) for result in story] == [True] * 5
    assert [progress.is_new(result) for result in story] == [False] * 5
    assert progress.is_new(partial(1, 1.5, "b"))
    assert progress.is_new(rt.Endpoint("end_likely", 1.6, 1, TIMING))
    assert progress.is_new(final(1))
    assert not progress.is_new(partial(1, 9.0)), "its final has been told"
    assert not progress.is_new(rt.Endpoint("speech_start", 0.1, 0, TIMING))


def test_the_client_imports_neither_the_server_nor_anything_heavy() -> None:
    code = (
        "import sys, realtide_client, realtide_client.sync\n"
        "heavy = {'realtide', 'torch', 'onnxruntime', 'pydantic', 'typer', 'rich', 'soundfile', 'soxr'}\n"
        "print(sorted(heavy & {name.split('.')[0] for name in sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
