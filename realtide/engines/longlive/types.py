"""Inputs, options and events of a video session: plain data; the server translates it for the wire (ours).

Positions are frames of video from 0. Times are monotonic seconds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Frames8 = npt.NDArray[np.uint8]
Encode = Callable[[int, Frames8], Any]
"""(index of the first frame, frames [n, height, width, 3]) to what `Frames.data` shall be.

It is called for consecutive frames, in the thread that decodes: encoding costs neither the event loop nor the
next block's denoising anything.
"""


@dataclass(frozen=True, slots=True)
class VideoOptions:
    """Choices of one session, validated at the edge.

    Attributes:
        prompt: what the video shows first.
        width: in pixels.
        height: in pixels.
        frames_per_second: of playback; sets deadlines.
        seed: of the noise.
        length: frames after which the video ends; None: endless.
        credit: frames below this one may be generated.
        group: most frames of one `Frames` event.
        encode: makes `Frames.data`; None: the frames as they are.
    """

    prompt: str
    width: int
    height: int
    frames_per_second: float
    seed: int
    length: int | None = None
    credit: int = 0
    group: int = 1
    encode: Encode | None = None


@dataclass(frozen=True, slots=True)
class SetPrompt:
    """Another prompt, from the first block on that begins at frame `at` or later; None: the next block."""

    control_id: str
    prompt: str
    at: int | None = None


@dataclass(frozen=True, slots=True)
class Pause:
    """Hold back what was not handed out yet and generate nothing."""

    control_id: str


@dataclass(frozen=True, slots=True)
class Play:
    """Go on after a pause."""

    control_id: str


@dataclass(frozen=True, slots=True)
class Credit:
    """Frames below `position` may be generated; `received`: when the client said so."""

    position: int
    received: float


@dataclass(frozen=True, slots=True)
class Finish:
    """No more input: hand out what the credit covers and end."""


VideoInput = SetPrompt | Pause | Play | Credit | Finish


@dataclass(frozen=True, slots=True)
class Denoised:
    """Frames first .. first+count-1 exist as latents."""

    first: int
    count: int


@dataclass(frozen=True, slots=True)
class Frames:
    """Frames first .. first+count-1, decoded and encoded.

    Attributes:
        first: index of the first frame.
        count: number of frames.
        data: what `VideoOptions.encode` gave, or frames [count, height, width, 3] as bytes of RGB.
        decoded: frames that have been decoded so far.
        began: when these frames could be begun: their credit had come and those before them were done.
    """

    first: int
    count: int
    data: Any
    decoded: int
    began: float


@dataclass(frozen=True, slots=True)
class PromptApplied:
    """A prompt is in force from frame `first` on; comes right before that frame.

    `recache` is in seconds; `replayed` counts latent frames.
    """

    control_id: str
    prompt: str
    first: int
    recache: float
    replayed: int


@dataclass(frozen=True, slots=True)
class Applied:
    """A control took effect at frame `position`."""

    control_id: str
    position: int


VideoEvent = Denoised | Frames | PromptApplied | Applied


@dataclass(frozen=True, slots=True)
class VideoModelInfo:
    """What is known of a loaded model; every value is the bundle's.

    Attributes:
        version: of the bundle.
        backend: ``onnxruntime``, ``torch`` or ``tensorrt``.
        precision: ``fp32``, ``fp16``, ``bf16``, ``int8`` or ``fp8``.
        device: ``cpu`` or ``cuda:0``.
        license: SPDX expression of the weights' licence.
        sizes: (width, height) in pixels that can be generated, the default first.
        frames_per_second: that the model was trained for.
        frames_per_second_range: lowest and highest of playback.
        first_block: video frames of the first block.
        block: video frames of every later block.
        max_prompt_tokens: of one prompt.
        count_tokens: tokens of a prompt; cheap.
        session_bytes: memory of one session: cache, prompts, latents and the decoder's state.
    """

    version: str
    backend: str
    precision: str
    device: str
    license: str
    sizes: tuple[tuple[int, int], ...]
    frames_per_second: float
    frames_per_second_range: tuple[float, float]
    first_block: int
    block: int
    max_prompt_tokens: int
    count_tokens: Callable[[str], int]
    session_bytes: int
