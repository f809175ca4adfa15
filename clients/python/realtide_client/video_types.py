"""Options and events of video as plain data. Positions are frames, counted from 0; times are in seconds."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from realtide_client.types import Timing

VideoEncoding = Literal["raw_rgb", "jpeg", "h264"]


@dataclass(frozen=True, slots=True)
class VideoOptions:
    """Choices of a video session. None leaves a choice to the server's default.

    Attributes:
        prompt: What the video shows first. Required, except to continue from a checkpoint.
        encoding: How frames come: `raw_rgb` (see `Frames.rgb`), `jpeg` (an image per frame), or `h264`
            (fragments of an MP4 file, several frames each).
        model: Name of the model; empty: the server's only one.
        width: In pixels; with `height` one of the model's sizes.
        height: In pixels.
        frames_per_second: At which the video is played; it sets deadlines and the times in MP4, not what is
            shown.
        seed: Of the noise: the same seed, prompts and frames of their changes give the same video. None: the
            server chooses one, and `VideoInfo.seed` says which.
        length_frames: Frames after which the video ends; None: endless.
        jpeg_quality: 1 to 100, with `jpeg` only.
        h264_crf: Constant rate factor, 0 (lossless) to 51, with `h264` only.
    """

    prompt: str = ""
    encoding: VideoEncoding = "raw_rgb"
    model: str = ""
    width: int | None = None
    height: int | None = None
    frames_per_second: float | None = None
    seed: int | None = None
    length_frames: int | None = None
    jpeg_quality: int | None = None
    h264_crf: int | None = None


@dataclass(frozen=True, slots=True)
class VideoInfo:
    """What was negotiated at open.

    Attributes:
        session_id: Names the session in the server's logs; kept over reconnections.
        model: Name of the model.
        model_version: Its version.
        server_version: Version of the server.
        prompt: The prompt in force.
        encoding: How frames come.
        width: In pixels.
        height: In pixels.
        frames_per_second: Of playback.
        seed: Of the noise.
        length_frames: Frames after which the video ends; None: endless.
        paused: Whether the session was paused when it was opened (only from a checkpoint).
        min_frames_per_second: Lowest rate of playback that the server takes.
        max_frames_per_second: Highest.
        max_prompt_tokens: Most tokens of a prompt.
        max_prompt_characters: Most characters of a prompt.
        max_credit_frames: Most frames that a credit may be ahead of those sent.
        max_length_frames: Highest `length_frames`.
        max_message_bytes: Largest message that the server takes.
        idle_timeout_seconds: Longest silence on the line; 0: no limit.
    """

    session_id: str
    model: str
    model_version: str
    server_version: str
    prompt: str
    encoding: VideoEncoding
    width: int
    height: int
    frames_per_second: float
    seed: int
    length_frames: int | None
    paused: bool
    min_frames_per_second: float
    max_frames_per_second: float
    max_prompt_tokens: int
    max_prompt_characters: int
    max_credit_frames: int
    max_length_frames: int
    max_message_bytes: int
    idle_timeout_seconds: float


@dataclass(frozen=True, slots=True)
class Frames:
    """Consecutive frames; each frame comes exactly once, in order, also over reconnections.

    Attributes:
        position: Index of the first frame.
        count: Number of frames; 1, but for `h264`.
        data: The frames in the session's encoding: RGB bytes, a JPEG image, or a fragment (`moof`, `mdat`).
        initialization: With `h264` only: the initialization segment (`ftyp`, `moov`) that `data` needs, if it
            has not been given yet: on the first frames, and after a reconnection if the new server wrote
            another one. Empty otherwise.
        encoding: The session's encoding.
        width: In pixels.
        height: In pixels.
        timing: When the frames were made. `processing_seconds` counts from when they could be begun: their
            credit had come and the frames before them were done.
    """

    position: int
    count: int
    data: bytes = field(repr=False)
    initialization: bytes = field(repr=False)
    encoding: VideoEncoding
    width: int
    height: int
    timing: Timing

    @property
    def end(self) -> int:
        """Index after the last frame."""
        return self.position + self.count

    @property
    def payload(self) -> bytes:
        """What to append to a file: the initialization segment, if there is one, and the frames."""
        return self.initialization + self.data

    @property
    def rgb(self) -> npt.NDArray[np.uint8]:
        """The pixels, uint8 of shape [count, height, width, 3]; read-only.

        Raises:
            ValueError: The encoding is not `raw_rgb`, or the server sent another number of bytes.
        """
        if self.encoding != "raw_rgb":
            raise ValueError(f"frames in the encoding {self.encoding} have to be decoded first")
        pixels: npt.NDArray[Any] = np.frombuffer(self.data, np.uint8)
        return pixels.reshape(self.count, self.height, self.width, 3)


@dataclass(frozen=True, slots=True)
class PromptApplied:
    """A prompt is in force: comes right before the first frame that it concerns.

    Attributes:
        control_id: `Control.control_id` of the change; empty for the prompt of the open.
        prompt: The prompt.
        first_frame: Index of the first frame that it concerns.
        recache_seconds: Time that making the model's cache follow the prompt took; 0: nothing to be done.
        recached_latent_frames: Latent frames that were replayed for it.
        arrived_at: When it arrived here, on `time.monotonic()`.
    """

    control_id: str
    prompt: str
    first_frame: int
    recache_seconds: float
    recached_latent_frames: int
    arrived_at: float


VideoEvent = Frames | PromptApplied
