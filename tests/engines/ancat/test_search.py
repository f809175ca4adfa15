"""Label-looping search against plain frame-by-frame greedy decoding."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from realtide.engines.ancat.boost import ROOT, BoostGraph, Gains
from realtide.engines.ancat.search import START, Context, Joiner, greedy
from tests.engines.ancat.toys import ToyJoiner, rows_of, split


@dataclass
class Stream:
    """Records what the search says. Utterances end after `silence` rows without a token or `longest` rows."""

    silence: int = 10**9
    longest: int = 10**9
    graph: BoostGraph | None = None
    again: int = 1  # rows after which a token may follow itself
    memory: int = 10**9  # rows after a token in which it is in the context
    base: int = 0  # rows of earlier calls
    start: int = 0
    last: int | None = None
    context: Context = START
    node: int = ROOT
    log: list[tuple[str, int, int]] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)

    @property
    def bonus(self) -> Gains | None:
        return None if self.graph is None else self.graph.bonus(self.node)

    def horizon(self) -> int:
        quiet_since = self.start - 1 if self.last is None else self.last
        return min(quiet_since + self.silence, self.start + self.longest - 1) - self.base

    def repeatable(self) -> int:
        return (self.start - 1 if self.last is None else self.last) + self.again - self.base

    def expires(self) -> int:
        return 10**9 if self.last is None else self.last + self.memory - self.base

    def emit(self, row: int, token: int, log_prob: float) -> None:
        older = START[1] if row >= self.expires() else self.context[1]
        self.context, self.last = (older, token), self.base + row
        if self.graph is not None:
            self.node = self.graph.step(self.node, token)[1]
        self.log.append(("token", self.base + row, token))
        self.log_probs.append(log_prob)

    def cut(self, row: int) -> None:
        self.log.append(("cut", self.base + row, 0))
        self.start, self.last, self.context, self.node = self.base + row + 1, None, START, ROOT


def frame_by_frame(
    joiner: ToyJoiner, enc: np.ndarray, stream: Stream, max_symbols: int, repeat_gain: float = 0.0
) -> Stream:
    """The definition: one frame at a time, one token at a time, then ask whether the utterance is over."""
    for row in range(len(enc)):
        for _ in range(max_symbols):
            forgotten = stream.last is not None and row - stream.last >= stream.memory
            log_probs = joiner.one(enc[row], START if forgotten else stream.context)
            scores = log_probs.copy()
            if stream.graph is not None and stream.bonus is not None:
                scores[stream.bonus.ids] += stream.bonus.values
            if stream.last is not None and row - stream.last >= stream.again and not forgotten:
                scores[stream.context[1]] += repeat_gain
            token = int(scores.argmax())
            if token == 0:
                break
            stream.emit(row, token, float(log_probs[token]))
        if row >= stream.horizon():
            stream.cut(row)
    return stream


def search(
    joiner: Joiner,
    encs: list[np.ndarray],
    streams: list[Stream],
    sizes: list[list[int]],
    max_symbols: int,
    repeat_gain: float = 0.0,
) -> None:
    """Feed every stream its own chunks, as many at a time as there are.

    Streams run dry at different times.
    """
    chunks = [list(split(len(enc), size)) for enc, size in zip(encs, sizes, strict=True)]
    for k in range(max(map(len, chunks))):
        live = [s for s in range(len(streams)) if k < len(chunks[s])]
        rows = [encs[s][chunks[s][k]] for s in live]
        members, counts = [streams[s] for s in live], [len(r) for r in rows]
        greedy(joiner, np.concatenate(rows), members, counts, max_symbols, repeat_gain)
        for s, r in zip(live, rows, strict=True):
            streams[s].base += len(r)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    frames=st.lists(st.integers(1, 60), min_size=1, max_size=4),
    sizes=st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=4).filter(any), min_size=4, max_size=4),
    max_symbols=st.integers(1, 3),
    silence=st.integers(1, 12),
    longest=st.integers(3, 30),
    boosted=st.booleans(),
    again=st.integers(1, 5),
    repeat_gain=st.sampled_from([0.0, 1.5, 4.0]),
    memory=st.integers(1, 20),
)
def test_equals_frame_by_frame(
    seed: int,
    frames: list[int],
    sizes: list[list[int]],
    max_symbols: int,
    silence: int,
    longest: int,
    boosted: bool,
    again: int,
    repeat_gain: float,
    memory: int,
) -> None:
    joiner = ToyJoiner(seed, blank=0.5)
    graph = BoostGraph([((1, 2, 3), 1.0), ((2, 4), 0.7)], joiner.vocabulary) if boosted else None
    encs = [rows_of(seed + k, n) for k, n in enumerate(frames)]

    def fresh(k: int) -> Stream:
        return Stream(silence=silence + k, longest=longest + k, graph=graph, again=again, memory=memory)

    streams = [fresh(k) for k in range(len(encs))]
    expected = [frame_by_frame(joiner, enc, fresh(k), max_symbols, repeat_gain) for k, enc in enumerate(encs)]
    search(joiner, encs, streams, sizes[: len(encs)], max_symbols, repeat_gain)
    for ours, theirs in zip(streams, expected, strict=True):
        assert ours.log == theirs.log
        assert ours.log_probs == theirs.log_probs


def test_toys_speak_pause_and_stack_symbols() -> None:
    """The comparison above means something: the toys emit, fall silent, cut, and reach the symbol limit."""
    kinds: set[str] = set()
    for seed in range(8):
        stream = frame_by_frame(ToyJoiner(seed, blank=0.5), rows_of(seed, 60), Stream(silence=4), 3)
        rows = [row for kind, row, _ in stream.log if kind == "token"]
        kinds |= {kind for kind, _, _ in stream.log}
        kinds |= {f"{rows.count(row)} in a frame" for row in rows}
        kinds |= {"silent"} if len(set(rows)) < 40 else set()
    assert kinds == {"token", "cut", "1 in a frame", "2 in a frame", "3 in a frame", "silent"}


def test_at_most_one_call_more_than_the_busiest_streams_tokens() -> None:
    joiner = ToyJoiner(3, blank=3.0)
    encs = [rows_of(k, 40) for k in range(6)]
    streams = [Stream() for _ in encs]
    greedy(joiner, np.concatenate(encs), streams, [40] * 6, 3)
    busiest = max(len(s.log) for s in streams)
    assert busiest > 2
    assert joiner.calls <= busiest + 1
    assert joiner.rows < 40 * 6 + 40 * sum(len(s.log) for s in streams)


def test_no_rows_no_call() -> None:
    joiner = ToyJoiner(0)
    stream = Stream()
    greedy(joiner, np.zeros((0, 5), np.float32), [stream], [0], 3)
    greedy(joiner, np.zeros((0, 5), np.float32), [], [], 3)
    assert (joiner.calls, stream.log) == (0, [])


def test_an_idle_stream_takes_no_rows() -> None:
    joiner = ToyJoiner(0)
    idle, busy = Stream(), Stream()
    enc = rows_of(0, 12)
    greedy(joiner, enc, [idle, busy, idle], [0, 12, 0], 3)
    assert idle.log == []
    assert busy.log == frame_by_frame(joiner, enc, Stream(), 3).log


def test_boosting_changes_the_outcome() -> None:
    for seed in range(20):
        joiner = ToyJoiner(seed, blank=1.0)
        enc = rows_of(seed, 40)
        plain = frame_by_frame(joiner, enc, Stream(), 3)
        graph = BoostGraph([((5, 4, 5), 4.0)], joiner.vocabulary)
        boosted = Stream(graph=graph)
        greedy(joiner, enc, [boosted], [40], 3)
        count = sum(token in (4, 5) for _, _, token in boosted.log)
        assert count > sum(token in (4, 5) for _, _, token in plain.log)
        assert max(boosted.log_probs) <= 0.0


def test_a_repeat_gain_brings_tokens_that_follow_themselves_but_not_too_soon() -> None:
    more = 0
    for seed in range(12):
        joiner, enc = ToyJoiner(seed, blank=1.0), rows_of(seed, 60)
        plain, eager = Stream(again=4), Stream(again=4)
        greedy(joiner, enc, [plain], [60], 1)
        greedy(joiner, enc, [eager], [60], 1, 3.0)
        pairs = [list(zip(s.log, s.log[1:], strict=False)) for s in (plain, eager)]
        late = [
            sum(a[2] == b[2] and b[1] - a[1] >= 4 for a, b in pair if (a[0], b[0]) == ("token", "token"))
            for pair in pairs
        ]
        more += late[1] - late[0]
        assert max(eager.log_probs) <= 0.0  # what is reported is the model's
    assert more > 5
    never = Stream(again=1000)
    greedy(joiner, enc, [never], [60], 1, 3.0)
    assert never.log == plain.log


def test_a_cut_due_at_once_waits_for_one_row() -> None:
    """Utterances of one row each: every row is searched from the start context and then cut."""
    joiner = ToyJoiner(1, blank=0.0)
    enc = rows_of(1, 10)
    stream = Stream(longest=1)
    greedy(joiner, enc, [stream], [10], 2)
    assert [row for kind, row, _ in stream.log if kind == "cut"] == list(range(10))
    assert stream.log == frame_by_frame(joiner, enc, Stream(longest=1), 2).log


@pytest.mark.parametrize("max_symbols", [1, 2, 3])
def test_symbols_per_frame_are_limited(max_symbols: int) -> None:
    joiner = ToyJoiner(2, blank=-20.0)  # never blank
    stream = Stream()
    greedy(joiner, rows_of(2, 7), [stream], [7], max_symbols)
    assert [row for _, row, _ in stream.log] == [row for row in range(7) for _ in range(max_symbols)]
