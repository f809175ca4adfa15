"""Inputs, options and events of a speech session: plain data; the server translates it for the wire (ours).

Media time is counted in samples at the client's own rate for input and in seconds of audio for results.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, slots=True)
class EndpointRules:
    """When an utterance ends. Two passes: `likely` is announced early, `final` cuts the utterance.

    All values in milliseconds of audio. Trailing silence is the time since the last emitted token's frame.
    """

    likely_silence_ms: int = 320  # after speech: announce that the end is likely and publish a stable partial
    final_silence_ms: int = 800  # after speech: cut the utterance
    no_speech_ms: int = 5000  # silence from the utterance's start without any speech: cut (empty final)
    max_utterance_ms: int = 20000  # cut whatever happens
    enabled: bool = True


@dataclass(frozen=True, slots=True)
class PhraseBoost:
    """Phrases to favour in the search. `boost` is added per matched token, in nats."""

    phrases: tuple[str, ...]
    boost: float = 2.0


@dataclass(frozen=True, slots=True)
class SpeechOptions:
    """Choices of one session, validated at the edge."""

    sample_rate: int = 16000
    interim_results: bool = True
    word_times: bool = True
    beam: int = 1  # 1: greedy; 2..8: modified beam search
    lookahead_bias: float = 0.0  # added to every scheduler logit; higher looks further ahead
    max_lookahead_ms: int | None = None  # hard cap on the encoder's algorithmic latency; None: no cap
    endpointing: EndpointRules = field(default_factory=EndpointRules)
    boosts: tuple[PhraseBoost, ...] = ()


@dataclass(frozen=True, slots=True)
class Audio:
    """Mono samples in [-1, 1] at the session's sample rate; `received`: monotonic arrival time in seconds."""

    samples: npt.NDArray[np.float32]
    received: float


@dataclass(frozen=True, slots=True)
class SetLookahead:
    """Turn the dial while the stream runs.

    None leaves a value as it is; `max_lookahead_ms` 0 means causal, -1 no cap.
    """

    control_id: str
    bias: float | None = None
    max_lookahead_ms: int | None = None


@dataclass(frozen=True, slots=True)
class SetInterim:
    """Turn interim results on or off."""

    control_id: str
    enabled: bool


@dataclass(frozen=True, slots=True)
class SetEndpointing:
    """Replace the endpointing rules from the next frame on."""

    control_id: str
    rules: EndpointRules


@dataclass(frozen=True, slots=True)
class SetBoosts:
    """Replace the boosted phrases from the next frame on."""

    control_id: str
    boosts: tuple[PhraseBoost, ...]


@dataclass(frozen=True, slots=True)
class Flush:
    """Resolve everything pending with the audio that exists, cut the utterance and go on."""

    control_id: str


@dataclass(frozen=True, slots=True)
class Finish:
    """No more audio: resolve everything pending, give the last final and end."""


SpeechInput = Audio | SetLookahead | SetInterim | SetEndpointing | SetBoosts | Flush | Finish


@dataclass(frozen=True, slots=True)
class Word:
    """A word with times in seconds of stream audio and its tokens' geometric mean posterior (0..1)."""

    text: str
    start: float
    end: float
    confidence: float
    # seconds of future audio (beyond the frame itself) that the word's last token waited for
    lookahead: float


@dataclass(frozen=True, slots=True)
class Partial:
    """Interim hypothesis of the current utterance. `stability` 0..1: share of it not expected to change."""

    text: str
    words: tuple[Word, ...]
    stability: float
    audio_processed: float  # seconds of audio whose encoder frames have been searched
    lookahead_mean: float  # seconds, over the utterance's frames so far
    utterance: int
    end_likely: bool = False


@dataclass(frozen=True, slots=True)
class Final:
    """Result of one utterance; never changes afterwards."""

    text: str
    words: tuple[Word, ...]
    confidence: float
    start: float  # seconds: where the utterance's audio starts
    end: float  # seconds: where it was cut
    speech_end: float  # seconds: end of the last word's audio (equals `start` if no words)
    audio_processed: float
    lookahead_mean: float  # seconds
    lookahead_p90: float  # seconds
    utterance: int
    reason: str  # "endpoint" | "no_speech" | "max_length" | "flush" | "finish"
    alternatives: tuple[tuple[str, float], ...] = ()  # (text, log-probability), best first, with beam > 1


@dataclass(frozen=True, slots=True)
class EndpointEvent:
    """`kind`: "speech_start", "end_likely" or "end"; `at` in seconds of stream audio."""

    kind: str
    at: float
    utterance: int


@dataclass(frozen=True, slots=True)
class Applied:
    """A control took effect at sample `position` of the session's input."""

    control_id: str
    position: int


SpeechEvent = Partial | Final | EndpointEvent | Applied
