"""Noise of latent frames: depends on the seed, the frame and the pass (ours; see `runtime.noise`)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from realtide.engines.runtime.noise import check_seed as check_seed
from realtide.engines.runtime.noise import normal as normal

Float32 = NDArray[np.float32]


def frames(seed: int, first: int, count: int, step: int, shape: tuple[int, ...]) -> Float32:
    """Noise [count, *shape] for frames first .. first+count-1; each frame's does not depend on the others."""
    return np.stack([normal(seed, first + index, step, shape) for index in range(count)])
