"""Checks every field of a video session's messages and translates them to the engine's options and controls.

Each refusal names the field's path and the accepted range, and comes before a slot is taken (open) or before
the engine has seen anything of the message (controls, credit).
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from realtide.engines.longlive import types
from realtide.server.config import ServerConfig
from realtide.server.frames import FragmentedMp4, FrameEncoder, Jpeg, RawRgb
from realtide.server.status import invalid
from realtide_client.v1 import video_pb2 as pb

ENCODINGS: dict[int, str] = {
    pb.VIDEO_ENCODING_RAW_RGB: "RAW_RGB",
    pb.VIDEO_ENCODING_JPEG: "JPEG",
    pb.VIDEO_ENCODING_H264_FMP4: "H264_FMP4",
}

# proto: VideoOptions
_QUALITIES = (1, 100)
_DEFAULT_QUALITY = 90
_FACTORS = (0, 51)
_DEFAULT_FACTOR = 20
# A seed that the server chooses is short enough to be written down.
_SEED_BITS = 32


@dataclass(frozen=True, slots=True)
class Fields:
    """Checks against one model's and one server's limits."""

    info: types.VideoModelInfo
    config: ServerConfig

    def limits(self, frames_per_second: float) -> pb.VideoLimits:
        """The ranges as the client is told."""
        low, high = self.info.frames_per_second_range
        return pb.VideoLimits(
            min_frames_per_second=low,
            max_frames_per_second=high,
            max_prompt_tokens=self.info.max_prompt_tokens,
            max_prompt_characters=self.config.max_prompt_characters,
            max_credit_frames=self.most_credit(frames_per_second),
            max_length_frames=self.config.max_video_frames,
        )

    def most_credit(self, frames_per_second: float) -> int:
        """Frames that a credit may be ahead of what was sent."""
        # With less than two blocks none could be begun while the one before it plays.
        blocks = self.info.first_block + self.info.block
        return max(math.ceil(self.config.max_video_credit * frames_per_second), blocks)

    def options(self, given: pb.VideoOptions, path: str) -> pb.VideoOptions:
        """Check the options and fill in every default."""
        full = pb.VideoOptions()
        full.CopyFrom(given)
        self.prompt(given.prompt, f"{path}.prompt")
        full.width, full.height = self._size(given, path)
        if not given.HasField("frames_per_second"):
            full.frames_per_second = self.info.frames_per_second
        low, high = self.info.frames_per_second_range
        _within(f"{path}.frames_per_second", full.frames_per_second, low, high)
        if not given.HasField("seed"):
            full.seed = secrets.randbits(_SEED_BITS)
        if given.HasField("length_frames"):
            _within(f"{path}.length_frames", given.length_frames, 1, self.config.max_video_frames, "frames")
        self._encoding(full, path)
        return full

    def prompt(self, prompt: str, path: str) -> None:
        """Check what the video shall show."""
        most = self.config.max_prompt_characters
        if not prompt.strip() or len(prompt) > most:
            raise invalid(path, f"{len(prompt)} characters, must be 1 to {most} and not only spaces")
        tokens, limit = self.info.count_tokens(prompt), self.info.max_prompt_tokens
        if tokens > limit:
            raise invalid(path, f"{tokens} tokens, at most {limit} are accepted")

    def _size(self, given: pb.VideoOptions, path: str) -> tuple[int, int]:
        default = self.info.sizes[0]
        size = (
            given.width if given.HasField("width") else default[0],
            given.height if given.HasField("height") else default[1],
        )
        if size not in self.info.sizes:
            # The width is at fault unless some size has it.
            field = "height" if size[0] in (width for width, _ in self.info.sizes) else "width"
            sizes = ", ".join(f"{width}x{height}" for width, height in self.info.sizes)
            raise invalid(f"{path}.{field}", f"{size[0]}x{size[1]}, must be one of {sizes}")
        return size

    def _encoding(self, full: pb.VideoOptions, path: str) -> None:
        if full.encoding not in ENCODINGS:
            known = ", ".join(f"{number} ({name})" for number, name in ENCODINGS.items())
            raise invalid(f"{path}.encoding", f"{full.encoding}, must be one of {known}")
        jpeg = full.encoding == pb.VIDEO_ENCODING_JPEG
        if full.HasField("jpeg_quality") and not jpeg:
            raise invalid(f"{path}.jpeg_quality", f"is only for JPEG, not for {ENCODINGS[full.encoding]}")
        h264 = full.encoding == pb.VIDEO_ENCODING_H264_FMP4
        if full.HasField("h264_crf") and not h264:
            raise invalid(f"{path}.h264_crf", f"is only for H264_FMP4, not for {ENCODINGS[full.encoding]}")
        if jpeg:
            full.jpeg_quality = full.jpeg_quality if full.HasField("jpeg_quality") else _DEFAULT_QUALITY
            _within(f"{path}.jpeg_quality", full.jpeg_quality, *_QUALITIES)
        if h264:
            full.h264_crf = full.h264_crf if full.HasField("h264_crf") else _DEFAULT_FACTOR
            _within(f"{path}.h264_crf", full.h264_crf, *_FACTORS)

    def credit(self, position: int, earlier: int, sent: int, options: pb.VideoOptions, path: str) -> None:
        """Check a credit: not below an earlier one and not too far ahead of what was sent."""
        most = sent + self.most_credit(options.frames_per_second)
        if not earlier <= position <= most:
            problem = f"{position}, must be {earlier} (the credit before) to {most} ({sent} frames were sent)"
            raise invalid(path, problem)

    def control(self, control: pb.VideoControl, options: pb.VideoOptions, sent: int) -> types.VideoInput:
        """Check a control when `sent` frames have been sent."""
        action = control.WhichOneof("action")
        if action is None:
            raise invalid("control.action", "none set, exactly one is needed")
        if action == "pause":
            return types.Pause(control.control_id)
        if action == "resume_playback":
            return types.Play(control.control_id)
        change, path = control.set_prompt, "control.set_prompt"
        self.prompt(change.prompt, f"{path}.prompt")
        if not change.HasField("at_frame"):
            return types.SetPrompt(control.control_id, change.prompt)
        end = options.length_frames if options.HasField("length_frames") else self.config.max_video_frames
        if not sent <= change.at_frame < end:
            problem = f"{change.at_frame}, must be {sent} (the next frame to be sent) to {end - 1}"
            raise invalid(f"{path}.at_frame", problem)
        return types.SetPrompt(control.control_id, change.prompt, change.at_frame)


def engine_options(options: pb.VideoOptions, credit: int, encoder: FrameEncoder) -> types.VideoOptions:
    """The engine's options from complete ones."""
    return types.VideoOptions(
        prompt=options.prompt,
        width=options.width,
        height=options.height,
        frames_per_second=options.frames_per_second,
        seed=options.seed,
        length=options.length_frames if options.HasField("length_frames") else None,
        credit=credit,
        group=encoder.group,
        encode=encoder,
    )


def encoder_for(options: pb.VideoOptions) -> FrameEncoder:
    """An encoder from complete options. It holds nothing before its first frame."""
    make: dict[int, Callable[[], Any]] = {
        pb.VIDEO_ENCODING_RAW_RGB: RawRgb,
        pb.VIDEO_ENCODING_JPEG: lambda: Jpeg(options.jpeg_quality),
        pb.VIDEO_ENCODING_H264_FMP4: lambda: FragmentedMp4(
            options.width, options.height, options.frames_per_second, options.h264_crf
        ),
    }
    encoder: FrameEncoder = make[options.encoding]()
    return encoder


def _within(path: str, value: float, low: float, high: float, unit: str = "") -> None:
    """Refuse what is not from `low` to `high`; NaN is not."""
    if not low <= value <= high:
        raise invalid(path, f"{value:.12g}, must be {low:.12g} to {high:.12g}{' ' + unit if unit else ''}")
