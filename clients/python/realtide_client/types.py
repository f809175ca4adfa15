"""Options, results and receipts as plain data. Times are in seconds, lookahead in milliseconds of audio."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Encoding = Literal["linear16", "float32"]
EndReason = Literal["unknown", "endpoint", "no_speech", "max_length", "flush", "finish"]
EndpointKind = Literal["unknown", "speech_start", "end_likely", "end"]


@dataclass(frozen=True, slots=True)
class EndpointingRules:
    """When utterances end, in milliseconds of audio. None leaves a value to the server's default.

    Attributes:
        enabled: Whether silence cuts utterances.
        likely_silence_ms: Silence after speech after which the end is announced as likely.
        final_silence_ms: Silence after speech that cuts the utterance.
        no_speech_ms: Silence without any speech that cuts it.
        max_utterance_ms: Length at which it is cut whatever happens.
    """

    enabled: bool | None = None
    likely_silence_ms: int | None = None
    final_silence_ms: int | None = None
    no_speech_ms: int | None = None
    max_utterance_ms: int | None = None


@dataclass(frozen=True, slots=True)
class PhraseBoost:
    """Phrases to favour, and by how much (nats per token; None: the server's default)."""

    phrases: tuple[str, ...]
    boost: float | None = None


@dataclass(frozen=True, slots=True)
class SpeechOptions:
    """Choices of a speech session. None leaves a choice to the server's default.

    Attributes:
        sample_rate: Samples per second of the audio that will be sent.
        encoding: How samples travel; what is sent is converted to it.
        model: Name of the model; empty: the server's only one.
        interim_results: Whether to get partials.
        word_times: Whether results carry words with times and confidences.
        beam: Width of the search; 1 is greedy.
        max_alternatives: Most alternatives in a final; needs a beam at least as wide.
        lookahead_bias: The lookahead dial: higher looks further ahead.
        max_lookahead_ms: Hard cap on the lookahead; None: no cap, 0: causal.
        endpointing: When utterances end.
        boosts: Phrases to favour.
        language_code: BCP-47 tag; empty: the model's first.
    """

    sample_rate: int = 16000
    encoding: Encoding = "linear16"
    model: str = ""
    interim_results: bool | None = None
    word_times: bool | None = None
    beam: int | None = None
    max_alternatives: int | None = None
    lookahead_bias: float | None = None
    max_lookahead_ms: int | None = None
    endpointing: EndpointingRules | None = None
    boosts: tuple[PhraseBoost, ...] = ()
    language_code: str = ""


@dataclass(frozen=True, slots=True)
class Timing:
    """When a result was made.

    Attributes:
        received_position: Samples that the server had received; of video: the credit that it had, in frames.
        processed_position: Samples that it had processed; of video: frames that it had decoded.
        processing_seconds: Queueing and computing inside the server, without the network.
        session_seconds: The server's time since the session opened there.
        arrived_at: When the result arrived here, on `time.monotonic()`.
    """

    received_position: int
    processed_position: int
    processing_seconds: float
    session_seconds: float
    arrived_at: float


@dataclass(frozen=True, slots=True)
class Word:
    """A word with its place in the audio (seconds), confidence (0 to 1) and the lookahead it waited for."""

    text: str
    start: float
    end: float
    confidence: float
    lookahead_ms: float


@dataclass(frozen=True, slots=True)
class Partial:
    """Interim hypothesis of the current utterance; it replaces the one before."""

    text: str
    words: tuple[Word, ...]
    stability: float
    audio_processed: float
    lookahead_mean_ms: float
    utterance: int
    end_likely: bool
    timing: Timing


@dataclass(frozen=True, slots=True)
class Alternative:
    """One of several texts that an utterance may be, with its log-probability in nats."""

    text: str
    log_probability: float


@dataclass(frozen=True, slots=True)
class Final:
    """Result of one utterance; it never changes, and comes exactly once, also over reconnections."""

    text: str
    words: tuple[Word, ...]
    confidence: float
    start: float
    end: float
    speech_end: float
    audio_processed: float
    lookahead_mean_ms: float
    lookahead_p90_ms: float
    utterance: int
    reason: EndReason
    alternatives: tuple[Alternative, ...]
    timing: Timing


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Start of speech, or end of an utterance, at `at` seconds of audio."""

    kind: EndpointKind
    at: float
    utterance: int
    timing: Timing


Result = Partial | Final | Endpoint


@dataclass(frozen=True, slots=True)
class Accepted:
    """First receipt of a control: it is valid and queued.

    `position`: samples received before it; of video: frames sent before it.
    """

    control_id: str
    position: int


@dataclass(frozen=True, slots=True)
class Applied:
    """Second receipt of a control: it affects the audio from sample (the video from frame) `position` on.

    `delay_seconds`: from its arrival at the server to its taking effect.
    """

    control_id: str
    position: int
    delay_seconds: float


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A session's whole state; audio from sample (video from frame) `position` on is not in it.

    Opaque, but safe to store.
    """

    data: bytes = field(repr=False)
    position: int


@dataclass(frozen=True, slots=True)
class SessionInfo:
    """What was negotiated at open.

    Attributes:
        session_id: Names the session in the server's logs; kept over reconnections.
        model: Name of the model.
        model_version: Its version.
        server_version: Version of the server.
        sample_rate: Samples per second of the audio.
        encoding: How samples travel.
        frame_seconds: Length of an encoder frame: the resolution of times.
        max_message_bytes: Largest message that the server takes.
        idle_timeout_seconds: Longest silence on the line; 0: no limit.
        max_audio_ahead_seconds: Audio taken in ahead of processing before the server stops reading.
    """

    session_id: str
    model: str
    model_version: str
    server_version: str
    sample_rate: int
    encoding: Encoding
    frame_seconds: float
    max_message_bytes: int
    idle_timeout_seconds: float
    max_audio_ahead_seconds: float
