"""Translation between plain data and the messages of Image. Unset options stay unset on the wire."""

from __future__ import annotations

from realtide_client import image_types as i
from realtide_client.v1 import common_pb2, image_pb2
from realtide_client.wire import timing

_ENCODINGS: dict[i.ImageEncoding, image_pb2.ImageEncoding.ValueType] = {
    "raw_rgb": image_pb2.IMAGE_ENCODING_RAW_RGB,
    "jpeg": image_pb2.IMAGE_ENCODING_JPEG,
    "png": image_pb2.IMAGE_ENCODING_PNG,
}
_ENCODING_NAMES: dict[int, i.ImageEncoding] = {number: name for name, number in _ENCODINGS.items()}


def options_message(options: i.ImageOptions) -> image_pb2.ImageOptions:
    """The options as a message.

    Raises:
        ValueError: The encoding has no such name, or a value does not fit its field at all.
    """
    if options.encoding not in _ENCODINGS:
        raise ValueError(f"encoding must be one of {', '.join(_ENCODINGS)}, not {options.encoding!r}")
    return image_pb2.ImageOptions(encoding=_ENCODINGS[options.encoding], jpeg_quality=options.jpeg_quality)


def open_request(
    options: image_pb2.ImageOptions, model: str, checkpoint_interval_ms: int
) -> image_pb2.ImageStreamRequest:
    """The first message of a new session."""
    session = common_pb2.SessionOptions(model=model, checkpoint_interval_ms=checkpoint_interval_ms or None)
    return image_pb2.ImageStreamRequest(open=image_pb2.ImageOpen(session=session, options=options))


def upload_request(condition: i.Condition, data: bytes) -> image_pb2.ImageStreamRequest:
    """A condition's upload."""
    return image_pb2.ImageStreamRequest(
        condition=image_pb2.ConditionUpload(
            condition_id=condition.condition_id, kind=condition.kind, data=data
        )
    )


def image_info(opened: image_pb2.ImageOpened) -> i.ImageInfo:
    """What the server's first message says."""
    session, limits = opened.session, opened.limits
    return i.ImageInfo(
        session_id=session.session_id,
        model=session.model,
        model_version=session.model_version,
        server_version=session.server_version,
        encoding=_ENCODING_NAMES[opened.options.encoding],
        max_prompt_tokens=limits.max_prompt_tokens,
        max_prompt_characters=limits.max_prompt_characters,
        size_multiple=limits.size_multiple,
        min_side=limits.min_side,
        max_side=limits.max_side,
        max_pixels=limits.max_pixels,
        max_steps=limits.max_steps,
        max_conditions=limits.max_conditions,
        min_weight=limits.min_weight,
        max_weight=limits.max_weight,
        max_upload_bytes=limits.max_upload_bytes,
        max_upload_pixels=limits.max_upload_pixels,
        max_message_bytes=session.limits.max_message_bytes,
        idle_timeout_seconds=session.limits.idle_timeout_seconds,
    )


def image(message: image_pb2.GeneratedImage, info: i.ImageInfo, arrived_at: float) -> i.Image:
    """An image; `arrived_at` is on `time.monotonic()`."""
    return i.Image(
        control_id=message.control_id,
        width=message.width,
        height=message.height,
        data=message.data,
        encoding=info.encoding,
        timing=timing(message.timing, arrived_at),
        seed=message.seed,
    )


def preview(
    message: image_pb2.ImagePreview, control_id: str, info: i.ImageInfo, arrived_at: float
) -> i.Preview:
    """A preview of the image that a control asked for."""
    return i.Preview(
        control_id=control_id,
        width=message.width,
        height=message.height,
        data=message.data,
        encoding=info.encoding,
        timing=timing(message.timing, arrived_at),
        step=message.step,
    )
