"""Phrase boosting: an Aho-Corasick graph whose scores are taken back when a match breaks (ours).

The idea is shallow fusion with a context graph that fails back (as in icefall's `ContextGraph` and NeMo's
boosting trees); the scoring rule here is our own potential: a token sequence is worth

    sum over every phrase occurrence that is complete of the boosts on its tokens
    + the boosts on the tokens of the longest partial match at the end (`pending`, revocable).

Where one phrase is a prefix of another, the longer one adds only the boosts of its remaining tokens. The
value depends on the tokens alone, not on the path, so hypotheses with equal tokens have equal boosts and may
be merged.

Greedy search cannot go back to what it passed over, so it uses `bonus`: what a token's own arc is worth,
never less than zero; a token that breaks a match costs nothing there.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

ROOT = 0


@dataclass(slots=True)
class _Node:
    arc: float  # boost of the token that leads here
    depth: int
    children: dict[int, int] = field(default_factory=dict)
    fail: int = ROOT  # node of the longest proper suffix that is in the graph
    is_end: bool = False
    pending: float = 0.0  # boosts since the last phrase end on the path here
    ended: float = 0.0  # boosts of every phrase that is complete on arriving here


@dataclass(frozen=True, slots=True)
class Gains:
    """What each next token adds to a score: `values[k]` for `ids[k]`, `default` for every other."""

    ids: npt.NDArray[np.int64]
    values: npt.NDArray[np.float32]
    default: float


class BoostGraph:
    """Graph of phrases given as (token ids, boost per token in nats). Immutable; nodes are small integers.

    Built deterministically: equal phrases in equal order give equal node numbers, so a node can be stored in
    a checkpoint. Raises ValueError for an empty phrase or a token outside 1..vocabulary - 1.
    """

    def __init__(self, phrases: Iterable[tuple[tuple[int, ...], float]], vocabulary: int) -> None:
        self._nodes = [_Node(arc=0.0, depth=0)]
        self._gains: dict[int, Gains] = {}
        self._bonus: dict[int, Gains] = {}
        for tokens, boost in phrases:
            if not tokens or not all(0 < t < vocabulary for t in tokens):
                raise ValueError(f"a phrase needs tokens in 1..{vocabulary - 1}, got {tokens}")
            self._insert(tokens, boost)
        self._link()

    def __len__(self) -> int:
        return len(self._nodes)

    def step(self, node: int, token: int) -> tuple[float, int]:
        """Score that `token` adds after `node`, and the node it leads to."""
        target = self._target(node, token)
        return self._nodes[target].pending + self._nodes[target].ended - self._nodes[node].pending, target

    def pending(self, node: int) -> float:
        """Part of the score at `node` that an unfinished match holds: taken back when the utterance ends."""
        return self._nodes[node].pending

    def gains(self, node: int) -> Gains:
        """`step`'s score of every token at once, for beam search."""
        if node not in self._gains:
            tokens = self._expected(node)
            self._gains[node] = Gains(
                np.array(tokens, np.int64),
                np.array([self.step(node, t)[0] for t in tokens], np.float32),
                -self._nodes[node].pending,
            )
        return self._gains[node]

    def bonus(self, node: int) -> Gains:
        """The boost of each token that starts or continues a match, for greedy search; the default is 0."""
        if node not in self._bonus:
            tokens = self._expected(node)
            arcs = [max(0.0, self._nodes[self._target(node, t)].arc) for t in tokens]
            self._bonus[node] = Gains(np.array(tokens, np.int64), np.array(arcs, np.float32), 0.0)
        return self._bonus[node]

    def _insert(self, tokens: tuple[int, ...], boost: float) -> None:
        node = ROOT
        for token in tokens:
            child = self._nodes[node].children.get(token)
            if child is None:
                child = len(self._nodes)
                self._nodes[node].children[token] = child
                self._nodes.append(_Node(arc=boost, depth=self._nodes[node].depth + 1))
            # Phrases that share a prefix share its arcs; the stronger boost counts.
            self._nodes[child].arc = max(self._nodes[child].arc, boost)
            node = child
        self._nodes[node].is_end = True

    def _link(self) -> None:
        """Failure links and scores, breadth first: a node's suffixes are shorter, so they are done first."""
        queue = [ROOT]
        for index in queue:
            node = self._nodes[index]
            for token, child_index in node.children.items():
                child = self._nodes[child_index]
                child.fail = self._target(node.fail, token) if index != ROOT else ROOT
                segment = node.pending + child.arc
                child.pending = 0.0 if child.is_end else segment
                child.ended = self._nodes[child.fail].ended + (segment if child.is_end else 0.0)
                queue.append(child_index)

    def _target(self, node: int, token: int) -> int:
        while True:
            child = self._nodes[node].children.get(token)
            if child is not None:
                return child
            if node == ROOT:
                return ROOT
            node = self._nodes[node].fail

    def _expected(self, node: int) -> list[int]:
        """Tokens that lead anywhere but to the root."""
        tokens: dict[int, None] = {}
        while True:
            tokens.update(dict.fromkeys(self._nodes[node].children))
            if node == ROOT:
                return sorted(tokens)
            node = self._nodes[node].fail
