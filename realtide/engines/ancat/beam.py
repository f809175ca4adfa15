"""Modified beam search of a stateless transducer, batched over streams and their hypotheses.

Source: icefall's `modified_beam_search` (at most one token per frame and hypothesis, equal hypotheses
log-added), with two exactness changes of ours: equal hypotheses are merged before the beam is cut, not after,
and phrase boosts are kept apart from the model's log-probability.

Frames are searched one after the other, so nothing depends on how they were cut into calls; streams of a
batch share the joiner call of a frame and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from realtide.engines.ancat.boost import ROOT, BoostGraph
from realtide.engines.ancat.search import START, Context, Float32, Joiner
from realtide.engines.ancat.tokenizer import BLANK
from realtide.engines.ancat.words import Token

Float64 = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """A token sequence of the current utterance."""

    tokens: tuple[Token, ...] = ()
    ids: tuple[int, ...] = ()  # of the tokens
    log_prob: float = 0.0  # of the model; in beam search summed over the alignments that were kept
    boost: float = 0.0  # of the phrases, unfinished matches included
    node: int = ROOT  # in the boost graph

    @property
    def score(self) -> float:
        """What hypotheses are ranked by."""
        return self.log_prob + self.boost

    @property
    def context(self) -> Context:
        """The last two tokens, oldest first, blanks before the utterance."""
        return (START + self.ids)[-2:]  # type: ignore[return-value]

    @property
    def last_frame(self) -> int | None:
        """Frame of the last token."""
        return self.tokens[-1].frame if self.tokens else None


class BeamStream(Protocol):
    """What the search asks of and tells to one stream.

    Rows are counted from 0 within one call of `beam_search`.
    """

    @property
    def hypotheses(self) -> Sequence[Hypothesis]:
        """At least one hypothesis, best first."""
        ...

    @property
    def beam(self) -> int:
        """Most hypotheses to keep."""
        ...

    @property
    def graph(self) -> BoostGraph | None:
        """Boosted phrases."""
        ...

    def token(self, row: int, token: int, log_prob: float) -> Token:
        """The token emitted at `row`, with its stream's frame numbers."""
        ...

    def searched(self, row: int, hypotheses: list[Hypothesis]) -> None:
        """`row` is searched and these are the hypotheses now, best first.

        The stream may start a new utterance.
        """
        ...


def beam_search(joiner: Joiner, enc: Float32, streams: Sequence[BeamStream], counts: Sequence[int]) -> None:
    """Search rows `enc` [M, J]; `counts[s]` contiguous rows belong to stream s. One joiner call per frame."""
    firsts = np.cumsum([0, *counts])
    for row in range(max(counts, default=0)):
        live = [s for s, count in enumerate(counts) if row < count]
        sizes = [len(streams[s].hypotheses) for s in live]
        rows = np.repeat(np.array([firsts[s] + row for s in live]), sizes)
        contexts = np.array([h.context for s in live for h in streams[s].hypotheses], np.int64)
        log_probs = joiner(enc[rows], contexts)
        end = 0
        for s, size in zip(live, sizes, strict=True):
            start, end = end, end + size
            stream = streams[s]

            def make(token: int, log_prob: float, stream: BeamStream = stream, row: int = row) -> Token:
                return stream.token(row, token, log_prob)

            stream.searched(
                row, extend(stream.hypotheses, log_probs[start:end], stream.beam, stream.graph, make)
            )


def extend(
    hypotheses: Sequence[Hypothesis],
    log_probs: Float32,
    beam: int,
    graph: BoostGraph | None,
    make_token: Callable[[int, float], Token],
) -> list[Hypothesis]:
    """The best `beam` hypotheses after one more frame, best first.

    `log_probs` [len(hypotheses), V] are the frame's.

    A sequence that is reached in two ways (it was there and the frame is blank; its last token is emitted
    now) gets the log-sum of both and keeps the token times of the likelier one.
    """
    totals = log_probs + np.array([[h.log_prob] for h in hypotheses])
    emitted_now = _merge(hypotheses, totals)
    scores = totals + np.array([[h.boost] for h in hypotheses])
    if graph is not None:
        for k, hypothesis in enumerate(hypotheses):
            gains = graph.gains(hypothesis.node)
            row = np.full(scores.shape[1], gains.default)
            row[gains.ids] = gains.values
            row[BLANK] = 0.0
            scores[k] += row
    extended: list[Hypothesis] = []
    for index in _best(scores.ravel(), beam):
        k, token = divmod(index, scores.shape[1])
        parent, log_prob = hypotheses[k], float(totals[k, token])
        if token == BLANK:
            tokens = parent.tokens
            if k in emitted_now:
                source = emitted_now[k]
                last = make_token(parent.ids[-1], float(log_probs[source, parent.ids[-1]]))
                tokens = (*hypotheses[source].tokens, last)
            extended.append(Hypothesis(tokens, parent.ids, log_prob, parent.boost, parent.node))
            continue
        gain, node = graph.step(parent.node, token) if graph is not None else (0.0, ROOT)
        new = make_token(token, float(log_probs[k, token]))
        extended.append(
            Hypothesis((*parent.tokens, new), (*parent.ids, token), log_prob, parent.boost + gain, node)
        )
    return extended


def finished(hypotheses: Sequence[Hypothesis], graph: BoostGraph | None) -> list[Hypothesis]:
    """Hypotheses at the end of an utterance, best first: boosts of unfinished matches are taken back."""
    if graph is None:
        return list(hypotheses)
    final = [
        Hypothesis(h.tokens, h.ids, h.log_prob, h.boost - graph.pending(h.node), ROOT) for h in hypotheses
    ]
    return sorted(final, key=lambda h: -h.score)


def _merge(hypotheses: Sequence[Hypothesis], totals: Float64) -> dict[int, int]:
    """Log-add into a hypothesis' blank entry the way through its prefix, where that is also in the beam.

    Returns, for hypotheses whose last token is likelier to be emitted now than before, their prefix's index.
    """
    emitted_now: dict[int, int] = {}
    index = {h.ids: k for k, h in enumerate(hypotheses)}
    for k, hypothesis in enumerate(hypotheses):
        source = index.get(hypothesis.ids[:-1]) if hypothesis.ids else None
        if source is None:
            continue
        token = hypothesis.ids[-1]
        if totals[source, token] > totals[k, BLANK]:
            emitted_now[k] = source
        totals[k, BLANK] = np.logaddexp(totals[k, BLANK], totals[source, token])
        totals[source, token] = -np.inf
    return emitted_now


def _best(scores: Float64, n: int) -> list[int]:
    """Indices of the n highest finite scores, best first, lower index first among equals."""
    n = min(n, len(scores))
    candidates = np.argpartition(scores, len(scores) - n)[len(scores) - n :]
    values = scores[candidates]
    order = np.lexsort((candidates, -values))
    return [int(candidates[k]) for k in order if values[k] > -np.inf]
