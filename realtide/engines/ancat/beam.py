"""Modified beam search of a stateless transducer, batched over streams and their hypotheses.

Source: icefall's `modified_beam_search` (at most one token per frame and hypothesis, equal hypotheses
log-added), with two exactness changes of ours: equal hypotheses are merged before the beam is cut, not after,
and phrase boosts are kept apart from the model's log-probability. A repeat gain (search.py) depends on when
a token came and not on the tokens alone, so it is part of the model's log-probability.

Frames are searched one after the other, so nothing depends on how they were cut into calls; streams of a
batch share the joiner call of a frame and nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import exp, log1p
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from realtide.engines.ancat.boost import ROOT, BoostGraph
from realtide.engines.ancat.search import START, Context, Float32, Joiner
from realtide.engines.ancat.tokenizer import BLANK
from realtide.engines.ancat.words import Token

Float64 = npt.NDArray[np.float64]


class Hypothesis(NamedTuple):
    """A token sequence of the current utterance."""

    tokens: tuple[Token, ...] = ()
    ids: tuple[int, ...] = ()  # of the tokens
    log_prob: float = 0.0  # of the model; in beam search summed over the alignments that were kept
    boost: float = 0.0  # of the phrases, unfinished matches included
    node: int = ROOT  # in the boost graph
    before: Context = START  # the last two tokens of the utterance before
    before_frame: int | None = None  # frame of the last of them
    since: int = 0  # the context starts with this token: those before it have expired

    @property
    def score(self) -> float:
        """What hypotheses are ranked by."""
        return self.log_prob + self.boost

    @property
    def context(self) -> Context:
        """The last two tokens, oldest first, blanks before the first utterance."""
        return (self.before + self.ids[self.since :])[-2:]  # type: ignore[return-value]

    @property
    def last_frame(self) -> int | None:
        """Frame of the last token."""
        return self.tokens[-1].frame if self.tokens else None

    @property
    def context_frame(self) -> int | None:
        """Frame of the context's last token."""
        return self.tokens[-1].frame if self.tokens else self.before_frame

    def expired(self) -> Hypothesis:
        """The same with nothing before its next token."""
        return self._replace(before=START, before_frame=None, since=len(self.ids))


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

    def repeatable(self, hypothesis: Hypothesis) -> int:
        """As `search.GreedyStream.repeatable`, for one hypothesis."""
        ...

    def expires(self, hypothesis: Hypothesis) -> int:
        """As `search.GreedyStream.expires`, for one hypothesis."""
        ...

    def searched(self, row: int, hypotheses: list[Hypothesis]) -> None:
        """`row` is searched and these are the hypotheses now, best first.

        The stream may start a new utterance.
        """
        ...


def beam_search(
    joiner: Joiner,
    enc: Float32,
    streams: Sequence[BeamStream],
    counts: Sequence[int],
    repeat_gain: float = 0.0,
) -> None:
    """Search rows `enc` [M, J]; `counts[s]` contiguous rows belong to stream s. One joiner call per frame.

    `repeat_gain` in nats is for a token that follows itself.
    """
    firsts = np.cumsum([0, *counts]).tolist()
    for row in range(max(counts, default=0)):
        live = [s for s, count in enumerate(counts) if row < count]
        beams = [streams[s].hypotheses for s in live]
        sizes = [len(hypotheses) for hypotheses in beams]
        owners = [streams[s] for s, size in zip(live, sizes, strict=True) for _ in range(size)]
        flat = [h for hypotheses in beams for h in hypotheses]
        contexts = [
            START if row >= stream.expires(h) else h.context for stream, h in zip(owners, flat, strict=True)
        ]
        rows = np.repeat([firsts[s] + row for s in live], sizes)
        log_probs = joiner(enc[rows], np.array(contexts, np.int64))
        totals = log_probs + np.array([h.log_prob for h in flat])[:, None]
        starts = np.cumsum([0, *sizes]).tolist()
        if repeat_gain:
            for k, (stream, h, (_, said)) in enumerate(zip(owners, flat, contexts, strict=True)):
                if said != BLANK and row >= stream.repeatable(h):
                    totals[k, said] += repeat_gain
        sources = [_merge(h, totals[a:b]) for h, a, b in zip(beams, starts, starts[1:], strict=False)]
        scores = totals + np.array([h.boost for h in flat])[:, None]
        for k, s in enumerate(live):
            _add_gains(scores[starts[k] : starts[k + 1]], beams[k], streams[s].graph)
        chosen = _best(scores, starts, [streams[s].beam for s in live])
        for k, s in enumerate(live):
            a, b = starts[k], starts[k + 1]
            new = _extended(streams[s], row, totals[a:b], log_probs[a:b], chosen[k], sources[k])
            streams[s].searched(row, new)


def finished(hypotheses: Sequence[Hypothesis], graph: BoostGraph | None) -> list[Hypothesis]:
    """Hypotheses at the end of an utterance, best first: boosts of unfinished matches are taken back."""
    if graph is None:
        return list(hypotheses)
    final = [h._replace(boost=h.boost - graph.pending(h.node), node=ROOT) for h in hypotheses]
    return sorted(final, key=lambda h: -h.score)


def _merge(hypotheses: Sequence[Hypothesis], totals: Float64) -> dict[int, int]:
    """Log-add into a hypothesis' blank entry the way through its prefix, where that is also in the beam.

    A sequence is reached in two ways: it was there and the frame is blank, or its last token is emitted now.
    Returns, for hypotheses whose last token is likelier to be emitted now, their prefix's index.
    """
    emitted_now: dict[int, int] = {}
    index = {h.ids: k for k, h in enumerate(hypotheses)}
    for k, hypothesis in enumerate(hypotheses):
        source = index.get(hypothesis.ids[:-1]) if hypothesis.ids else None
        if source is None:
            continue
        token = hypothesis.ids[-1]
        stays, arrives = float(totals[k, BLANK]), float(totals[source, token])
        if arrives > stays:
            emitted_now[k] = source
        high, low = max(stays, arrives), min(stays, arrives)
        totals[k, BLANK] = high + log1p(exp(low - high))
        totals[source, token] = -np.inf
    return emitted_now


def _add_gains(scores: Float64, hypotheses: Sequence[Hypothesis], graph: BoostGraph | None) -> None:
    if graph is None:
        return
    for row, hypothesis in zip(scores, hypotheses, strict=True):
        gains = graph.gains(hypothesis.node)
        if gains.default:
            row[BLANK + 1 :] += gains.default
        row[gains.ids] += gains.values - gains.default


def _best(scores: Float64, starts: Sequence[int], beams: Sequence[int]) -> list[list[tuple[int, int]]]:
    """The best (row, token) entries of each stream's rows, best first, earlier entries first among equals.

    Blank entries alone fill a full beam, so nothing below the worst of them can be chosen: that leaves few to
    sort.
    """
    worst = np.minimum.reduceat(scores[:, BLANK], starts[:-1])
    for k, beam in enumerate(beams):
        if starts[k + 1] - starts[k] != beam:
            entries = scores[starts[k] : starts[k + 1]].ravel()
            n = min(beam, len(entries))
            worst[k] = np.partition(entries, len(entries) - n)[len(entries) - n]
    rows, tokens = np.nonzero(scores >= np.repeat(worst, np.diff(starts))[:, None])
    values = scores[rows, tokens]
    ends = np.searchsorted(rows, starts).tolist()
    candidates = list(zip((-values).tolist(), rows.tolist(), tokens.tolist(), strict=True))
    return [
        [(r - starts[k], t) for v, r, t in sorted(candidates[ends[k] : ends[k + 1]])[:beam] if v < np.inf]
        for k, beam in enumerate(beams)
    ]


def _extended(
    stream: BeamStream,
    row: int,
    totals: Float64,
    log_probs: Float32,
    chosen: Sequence[tuple[int, int]],
    sources: dict[int, int],
) -> list[Hypothesis]:
    """The chosen entries as hypotheses. A merged one keeps the token times of its likelier way."""
    hypotheses, graph, extended = stream.hypotheses, stream.graph, []
    for k, token in chosen:
        parent, log_prob = hypotheses[k], float(totals[k, token])
        if token == BLANK:
            tokens = parent.tokens
            if k in sources:
                last = stream.token(row, parent.ids[-1], float(log_probs[sources[k], parent.ids[-1]]))
                tokens = (*hypotheses[sources[k]].tokens, last)
            extended.append(parent._replace(tokens=tokens, log_prob=log_prob))
            continue
        gain, node = graph.step(parent.node, token) if graph is not None else (0.0, ROOT)
        kept = parent.expired() if row >= stream.expires(parent) else parent
        new = stream.token(row, token, float(log_probs[k, token]))
        extended.append(
            kept._replace(
                tokens=(*parent.tokens, new),
                ids=(*parent.ids, token),
                log_prob=log_prob,
                boost=parent.boost + gain,
                node=node,
            )
        )
    return extended
