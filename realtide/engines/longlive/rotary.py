"""Tables of the 3-D rotary embedding: cosines and sines by frame, and by place in a frame (Wan2.1).

The complex pairs of a head are split over time, height and width, each with theta 10000 over its own width.
Angles are computed in float64, so that positions may grow without losing digits. Numpy only.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from realtide.engines.longlive.config import VideoConfig

Float32 = NDArray[np.float32]
THETA = 10000.0


def time_table(config: VideoConfig, frames: ArrayLike) -> Float32:
    """Cosines and sines [n, pairs of time, 2] for frames at positions [n]."""
    return _stacked(_angles(np.asarray(frames), config.transformer.rotary_pairs[0]))


def space_table(config: VideoConfig) -> Float32:
    """Cosines and sines [tokens of a frame, pairs of height and width, 2], row by row."""
    rows, columns = config.grid
    _, high, wide = config.transformer.rotary_pairs
    vertical = np.repeat(_angles(np.arange(rows), high), columns, 0)
    horizontal = np.tile(_angles(np.arange(columns), wide), (rows, 1))
    return _stacked(np.concatenate([vertical, horizontal], -1))


def _angles(positions: NDArray[Any], pairs: int) -> NDArray[np.float64]:
    frequencies = THETA ** (-np.arange(pairs) / pairs)
    return positions.astype(np.float64)[:, None] * frequencies


def _stacked(angles: NDArray[np.float64]) -> Float32:
    return np.stack([np.cos(angles), np.sin(angles)], -1).astype(np.float32)
