"""Noise levels of flow matching and the few steps that are taken (LongLive's release; Lipman et al. 2023).

A latent at noise level sigma is ``x = (1 - sigma) * x0 + sigma * noise``; the model predicts the *flow*
``noise - x0``. Levels are computed in float64. Numpy only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]

TABLE = 1000
"""Entries of the sigma table; a timestep is a sigma times this."""


def sigma_table(shift: float) -> Float64:
    """Sigmas [1000] from 1 down to just above 0, shifted towards noise."""
    even = np.linspace(1.0, 0.0, TABLE + 1)[:-1]
    return shift * even / (1 + (shift - 1) * even)


def warped(steps: Sequence[int], shift: float) -> Float64:
    """Timesteps of the few-step list: entry k stands for index 1000 - k of the table; 0 for no noise."""
    timesteps = np.append(TABLE * sigma_table(shift), 0.0)
    return timesteps[TABLE - np.asarray(steps, np.int64)]


def clean(noisy: Float32, flow: Float32, timestep: float) -> Float32:
    """The clean latents that a prediction amounts to; arrays of one shape."""
    sigma = timestep / TABLE
    return (noisy.astype(np.float64) - sigma * flow).astype(np.float32)


def noised(latents: Float32, noise: Float32, timestep: float) -> Float32:
    """Clean latents brought to a timestep's noise level; arrays of one shape."""
    sigma = timestep / TABLE
    return ((1 - sigma) * latents.astype(np.float64) + sigma * noise).astype(np.float32)


def sinusoid(timesteps: Sequence[float] | NDArray[Any], width: int) -> Float32:
    """Features [..., width] of timesteps [...]: cosines, then sines.

    They are made here, in float64, and not in the graph: a timestep of 1000 leaves float32 few digits.
    """
    half = width // 2
    frequencies = 10000.0 ** (-np.arange(half) / half)
    angles = np.asarray(timesteps, np.float64)[..., None] * frequencies
    return np.concatenate([np.cos(angles), np.sin(angles)], -1).astype(np.float32)
