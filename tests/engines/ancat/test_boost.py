"""Phrase boosting: the graph against the definition of a sequence's worth, written out naively."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from realtide.engines.ancat.boost import ROOT, BoostGraph

VOCABULARY = 5
Phrases = dict[tuple[int, ...], float]


def arcs_of(phrases: Phrases) -> Phrases:
    """Boost on the last token of every prefix of a phrase: the strongest of the phrases through it."""
    arcs: Phrases = {}
    for tokens, boost in phrases.items():
        for k in range(1, len(tokens) + 1):
            arcs[tokens[:k]] = max(arcs.get(tokens[:k], -np.inf), boost)
    return arcs


def worth(tokens: tuple[int, ...], phrases: Phrases) -> float:
    """The definition in boost.py's docstring, by looking at every position and every phrase."""
    arcs = arcs_of(phrases)

    def segment(prefix: tuple[int, ...]) -> float:
        """Boosts on the path of `prefix` after the last complete phrase that is a proper prefix of it."""
        total = 0.0
        for k in range(len(prefix), 0, -1):
            total += arcs[prefix[:k]]
            if prefix[: k - 1] in phrases:
                break
        return total

    total = 0.0
    for end in range(1, len(tokens) + 1):
        total += sum(segment(p) for p in phrases if tokens[:end][-len(p) :] == p)
    for start in range(len(tokens)):
        if tokens[start:] in arcs:
            return total + (0.0 if tokens[start:] in phrases else segment(tokens[start:]))
    return total


def walk(graph: BoostGraph, tokens: tuple[int, ...]) -> tuple[float, int]:
    total, node = 0.0, ROOT
    for token in tokens:
        gain, node = graph.step(node, token)
        total += gain
    return total, node


phrase = st.lists(st.integers(1, VOCABULARY - 1), min_size=1, max_size=4).map(tuple)
phrase_sets = st.dictionaries(phrase, st.sampled_from((0.5, 1.0, 2.0)), min_size=1, max_size=6)


@given(phrase_sets, st.lists(st.integers(1, VOCABULARY - 1), max_size=10).map(tuple))
def test_score_is_the_sequences_worth(phrases: Phrases, tokens: tuple[int, ...]) -> None:
    graph = BoostGraph(phrases.items(), VOCABULARY)
    total, node = walk(graph, tokens)
    assert total == pytest.approx(worth(tokens, phrases))
    complete = total - graph.pending(node)
    assert complete == pytest.approx(worth((*tokens, 0), phrases))  # a token in no phrase ends every match


@given(phrase_sets, st.lists(st.integers(1, VOCABULARY - 1), max_size=6).map(tuple))
def test_gains_are_every_tokens_step(phrases: Phrases, tokens: tuple[int, ...]) -> None:
    graph = BoostGraph(phrases.items(), VOCABULARY)
    _, node = walk(graph, tokens)
    gains = graph.gains(node)
    dense = np.full(VOCABULARY, gains.default, np.float32)
    dense[gains.ids] = gains.values
    for token in range(1, VOCABULARY):
        assert dense[token] == pytest.approx(graph.step(node, token)[0])
    assert graph.gains(node) is gains


@given(phrase_sets, st.lists(st.integers(1, VOCABULARY - 1), max_size=6).map(tuple))
def test_bonus_is_the_arc_of_the_longest_match(phrases: Phrases, tokens: tuple[int, ...]) -> None:
    graph = BoostGraph(phrases.items(), VOCABULARY)
    arcs = arcs_of(phrases)
    bonus = graph.bonus(walk(graph, tokens)[1])
    dense = np.full(VOCABULARY, bonus.default, np.float32)
    dense[bonus.ids] = bonus.values
    for token in range(1, VOCABULARY):
        longer = (*tokens, token)
        matches = [arcs[longer[k:]] for k in range(len(longer)) if longer[k:] in arcs]
        assert dense[token] == (matches[0] if matches else 0.0)


def test_broken_match_is_taken_back_and_complete_one_kept() -> None:
    graph = BoostGraph([((1, 2, 3), 1.5)], VOCABULARY)
    assert walk(graph, (1, 2))[0] == 3.0
    assert walk(graph, (1, 2, 4))[0] == 0.0
    assert walk(graph, (1, 2, 1))[0] == 1.5  # the break is itself a new start
    assert walk(graph, (1, 2, 3, 4))[0] == 4.5
    assert walk(graph, (1, 2, 3, 1, 2, 3))[0] == 9.0


def test_numbering_is_reproducible() -> None:
    phrases = [((1, 2, 3), 1.0), ((1, 4), 2.0), ((2, 3), 1.0)]
    a, b = BoostGraph(phrases, VOCABULARY), BoostGraph(list(phrases), VOCABULARY)
    assert len(a) == len(b) == 7
    for tokens in ((1, 2, 3), (1, 4), (4, 2, 3), (1, 2)):
        assert walk(a, tokens) == walk(b, tokens)


@pytest.mark.parametrize("tokens", [(), (0,), (1, VOCABULARY), (-1,)])
def test_bad_phrases_are_refused(tokens: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="phrase"):
        BoostGraph([(tokens, 1.0)], VOCABULARY)
