"""Words with times and confidences from emitted tokens (ours).

A transducer emits a token near the audio that it stands for: the frame of a word's first token dates its
start, the frame of its last token its end. What is systematic in that (models emit late) is calibrated on
held-out recordings and given as two offsets by the bundle's manifest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp
from typing import NamedTuple

from realtide.engines.ancat.types import Word


class Token(NamedTuple):
    """One emitted token."""

    id: int
    frame: int  # encoder frame at which it was emitted, counted over the whole stream
    log_prob: float  # the model's log-probability of it, nats
    avail: int  # newest encoder input frame that had to exist for that frame's encoder output


@dataclass(frozen=True, slots=True)
class WordTiming:
    """How frames become seconds."""

    frame_ms: int = 40
    start_offset_ms: float = 0.0  # added to the start of a word's first frame
    end_offset_ms: float = 0.0  # added to the end of a word's last frame


def words_of(
    tokens: Sequence[Token],
    spans: Sequence[tuple[str, int, int]],
    timing: WordTiming,
    *,
    shift: float = 0.0,
    earliest: float = 0.0,
    latest: float = float("inf"),
) -> tuple[Word, ...]:
    """Words of one utterance, in order; `spans` are `Tokenizer.words` of the tokens' ids.

    Times are seconds: frame times plus offsets minus `shift`, kept within `earliest`..`latest`; starts and
    ends never decrease, a word never ends before it starts, and where two words would overlap they meet in
    the middle. A word's confidence is the geometric mean of its tokens' posteriors, its lookahead that of its
    last token.
    """
    frame = timing.frame_ms / 1000
    starts, ends = [], []
    for _, first, last in spans:
        start = tokens[first].frame * frame + timing.start_offset_ms / 1000 - shift
        end = (tokens[last].frame + 1) * frame + timing.end_offset_ms / 1000 - shift
        starts.append(min(max(start, earliest), latest))
        ends.append(min(max(end, start, earliest), latest))
    # Frames never decrease along the tokens, so neither do starts, nor ends, nor the middles that replace
    # them.
    for k in range(len(spans) - 1):
        if ends[k] > starts[k + 1]:
            ends[k] = starts[k + 1] = (ends[k] + starts[k + 1]) / 2
    return tuple(
        Word(
            text=text,
            start=starts[k],
            end=ends[k],
            confidence=confidence(tokens[first : last + 1]),
            lookahead=(tokens[last].avail - tokens[last].frame) * frame,
        )
        for k, (text, first, last) in enumerate(spans)
    )


def confidence(tokens: Sequence[Token]) -> float:
    """Geometric mean of the tokens' posteriors, 0..1; 0 without tokens."""
    if not tokens:
        return 0.0
    return exp(min(0.0, sum([token.log_prob for token in tokens]) / len(tokens)))
