"""Label-looping greedy search of a stateless transducer, batched over streams.

Source: "Label-Looping: Highly Efficient Decoding for Transducers" (Bataev et al., 2024): the outer loop goes
over labels, not frames. All remaining frames of all streams are joined with their streams' current contexts
in one call; the first frame of each stream that is not blank gives its next token, and only that stream is
joined again. Here (ours) a stream is also bounded by the frame after which its utterance may end, so that
cutting an utterance is exact.

A token that follows itself gets a *repeat gain* (ours). The stateless predictor learns from texts in which
hardly any token does, and so does all it can to hear one sound once; said twice, the second one is lost
("five five" as "five"). What its prior takes away, the search gives back, as one does with a model's internal
language model (Meng et al. 2021, arXiv 2011.01991), but only once the first sound must be over.

A context *expires* (ours). The model learns from utterances, after whose last word nothing comes; in a
stream the next command follows after a pause, and with the old context it would not be heard. So from some
row after its last token on, a stream is searched from the start context, as at its beginning.

Rows of different streams never influence each other and every frame is searched to its end before the next,
so tokens depend neither on the batch nor on how the rows were cut into calls. The module knows nothing of
words or events.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from realtide.engines.ancat.boost import Gains
from realtide.engines.ancat.tokenizer import BLANK

Float32 = npt.NDArray[np.float32]
Int64 = npt.NDArray[np.int64]
Context = tuple[int, int]
Joiner = Callable[[Float32, Int64], Float32]
"""(encoder rows [M, J], contexts [M, 2]) -> log-probabilities [M, V], each row independent of the others."""

START: Context = (BLANK, BLANK)


class GreedyStream(Protocol):
    """What the search asks of and tells to one stream.

    Rows are counted from 0 within one call of `greedy`.
    """

    @property
    def context(self) -> Context:
        """The last two tokens of the utterance, oldest first."""
        ...

    @property
    def bonus(self) -> Gains | None:
        """Boosts of the next token, if phrases are boosted."""
        ...

    def horizon(self) -> int:
        """The row after which the utterance is cut if no further token comes; may lie past the last row."""
        ...

    def repeatable(self) -> int:
        """The row from which on the context's last token, heard again, was said again.

        It lies after the token's own row; may be negative or past the last row.
        """
        ...

    def expires(self) -> int:
        """The row from which on the context no longer counts, but `START` does.

        It lies after the last token's row; may be negative or past the last row.
        """
        ...

    def emit(self, row: int, token: int, log_prob: float) -> None:
        """`token` follows, at `row`.

        All rows before it are searched. `log_prob` is the model's, without boosts.
        """
        ...

    def cut(self, row: int) -> None:
        """The utterance ends after `row`; the next row starts a new one."""
        ...


class _Cursor:
    """Where one stream's search stands."""

    __slots__ = ("end", "first", "next_row", "rows", "stream", "symbols")

    def __init__(self, stream: GreedyStream, first: int, rows: int) -> None:
        self.stream = stream
        self.first = first  # of its rows in the batch
        self.rows = rows
        self.next_row = 0
        self.end = 0  # rows next_row..end - 1 may be searched with the current context
        self.symbols = 0  # already emitted at next_row

    def settle(self) -> bool:
        """Cut as long as a cut is due and find the rows to search next; false when no row is left."""
        while True:
            limit = self.stream.horizon() + 1
            self.end = min(self.rows, limit)
            if self.next_row < self.end:
                return True
            if limit > self.rows:
                return False
            self.stream.cut(self.next_row - 1)

    def emit(self, row: int, token: int, log_prob: float, max_symbols: int) -> None:
        self.symbols = self.symbols + 1 if row == self.next_row else 1
        self.next_row = row
        self.stream.emit(row, token, log_prob)
        if self.symbols == max_symbols:
            self.next_row, self.symbols = row + 1, 0

    def pass_over(self) -> None:
        """All rows that could be searched are blank."""
        self.next_row, self.symbols = self.end, 0


def greedy(
    joiner: Joiner,
    enc: Float32,
    streams: Sequence[GreedyStream],
    counts: Sequence[int],
    max_symbols: int,
    repeat_gain: float = 0.0,
) -> None:
    """Search rows `enc` [M, J]; `counts[s]` contiguous rows belong to stream s.

    A frame yields at most `max_symbols` tokens. `repeat_gain` in nats is for a token that follows itself. The
    joiner is called once more than the busiest stream has new tokens and cuts, at most, and each call joins
    only rows that are still open.
    """
    firsts = [0, *np.cumsum(counts).tolist()]
    cursors = [_Cursor(*args) for args in zip(streams, firsts, counts, strict=False)]
    active = [cursor for cursor in cursors if cursor.settle()]
    while active:
        lengths = [cursor.end - cursor.next_row for cursor in active]
        total = sum(lengths)
        if total == len(enc):
            rows = enc
        else:
            rows = enc[_ranges([cursor.first + cursor.next_row for cursor in active], lengths)]
        contexts = np.repeat(
            np.array([cursor.stream.context for cursor in active], np.int64), lengths, axis=0
        )
        starts = np.concatenate(([0], np.cumsum(lengths)))
        late = [cursor.end - max(cursor.stream.expires(), cursor.next_row) for cursor in active]
        if max(late) > 0:  # the last rows of some streams
            expired = [(end - n, n) for end, n in zip(starts[1:].tolist(), late, strict=True) if n > 0]
            contexts[_ranges(*zip(*expired, strict=True))] = START
        log_probs = joiner(rows, contexts)
        scores = _boosted(log_probs, active, lengths, repeat_gain)
        best = scores.argmax(axis=1)
        hits = np.flatnonzero(best != BLANK)
        first_hits = np.searchsorted(hits, starts).tolist()
        for k, cursor in enumerate(active):
            if first_hits[k] == first_hits[k + 1]:
                cursor.pass_over()
                continue
            hit = hits[first_hits[k]]
            token = int(best[hit])
            row = cursor.next_row + int(hit - starts[k])
            cursor.emit(row, token, float(log_probs[hit, token]), max_symbols)
        active = [cursor for cursor in active if cursor.settle()]


def _boosted(
    log_probs: Float32, active: Sequence[_Cursor], lengths: Sequence[int], repeat_gain: float
) -> Float32:
    """Scores to choose by.

    A copy with the streams' bonuses and repeat gains added, or `log_probs` itself where there are none.
    """
    scores, start = log_probs, 0
    for cursor, length in zip(active, lengths, strict=True):
        bonus = cursor.stream.bonus
        said = cursor.stream.context[1] if repeat_gain else BLANK
        first = last = 0
        if said != BLANK:
            first = max(cursor.stream.repeatable() - cursor.next_row, 0)
            last = min(cursor.stream.expires() - cursor.next_row, length)
        if scores is log_probs and (bonus is not None or first < last):
            scores = log_probs.copy()
        if bonus is not None:
            scores[start : start + length, bonus.ids] += bonus.values
        if first < last:
            scores[start + first : start + last, said] += repeat_gain
        start += length
    return scores


def _ranges(starts: Sequence[int], lengths: Sequence[int]) -> Int64:
    """The integers start .. start + length - 1 of every pair, one after the other."""
    sizes = np.asarray(lengths)
    offsets = np.asarray(starts) - np.cumsum(sizes) + sizes
    indices: Int64 = np.arange(int(sizes.sum())) + np.repeat(offsets, sizes)
    return indices
