"""Weights of matrix products in 8 bits, computed from the stored weights when a graph is loaded (ours).

Int8 is symmetric, one scale per output column: ``w[k, n] ~ q[k, n] * scale[n]``, ``q`` in -127..127. A graph
asks for them by initializer name: a weight ``w`` stored as [K, N] gives ``w@int8`` [K, N] and ``w@scale``
[N]; a weight stored as [N, K] (the layout of a linear layer) gives ``w@int8.T`` [K, N] and ``w@scale.T`` [N].

Float8 (e4m3) has one scale for a weight, a power of two: ``w@float8`` and ``w@float8.T`` [K, N], and
``w@float8_scale`` []. Dividing by such a scale and multiplying with it are exact, in half precision too and
whether or not it is done by the reciprocal, so that every runtime rounds to the same; and as float8 rounds
relative to each value, scales in between would gain nothing.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from realtide.engines.runtime.program import Array, ProgramError

INT8, SCALE, TRANSPOSED = "@int8", "@scale", ".T"
FLOAT8, FLOAT8_SCALE = "@float8", "@float8_scale"
FLOAT8_MOST = 448.0
"""The largest number of e4m3."""
FLOAT8_CAPABILITY = (8, 9)
"""Least compute capability of a GPU that multiplies float8: Ada, Hopper and newer."""
_SCALES = 2.0**-24, 2.0**15
"""Smallest and largest power of two of float16."""

COPY = "#"
"""Followed by a number: the same value for another product (see int8.py on why it is not shared)."""


def column_scales(weight: Array) -> Array:
    """Scales [N] float32 of a weight [K, N]: each column's largest magnitude over 127, or 1 if that is 0."""
    peak = np.abs(weight.astype(np.float32)).max(axis=0, initial=0.0)
    scale: Array = np.where(peak > 0, peak / np.float32(127), np.float32(1)).astype(np.float32)
    return scale


def quantize_columns(weight: Array) -> Array:
    """The weight [K, N] as int8 [K, N] under `column_scales`, rounded to the nearest even."""
    scaled = weight.astype(np.float32) / column_scales(weight)
    return np.clip(np.rint(scaled), -127, 127).astype(np.int8)


def float8_scale(peak: float) -> float:
    """The smallest power of two that float16 has and that brings `peak` into e4m3's range; 1 for a peak of 0.

    Raises:
        ProgramError: it is not finite, or too large for float16.
    """
    if not 0 <= peak <= FLOAT8_MOST * _SCALES[1]:
        raise ProgramError(f"magnitude must be finite and at most {FLOAT8_MOST * _SCALES[1]:g}, not {peak}")
    if peak == 0:
        return 1.0
    mantissa, exponent = np.frexp(peak / FLOAT8_MOST)
    return max(float(np.ldexp(1.0, int(exponent) - (mantissa == 0.5))), _SCALES[0])


def weight_float8_scale(weight: Array) -> Array:
    """The scale [] float32 of a weight in float8; see `float8_scale`."""
    return np.asarray(float8_scale(float(np.abs(weight.astype(np.float32)).max(initial=0.0))), np.float32)


def quantize_float8(weight: Array) -> Array:
    """The weight in float8 (e4m3) under `weight_float8_scale`, rounded to the nearest even.

    Raises:
        ProgramError: ml-dtypes is not installed (extra ``export``).
    """
    try:
        from ml_dtypes import float8_e4m3fn
    except ImportError:
        raise ProgramError("weights in float8 need ml-dtypes (extra export)") from None
    scaled = weight.astype(np.float32) / weight_float8_scale(weight)
    narrow: Array = scaled.astype(float8_e4m3fn)
    return narrow


def pack_rows(name: str, weight: Array) -> dict[str, Array]:
    """A weight [N, ...] as a weight file stores it in a byte an element: int8, and a scale [N] for each row.

    `WeightFile` gives it back in float32, each element at most half a row's scale from what it was.
    """
    rows = weight.reshape(len(weight), -1).T
    stored = np.ascontiguousarray(quantize_columns(rows).T.reshape(weight.shape))
    return {name: stored, name + SCALE: column_scales(rows)}


def unpack_rows(stored: Array, scales: Array) -> Array:
    """The inverse of `pack_rows`: [N, ...] in float32."""
    wide: Array = stored * scales.reshape(-1, *[1] * (stored.ndim - 1))
    return wide


def derived(name: str) -> tuple[str, Callable[[Array], Array]] | None:
    """The stored weight an initializer is computed from, and the function; None if it is stored itself."""
    base, at, recipe = name.partition(COPY)[0].rpartition("@")
    if not at:
        return None
    kind = "@" + recipe.removesuffix(TRANSPOSED)
    compute = _RECIPES.get(kind)
    if compute is None:
        return None
    return base, (lambda weight: compute(weight.T)) if recipe.endswith(TRANSPOSED) else compute


_RECIPES: dict[str, Callable[[Array], Array]] = {
    INT8: quantize_columns,
    SCALE: column_scales,
    FLOAT8: quantize_float8,
    FLOAT8_SCALE: weight_float8_scale,
}
