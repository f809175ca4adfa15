"""Half precision as a processor computes it: rounded like PyTorch's, and like ONNX Runtime's own float16."""

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
from realtide.engines.runtime.fp8_graph import quantize_graph_float8
from realtide.engines.runtime.host_form import host_form
from realtide.engines.runtime.narrow import Narrow, narrow_graph
from realtide.engines.runtime.ort import OrtProgram
from realtide.engines.runtime.products import calibrate
from realtide.engines.runtime.program import Array, ProgramError
from tests.engines.runtime.cell import Exported, feeds, state

WIDTH = 8


class Arithmetic(nn.Module):
    """Operators whose every result half precision rounds in one way only; products of few small integers."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.randn(WIDTH))
        self.whole = nn.Parameter(torch.randint(-4, 5, (WIDTH, WIDTH)).float())

    def forward(self, x: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        """x [n, W], counts [n, W] of small integers -> two [n, W]."""
        y = (x * self.gain + x) / (x.abs() + 1.0) - self.gain
        return torch.cat([y[1:], y[:1]]).clamp(-0.7, 0.7), counts @ self.whole


@pytest.fixture(scope="module")
def arithmetic(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Arithmetic]:
    torch.manual_seed(4)
    module = Arithmetic().requires_grad_(False)
    path = tmp_path_factory.mktemp("arithmetic") / "arithmetic.onnx"
    export_program(module, [dict(zip(("x", "counts"), inputs(), strict=True))], {}, ["y", "sums"], path)
    return path, module


def inputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return 3 * torch.randn(40, WIDTH, generator=generator), torch.randint(
        -5, 6, (40, WIDTH), generator=generator
    ).float()


def arrays(module: nn.Module) -> dict[str, Array]:
    return {name: value.numpy() for name, value in module.state_dict().items()}


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_every_result_is_rounded_as_pytorch_rounds(
    arithmetic: tuple[Path, Arithmetic], tmp_path: Path, precision: Narrow
) -> None:
    source, module = arithmetic
    narrow, form = tmp_path / "narrow.onnx", tmp_path / "form.onnx"
    narrow_graph(source, narrow, precision)
    host_form(narrow, form)
    x, counts = inputs()
    found = OrtProgram(form, arrays(module), {}).run({"x": x.numpy(), "counts": counts.numpy()})
    kind = getattr(torch, precision)
    copy = Arithmetic().requires_grad_(False)
    copy.load_state_dict(module.state_dict())
    wanted = copy.to(kind)(x.to(kind), counts.to(kind))
    for name, value in zip(("y", "sums"), wanted, strict=True):
        assert found[name].dtype == np.float32
        np.testing.assert_array_equal(found[name], value.float().numpy())
    exact = module(x, counts)[0].numpy()
    assert np.abs(found["y"] - exact).max() > 1e-4  # it is not float32


def test_it_is_what_onnxruntime_makes_of_float16(exported: Exported, tmp_path: Path) -> None:
    """State included, over several calls. Where ONNX Runtime fuses operators it rounds less often."""
    narrow, form = tmp_path / "narrow.onnx", tmp_path / "form.onnx"
    narrow_graph(exported.graph, narrow, "float16")
    host_form(narrow, form)
    weights = load_file(exported.weights)
    kept = {name: value.astype(np.float16) for name, value in state().items()}
    held = {name: value.astype(np.float32) for name, value in kept.items()}
    native, ours = OrtProgram(narrow, weights, kept), OrtProgram(form, weights, held)
    for seed in range(3):
        given = feeds(4, seed)
        have = ours.run(given)
        want = native.run(given | {"x": given["x"].astype(np.float16)})
        for name, value in want.items():
            np.testing.assert_allclose(have[name], value.astype(have[name].dtype), rtol=2e-3, atol=2e-3)
    for name, value in held.items():
        np.testing.assert_array_equal(value, value.astype(np.float16))  # what it keeps is of the type
        np.testing.assert_allclose(value, kept[name], rtol=2e-3, atol=2e-3)


def test_constants_of_half_precision_are_widened(tmp_path: Path) -> None:
    third = numpy_helper.from_array(np.array([1 / 3], np.float16), "third")
    graph = helper.make_graph(
        [helper.make_node("Mul", ["x", "third"], ["y"])],
        "program",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT16, [2])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT16, [2])],
        [third],
    )
    narrow, form = tmp_path / "narrow.onnx", tmp_path / "form.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), narrow)
    host_form(narrow, form)
    found = OrtProgram(form, {}, {}).run({"x": np.array([3, 0.1], np.float32)})
    half = np.array([3, 0.1], np.float16) * np.array([1 / 3], np.float16)
    np.testing.assert_array_equal(found["y"], half.astype(np.float32))


def test_a_graph_without_half_precision_is_refused(exported: Exported, tmp_path: Path) -> None:
    with pytest.raises(ProgramError, match="nothing in it is in half precision"):
        host_form(exported.graph, tmp_path / "form.onnx")
    assert not (tmp_path / "form.onnx").exists()


def test_products_in_float8_stay_what_they_are(tmp_path: Path) -> None:
    """ONNX Runtime computes float8 on a processor by itself, in float16: the form must not differ."""
    torch.manual_seed(5)
    module = nn.Linear(32, 48).requires_grad_(False)
    source, narrow, form = (tmp_path / f"{name}.onnx" for name in ("source", "narrow", "form"))
    export_program(module, [{"x": torch.randn(4, 32)}], {}, ["y"], source)
    weights = arrays(module)
    x = np.random.default_rng(2).standard_normal((4, 32)).astype(np.float16)
    wide = x.astype(np.float32)
    quantize_graph_float8(source, narrow, calibrate(source, weights, {}, [{"x": wide}]))
    host_form(narrow, form)
    want = OrtProgram(narrow, weights, {}).run({"x": x})["y"]
    have = OrtProgram(form, weights, {}).run({"x": wide})["y"]
    np.testing.assert_allclose(have, want.astype(np.float32), rtol=2e-3, atol=1e-3)
    exact = wide @ weights["weight"].T + weights["bias"]
    assert 0.005 < np.linalg.norm(have - exact) / np.linalg.norm(exact) < 0.1
