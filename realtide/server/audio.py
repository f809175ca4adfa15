"""PCM bytes to float32 samples."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from realtide.server.status import invalid
from realtide_client.v1 import speech_pb2

Samples = npt.NDArray[np.float32]

BYTES: dict[int, int] = {speech_pb2.AUDIO_ENCODING_LINEAR16: 2, speech_pb2.AUDIO_ENCODING_FLOAT32: 4}
NAMES: dict[int, str] = {
    speech_pb2.AUDIO_ENCODING_LINEAR16: "LINEAR16",
    speech_pb2.AUDIO_ENCODING_FLOAT32: "FLOAT32",
}


def decode(data: bytes, encoding: int) -> Samples:
    """Samples [N] of a chunk in little endian `encoding`; full scale is 1.0.

    LINEAR16 is copied once. FLOAT32 is not copied (the array is a read-only view of `data`) unless it must be
    clipped.

    Raises:
        StatusError: INVALID_ARGUMENT, no bytes, part of a sample, NaN or infinity.
    """
    size = BYTES[encoding]
    if not data:
        raise invalid("audio.data", "empty, at least one sample is needed")
    if len(data) % size:
        raise invalid("audio.data", f"{len(data)} bytes, must be a multiple of {size} ({NAMES[encoding]})")
    if encoding == speech_pb2.AUDIO_ENCODING_LINEAR16:
        samples: Samples = np.multiply(np.frombuffer(data, "<i2"), np.float32(1 / 32768), dtype=np.float32)
        return samples
    view: Samples = np.frombuffer(data, "<f4")
    # Minimum and maximum carry a NaN along, so no temporary array is needed to look for one.
    low, high = float(view.min()), float(view.max())
    if not (-np.inf < low and high < np.inf):
        raise invalid("audio.data", "holds NaN or infinity, samples must be finite")
    if low < -1.0 or high > 1.0:
        view = np.clip(view, -1.0, 1.0)
    return view


def pieces(samples: Samples, size: int) -> Iterator[Samples]:
    """Views of at most `size` samples, so that one large message cannot hold up a step of others."""
    for start in range(0, len(samples), size):
        yield samples[start : start + size]
