"""Int8 weights for matrix products, computed from the stored float weights when a graph is loaded (ours).

Symmetric, one scale per output column: ``w[k, n] ~ q[k, n] * scale[n]``, ``q`` in -127..127. A graph asks
for them by initializer name: a weight ``w`` stored as [K, N] gives ``w@int8`` [K, N] and ``w@scale`` [N]; a
weight stored as [N, K] (the layout of a linear layer) gives ``w@int8.T`` [K, N] and ``w@scale.T`` [N].
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from realtide.engines.runtime.program import Array

INT8, SCALE, TRANSPOSED = "@int8", "@scale", ".T"
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
    transpose = recipe.endswith(TRANSPOSED)
    kind = "@" + recipe.removesuffix(TRANSPOSED)
    if kind not in (INT8, SCALE):
        return None
    compute = quantize_columns if kind == INT8 else column_scales
    return base, (lambda weight: compute(weight.T)) if transpose else compute
