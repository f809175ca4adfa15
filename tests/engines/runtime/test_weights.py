"""Files of weights: what is packed comes back, and what is damaged is told."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from realtide.engines.runtime.program import ProgramError, TensorSpec
from realtide.engines.runtime.quantize import SCALE, pack_rows
from realtide.engines.runtime.weights import WeightFile, resolve


@pytest.mark.parametrize("shape", [(6, 5), (4, 3, 2, 2), (3,)])
def test_rows_in_int8_come_back_within_half_a_step(tmp_path: Path, shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(1)
    # Rows of very different sizes, one of them zero: a single scale would lose the small ones.
    size = np.array([1e-3, 1, 0, 50, 7, 2])[: shape[0]].reshape(-1, *[1] * (len(shape) - 1))
    weight = (rng.standard_normal(shape) * size).astype(np.float32)
    save_file(pack_rows("w", weight) | {"plain": weight.astype(np.float16)}, tmp_path / "w.safetensors")
    weights = WeightFile(tmp_path / "w.safetensors")
    assert sorted(weights) == ["plain", "w"]
    assert len(weights) == 2
    assert "w@scale" not in weights
    back = weights["w"]
    assert back.dtype == np.float32
    peaks = np.abs(weight.reshape(shape[0], -1)).max(1)
    apart = np.abs(back - weight).reshape(shape[0], -1).max(1)
    assert (apart <= peaks / 127 / 2 * 1.001).all()
    # What a graph asks for is made of it, in the graph's type.
    resolved = resolve(TensorSpec("w", np.dtype(np.float16), shape), weights)
    np.testing.assert_array_equal(resolved, back.astype(np.float16))


def test_packed_rows_that_do_not_fit_are_told(tmp_path: Path) -> None:
    packed = pack_rows("w", np.ones((4, 3), np.float32))
    save_file(packed | {"w" + SCALE: packed["w" + SCALE][:2]}, tmp_path / "few.safetensors")
    with pytest.raises(ProgramError, match=r"'w' must be int8 with a scale for each of its \(4,\) rows"):
        WeightFile(tmp_path / "few.safetensors")["w"]
    save_file({"w" + SCALE: packed["w" + SCALE]}, tmp_path / "lost.safetensors")
    with pytest.raises(ProgramError, match="'w' has scales and no values"):
        WeightFile(tmp_path / "lost.safetensors")
