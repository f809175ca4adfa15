"""Recorded calls are copies of what was fed and of the state before, of early calls and late ones."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from realtide.engines.runtime.program import Array, TensorSpec
from realtide.engines.runtime.recording import Recorded, shortened


class Sum:
    """Adds what it is fed to its state."""

    inputs: tuple[TensorSpec, ...] = ()
    outputs: tuple[TensorSpec, ...] = ()
    state: tuple[TensorSpec, ...] = ()

    def __init__(self, total: Array) -> None:
        self._total = total

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        self._total += feeds["x"]
        return {"total": self._total.copy()}


def test_calls_are_kept_as_they_were() -> None:
    total, x = np.zeros(2), np.ones(2)
    program = Recorded(Sum(total), {"total": total})
    for number in range(1, 10):
        x[:] = number
        assert program.run({"x": x})["total"][0] == number * (number + 1) / 2
    assert [sample.calls[0]["x"][0] for sample in program.samples] == [1, 2, 4, 8]
    assert [sample.state["total"][0] for sample in program.samples] == [0, 1, 6, 28]


def test_prompts_are_cut_to_what_a_model_takes() -> None:
    assert shortened("a red roof", len, 10) == "a red roof"
    assert shortened("a red roof", len, 9) == "a red"
    assert shortened("a red roof", len, 0) == ""
