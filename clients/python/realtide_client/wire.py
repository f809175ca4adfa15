"""Translation between plain data and the protobuf messages. Unset options stay unset on the wire."""

from __future__ import annotations

from collections.abc import Iterable

from realtide_client import types as t
from realtide_client.v1 import common_pb2, speech_pb2

_ENCODINGS: dict[t.Encoding, speech_pb2.AudioEncoding.ValueType] = {
    "linear16": speech_pb2.AUDIO_ENCODING_LINEAR16,
    "float32": speech_pb2.AUDIO_ENCODING_FLOAT32,
}
_ENCODING_NAMES: dict[int, t.Encoding] = {number: name for name, number in _ENCODINGS.items()}
_REASONS: dict[int, t.EndReason] = {
    speech_pb2.UTTERANCE_END_REASON_ENDPOINT: "endpoint",
    speech_pb2.UTTERANCE_END_REASON_NO_SPEECH: "no_speech",
    speech_pb2.UTTERANCE_END_REASON_MAX_LENGTH: "max_length",
    speech_pb2.UTTERANCE_END_REASON_FLUSH: "flush",
    speech_pb2.UTTERANCE_END_REASON_FINISH: "finish",
}
_KINDS: dict[int, t.EndpointKind] = {
    speech_pb2.ENDPOINT_KIND_SPEECH_START: "speech_start",
    speech_pb2.ENDPOINT_KIND_END_LIKELY: "end_likely",
    speech_pb2.ENDPOINT_KIND_END: "end",
}


def rules_message(rules: t.EndpointingRules) -> speech_pb2.EndpointingRules:
    """The rules as a message; None stays unset."""
    return speech_pb2.EndpointingRules(
        enabled=rules.enabled,
        likely_silence_ms=rules.likely_silence_ms,
        final_silence_ms=rules.final_silence_ms,
        no_speech_ms=rules.no_speech_ms,
        max_utterance_ms=rules.max_utterance_ms,
    )


def boost_messages(boosts: Iterable[t.PhraseBoost]) -> list[speech_pb2.PhraseBoost]:
    """The phrases as messages."""
    return [speech_pb2.PhraseBoost(phrases=boost.phrases, boost=boost.boost) for boost in boosts]


def open_request(options: t.SpeechOptions, checkpoint_interval_ms: int) -> speech_pb2.SpeechStreamRequest:
    """The first message of a new session.

    Raises:
        ValueError: A value does not fit its field at all (negative, for example); the server checks the
        ranges.
    """
    return speech_pb2.SpeechStreamRequest(
        open=speech_pb2.SpeechOpen(
            session=common_pb2.SessionOptions(
                model=options.model, checkpoint_interval_ms=checkpoint_interval_ms or None
            ),
            audio=speech_pb2.AudioFormat(
                encoding=_ENCODINGS[options.encoding], sample_rate_hz=options.sample_rate
            ),
            options=speech_pb2.SpeechOptions(
                interim_results=options.interim_results,
                word_times=options.word_times,
                beam=options.beam,
                max_alternatives=options.max_alternatives,
                lookahead_bias=options.lookahead_bias,
                max_lookahead_ms=options.max_lookahead_ms,
                endpointing=None if options.endpointing is None else rules_message(options.endpointing),
                boosts=boost_messages(options.boosts),
                language_code=options.language_code,
            ),
        )
    )


def session_info(opened: speech_pb2.SpeechOpened) -> t.SessionInfo:
    """What the server's first message says."""
    session = opened.session
    return t.SessionInfo(
        session_id=session.session_id,
        model=session.model,
        model_version=session.model_version,
        server_version=session.server_version,
        sample_rate=opened.audio.sample_rate_hz,
        encoding=_ENCODING_NAMES[opened.audio.encoding],
        frame_seconds=opened.frame_seconds,
        max_message_bytes=session.limits.max_message_bytes,
        idle_timeout_seconds=session.limits.idle_timeout_seconds,
        max_audio_ahead_seconds=opened.limits.max_audio_ahead_seconds,
    )


def timing(message: common_pb2.Timing, arrived_at: float) -> t.Timing:
    """When a result was made; `arrived_at` is on `time.monotonic()`."""
    return t.Timing(
        received_position=message.received_position,
        processed_position=message.processed_position,
        processing_seconds=message.processing_seconds,
        session_seconds=message.session_seconds,
        arrived_at=arrived_at,
    )


def _words(messages: Iterable[speech_pb2.Word]) -> tuple[t.Word, ...]:
    return tuple(
        t.Word(w.text, w.start_seconds, w.end_seconds, w.confidence, w.lookahead_ms) for w in messages
    )


def partial(message: speech_pb2.SpeechPartial, arrived_at: float) -> t.Partial:
    """An interim hypothesis; `arrived_at` is on `time.monotonic()`."""
    return t.Partial(
        text=message.text,
        words=_words(message.words),
        stability=message.stability,
        audio_processed=message.audio_processed_seconds,
        lookahead_mean_ms=message.lookahead_mean_ms,
        utterance=message.utterance,
        end_likely=message.end_likely,
        timing=timing(message.timing, arrived_at),
    )


def final(message: speech_pb2.SpeechFinal, arrived_at: float) -> t.Final:
    """An utterance's result; `arrived_at` is on `time.monotonic()`."""
    return t.Final(
        text=message.text,
        words=_words(message.words),
        confidence=message.confidence,
        start=message.start_seconds,
        end=message.end_seconds,
        speech_end=message.speech_end_seconds,
        audio_processed=message.audio_processed_seconds,
        lookahead_mean_ms=message.lookahead_mean_ms,
        lookahead_p90_ms=message.lookahead_p90_ms,
        utterance=message.utterance,
        reason=_REASONS.get(message.reason, "unknown"),
        alternatives=tuple(t.Alternative(a.text, a.log_probability) for a in message.alternatives),
        timing=timing(message.timing, arrived_at),
    )


def endpoint(message: speech_pb2.EndpointEvent, arrived_at: float) -> t.Endpoint:
    """An endpointing event; `arrived_at` is on `time.monotonic()`."""
    return t.Endpoint(
        kind=_KINDS.get(message.kind, "unknown"),
        at=message.at_seconds,
        utterance=message.utterance,
        timing=timing(message.timing, arrived_at),
    )
