"""Half-precision graphs made of float32 ones: types, what stays wide, constants, state, refusals."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import load_file
from torch import Tensor, nn

from realtide.engines.runtime.export import export_program
from realtide.engines.runtime.narrow import narrow_graph
from realtide.engines.runtime.onnx_file import read_graph
from realtide.engines.runtime.ort import OrtProgram
from realtide.engines.runtime.program import Array, ProgramError
from realtide.engines.runtime.tensorrt import build_engine
from realtide.engines.runtime.weights import resolve
from tests.engines.runtime.cell import Exported, feeds, state


class Pixels(nn.Module):
    """A convolution, a root mean square norm written out, a mask, and pixels doubled."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.gain = nn.Parameter(torch.full((4, 1, 1), 0.5))

    def forward(self, x: Tensor, seen: Tensor) -> Tensor:
        """x [1, 3, h, w], seen bool [h, w] -> [1, 4, 2h, 2w]."""
        y = self.conv(x)
        y = y * torch.rsqrt(y.square().mean(1, keepdim=True) + 1e-6) * self.gain
        y = torch.where(seen, y, -1e9).softmax(-1)
        return nn.functional.interpolate(y, scale_factor=2, mode="nearest")


@pytest.fixture(scope="module")
def pixels(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Array]]:
    torch.manual_seed(0)
    module = Pixels().requires_grad_(False)
    path = tmp_path_factory.mktemp("pixels") / "pixels.onnx"
    example = {"x": 300 * torch.randn(1, 3, 6, 5), "seen": torch.rand(6, 5) < 0.7}
    export_program(module, [example], {}, ["y"], path)
    return path, {name: value.numpy() for name, value in module.state_dict().items()}


def producers(model: onnx.ModelProto) -> dict[str, onnx.NodeProto]:
    return {name: node for node in model.graph.node for name in node.output}


def types(model: onnx.ModelProto) -> dict[str, int]:
    """Inferred element types; the checker is strict about operators whose operands differ."""
    inferred = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True).graph
    values = (*inferred.value_info, *inferred.input, *inferred.output)
    return {v.name: v.type.tensor_type.elem_type for v in values} | {
        t.name: t.data_type for t in inferred.initializer
    }


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_products_are_narrow_and_norms_and_softmax_are_not(
    pixels: tuple[Path, dict[str, Array]], tmp_path: Path, precision: str
) -> None:
    target = tmp_path / "narrow.onnx"
    narrow_graph(pixels[0], target, "float16" if precision == "float16" else "bfloat16")
    model = onnx.load(target, load_external_data=False)
    found, code = types(model), {"float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16}[precision]
    seen = set()
    for node in model.graph.node:
        operands = {found[name] for name in node.input if found.get(name) in (TensorProto.FLOAT, code)}
        if node.op_type == "Conv":
            assert operands == {code}
        elif node.op_type in ("Softmax", "ReduceMean", "Sqrt", "Reciprocal"):
            assert operands == {TensorProto.FLOAT}, node
        seen.add(node.op_type)
    assert {"Conv", "Softmax", "ReduceMean", "Resize", "Cast"} <= seen
    assert {found["x"], found["y"]} == {code}
    assert found["gain"] == TensorProto.FLOAT  # read by the norm alone: no cast, no rounding
    assert found["conv.weight"] == code
    info = read_graph(target.read_bytes())
    (conv,) = [spec for spec in info.external if spec.name == "conv.weight"]
    assert resolve(conv, pixels[1]).dtype == conv.dtype
    assert conv.dtype.name == precision
    assert len(build_engine(target, pixels[1])) > 1000  # TensorRT checks the types too


def test_results_are_those_of_float32_though_squares_exceed_half(
    pixels: tuple[Path, dict[str, Array]], tmp_path: Path
) -> None:
    graph, weights = pixels
    narrow_graph(graph, tmp_path / "narrow.onnx", "float16")
    rng = np.random.default_rng(1)
    x = (900 * rng.standard_normal((1, 3, 6, 5))).astype(np.float32)
    seen = rng.random((6, 5)) < 0.7
    want = OrtProgram(graph, weights, {}).run({"x": x, "seen": seen})["y"]
    have = OrtProgram(tmp_path / "narrow.onnx", weights, {}).run({"x": x.astype(np.float16), "seen": seen})[
        "y"
    ]
    assert have.dtype == np.float16
    assert np.abs(x).max() ** 2 > np.finfo(np.float16).max
    assert np.linalg.norm(have - want) <= 2e-3 * np.linalg.norm(want)


def test_caches_are_narrow_and_still_updated_in_place(exported: Exported, tmp_path: Path) -> None:
    target = tmp_path / "cell.onnx"
    narrow_graph(exported.graph, target, "float16")
    weights = load_file(exported.weights)
    wide = state()
    narrow = {name: array.astype(np.float16) for name, array in wide.items()}
    reference, program = OrtProgram(exported.graph, weights, wide), OrtProgram(target, weights, narrow)
    assert {spec.dtype for spec in program.state} == {np.dtype(np.float16)}
    for seed, count in enumerate((3, 5)):
        given = feeds(count, seed)
        want = reference.run(given)
        have = program.run(
            {n: a.astype(np.float16) if a.dtype == np.float32 else a for n, a in given.items()}
        )
        np.testing.assert_array_equal(have["picked"], want["picked"])
        np.testing.assert_allclose(have["y"], want["y"], atol=0.01)
    for name, array in wide.items():
        assert array.any()
        np.testing.assert_allclose(narrow[name], array, atol=0.01)


def test_the_same_graph_gives_the_same_bytes(exported: Exported, tmp_path: Path) -> None:
    for name in ("a", "b"):
        narrow_graph(exported.graph, tmp_path / name, "float16")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def model_of(nodes: list[onnx.NodeProto], initializers: list[TensorProto], path: Path) -> Path:
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [4]) for name in ("x", "y")]
    graph = helper.make_graph(nodes, "program", values[:1], values[1:], initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model)
    path.write_bytes(model.SerializeToString())
    return path


def test_constants_beyond_half_precision_mask_as_well(tmp_path: Path) -> None:
    mask = numpy_helper.from_array(np.array([-1e9, -np.inf, 0.5, 1e30], np.float32), "mask")
    source = model_of([helper.make_node("Add", ["x", "mask"], ["y"])], [mask], tmp_path / "wide.onnx")
    narrow_graph(source, tmp_path / "narrow.onnx", "float16")
    got = OrtProgram(tmp_path / "narrow.onnx", {}, {}).run({"x": np.zeros(4, np.float16)})["y"]
    np.testing.assert_array_equal(got, np.array([-65504, -np.inf, 0.5, 65504], np.float16))


def test_what_an_integer_becomes_stays_wide(tmp_path: Path) -> None:
    """A position beyond 2048 is no half-precision number."""
    nodes = [
        helper.make_node("Cast", ["x"], ["n"], to=TensorProto.INT64),
        helper.make_node("Mul", ["n", "big"], ["m"]),
        helper.make_node("Cast", ["m"], ["f"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["f", "small"], ["y"]),
    ]
    constants = [
        numpy_helper.from_array(np.array(100_001), "big"),
        numpy_helper.from_array(np.array(1e-5, np.float32), "small"),
    ]
    narrow_graph(model_of(nodes, constants, tmp_path / "wide.onnx"), tmp_path / "narrow.onnx", "float16")
    got = OrtProgram(tmp_path / "narrow.onnx", {}, {}).run({"x": np.arange(4, dtype=np.float16)})["y"]
    np.testing.assert_allclose(got, np.arange(4), atol=2e-3)


def test_constants_written_as_attributes_keep_their_type(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Constant", [], ["c"], value_float=0.25),
        helper.make_node("Mul", ["x", "c"], ["y"]),
    ]
    narrow_graph(model_of(nodes, [], tmp_path / "wide.onnx"), tmp_path / "narrow.onnx", "float16")
    got = OrtProgram(tmp_path / "narrow.onnx", {}, {}).run({"x": np.arange(4, dtype=np.float16)})["y"]
    np.testing.assert_array_equal(got, 0.25 * np.arange(4, dtype=np.float16))


def test_graphs_that_cannot_be_rewritten_are_refused(tmp_path: Path) -> None:
    value = helper.make_tensor_value_info("z", TensorProto.FLOAT, [4])
    inner = helper.make_graph([helper.make_node("Identity", ["x"], ["z"])], "inner", [], [value])
    always = numpy_helper.from_array(np.array(True), "always")
    node = helper.make_node("If", ["always"], ["y"], then_branch=inner, else_branch=inner)
    source = model_of([node], [always], tmp_path / "branch.onnx")
    with pytest.raises(ProgramError, match=r"branch\.onnx: If 'y' has a subgraph"):
        narrow_graph(source, tmp_path / "narrow.onnx", "float16")
    assert not (tmp_path / "narrow.onnx").exists()
