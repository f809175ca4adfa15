"""Endpoint rules in frames against a simulation that looks at the clock after every frame."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from realtide.engines.ancat.endpoint import NEVER, Endpointer
from realtide.engines.ancat.types import EndpointRules

FRAME_MS = 40


def simulate(rules: EndpointRules, start: int, last: int | None, hard_max_ms: int) -> tuple[int, str, int]:
    """First frame after which a rule holds, its reason, and the first after which the end is likely."""
    frame, likely = start if last is None else last, NEVER
    while True:
        length = (frame + 1 - start) * FRAME_MS
        if rules.enabled and last is not None:
            silence = (frame - last) * FRAME_MS
            if silence >= rules.likely_silence_ms and likely == NEVER:
                likely = frame
            if silence >= rules.final_silence_ms:
                return frame, "endpoint", likely
        if rules.enabled and last is None and length >= rules.no_speech_ms:
            return frame, "no_speech", likely
        if length >= (min(rules.max_utterance_ms, hard_max_ms) if rules.enabled else hard_max_ms):
            return frame, "max_length", likely
        frame += 1


@given(
    st.builds(
        EndpointRules,
        likely_silence_ms=st.integers(0, 900),
        final_silence_ms=st.integers(0, 1500),
        no_speech_ms=st.integers(0, 3000),
        max_utterance_ms=st.integers(1000, 4000),
        enabled=st.booleans(),
    ),
    st.integers(0, 50),
    st.one_of(st.none(), st.integers(0, 20)),
)
def test_frames_are_those_of_a_clock(rules: EndpointRules, start: int, offset: int | None) -> None:
    last = None if offset is None else start + offset
    endpointer = Endpointer.of(rules, FRAME_MS, 6000)
    frame, reason, likely = simulate(rules, start, last, 6000)
    cut = endpointer.cut(start, last)
    assert (cut.frame, cut.reason) == (frame, reason)
    if likely != NEVER:
        assert endpointer.likely_end(last) == likely
    else:
        assert endpointer.likely_end(last) > frame


def test_defaults() -> None:
    endpointer = Endpointer.of(EndpointRules(), FRAME_MS, 60000)
    assert endpointer.cut(0, None).frame == 124  # 125 frames are 5 s
    assert endpointer.cut(0, 10).frame == 30  # 20 frames are 800 ms
    assert endpointer.likely_end(10) == 18
    assert endpointer.cut(0, 490).reason == "max_length"


@pytest.mark.parametrize(
    "rules",
    [
        EndpointRules(likely_silence_ms=-1),
        EndpointRules(final_silence_ms=-40),
        EndpointRules(no_speech_ms=-1),
        EndpointRules(max_utterance_ms=0),
    ],
)
def test_impossible_durations_are_refused(rules: EndpointRules) -> None:
    with pytest.raises(ValueError, match="durations"):
        Endpointer.of(rules, FRAME_MS, 60000)
