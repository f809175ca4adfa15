"""Programs that leave everything on the device: types, bound inputs, errors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from realtide.engines.runtime.device_program import DeviceProgram
from realtide.engines.runtime.program import FeedError, ProgramError
from realtide.engines.runtime.resident_program import Bound, ResidentProgram, named


class Scaled(nn.Module):
    """x times the weight plus what is bound, added to the state."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((2,), 2.0, dtype=torch.bfloat16))

    def forward(self, x: Tensor, shift: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
        if x.shape[0] != 2:
            raise RuntimeError("no such shape")
        return x * self.weight, total.add_(x * self.weight + shift)


class Made:
    """A program, its state and what is bound."""

    def __init__(self) -> None:
        self.total = torch.zeros(2, dtype=torch.bfloat16)
        self.bound = Bound({"shift": torch.zeros(2, dtype=torch.bfloat16)})
        program = DeviceProgram(Scaled(), [self.total], list(self.bound.tensors.values()))
        types = {"x": torch.bfloat16}
        self.program = ResidentProgram("scaled", named(program, ["y"]), types, "cpu", self.bound)


def test_arrays_and_tensors_are_cast_and_results_stay_tensors() -> None:
    made = Made()
    shift = np.array([1.0, 0.0], np.float32)
    for x in (np.array([1.0, 2.0], np.float32), torch.tensor([1.0, 2.0], dtype=torch.float64)):
        result = made.program.run({"x": x, "shift": shift})
        assert result["y"].dtype == torch.bfloat16
        assert result["y"].tolist() == [2.0, 4.0]
    assert made.total.tolist() == [6.0, 8.0]


def test_bound_inputs_stay_where_they_are_and_are_copied_only_when_others_come() -> None:
    made = Made()
    address = made.bound.tensors["shift"].data_ptr()
    x, first, second = np.zeros(2, np.float32), torch.ones(2), torch.full((2,), 5.0)
    made.program.run({"x": x, "shift": first})
    assert made.total.tolist() == [1.0, 1.0]
    made.bound.tensors["shift"].fill_(0)  # nothing overwrites it: the same tensor is given
    made.program.run({"x": x, "shift": first})
    assert made.total.tolist() == [1.0, 1.0]
    made.program.run({"x": x, "shift": second})
    assert made.total.tolist() == [6.0, 6.0]
    made.program.run({"x": x, "shift": first})
    assert made.total.tolist() == [7.0, 7.0]
    assert made.bound.tensors["shift"].data_ptr() == address


def test_what_does_not_fit_is_named() -> None:
    made = Made()
    x, shift = np.zeros(2, np.float32), np.zeros(2, np.float32)
    with pytest.raises(FeedError, match="input 'x' is missing"):
        made.program.run({"shift": shift})
    with pytest.raises(FeedError, match="input 'shift' is missing"):
        made.program.run({"x": x})
    with pytest.raises(FeedError, match="scaled: unknown input 'y', 'z'"):
        made.program.run({"x": x, "shift": shift, "z": x, "y": x})
    with pytest.raises(ProgramError, match=r"scaled: run failed with x \[3\]: no such shape"):
        made.program.run({"x": np.zeros(3, np.float32), "shift": shift})
    assert made.total.tolist() == [0.0, 0.0]
