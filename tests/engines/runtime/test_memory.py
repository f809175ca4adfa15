"""Host memory and a device's compute the same."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from realtide.engines.runtime.memory import HOST, Memory
from realtide.engines.runtime.program import Array, ProgramError
from realtide.engines.runtime.torch_memory import TorchMemory, out_of_memory

BOTH = pytest.mark.parametrize("memory", [HOST, TorchMemory()], ids=["host", "torch"])


def random(*shape: int) -> Array:
    return np.random.default_rng(1).standard_normal(shape).astype(np.float32)


@BOTH
def test_what_is_put_comes_back_joined_and_in_part(memory: Memory) -> None:
    x, y = random(3, 2), random(2, 2)
    joined = memory.join([memory.put(x), memory.put(y)])
    np.testing.assert_array_equal(memory.get(joined[1:4]), np.concatenate([x, y])[1:4])
    aside = memory.join([memory.put(x), memory.put(x)], 1)
    np.testing.assert_array_equal(memory.get(aside), np.concatenate([x, x], 1))
    assert joined.nbytes == 5 * 2 * 4
    memory.fill(joined, np.full((5, 2), 3.0, np.float32))
    assert (memory.get(joined) == 3).all()
    memory.wait()
    memory.enter()
    assert memory.device == "cpu"


@BOTH
def test_read_only_arrays_are_taken(memory: Memory) -> None:
    array = random(2)
    array.flags.writeable = False
    np.testing.assert_array_equal(memory.get(memory.put(array)), array)


@BOTH
def test_mixing_is_exact_where_float32_is_not(memory: Memory) -> None:
    x, y = random(50), random(50) * 1e-3
    mixed = memory.get(memory.mix(0.1, memory.put(x), -0.7, memory.put(y)))
    wide = 0.1 * x.astype(np.float64) - 0.7 * y.astype(np.float64)
    np.testing.assert_array_equal(mixed, wide.astype(np.float32))
    assert mixed.dtype == np.float32
    assert (mixed != np.float32(0.1) * x - np.float32(0.7) * y).any()


@BOTH
def test_pixels_are_rounded_clipped_and_turned(memory: Memory) -> None:
    planes = np.zeros((1, 3, 1, 5), np.float32)
    planes[0, :, 0] = [-2.0, -1.0, 1.0 / 255, 3.0 / 255, 1.7]
    planes[0, 2] += 0.1
    images = memory.pixels(memory.put(planes))
    assert images.dtype == np.uint8
    assert images.shape == (1, 1, 5, 3)
    assert images.flags.c_contiguous
    assert images[0, 0, :, 0].tolist() == [0, 0, 128, 129, 255]
    assert images[0, 0, :, 2].tolist() == [0, 13, 141, 142, 255]


def test_narrow_values_come_back_in_float32() -> None:
    memory = TorchMemory()
    kept = memory.zeros((4,), torch.bfloat16)
    memory.fill(kept, np.array([1.0, -2.5, 0.1, 3.0], np.float32))
    back = memory.get(kept)
    assert back.dtype == np.float32
    assert back[[0, 1, 3]].tolist() == [1.0, -2.5, 3.0]
    assert back[2] == pytest.approx(0.1, rel=2**-8)
    again = memory.zeros((4,), torch.bfloat16)
    memory.fill(again, back)
    assert torch.equal(again, kept)


def test_what_was_read_does_not_change_with_its_origin() -> None:
    memory = TorchMemory()
    values = memory.zeros((2,), torch.float32)
    read = memory.get(values)
    values.fill_(1)
    assert read.tolist() == [0.0, 0.0]


def test_a_full_device_is_told_in_one_sentence() -> None:
    told = pytest.raises(ProgramError, match="too little memory for two caches: no room")
    with told, out_of_memory("two caches"):
        raise torch.OutOfMemoryError("no room")
