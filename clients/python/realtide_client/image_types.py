"""Options, requests and events of images as plain data. Positions are images, counted from 0."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from realtide_client.types import Timing

ImageEncoding = Literal["raw_rgb", "jpeg", "png"]


@dataclass(frozen=True, slots=True)
class ImageOptions:
    """Choices of an image session. None leaves a choice to the server's default.

    Attributes:
        encoding: How images and previews come: `png`, `jpeg`, or `raw_rgb` (see `Image.rgb`).
        model: Name of the model; empty: the server's only one.
        jpeg_quality: 1 to 100, with `jpeg` only.
    """

    encoding: ImageEncoding = "png"
    model: str = ""
    jpeg_quality: int | None = None


@dataclass(frozen=True, slots=True)
class Condition:
    """A condition image that the server has; made by `ImageStream.condition`.

    Attributes:
        condition_id: Names it in this session.
        kind: What it says of an image.
    """

    condition_id: str
    kind: str


@dataclass(frozen=True, slots=True)
class ImageInfo:
    """What was negotiated at open.

    Attributes:
        session_id: Names the session in the server's logs; kept over reconnections.
        model: Name of the model.
        model_version: Its version.
        server_version: Version of the server.
        encoding: How images come.
        max_prompt_tokens: Most tokens of a prompt.
        max_prompt_characters: Most characters of a prompt.
        size_multiple: Widths and heights are multiples of it, in pixels.
        min_side: Smallest width and height.
        max_side: Largest width and height.
        max_pixels: Most pixels of an image.
        max_steps: Most steps of an image.
        max_conditions: Most conditions of an image.
        min_weight: Lowest weight of a condition.
        max_weight: Highest weight of a condition.
        max_upload_bytes: Largest condition file.
        max_upload_pixels: Most pixels of a condition file.
        max_message_bytes: Largest message that the server takes.
        idle_timeout_seconds: Longest silence on the line; 0: no limit.
    """

    session_id: str
    model: str
    model_version: str
    server_version: str
    encoding: ImageEncoding
    max_prompt_tokens: int
    max_prompt_characters: int
    size_multiple: int
    min_side: int
    max_side: int
    max_pixels: int
    max_steps: int
    max_conditions: int
    min_weight: float
    max_weight: float
    max_upload_bytes: int
    max_upload_pixels: int
    max_message_bytes: int
    idle_timeout_seconds: float


@dataclass(frozen=True, slots=True)
class Picture:
    """Pixels in the session's encoding.

    Attributes:
        control_id: `Control.control_id` of the request.
        width: In pixels.
        height: In pixels.
        data: A PNG or JPEG file, or RGB bytes.
        encoding: The session's encoding.
        timing: When it was made; `processing_seconds` counts from when the image was asked for.
    """

    control_id: str
    width: int
    height: int
    data: bytes = field(repr=False)
    encoding: ImageEncoding
    timing: Timing

    @property
    def rgb(self) -> npt.NDArray[np.uint8]:
        """The pixels, uint8 of shape [height, width, 3]; read-only.

        Raises:
            ValueError: The encoding is not `raw_rgb`, or the server sent another number of bytes.
        """
        if self.encoding != "raw_rgb":
            raise ValueError(f"pictures in the encoding {self.encoding} have to be decoded first")
        pixels: npt.NDArray[Any] = np.frombuffer(self.data, np.uint8)
        return pixels.reshape(self.height, self.width, 3)


@dataclass(frozen=True, slots=True)
class Image(Picture):
    """An image, done; each comes exactly once, also over reconnections. `seed`: of its noise."""

    seed: int


@dataclass(frozen=True, slots=True)
class Preview(Picture):
    """What an image would be after `step` steps, made cheaply. May come again after a reconnection."""

    step: int


@dataclass(frozen=True, slots=True)
class Progress:
    """`step` of `steps` steps of an image are done."""

    control_id: str
    step: int
    steps: int


@dataclass(frozen=True, slots=True)
class ConditionsReady:
    """The conditions of an image are ready.

    Attributes:
        control_id: Of the image's request.
        hits: Conditions that the server still had.
        misses: Conditions that it computed.
        seconds: From the beginning of the image to its first step.
    """

    control_id: str
    hits: int
    misses: int
    seconds: float


@dataclass(frozen=True, slots=True)
class ImageCancelled:
    """An image was called off and will not come."""

    control_id: str


ImageEvent = Image | Preview | Progress | ConditionsReady | ImageCancelled
