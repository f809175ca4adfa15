"""Noise levels of flow matching and the few steps that are taken (LongLive's release; Lipman et al. 2023).

A latent at noise level sigma is ``x = (1 - sigma) * x0 + sigma * noise``; the model predicts the *flow*
``noise - x0``. Levels are computed in float64. Numpy only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from realtide.engines.runtime.memory import HOST, Memory, Values

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


def clean(noisy: Values, flow: Values, timestep: float, memory: Memory = HOST) -> Values:
    """The clean latents that a prediction amounts to; values of one shape."""
    return memory.mix(1.0, noisy, -timestep / TABLE, flow)


def noised(latents: Values, noise: Values, timestep: float, memory: Memory = HOST) -> Values:
    """Clean latents brought to a timestep's noise level; values of one shape."""
    sigma = timestep / TABLE
    return memory.mix(1 - sigma, latents, sigma, noise)


def sinusoid(timesteps: Sequence[float] | NDArray[Any], width: int) -> Float32:
    """Features [..., width] of timesteps [...]: cosines, then sines.

    They are made here, in float64, and not in the graph: a timestep of 1000 leaves float32 few digits.
    """
    half = width // 2
    frequencies = 10000.0 ** (-np.arange(half) / half)
    angles = np.asarray(timesteps, np.float64)[..., None] * frequencies
    return np.concatenate([np.cos(angles), np.sin(angles)], -1).astype(np.float32)
