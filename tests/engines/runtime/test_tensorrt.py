"""Graphs compiled by TensorRT for RTX, which needs no GPU for that."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import Tensor, nn

from realtide.engines.runtime import tensorrt
from realtide.engines.runtime.export import export_program
from realtide.engines.runtime.program import Array, ProgramError
from realtide.engines.runtime.tensorrt import Sizes, build_engine


class Product(nn.Module):
    """One matrix product with rows of any number."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        """x [n, 8] -> [n, 8]."""
        return torch.relu(x @ self.weight)


@pytest.fixture
def product(tmp_path: Path) -> tuple[Path, dict[str, Array]]:
    module = Product().half().requires_grad_(False)
    path = tmp_path / "product.onnx"
    examples = [{"x": torch.randn(n, 8).half()} for n in (3, 5)]
    export_program(module, examples, {}, ["y"], path, dynamic={"x": {0: "n"}}, tolerance=0.1)
    return path, {"weight": module.weight.float().numpy()}


def test_a_graph_becomes_an_engine(product: tuple[Path, dict[str, Array]]) -> None:
    graph, weights = product
    engine = build_engine(graph, weights, {"n": Sizes(1, 4, 16)})
    assert len(engine) > 1000
    other = build_engine(graph.read_bytes(), {"weight": 2 * weights["weight"]}, {"n": Sizes(1, 4, 16)})
    assert other != engine  # the weights are in it


def test_what_is_missing_is_named(product: tuple[Path, dict[str, Array]]) -> None:
    graph, weights = product
    with pytest.raises(ProgramError, match="dimension 'n' of 'x' is dynamic: say its sizes"):
        build_engine(graph, weights)
    with pytest.raises(ProgramError, match="wants weight 'weight', which the weight file lacks"):
        build_engine(graph, {}, {"n": Sizes(1, 4, 16)})
    with pytest.raises(ProgramError, match=r"must be float16\[8, 8\]"):
        build_engine(graph, {"weight": np.zeros((8, 9))}, {"n": Sizes(1, 4, 16)})
    with pytest.raises(ProgramError, match=r"nothing\.onnx: No such file"):
        build_engine(graph.with_name("nothing.onnx"), weights)
    with pytest.raises(ProgramError, match="no ONNX model"):
        build_engine(b"text", weights)
    for wrong in ((2, 1, 3), (-1, 1, 2), (0, 0, 0)):
        with pytest.raises(ValueError, match="sizes must not fall"):
            Sizes(*wrong)


def test_the_parser_is_quoted() -> None:
    node = helper.make_node("Det", ["x"], ["y"], name="determinant")
    values = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
        for name, shape in (("x", [4, 4]), ("y", []))
    ]
    graph = helper.make_graph([node], "program", values[:1], values[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])
    onnx.checker.check_model(model)
    with pytest.raises(ProgramError, match=r"^graph: Det determinant: .*Det"):
        build_engine(model.SerializeToString(), {})


def test_an_absent_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt, "PACKAGES", ("no_such_package",))
    with pytest.raises(ProgramError, match=r"extra trt\).*extra trt-rtx"):
        build_engine(b"", {})
