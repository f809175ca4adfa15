"""Normal noise that depends on nothing but the seed and where it is used (ours).

Every draw starts a Philox counter of its own, so a session that was parked, moved or resumed goes on with the
same noise and carries no generator state. Only Philox's raw bits are numpy's (their stream is promised not to
change); they become normal numbers by Box and Muller's method in float64. Numpy only.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Float32 = NDArray[np.float32]


def normal(seed: int, frame: int, step: int, shape: tuple[int, ...]) -> Float32:
    """Standard normal noise.

    Args:
        seed: the session's, 0 to 2**64 - 1.
        frame: index of what is drawn: of video, the latent frame counted from the start.
        step: 0 for the noise that it starts from, k for what is added after denoising pass k.
        shape: of the result.

    Raises:
        ValueError: the seed is out of range.
    """
    check_seed(seed)
    count = math.prod(shape)
    # The lowest word counts; the others say where: draws of other frames or passes never overlap.
    # As arrays: numpy makes floats of a list with large numbers.
    counter, key = np.array([0, step, frame, 0], np.uint64), np.array([seed, 0], np.uint64)
    bits = np.random.Philox(counter=counter, key=key)
    raw = bits.random_raw(2 * -(-count // 2)).reshape(2, -1)
    # 53 bits each; the radius' number lies in (0, 1], so that its logarithm is finite.
    radius = np.sqrt(-2.0 * np.log(((raw[0] >> np.uint64(11)) + np.uint64(1)) * 2.0**-53))
    angle = (raw[1] >> np.uint64(11)) * (2.0 * np.pi * 2.0**-53)
    pairs = np.stack([radius * np.cos(angle), radius * np.sin(angle)], -1)
    return pairs.reshape(-1)[:count].reshape(shape).astype(np.float32)


def check_seed(seed: int) -> None:
    """Raise ValueError unless the seed is in 0..2**64-1."""
    if not 0 <= seed < 1 << 64:
        raise ValueError(f"seed must be in 0..2**64-1, got {seed}")
