"""Noise levels of flow matching and Euler's steps between them (FLUX's release; Lipman et al. 2023).

A latent at noise level sigma is ``x = (1 - sigma) * x0 + sigma * noise``; the model predicts the *velocity*
``noise - x0``. Numpy only.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

from realtide.engines.easycontrol.config import SamplerConfig

Float32 = NDArray[np.float32]

TIMES = 1000.0
"""Timestep and guidance enter the network times this."""


def sigmas(config: SamplerConfig, steps: int, tokens: int) -> Float32:
    """Noise levels [steps + 1] from 1 to 0 for an image of `tokens` tokens."""
    slope = (config.max_shift - config.base_shift) / (config.max_tokens - config.base_tokens)
    shift = math.exp(config.base_shift + slope * (tokens - config.base_tokens))
    even = np.linspace(1.0, 1.0 / steps, steps)
    shifted = shift / (shift + (1.0 / even - 1.0))
    return np.append(shifted, 0.0).astype(np.float32)


def sinusoid(values: ArrayLike, width: int) -> Float32:
    """Features [..., width] of timesteps or guidance scales [...]: cosines, then sines.

    In float32 throughout, as the weights were trained: float64 gives features that differ by 2e-5.
    """
    half = width // 2
    exponents = np.float32(-math.log(10000.0)) * np.arange(half, dtype=np.float32) / np.float32(half)
    # The exponents' own rounding counts; numpy's exponential of float32 is a digit off in many places.
    frequencies = np.exp(exponents.astype(np.float64)).astype(np.float32)
    angles = np.asarray(values, np.float32)[..., None] * np.float32(TIMES) * frequencies
    return np.concatenate([np.cos(angles), np.sin(angles)], -1).astype(np.float32)


def clean(noisy: Float32, velocity: Float32, sigma: float) -> Float32:
    """The clean latents that a prediction amounts to; arrays of one shape."""
    return noisy - np.float32(sigma) * velocity


def step(noisy: Float32, velocity: Float32, sigma: float, following: float) -> Float32:
    """Euler's step from noise level `sigma` to `following`; arrays of one shape."""
    return noisy + (np.float32(following) - np.float32(sigma)) * velocity
