"""Pictures from clients, decoded with suspicion, and pictures for clients (ours).

An upload says its size and format in its first bytes. Both are checked before a pixel is decoded, so that a
small file cannot ask for much memory; what is decoded is at most what was announced. Pillow is imported with
the first picture that needs it.
"""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Pixels8 = npt.NDArray[np.uint8]

FORMATS = ("PNG", "JPEG", "WEBP")
_GRAY = (128, 128, 128)


class BadPicture(ValueError):
    """An upload is no picture that is accepted; the message says why and what would be."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """What an upload may be.

    Attributes:
        max_bytes: of the file.
        max_pixels: width times height.
    """

    max_bytes: int
    max_pixels: int


def decode(data: bytes, bounds: Bounds, size: int, *, stretch: bool) -> Pixels8:
    """An upload as a condition [size, size, 3].

    Args:
        data: a PNG, JPEG or WebP file.
        bounds: of the file.
        size: of the result, each way.
        stretch: to fill it; otherwise it is scaled as it is and lies in the middle, on gray.

    Raises:
        BadPicture: see there.
    """
    from PIL import Image, ImageOps

    if not 0 < len(data) <= bounds.max_bytes:
        raise BadPicture(f"{len(data)} bytes, must be 1 to {bounds.max_bytes}")
    try:
        # Pillow's own limit is for the process and far above ours; its warning is nobody's business.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data), formats=FORMATS) as opened:
                width, height = opened.size
                pixels = width * height
                if not 0 < pixels <= bounds.max_pixels:
                    raise BadPicture(
                        f"{width}x{height} pixels, at most {bounds.max_pixels} pixels are accepted"
                    )
                if getattr(opened, "n_frames", 1) != 1:
                    raise BadPicture("it has several frames, one is accepted")
                opened.load()
                picture = _flat(ImageOps.exif_transpose(opened))
    except BadPicture:
        raise
    except Image.DecompressionBombError:
        raise BadPicture(f"too many pixels, at most {bounds.max_pixels} pixels are accepted") from None
    except Exception as error:  # of many kinds, as damaged files have it
        known = ", ".join(FORMATS)
        raise BadPicture(f"cannot be decoded ({type(error).__name__}), must be one of {known}") from None
    if stretch:
        return _array(picture.resize((size, size), Image.Resampling.LANCZOS))
    scale = size / max(picture.size)
    inner = [max(1, round(length * scale)) for length in picture.size]
    padded = Image.new("RGB", (size, size), _GRAY)
    small = picture.resize((inner[0], inner[1]), Image.Resampling.LANCZOS)
    padded.paste(small, ((size - inner[0]) // 2, (size - inner[1]) // 2))
    return _array(padded)


def encode(pixels: Pixels8, encoding: str, quality: int = 90) -> bytes:
    """Pixels [height, width, 3] as ``RAW_RGB``, ``PNG`` or ``JPEG``."""
    if encoding == "RAW_RGB":
        return pixels.tobytes()
    from PIL import Image

    written = io.BytesIO()
    picture = Image.fromarray(pixels)
    if encoding == "PNG":
        picture.save(written, "PNG", compress_level=4)
    else:
        subsampling = "4:4:4" if quality >= 90 else "4:2:0"
        picture.save(written, "JPEG", quality=quality, subsampling=subsampling)
    return written.getvalue()


def _flat(picture: Any) -> Any:
    """In RGB; what is transparent lies on black."""
    from PIL import Image

    if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
        clear = picture.convert("RGBA")
        ground = Image.new("RGBA", clear.size, (0, 0, 0, 255))
        return Image.alpha_composite(ground, clear).convert("RGB")
    if picture.mode.startswith("I") or picture.mode == "F":
        # 16 bits a channel: Pillow would cut them off, not scale them.
        wide = np.asarray(picture, np.float64)
        return Image.fromarray((np.clip(wide / 257, 0, 255)).astype(np.uint8)).convert("RGB")
    return picture.convert("RGB")


def _array(picture: Any) -> Pixels8:
    return np.array(picture, np.uint8)
