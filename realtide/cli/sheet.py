"""Contact sheets: a clip at a glance, as one picture (ours)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from realtide.cli.errors import CommandError

Frame = npt.NDArray[np.uint8]

_GAP = 6  # pixels between pictures
_BACKGROUND, _INK, _SEAM = (250, 250, 250), (40, 40, 40), (208, 64, 48)


def decoded(path: Path) -> list[Frame]:
    """Every frame of a video file, uint8 of shape [height, width, 3] in RGB.

    Raises:
        CommandError: The file cannot be read as video.
    """
    import av

    try:
        with av.open(str(path)) as container:
            return [np.asarray(frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)]
    except (OSError, av.FFmpegError, IndexError) as error:
        raise CommandError(f"{path} cannot be read as video: {error}") from None


def contact_sheet(
    frames: Sequence[Frame],
    frames_per_second: float,
    prompts: Mapping[int, str],
    *,
    columns: int = 8,
    rows: int = 4,
    height: int = 96,
) -> Image.Image:
    """Pictures at equal distances from a clip, with their times, and each prompt above its first picture.

    Args:
        frames: The clip: uint8 of shape [height, width, 3] each.
        frames_per_second: Its rate.
        prompts: Prompts by the first frame that they concern. A new prompt begins a new row.
        columns: Most pictures of a row.
        rows: Most rows, if every prompt needs one only; more prompts make more.
        height: Height of a picture in pixels, about: small ones grow by whole factors.

    Raises:
        ValueError: There are no frames.
    """
    if not frames:
        raise ValueError("there are no frames")
    parts = _parts(len(frames), prompts)
    each = max(1, rows // len(parts))
    chosen = [(text, _spread(start, end, columns * each)) for start, end, text in parts]
    size = _size(frames[0], height)
    font = ImageFont.load_default(size=13)
    line = 18
    lines = [
        (text, indices[at : at + columns])
        for text, indices in chosen
        for at in range(0, len(indices), columns)
    ]
    titled = sum(1 for (text, _), before in zip(lines, [("", []), *lines], strict=False) if text != before[0])
    width = _GAP + columns * (size[0] + _GAP)
    sheet = Image.new("RGB", (width, _GAP + titled * line + len(lines) * (size[1] + line)), _BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    y, last = _GAP, ""
    for text, indices in lines:
        if text != last:
            draw.text((_GAP, y), _fit(text, font, width - 2 * _GAP), fill=_SEAM if last else _INK, font=font)
            y, last = y + line, text
        for column, index in enumerate(indices):
            x = _GAP + column * (size[0] + _GAP)
            picture = Image.fromarray(frames[index]).resize(size, Image.Resampling.NEAREST)
            sheet.paste(picture, (x, y))
            draw.text((x, y + size[1]), f"{index / frames_per_second:.2f} s", fill=_INK, font=font)
        y += size[1] + line
    return sheet


def write_sheet(sheet: Image.Image, path: Path) -> None:
    """Write a sheet as a small PNG: a palette of 256 colours is enough for it.

    Raises:
        CommandError: The file cannot be written.
    """
    try:
        sheet.quantize(256, dither=Image.Dither.NONE).save(path, "PNG", optimize=True)
    except OSError as error:
        raise CommandError(f"{path} cannot be written: {error.strerror or error}") from None


def _parts(count: int, prompts: Mapping[int, str]) -> list[tuple[int, int, str]]:
    """(first frame, end, prompt) of each prompt that has frames."""
    starts = sorted(at for at in prompts if at < count)
    if not starts or starts[0] > 0:
        starts.insert(0, 0)
    ends = [*starts[1:], count]
    return [(start, end, prompts.get(start, "")) for start, end in zip(starts, ends, strict=True)]


def _spread(start: int, end: int, most: int) -> list[int]:
    """At most `most` frames of [start, end), at equal distances, the first and the last among them."""
    number = min(most, end - start)
    return [int(index) for index in np.linspace(start, end - 1, number).round()]


def _size(frame: Frame, height: int) -> tuple[int, int]:
    tall, wide = frame.shape[:2]
    factor = max(1, round(height / tall)) if tall < height else height / tall
    return round(wide * factor), round(tall * factor)


def _fit(text: str, font: Any, width: int) -> str:
    """The text, cut where it would be wider."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"
