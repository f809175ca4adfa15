"""Follows one stream through a search call: tokens become events, utterances end by the rules (ours).

Endpoint events, finals and the partial that comes with "end_likely" depend on frames only. Other partials
show the state after a call, at most one per call, and so are the only events that depend on how frames were
cut into calls.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import ceil, inf

import numpy as np

from realtide.engines.ancat.beam import Hypothesis, finished
from realtide.engines.ancat.boost import BoostGraph, Gains
from realtide.engines.ancat.decode_state import DecodeState
from realtide.engines.ancat.endpoint import NEVER
from realtide.engines.ancat.search import Context
from realtide.engines.ancat.tokenizer import Tokenizer
from realtide.engines.ancat.types import EndpointEvent, Final, Partial, SpeechEvent, Word
from realtide.engines.ancat.words import Token, WordTiming, confidence, words_of

Spans = Sequence[tuple[str, int, int]]


@dataclass(frozen=True, slots=True)
class DecoderConfig:
    """Parameters of the decoder, from the bundle's manifest and the server's limits."""

    max_symbols: int = 3  # most tokens that greedy search emits at one frame
    timing: WordTiming = field(default_factory=WordTiming)
    stable_frames: int = 8  # a word whose last token is older than this counts as stable
    repeat_gain: float = 0.0  # nats for a token that follows itself
    repeat_frames: int = 6  # and comes so many frames after itself, or more
    context_frames: int = NEVER  # after the last token, in which the predictor remembers it
    hard_max_utterance_ms: int = 60_000  # bounds an utterance even where endpointing is off

    def __post_init__(self) -> None:
        if not 0 <= self.repeat_gain < inf or min(self.repeat_frames, self.context_frames) < 1:
            raise ValueError(
                "repeat_gain must be finite and at least 0, repeat_frames and context_frames at least 1, not "
                f"{self.repeat_gain}, {self.repeat_frames} and {self.context_frames}"
            )


class Follower:
    """One stream during one call: what `greedy` and `beam_search` ask of and tell to it.

    `avail` is the newest encoder input frame that each of the call's rows needed. Events are appended to
    `events`.
    """

    __slots__ = ("_avail", "_base", "_config", "_tokenizer", "events", "state")

    def __init__(
        self, state: DecodeState, avail: Sequence[int], tokenizer: Tokenizer, config: DecoderConfig
    ) -> None:
        self.state = state
        self.events: list[SpeechEvent] = []
        self._avail = avail
        self._base = state.frame
        self._tokenizer = tokenizer
        self._config = config

    # What both searches read.

    @property
    def graph(self) -> BoostGraph | None:
        """Boosted phrases."""
        return self.state.graph

    @property
    def hypotheses(self) -> Sequence[Hypothesis]:
        """Current hypotheses, best first."""
        return self.state.hypotheses

    @property
    def beam(self) -> int:
        """Most hypotheses to keep."""
        return self.state.options.beam

    @property
    def context(self) -> Context:
        """The best hypothesis' last two tokens."""
        return self.state.hypotheses[0].context

    @property
    def bonus(self) -> Gains | None:
        """Greedy boosts of the next token."""
        graph = self.state.graph
        return None if graph is None else graph.bonus(self.state.hypotheses[0].node)

    def horizon(self) -> int:
        """Row after which the utterance is cut if no token follows.

        Rules never reach back before they were set.
        """
        state = self.state
        frame = state.endpointer.cut(state.start, state.hypotheses[0].last_frame).frame
        return max(frame, state.rules_from) - self._base

    def repeatable(self, hypothesis: Hypothesis | None = None) -> int:
        """Row from which on the last token of `hypothesis` (None: the best) may have been said again."""
        return self._after(hypothesis, self._config.repeat_frames)

    def expires(self, hypothesis: Hypothesis | None = None) -> int:
        """Row from which on the predictor no longer remembers the tokens of `hypothesis` (None: the best)."""
        return self._after(hypothesis, self._config.context_frames)

    def _after(self, hypothesis: Hypothesis | None, frames: int) -> int:
        last = (hypothesis or self.state.hypotheses[0]).context_frame
        return NEVER if last is None else last + frames - self._base

    # What greedy search tells.

    def emit(self, row: int, token: int, log_prob: float) -> None:
        """Append a token; everything before `row` is searched."""
        self._pass_to(self._base + row)
        best, graph = self.state.hypotheses[0], self.state.graph
        kept = best.expired() if row >= self.expires() else best
        gain, node = (0.0, best.node) if graph is None else graph.step(best.node, token)
        self.state.hypotheses = [
            kept._replace(
                tokens=(*best.tokens, self.token(row, token, log_prob)),
                ids=(*best.ids, token),
                log_prob=best.log_prob + log_prob,
                boost=best.boost + gain,
                node=node,
            )
        ]
        self._announce_speech()

    def cut(self, row: int) -> None:
        """End the utterance after `row`, which is searched."""
        self._pass_to(self._base + row + 1)
        self._end_by_rule()

    # What beam search tells.

    def token(self, row: int, token: int, log_prob: float) -> Token:
        """The token with its frame in the stream."""
        return Token(token, self._base + row, log_prob, self._avail[row])

    def searched(self, row: int, hypotheses: list[Hypothesis]) -> None:
        """Take the hypotheses after `row`."""
        state = self.state
        state.hypotheses = hypotheses
        self._announce_speech()
        self._pass_to(self._base + row + 1)
        if row >= self.horizon():
            self._end_by_rule()

    # What the decoder calls.

    def settle(self) -> None:
        """All rows are searched; show what changed."""
        self._pass_to(self._base + len(self._avail))
        state = self.state
        if not state.options.interim_results or state.hypotheses[0].ids == state.shown_ids:
            return
        state.shown_ids = state.hypotheses[0].ids
        if self._tokenizer.decode(state.shown_ids) != state.shown:
            self._show()

    def finish(self, reason: str) -> None:
        """All rows are searched; end the utterance because the client says so ("flush" or "finish").

        "finish" is silent if nothing was searched since the last final and there was one.
        """
        self._pass_to(self._base + len(self._avail))
        state = self.state
        if reason == "finish" and state.utterance and state.frame == state.start:
            return
        self._end(reason)

    def _end(self, reason: str) -> None:
        state, timing = self.state, self._config.timing
        ranked = finished(state.hypotheses, state.graph)
        best = ranked[0]
        start, end = self._seconds(state.start), self._seconds(state.frame)
        spans = self._tokenizer.words(best.ids)
        words = self._words(best, spans)
        mean, p90 = _mean_and_p90(state.lookahead)
        frame = timing.frame_ms / 1000
        self.events.append(
            Final(
                text=" ".join([word for word, _, _ in spans]),
                words=words if state.options.word_times else (),
                confidence=confidence(best.tokens),
                start=start,
                end=end,
                speech_end=words[-1].end if words else start,
                audio_processed=end,
                lookahead_mean=mean * frame,
                lookahead_p90=p90 * frame,
                utterance=state.utterance,
                reason=reason,
                alternatives=self._alternatives(ranked) if state.options.beam > 1 else (),
            )
        )
        # The encoder remembers what was said, and so must the predictor: from blanks it would say it again.
        last = state.hypotheses[0]
        state.hypotheses = [Hypothesis(before=last.context, before_frame=last.context_frame)]
        state.start, state.earliest, state.utterance = state.frame, end, state.utterance + 1
        state.speaking, state.likely_for, state.shown, state.shown_ids = False, None, "", ()
        state.lookahead = Counter()

    def _end_by_rule(self) -> None:
        state = self.state
        reason = state.endpointer.cut(state.start, state.hypotheses[0].last_frame).reason
        self.events.append(EndpointEvent("end", self._seconds(state.frame), state.utterance))
        self._end(reason)

    def _pass_to(self, frame: int) -> None:
        """Frames before `frame` are searched; on the way, announce a likely end after the frame it is due."""
        state = self.state
        last = state.hypotheses[0].last_frame
        if last is not None and state.likely_for != last:
            due = max(state.endpointer.likely_end(last), state.rules_from, state.frame)
            if due < frame:
                self._count(due + 1)
                self._announce_likely_end(last)
        self._count(frame)

    def _count(self, frame: int) -> None:
        state = self.state
        for f in range(state.frame, frame):
            state.lookahead[self._avail[f - self._base] - f] += 1
        state.frame = frame

    def _announce_speech(self) -> None:
        state = self.state
        tokens = state.hypotheses[0].tokens
        if tokens and not state.speaking:
            state.speaking = True
            if state.endpointer.enabled:
                timing = self._config.timing
                at = tokens[0].frame * timing.frame_ms / 1000 + timing.start_offset_ms / 1000 - state.shift
                self.events.append(
                    EndpointEvent(
                        "speech_start", min(max(at, state.earliest), state.audio_end), state.utterance
                    )
                )

    def _announce_likely_end(self, last_frame: int) -> None:
        state = self.state
        state.likely_for = last_frame
        self.events.append(EndpointEvent("end_likely", self._seconds(state.frame), state.utterance))
        if state.options.interim_results:
            state.shown_ids = state.hypotheses[0].ids
            self._show()

    def _show(self) -> None:
        state = self.state
        best = state.hypotheses[0]
        spans = self._tokenizer.words(best.ids)
        text = " ".join([word for word, _, _ in spans])
        mean, _ = _mean_and_p90(state.lookahead)
        state.shown = text
        self.events.append(
            Partial(
                text=text,
                words=self._words(best, spans) if state.options.word_times else (),
                stability=self._stability(best, spans),
                audio_processed=self._seconds(state.frame),
                lookahead_mean=mean * self._config.timing.frame_ms / 1000,
                utterance=state.utterance,
                end_likely=best.last_frame is not None and state.likely_for == best.last_frame,
            )
        )

    def _seconds(self, frame: int) -> float:
        """Audio time at which `frame` starts, within the utterance's earliest time and the audio there is."""
        state = self.state
        at = frame * self._config.timing.frame_ms / 1000 - state.shift
        return max(state.earliest, min(at, state.audio_end))

    def _words(self, hypothesis: Hypothesis, spans: Spans) -> tuple[Word, ...]:
        state = self.state
        return words_of(
            hypothesis.tokens,
            spans,
            self._config.timing,
            shift=state.shift,
            earliest=state.earliest,
            latest=self._seconds(state.frame),
        )

    def _stability(self, best: Hypothesis, spans: Spans) -> float:
        """Share of the words that are not expected to change: leading ones that are old, or agreed on.

        A word is *old* when its last token was emitted more than `stable_frames` frames ago. It is
        *agreed on* when all hypotheses have the same tokens up to the next word's start. Without words: 1.
        """
        agreed = min(_common_prefix(best.ids, h.ids) for h in self.state.hypotheses)
        stable = 0
        for k, (_, _, last) in enumerate(spans):
            old = self.state.frame - 1 - best.tokens[last].frame > self._config.stable_frames
            followed = k + 1 < len(spans) and spans[k + 1][1] < agreed
            if not old and not followed:
                break
            stable += 1
        return stable / len(spans) if spans else 1.0

    def _alternatives(self, ranked: Sequence[Hypothesis]) -> tuple[tuple[str, float], ...]:
        """Texts with the model's log-probability; token sequences that spell the same are summed."""
        texts: dict[str, float] = {}
        for h in ranked:
            text = self._tokenizer.decode(h.ids)
            texts[text] = float(np.logaddexp(texts.get(text, -np.inf), h.log_prob))
        return tuple(texts.items())


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    if a is b:
        return len(a)
    for k, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return k
    return min(len(a), len(b))


def _mean_and_p90(histogram: Counter[int]) -> tuple[float, int]:
    """Mean and nearest-rank 90th percentile of the counted values; zeros if nothing was counted."""
    total = histogram.total()
    if not total:
        return 0.0, 0
    rank, seen = ceil(0.9 * total), 0
    for value in sorted(histogram):
        seen += histogram[value]
        if seen >= rank:
            break
    return sum(value * n for value, n in histogram.items()) / total, value
