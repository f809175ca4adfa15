"""Positions of tokens and the tables of their rotary embedding (FLUX; EasyControl sections 3.2 and 3.3).

A token's position is (index, row, column). Text lies at the origin. A *spatial* condition's grid is stretched
over the image's (position-aware interpolation), so that a condition of one size guides images of any; a
*subject* keeps its own grid, shifted by some rows. Angles are computed in float64. Numpy only.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from realtide.engines.easycontrol.config import Role, TransformerConfig

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]
Grid = tuple[int, int]
THETA = 10000.0


def positions(grid: Grid, step: tuple[float, float] = (1.0, 1.0), first_row: float = 0.0) -> Float64:
    """Positions [rows * columns, 3] of a grid of tokens, row by row."""
    rows, columns = grid
    found = np.zeros((rows, columns, 3))
    found[..., 1] = (np.arange(rows) * step[0] + first_row)[:, None]
    found[..., 2] = np.arange(columns) * step[1]
    return found.reshape(-1, 3)


def condition_positions(role: Role, own: Grid, image: Grid, offset: int) -> Float64:
    """Positions of a condition's tokens.

    Args:
        role: whether they are the image's.
        own: the condition's grid.
        image: the image's grid.
        offset: rows that a subject is shifted by.
    """
    if role == "subject":
        return positions(own, first_row=offset)
    return positions(own, (image[0] / own[0], image[1] / own[1]))


def table(config: TransformerConfig, where: Float64) -> Float32:
    """Cosines and sines [n, head width / 2, 2] of positions [n, 3]; pairs lie side by side in a head."""
    angles = np.concatenate(
        [
            where[:, axis, None] * THETA ** (-np.arange(0, width, 2, dtype=np.float64) / width)
            for axis, width in enumerate(config.axes)
        ],
        1,
    )
    return np.stack([np.cos(angles), np.sin(angles)], -1).astype(np.float32)


def image_table(config: TransformerConfig, image: Grid) -> Float32:
    """Table of the text's tokens and then the image's."""
    text = np.zeros((config.text_tokens, 3))
    return table(config, np.concatenate([text, positions(image)]))
