"""When an utterance ends, counted in encoder frames and never in chunks (rules: ours, in two passes).

Frame i is over at (i + 1) * frame_ms. All answers are *the frame after which* something happens if no token
comes before it, so that a search can run many frames at once and still stop where frame-by-frame decoding
would have stopped.
"""

from __future__ import annotations

from dataclasses import dataclass

from realtide.engines.ancat.types import EndpointRules

NEVER = 1 << 62


@dataclass(frozen=True, slots=True)
class Cut:
    """The utterance ends after `frame`; `reason` is "endpoint", "no_speech" or "max_length"."""

    frame: int
    reason: str


@dataclass(frozen=True, slots=True)
class Endpointer:
    """`EndpointRules` in frames of `frame_ms`. Every duration is rounded up to whole frames.

    `hard_max_ms` ends an utterance even where the rules are disabled, so that a stream's state stays bounded.
    """

    likely: int
    final: int
    no_speech: int
    longest: int
    enabled: bool

    @classmethod
    def of(cls, rules: EndpointRules, frame_ms: int, hard_max_ms: int) -> Endpointer:
        """Convert; raises ValueError for a negative duration or a maximum under one frame."""
        durations = (rules.likely_silence_ms, rules.final_silence_ms, rules.no_speech_ms)
        if min(durations) < 0 or rules.max_utterance_ms < 1 or hard_max_ms < 1:
            raise ValueError("endpointing durations must not be negative, and the maximum must be positive")
        likely, final, no_speech = (-(-ms // frame_ms) for ms in durations)
        longest = min(rules.max_utterance_ms, hard_max_ms) if rules.enabled else hard_max_ms
        return cls(likely, final, max(1, no_speech), -(-longest // frame_ms), rules.enabled)

    def cut(self, start: int, last_token: int | None) -> Cut:
        """Where an utterance that started with frame `start` ends if no token follows `last_token` (a frame).

        Trailing silence counts from the end of the last token's frame; the utterance's length from `start`.
        """
        longest = Cut(start + self.longest - 1, "max_length")
        if not self.enabled:
            return longest
        if last_token is None:
            silence = Cut(start + self.no_speech - 1, "no_speech")
        else:
            silence = Cut(last_token + self.final, "endpoint")
        return silence if silence.frame <= longest.frame else longest

    def likely_end(self, last_token: int | None) -> int:
        """The frame after which the end is likely if no token follows; NEVER without speech or rules."""
        if not self.enabled or last_token is None:
            return NEVER
        return last_token + self.likely
