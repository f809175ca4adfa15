"""Words from tokens: exact times, calibration, order under any offsets, confidence and lookahead."""

from __future__ import annotations

from math import exp, log

import pytest
from hypothesis import given
from hypothesis import strategies as st

from realtide.engines.ancat import words
from realtide.engines.ancat.types import Word
from realtide.engines.ancat.words import Token, WordTiming, confidence
from tests.engines.ancat.toys import toy_tokenizer


def words_of(tokens: list[Token], timing: WordTiming, **limits: float) -> tuple[Word, ...]:
    return words.words_of(tokens, toy_tokenizer().words([t.id for t in tokens]), timing, **limits)


def test_times_confidence_and_lookahead() -> None:
    """Toy tokens: 1 "_a", 2 "_b", 3 "c", 4 "d", 5 "_e"."""
    tokens = [
        Token(1, 3, log(0.9), 5),
        Token(3, 4, log(0.4), 9),
        Token(2, 10, log(0.5), 10),
    ]
    first, second = words_of(tokens, WordTiming())
    assert (first.text, second.text) == ("ac", "b")
    assert (first.start, first.end) == pytest.approx((0.12, 0.20))
    assert (second.start, second.end) == pytest.approx((0.40, 0.44))
    assert first.confidence == pytest.approx((0.9 * 0.4) ** 0.5)
    assert (first.lookahead, second.lookahead) == pytest.approx((0.2, 0.0))


def test_offsets_and_shift() -> None:
    tokens = [Token(1, 20, -0.1, 20), Token(2, 40, -0.1, 40)]
    timing = WordTiming(frame_ms=40, start_offset_ms=-100, end_offset_ms=60)
    first, second = words_of(tokens, timing, shift=0.5)
    assert (first.start, first.end) == pytest.approx((0.2, 0.4))
    assert (second.start, second.end) == pytest.approx((1.0, 1.2))


def test_overlapping_words_meet_in_the_middle() -> None:
    tokens = [Token(1, 10, -0.1, 10), Token(2, 12, -0.1, 12)]
    first, second = words_of(tokens, WordTiming(40, -80, 80))
    assert first.end == second.start == pytest.approx((0.52 + 0.40) / 2)
    assert (first.start, second.end) == pytest.approx((0.32, 0.60))


def test_no_tokens_no_words() -> None:
    assert words_of([], WordTiming()) == ()
    assert confidence([]) == 0.0


@given(
    st.lists(st.tuples(st.integers(1, 5), st.integers(0, 6), st.floats(-9, 0)), max_size=14),
    st.integers(-400, 400),
    st.integers(-400, 400),
    st.floats(0, 1),
    st.floats(0, 1.5),
    st.floats(0, 3),
)
def test_times_are_ordered_whatever_the_offsets(
    items: list[tuple[int, int, float]],
    start_ms: int,
    end_ms: int,
    shift: float,
    earliest: float,
    length: float,
) -> None:
    frame, tokens = 0, []
    for token, gap, log_prob in items:
        frame += gap
        tokens.append(Token(token, frame, log_prob, frame + 2))
    timing = WordTiming(40, start_ms, end_ms)
    limits = {"shift": shift, "earliest": earliest, "latest": earliest + length}
    result = words_of(tokens, timing, **limits)
    assert " ".join(w.text for w in result) == toy_tokenizer().decode([t.id for t in tokens])
    times = [t for w in result for t in (w.start, w.end)]
    assert times == sorted(times)
    assert all(earliest <= t <= earliest + length for t in times)
    assert all(exp(-9) * 0.999 <= w.confidence <= 1.0 for w in result)
