"""Int8 graphs: right to a percent in every row, independent of the batch, from the same float weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from realtide.engines.runtime.export import export_program
from realtide.engines.runtime.int8 import Activations, quantize_graph
from realtide.engines.runtime.ort import OrtOptions, OrtProgram, read_graph_file
from realtide.engines.runtime.products import calibrate
from realtide.engines.runtime.program import Array, ProgramError
from realtide.engines.runtime.quantize import column_scales, derived, quantize_columns

WIDTH = 96
WAYS: list[Activations] = ["row", "tensor", "static"]


class Block(nn.Module):
    """Products of every form: Gemm, MatMul with a transposed weight and with a plain one, shared weights."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(WIDTH, WIDTH)
        self.key = nn.Linear(WIDTH, 2 * WIDTH, bias=False)
        self.plain = nn.Parameter(torch.randn(2 * WIDTH, WIDTH) / 14)
        self.small = nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = torch.relu(self.query(x)) @ self.query.weight + self.key(x)[:, :WIDTH]
        return self.key(hidden[None])[0] @ self.plain, self.small(hidden)


@pytest.fixture(scope="module")
def block(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Array]]:
    torch.manual_seed(3)
    module = Block()
    path = tmp_path_factory.mktemp("block") / "block.onnx"
    examples = [{"x": torch.randn(rows, WIDTH)} for rows in (5, 0, 1)]
    program = export_program(module, examples, {}, ["y", "z"], path, dynamic={"x": {0: "n"}})
    return path, {name: value.numpy() for name, value in program.weights.items()}


def rows_of_many_sizes(count: int) -> Array:
    """Rows whose magnitudes differ a thousandfold: one scale for all of them would flatten the small ones."""
    random = np.random.default_rng(count)
    scale = np.logspace(-2, 1, count)[:, None]
    return (random.standard_normal((count, WIDTH)) * scale).astype(np.float32)


def quantize(block: tuple[Path, dict[str, Array]], activations: Activations) -> tuple[Path, list[str]]:
    """Quantize in one of the ways, calibrated on other inputs than those of the tests."""
    path, weights = block
    target = path.with_name(f"{activations}.int8.onnx")
    ranges = None
    if activations == "static":
        noise = np.random.default_rng(7).standard_normal((300, WIDTH)).astype(np.float32)
        ranges = calibrate(path, weights, {}, [{"x": noise}])
    return target, quantize_graph(path, target, activations=activations, ranges=ranges)


@pytest.mark.parametrize("activations", WAYS)
@pytest.mark.parametrize("exact", ["0", "1"])
def test_int8_is_close_to_float(
    block: tuple[Path, dict[str, Array]], activations: Activations, exact: str
) -> None:
    path, weights = block
    target, done = quantize(block, activations)
    assert set(done) == {"query.weight", "key.weight", "plain"}
    x = np.random.default_rng(0).standard_normal((9, WIDTH)).astype(np.float32)
    want = OrtProgram(path, weights, {}).run({"x": x})
    options = OrtOptions(config={"session.x64quantprecision": exact})
    got = OrtProgram(target, weights, {}, options).run({"x": x})
    for mine, true in zip(got["y"], want["y"], strict=True):
        assert np.linalg.norm(mine - true) < 0.03 * np.linalg.norm(true)
    # Rows of z have four elements, of which all may happen to be small: take them together.
    assert np.linalg.norm(got["z"] - want["z"]) < 0.03 * np.linalg.norm(want["z"])
    assert not np.array_equal(got["y"], want["y"])


@pytest.mark.parametrize("activations", ["row", "static"])
def test_rows_do_not_influence_each_other(
    block: tuple[Path, dict[str, Array]], activations: Activations
) -> None:
    path, weights = block
    program = OrtProgram(quantize(block, activations)[0], weights, {})
    x = rows_of_many_sizes(12)
    together = program.run({"x": x})
    for index in range(len(x)):
        alone = program.run({"x": x[index : index + 1]})
        for name in ("y", "z"):
            assert np.array_equal(alone[name][0], together[name][index])
    if activations == "static":
        return  # one scale for rows of so different sizes cannot be near
    want = OrtProgram(path, weights, {}).run({"x": x})["y"]
    for mine, true in zip(together["y"], want, strict=True):
        assert np.linalg.norm(mine - true) < 0.03 * np.linalg.norm(true)


@pytest.mark.parametrize("activations", WAYS)
def test_no_rows_and_zero_rows(block: tuple[Path, dict[str, Array]], activations: Activations) -> None:
    path, weights = block
    target, _ = quantize(block, activations)
    program = OrtProgram(target, weights, {})
    assert program.run({"x": np.zeros((0, WIDTH), np.float32)})["y"].shape == (0, WIDTH)
    reference = OrtProgram(path, weights, {})
    usual = reference.run({"x": np.random.default_rng(1).standard_normal((3, WIDTH)).astype(np.float32)})["y"]
    want = reference.run({"x": np.zeros((3, WIDTH), np.float32)})["y"]
    got = program.run({"x": np.zeros((3, WIDTH), np.float32)})["y"]
    # What is left are the biases: small beside the usual result, which sets a constant scale's rounding.
    assert np.linalg.norm(got - want) < 0.03 * np.linalg.norm(usual)


def test_the_graph_carries_no_weights_and_no_float_copies(block: tuple[Path, dict[str, Array]]) -> None:
    path, _ = block
    target = path.with_name("lean.int8.onnx")
    quantize_graph(path, target)
    wanted = {spec.name: spec.dtype.name for spec in read_graph_file(target).external}
    assert {name: kind for name, kind in wanted.items() if "small" not in name and "bias" not in name} == {
        "query.weight@int8.T": "int8",
        "query.weight@scale.T": "float32",
        "query.weight@int8#1": "int8",
        "query.weight@scale": "float32",
        "key.weight@int8.T": "int8",
        "key.weight@int8.T#1": "int8",
        "key.weight@scale.T": "float32",
        "plain@int8": "int8",
        "plain@scale": "float32",
    }
    assert target.stat().st_size < 10_000


def test_one_activation_is_quantized_once(block: tuple[Path, dict[str, Array]]) -> None:
    path, _ = block
    target = path.with_name("shared.int8.onnx")
    quantize_graph(path, target, activations="tensor")
    nodes = onnx.load(target, load_external_data=False).graph.node
    # query(x) and key(x) share x; relu, the sum, and the last product have one each.
    assert sum(node.op_type == "DynamicQuantizeLinear" for node in nodes) == 4
    assert sum(node.op_type == "MatMulIntegerToFloat" for node in nodes) == 5


def test_weights_can_be_selected(block: tuple[Path, dict[str, Array]]) -> None:
    path, _ = block
    target = path.with_name("some.int8.onnx")
    assert quantize_graph(path, target, select=lambda name: name == "plain") == ["plain"]
    with pytest.raises(ProgramError, match="no matrix product can be quantized"):
        quantize_graph(path, target, select=lambda name: False)


def test_calibration_measures_activations(block: tuple[Path, dict[str, Array]]) -> None:
    path, weights = block
    x = np.random.default_rng(2).standard_normal((6, WIDTH)).astype(np.float32)
    ranges = calibrate(path, weights, {}, [{"x": x}, {"x": 3 * x}, {"x": x[:0]}, {"x": x}])
    hidden = np.maximum(3 * x @ weights["query.weight"].T + weights["query.bias"], 0)
    assert ranges["x"] == np.abs(3 * x).max()
    assert any(value == pytest.approx(hidden.max(), rel=1e-5) for value in ranges.values())
    with pytest.raises(ProgramError, match="activation 'x' was not calibrated"):
        quantize_graph(path, path.with_name("no.onnx"), activations="static")


def test_columns_are_rounded_to_half_a_step() -> None:
    random = np.random.default_rng(1)
    weight = (random.standard_normal((50, 7)) * np.logspace(-6, 3, 7)).astype(np.float16).astype(np.float32)
    weight[:, 3] = 0
    scale, values = column_scales(weight), quantize_columns(weight)
    assert np.all(np.abs(values * scale - weight) <= 0.5001 * scale)
    assert np.abs(values).max(axis=0).tolist() == [127, 127, 127, 0, 127, 127, 127]
    assert np.array_equal(quantize_columns(weight.astype(np.float64)), values)


def test_derived_names() -> None:
    weight = np.arange(6, dtype=np.float32).reshape(2, 3)
    for name in ("layer.weight", "a@b", "a@int9"):
        assert derived(name) is None
    for name, shape in {"w@int8": (2, 3), "w@int8.T#1": (3, 2), "w@scale": (3,), "w@scale.T": (2,)}.items():
        recipe = derived(name)
        assert recipe is not None
        assert recipe[0] == "w"
        assert recipe[1](weight).shape == shape
