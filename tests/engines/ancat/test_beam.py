"""Modified beam search against exhaustive enumeration and against a plain dictionary implementation."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from realtide.engines.ancat.beam import Hypothesis, beam_search, finished
from realtide.engines.ancat.boost import BoostGraph
from realtide.engines.ancat.search import START, Context
from realtide.engines.ancat.words import Token
from tests.engines.ancat.toys import ToyJoiner, rows_of, split


@dataclass
class Stream:
    beam: int = 4
    graph: BoostGraph | None = None
    longest: int = 10**9  # rows of an utterance
    again: int = 1  # rows after which a token may follow itself
    memory: int = 10**9  # rows after a token in which it is in the context
    base: int = 0
    start: int = 0
    hypotheses: list[Hypothesis] = field(default_factory=lambda: [Hypothesis()])
    results: list[list[Hypothesis]] = field(default_factory=list)  # of every row

    def token(self, row: int, token: int, log_prob: float) -> Token:
        return Token(token, self.base + row, log_prob, self.base + row)

    def repeatable(self, hypothesis: Hypothesis) -> int:
        assert hypothesis.last_frame is not None
        return hypothesis.last_frame + self.again - self.base

    def expires(self, hypothesis: Hypothesis) -> int:
        last = hypothesis.context_frame
        return 10**9 if last is None else last + self.memory - self.base

    def searched(self, row: int, hypotheses: list[Hypothesis]) -> None:
        self.results.append(hypotheses)
        self.hypotheses = hypotheses
        if self.base + row + 1 - self.start == self.longest:
            self.hypotheses, self.start = [Hypothesis()], self.base + row + 1


def context_of(ids: tuple[int, ...]) -> Context:
    padded = (*START, *ids)
    return padded[-2], padded[-1]


def all_alignments(joiner: ToyJoiner, enc: np.ndarray, gain: float) -> dict[tuple[int, ...], float]:
    """Log-probability of every token sequence: every alignment with at most one token per frame, summed.

    A token that follows itself is worth `gain` more.
    """
    totals: dict[tuple[int, ...], float] = {}
    for choice in product(range(joiner.vocabulary), repeat=len(enc)):
        ids: tuple[int, ...] = ()
        log_prob = 0.0
        for row, token in zip(enc, choice, strict=True):
            log_prob += float(joiner.one(row, context_of(ids))[token])
            log_prob += gain if ids and token == ids[-1] else 0.0
            ids = (*ids, token) if token else ids
        totals[ids] = np.logaddexp(totals.get(ids, -np.inf), log_prob)
    return totals


@pytest.mark.parametrize("gain", [0.0, 1.5])
@pytest.mark.parametrize("seed", range(4))
def test_a_wide_beam_is_exhaustive(seed: int, gain: float) -> None:
    joiner = ToyJoiner(seed, vocabulary=3, blank=0.3)
    enc = rows_of(seed, 5)
    stream = Stream(beam=1000)
    beam_search(joiner, enc, [stream], [5], gain)
    expected = all_alignments(joiner, enc, gain)
    assert {h.ids: h.log_prob for h in stream.hypotheses} == pytest.approx(expected, abs=1e-4)
    assert len(stream.hypotheses) == len(expected) > 40
    scores = [h.score for h in stream.hypotheses]
    assert scores == sorted(scores, reverse=True)


def reference(
    joiner: ToyJoiner, enc: np.ndarray, beam: int, worth: dict[tuple[int, ...], float]
) -> list[dict[tuple[int, ...], float]]:
    """Beam of every row: a dictionary of sequences, ranked by log-probability plus a table of boosts."""
    kept: dict[tuple[int, ...], float] = {(): 0.0}
    history = []
    for row in enc:
        new: dict[tuple[int, ...], float] = {}
        for ids, log_prob in kept.items():
            for token, step in enumerate(joiner.one(row, context_of(ids)).tolist()):
                key = (*ids, token) if token else ids
                new[key] = np.logaddexp(new.get(key, -np.inf), log_prob + step)
        best = sorted(new, key=lambda ids: -new[ids] - worth.get(ids, 0.0))[:beam]
        kept = {ids: new[ids] for ids in best}
        history.append(kept)
    return history


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    frames=st.lists(st.integers(1, 20), min_size=1, max_size=3),
    beams=st.lists(st.integers(2, 8), min_size=3, max_size=3),
    sizes=st.lists(st.lists(st.integers(0, 7), min_size=1, max_size=3).filter(any), min_size=3, max_size=3),
)
def test_equals_the_plain_search_in_any_chunking_and_batch(
    seed: int, frames: list[int], beams: list[int], sizes: list[list[int]]
) -> None:
    joiner = ToyJoiner(seed, blank=1.0)
    encs = [rows_of(seed + k, n) for k, n in enumerate(frames)]
    streams = [Stream(beam=beams[k]) for k in range(len(encs))]
    chunks = [list(split(len(enc), size)) for enc, size in zip(encs, sizes, strict=False)]
    for step in range(max(map(len, chunks))):
        live = [k for k in range(len(encs)) if step < len(chunks[k])]
        rows = [encs[k][chunks[k][step]] for k in live]
        beam_search(joiner, np.concatenate(rows), [streams[k] for k in live], [len(r) for r in rows])
        for k, r in zip(live, rows, strict=True):
            streams[k].base += len(r)
    for k, enc in enumerate(encs):
        history = reference(joiner, enc, beams[k], {})
        for ours, theirs in zip(streams[k].results, history, strict=True):
            assert {h.ids: h.log_prob for h in ours} == pytest.approx(theirs, abs=1e-6)


def test_tokens_carry_the_frames_of_the_likelier_way() -> None:
    """A merged hypothesis takes its last token's time from whichever way was likelier when they met."""
    joiner = ToyJoiner(5, vocabulary=3, blank=0.0)
    enc = rows_of(5, 12)
    stream = Stream(beam=6)
    beam_search(joiner, enc, [stream], [12])
    moved = 0
    for row, hypotheses in enumerate(stream.results):
        for h in hypotheses:
            assert h.ids == tuple(t.id for t in h.tokens)
            frames = [t.frame for t in h.tokens]
            assert frames == sorted(set(frames))
            assert not frames or frames[-1] <= row
        if row:
            before = {h.ids: h.tokens for h in stream.results[row - 1]}
            for h in hypotheses:
                if h.ids in before and h.tokens != before[h.ids]:
                    assert h.tokens[-1].frame == row
                    moved += 1
    assert moved > 0


def test_a_context_that_expires_at_once_is_no_context() -> None:
    """With a memory of one row every row is searched from the start, whatever was said before."""
    joiner, enc = ToyJoiner(3, vocabulary=3, blank=0.3), rows_of(3, 6)
    stream = Stream(beam=1000, memory=1)
    beam_search(joiner, enc, [stream], [6])
    steps = np.array([joiner.one(row, START) for row in enc], np.float64)
    expected: dict[tuple[int, ...], float] = {}
    for choice in product(range(3), repeat=6):
        ids = tuple(token for token in choice if token)
        total = float(sum(steps[row, token] for row, token in enumerate(choice)))
        expected[ids] = float(np.logaddexp(expected.get(ids, -np.inf), total))
    assert {h.ids: h.log_prob for h in stream.hypotheses} == pytest.approx(expected, abs=1e-4)


def test_a_repeat_gain_waits_until_the_token_may_be_said_again() -> None:
    gained = 0
    for seed in range(8):
        joiner, enc = ToyJoiner(seed, blank=1.0), rows_of(seed, 24)
        plain, late, never = Stream(), Stream(again=4), Stream(again=24)
        for stream in (plain, late, never):
            beam_search(joiner, enc, [stream], [24], 0.0 if stream is plain else 3.0)
        assert never.results == plain.results
        assert late.results[:4] == plain.results[:4]
        repeats = [
            sum(a == b for a, b in zip(h.ids, h.ids[1:], strict=False))
            for h in (plain.hypotheses[0], late.hypotheses[0])
        ]
        gained += repeats[1] - repeats[0]
    assert gained > 0


def test_boosts_change_the_outcome_and_broken_matches_are_taken_back() -> None:
    changed = broken = 0
    for seed in range(12):
        joiner = ToyJoiner(seed, blank=1.0)
        enc = rows_of(seed, 24)
        graph = BoostGraph([((3, 1, 4, 2), 1.5)], joiner.vocabulary)
        plain, boosted = Stream(beam=8), Stream(beam=8, graph=graph)
        for stream in (plain, boosted):
            beam_search(joiner, enc, [stream], [24])
        for h in boosted.hypotheses:
            complete = sum(h.ids[k : k + 4] == (3, 1, 4, 2) for k in range(len(h.ids)))
            assert h.boost - graph.pending(h.node) == pytest.approx(6.0 * complete, abs=1e-5)
            broken += any(h.ids[k : k + 2] == (3, 1) for k in range(len(h.ids) - 2)) and not complete
        changed += plain.hypotheses[0].ids != boosted.hypotheses[0].ids
        ends = finished(boosted.hypotheses, graph)
        assert [h.score for h in ends] == sorted((h.score for h in ends), reverse=True)
        assert {h.ids: h.log_prob for h in ends} == {h.ids: h.log_prob for h in boosted.hypotheses}
    assert changed > 0
    assert broken > 0


@pytest.mark.parametrize("seed", range(5))
def test_boosted_search_is_the_plain_search_with_the_sequences_worth_added(seed: int) -> None:
    joiner = ToyJoiner(seed, vocabulary=4, blank=0.5)
    enc = rows_of(seed, 4)
    graph = BoostGraph([((1, 2), 1.0), ((2, 3, 1), 0.8)], 4)
    worth: dict[tuple[int, ...], float] = {}
    for n in range(5):
        for ids in product((1, 2, 3), repeat=n):
            node, total = 0, 0.0
            for token in ids:
                gain, node = graph.step(node, token)
                total += gain
            worth[ids] = total
    stream = Stream(beam=5, graph=graph)
    beam_search(joiner, enc, [stream], [4])
    for ours, theirs in zip(stream.results, reference(joiner, enc, 5, worth), strict=True):
        assert {h.ids: h.log_prob for h in ours} == pytest.approx(theirs, abs=1e-5)


def test_an_utterance_may_end_inside_a_call() -> None:
    joiner = ToyJoiner(4, blank=0.5)
    enc = rows_of(4, 20)
    stream = Stream(longest=6)
    beam_search(joiner, enc, [stream], [20])
    expected = [h for k in range(0, 20, 6) for h in reference(joiner, enc[k : k + 6], 4, {})]
    for ours, theirs in zip(stream.results, expected, strict=True):
        assert {h.ids: h.log_prob for h in ours} == pytest.approx(theirs, abs=1e-6)
