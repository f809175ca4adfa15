"""How far two graphs are apart, as reports say it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from safetensors.numpy import load_file

from realtide.engines.runtime.host_form import host_form
from realtide.engines.runtime.narrow import narrow_graph
from realtide.engines.runtime.program import ProgramError
from realtide.engines.runtime.quality import Sample, measure, measure_each, worst
from tests.engines.runtime.cell import Exported, feeds, state


def pointwise(path: Path, operator: str, output: str = "y", code: int = TensorProto.FLOAT) -> Path:
    value = helper.make_tensor_value_info("x", code, ["n"])
    result = helper.make_tensor_value_info(output, code, ["n"])
    graph = helper.make_graph(
        [helper.make_node(operator, ["x", "x"], [output])], "program", [value], [result]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    path.write_bytes(model.SerializeToString())
    return path


def test_differences_are_relative_and_largest_over_all_calls(tmp_path: Path) -> None:
    double, square = pointwise(tmp_path / "a", "Add"), pointwise(tmp_path / "b", "Mul")
    calls = [{"x": np.array(values, np.float32)} for values in ([2.0, 1.0], [3.0])]
    (found,) = measure(double, square, {}, Sample(calls, {}))
    # 2x: 4, 2, 6; x squared: 4, 1, 9.
    assert (found.output, found.largest, found.peak) == ("y", 3.0, 6.0)
    assert found.relative == pytest.approx(np.sqrt(10 / 56))
    (same,) = measure(double, double, {}, Sample(calls, {}))
    assert (same.relative, same.largest) == (0.0, 0.0)


def test_what_is_not_finite_passes_for_no_number(tmp_path: Path) -> None:
    double, quotient = pointwise(tmp_path / "a", "Add"), pointwise(tmp_path / "b", "Div")
    (found,) = measure(double, quotient, {}, Sample([{"x": np.array([0.0, 1.0], np.float32)}], {}))
    assert found.relative == np.inf


def test_of_integers_the_share_that_differs_is_told(tmp_path: Path) -> None:
    double = pointwise(tmp_path / "a", "Add", code=TensorProto.INT64)
    square = pointwise(tmp_path / "b", "Mul", code=TensorProto.INT64)
    (found,) = measure(double, square, {}, Sample([{"x": np.array([0, 2, 3, 5])}], {}))
    assert (found.relative, found.largest) == (0.5, 15.0)


def test_state_is_compared_after_the_calls(exported: Exported, tmp_path: Path) -> None:
    narrow_graph(exported.graph, tmp_path / "cell.onnx", "float16")
    sample = Sample([feeds(3, 0), feeds(5, 1)], state())
    found = {
        q.output: q
        for q in measure(exported.graph, tmp_path / "cell.onnx", load_file(exported.weights), sample)
    }
    assert set(found) == {"y", "picked", "keys.next", "values.next"}
    assert found["picked"].relative == 0.0
    for name in ("y", "keys.next", "values.next"):
        assert 0 < found[name].relative < 0.005
    assert not state()["keys"].any()  # and the sample's own state is as it was


def test_of_several_samples_the_worst_of_each_output_is_told(tmp_path: Path) -> None:
    double, square = pointwise(tmp_path / "a", "Add"), pointwise(tmp_path / "b", "Mul")
    samples = [Sample([{"x": np.array([value], np.float32)}], {}) for value in (2.0, 4.0, 3.0)]
    each = measure_each(double, square, {}, *samples)
    assert [[found.relative for found in one] for one in each] == [[0.0], [1.0], [0.5]]
    assert worst(each) == measure(double, square, {}, *samples) == each[1]


def test_a_host_forms_state_is_rounded_as_the_graph_holds_it(exported: Exported, tmp_path: Path) -> None:
    narrow, form = tmp_path / "narrow.onnx", tmp_path / "form.onnx"
    narrow_graph(exported.graph, narrow, "bfloat16")
    host_form(narrow, form)
    third = np.float32(1 / 3)
    held = {name: np.full_like(array, third) for name, array in state().items()}
    sample = Sample([feeds(3, 0)], held)
    weights = load_file(exported.weights)
    (rounded,) = measure_each(exported.graph, form, weights, sample, state_of=narrow)
    (plain,) = measure_each(exported.graph, form, weights, sample)
    # Rows that the call does not write keep what they had: a third in bfloat16 is 0.333984375.
    keys, same = ({q.output: q for q in found}["keys.next"] for found in (rounded, plain))
    assert keys.largest >= 0.333984375 - third
    assert keys.relative > same.relative


def test_other_outputs_are_refused(tmp_path: Path) -> None:
    one, other = pointwise(tmp_path / "a", "Add"), pointwise(tmp_path / "b", "Add", output="z")
    assert onnx.load(other).graph.output[0].name == "z"
    with pytest.raises(ProgramError, match="'y' is an output of one of the two graphs only"):
        measure(one, other, {}, Sample([{"x": np.ones(1, np.float32)}], {}))
