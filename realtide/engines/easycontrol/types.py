"""Inputs, options and events of an image session: plain data; the server translates it for the wire (ours).

Positions are images of the session, counted from 0 in the order in which they were asked for. Times are
monotonic seconds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from realtide.engines.easycontrol.config import Role

Pixels8 = npt.NDArray[np.uint8]
Encode = Callable[[Pixels8], Any]
"""Pixels [height, width, 3] to what `Image.data` and `Preview.data` shall be.

It is called in the thread that decodes: encoding costs neither the event loop nor the next step anything.
"""


@dataclass(frozen=True, slots=True)
class ImageOptions:
    """Choices of one session, validated at the edge.

    Attributes:
        encode: makes `data` of results; None: the pixels as they are.
        start: position of the first image.
    """

    encode: Encode | None = None
    start: int = 0


@dataclass(frozen=True, slots=True)
class Condition:
    """A condition image for later requests; another one of the same id takes its place for those.

    Attributes:
        condition_id: the client's name for it.
        kind: one of `ImageModelInfo.kinds`.
        pixels: [size, size, 3], as the model takes it (see `ImageModelInfo.condition_size`).
    """

    condition_id: str
    kind: str
    pixels: Pixels8 = field(repr=False)


@dataclass(frozen=True, slots=True)
class Forget:
    """A condition is not needed any more by later requests."""

    control_id: str
    condition_id: str


@dataclass(frozen=True, slots=True)
class Generate:
    """An image is wanted.

    Attributes:
        control_id: the client's name for it.
        prompt: what it shows.
        width: in pixels.
        height: in pixels.
        steps: of the sampler.
        guidance: scale; not used by a model that takes none.
        seed: of the noise.
        conditions: ids and weights.
        preview_interval: steps between previews; 0: none.
        received: when it came.
    """

    control_id: str
    prompt: str
    width: int
    height: int
    steps: int
    guidance: float
    seed: int
    conditions: tuple[tuple[str, float], ...] = ()
    preview_interval: int = 0
    received: float = 0.0


@dataclass(frozen=True, slots=True)
class Cancel:
    """The image of the control `target` is not wanted any more; if it is done already, nothing happens."""

    control_id: str
    target: str


@dataclass(frozen=True, slots=True)
class Finish:
    """No more input: make what was asked for and end."""


ImageInput = Condition | Forget | Generate | Cancel | Finish


@dataclass(frozen=True, slots=True)
class Applied:
    """A control took effect; of `Generate`: image `position` is begun."""

    control_id: str
    position: int


@dataclass(frozen=True, slots=True)
class Conditioned:
    """The conditions of an image are ready: `hits` were in the cache, `misses` were computed."""

    position: int
    hits: int
    misses: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Progress:
    """`step` of `steps` steps of image `position` are done."""

    position: int
    step: int
    steps: int


@dataclass(frozen=True, slots=True)
class Preview:
    """What image `position` would be, cheaply, after `step` steps; `width` and `height` are the preview's."""

    position: int
    step: int
    width: int
    height: int
    data: Any
    received: float


@dataclass(frozen=True, slots=True)
class Image:
    """Image `position`, done."""

    position: int
    control_id: str
    width: int
    height: int
    seed: int
    data: Any
    received: float


@dataclass(frozen=True, slots=True)
class Cancelled:
    """Image `position` will not come."""

    position: int
    control_id: str


ImageEvent = Applied | Conditioned | Progress | Preview | Image | Cancelled


@dataclass(frozen=True, slots=True)
class ImageModelInfo:
    """What is known of a loaded model; every value is the bundle's.

    Attributes:
        version: of the bundle.
        backend: ``onnxruntime``, ``torch`` or ``tensorrt``.
        precision: ``fp32``, ``fp16``, ``bf16``, ``int8`` or ``fp8``.
        device: ``cpu`` or ``cuda:0``.
        license: SPDX expression of the weights' licence.
        size: (width, height) in pixels by default.
        multiple: widths and heights are multiples of it.
        side_range: smallest and largest width and height, in pixels.
        max_pixels: largest width times height.
        steps: by default.
        max_steps: of one image.
        guidance: scale by default; None: the model takes none.
        guidance_range: lowest and highest scale.
        kinds: of conditions, with what the positions of each are.
        condition_size: pixels of a condition image, each way.
        weight_range: lowest and highest weight of a condition.
        max_conditions: of one image.
        condition_bytes: memory of one condition in the cache.
        cache_bytes: budget of the cache.
        preview_scale: pixels of an image to one of its preview, each way.
        max_prompt_tokens: of one prompt.
        count_tokens: tokens of a prompt; cheap.
    """

    version: str
    backend: str
    precision: str
    device: str
    license: str
    size: tuple[int, int]
    multiple: int
    side_range: tuple[int, int]
    max_pixels: int
    steps: int
    max_steps: int
    guidance: float | None
    guidance_range: tuple[float, float]
    kinds: dict[str, Role]
    condition_size: int
    weight_range: tuple[float, float]
    max_conditions: int
    condition_bytes: int
    cache_bytes: int
    preview_scale: int
    max_prompt_tokens: int
    count_tokens: Callable[[str], int]
