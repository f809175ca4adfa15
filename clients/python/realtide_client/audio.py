"""Samples to bytes in the session's encoding."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from realtide_client.types import Encoding

Samples = npt.NDArray[Any] | bytes | bytearray | memoryview

_WIDTHS: dict[Encoding, int] = {"linear16": 2, "float32": 4}
FULL_SCALE = 32768.0


def sample_bytes(encoding: Encoding) -> int:
    """Bytes of one sample."""
    return _WIDTHS[encoding]


def encode(samples: Samples, encoding: Encoding) -> bytes:
    """Encode mono samples, little endian.

    Args:
        samples: int16 (full scale 32768), float32 or float64 (full scale 1.0) of shape [n] or [n, 1]; or
            bytes, which must be in the session's encoding already.
        encoding: The session's encoding.

    Raises:
        ValueError: More than one channel, another type, NaN or infinity, or bytes that are not whole samples.
    """
    if isinstance(samples, bytes | bytearray | memoryview):
        data = bytes(samples)
        width = sample_bytes(encoding)
        if len(data) % width:
            raise ValueError(f"{len(data)} bytes are not whole {encoding} samples of {width} bytes")
        return data
    array = np.asarray(samples)
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.ndim != 1:
        raise ValueError(f"audio must be mono with shape [n] or [n, 1], not {list(array.shape)}")
    if array.dtype == np.int16:
        if encoding == "linear16":
            return array.astype("<i2").tobytes()
        return (array.astype("<f4") / np.float32(FULL_SCALE)).astype("<f4").tobytes()
    if array.dtype not in (np.float32, np.float64):
        raise ValueError(f"audio must be int16, float32 or float64, not {array.dtype}")
    if not np.isfinite(array).all():
        raise ValueError("audio contains NaN or infinity")
    if encoding == "float32":
        return array.astype("<f4").tobytes()
    scaled = np.rint(array * array.dtype.type(FULL_SCALE))
    clipped: npt.NDArray[np.int16] = np.clip(scaled, -FULL_SCALE, FULL_SCALE - 1).astype("<i2")
    return clipped.tobytes()
