"""Translation between plain data and the messages of Video. Unset options stay unset on the wire."""

from __future__ import annotations

from realtide_client import video_types as v
from realtide_client.v1 import common_pb2, video_pb2
from realtide_client.wire import timing

_ENCODINGS: dict[v.VideoEncoding, video_pb2.VideoEncoding.ValueType] = {
    "raw_rgb": video_pb2.VIDEO_ENCODING_RAW_RGB,
    "jpeg": video_pb2.VIDEO_ENCODING_JPEG,
    "h264": video_pb2.VIDEO_ENCODING_H264_FMP4,
}
_ENCODING_NAMES: dict[int, v.VideoEncoding] = {number: name for name, number in _ENCODINGS.items()}


def options_message(options: v.VideoOptions) -> video_pb2.VideoOptions:
    """The options as a message.

    Raises:
        ValueError: The encoding has no such name, or a value does not fit its field at all (negative, for
            example); the server checks the ranges.
    """
    if options.encoding not in _ENCODINGS:
        raise ValueError(f"encoding must be one of {', '.join(_ENCODINGS)}, not {options.encoding!r}")
    return video_pb2.VideoOptions(
        prompt=options.prompt,
        width=options.width,
        height=options.height,
        frames_per_second=options.frames_per_second,
        seed=options.seed,
        length_frames=options.length_frames,
        encoding=_ENCODINGS[options.encoding],
        jpeg_quality=options.jpeg_quality,
        h264_crf=options.h264_crf,
    )


def open_request(
    options: video_pb2.VideoOptions, model: str, checkpoint_interval_ms: int, credit: int
) -> video_pb2.VideoStreamRequest:
    """The first message of a new session."""
    return video_pb2.VideoStreamRequest(
        open=video_pb2.VideoOpen(
            session=common_pb2.SessionOptions(
                model=model, checkpoint_interval_ms=checkpoint_interval_ms or None
            ),
            options=options,
            credit=credit,
        )
    )


def video_info(opened: video_pb2.VideoOpened) -> v.VideoInfo:
    """What the server's first message says."""
    session, options, limits = opened.session, opened.options, opened.limits
    return v.VideoInfo(
        session_id=session.session_id,
        model=session.model,
        model_version=session.model_version,
        server_version=session.server_version,
        prompt=options.prompt,
        encoding=_ENCODING_NAMES[options.encoding],
        width=options.width,
        height=options.height,
        frames_per_second=options.frames_per_second,
        seed=options.seed,
        length_frames=options.length_frames if options.HasField("length_frames") else None,
        paused=opened.paused,
        min_frames_per_second=limits.min_frames_per_second,
        max_frames_per_second=limits.max_frames_per_second,
        max_prompt_tokens=limits.max_prompt_tokens,
        max_prompt_characters=limits.max_prompt_characters,
        max_credit_frames=limits.max_credit_frames,
        max_length_frames=limits.max_length_frames,
        max_message_bytes=session.limits.max_message_bytes,
        idle_timeout_seconds=session.limits.idle_timeout_seconds,
    )


def frames(
    message: video_pb2.VideoFrames, initialization: bytes, info: v.VideoInfo, arrived_at: float
) -> v.Frames:
    """Frames; `initialization` is what the application is given as such."""
    return v.Frames(
        position=message.position,
        count=message.count,
        data=message.data,
        initialization=initialization,
        encoding=info.encoding,
        width=info.width,
        height=info.height,
        timing=timing(message.timing, arrived_at),
    )


def prompt_applied(message: video_pb2.PromptApplied, arrived_at: float) -> v.PromptApplied:
    """A prompt in force; `arrived_at` is on `time.monotonic()`."""
    return v.PromptApplied(
        control_id=message.control_id,
        prompt=message.prompt,
        first_frame=message.first_frame,
        recache_seconds=message.recache_seconds,
        recached_latent_frames=message.recached_latent_frames,
        arrived_at=arrived_at,
    )
