"""Latents to tokens and back (FLUX's release). Numpy only."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Float32 = NDArray[np.float32]


def pack(latents: Float32, patch: int) -> Float32:
    """Latents [C, h, w] -> tokens [h / patch * w / patch, C * patch * patch], row by row."""
    channels, height, width = latents.shape
    split = latents.reshape(channels, height // patch, patch, width // patch, patch)
    return np.ascontiguousarray(split.transpose(1, 3, 0, 2, 4)).reshape(-1, channels * patch * patch)


def unpack(tokens: Float32, grid: tuple[int, int], patch: int) -> Float32:
    """The inverse of `pack`, for tokens of a grid of rows and columns."""
    rows, columns = grid
    split = tokens.reshape(rows, columns, -1, patch, patch).transpose(2, 0, 3, 1, 4)
    return np.ascontiguousarray(split).reshape(split.shape[0], rows * patch, columns * patch)
