"""Graphs with products in float8: PyTorch's bits, what was foreseen is kept, plans hold float8 weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from realtide.engines.runtime import tensorrt
from realtide.engines.runtime.export import export_program
from realtide.engines.runtime.fp8_graph import HEADROOM, quantize_graph_float8
from realtide.engines.runtime.narrow import narrow_graph
from realtide.engines.runtime.ort import OrtProgram, read_graph_file
from realtide.engines.runtime.products import Measured, calibrate
from realtide.engines.runtime.program import Array, ProgramError
from realtide.engines.runtime.quantize import derived, float8_scale, quantize_float8, weight_float8_scale
from realtide.engines.runtime.tensorrt import Sizes

WIDTH = 96
FLOAT8 = torch.float8_e4m3fn


class Block(nn.Module):
    """Products of every form: Gemm, MatMul with a transposed weight and with a plain one, one too narrow."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(WIDTH, WIDTH)
        self.key = nn.Linear(WIDTH, 2 * WIDTH, bias=False)
        self.plain = nn.Parameter(torch.randn(2 * WIDTH, WIDTH) / 14)
        self.narrow = nn.Linear(WIDTH, 8)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        key = self.key(x)
        return key @ self.plain + key[:, :WIDTH] + self.query(x), self.narrow(x)


Made = tuple[Path, dict[str, Array], Block]


@pytest.fixture(scope="module")
def block(tmp_path_factory: pytest.TempPathFactory) -> Made:
    torch.manual_seed(3)
    module = Block().eval().requires_grad_(False)
    path = tmp_path_factory.mktemp("block") / "block.onnx"
    examples = [{"x": torch.randn(rows, WIDTH)} for rows in (5, 0, 1)]
    program = export_program(module, examples, {}, ["y", "z"], path, dynamic={"x": {0: "n"}})
    return path, {name: value.numpy() for name, value in program.weights.items()}, module


def inputs(rows: int, largest: float) -> Array:
    x = np.random.default_rng(rows).standard_normal((rows, WIDTH)).astype(np.float32)
    scaled: Array = (x * (largest / np.abs(x).max())).astype(np.float16)
    return scaled


def through(x: Tensor, scale: float) -> Tensor:
    """What float8 leaves of x, by PyTorch."""
    return (x.double() / scale).clamp(-448, 448).to(FLOAT8).double() * scale


def expected(module: Block, x: Array, ranges: Mapping[str, float], names: tuple[str, str]) -> Tensor:
    """y of `Block` in float64, but for float8."""
    own, inner = (float8_scale(ranges[name] * HEADROOM) for name in names)

    def weight(value: Tensor) -> Tensor:
        return through(value, float8_scale(float(value.abs().max())))

    given = through(torch.from_numpy(x.astype(np.float64)), own)
    key = given @ weight(module.key.weight).T
    y = given @ weight(module.query.weight).T + module.query.bias.double() + key[:, :WIDTH]
    return through(key.half(), inner) @ weight(module.plain) + y


def test_float8_is_pytorchs_bit_by_bit() -> None:
    every = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    every = every[np.isfinite(every)].astype(np.float32)
    for largest in (448.0, 3.0, 1e-3, 60000.0):
        weight = every[np.abs(every) <= largest]
        scale = float(weight_float8_scale(weight))
        want = (torch.from_numpy(weight) / scale).to(FLOAT8)
        have = quantize_float8(weight)
        assert have.dtype == ml_dtypes.float8_e4m3fn
        np.testing.assert_array_equal(have.view(np.uint8), want.view(torch.uint8).numpy())
        assert np.isfinite(have.astype(np.float32)).all()


def test_scales_are_powers_of_two_that_reach_the_peak() -> None:
    exact = {448.0: 1.0, 448.1: 2.0, 224.0: 0.5, 300.0: 1.0, 0.0: 1.0, 1e-9: 2.0**-24, 448.0 * 2**15: 2.0**15}
    assert {peak: float8_scale(peak) for peak in exact} == exact
    for peak in np.random.default_rng(0).lognormal(0, 4, 200):
        scale = float8_scale(float(peak))
        assert 224 < peak / scale <= 448
        assert np.float16(scale) == scale
    for bad in (-1.0, float("inf"), float("nan"), 1e9):
        with pytest.raises(ProgramError, match="magnitude must be finite and at most"):
            float8_scale(bad)


def test_the_graph_computes_what_pytorch_says(block: Made, tmp_path: Path) -> None:
    path, weights, module = block
    x = inputs(9, 4.0)
    ranges = calibrate(path, weights, {}, [{"x": x.astype(np.float32)}])
    target = tmp_path / "block.onnx"
    assert sorted(quantize_graph_float8(path, target, ranges)) == ["key.weight", "plain", "query.weight"]
    have = OrtProgram(target, weights, {}).run({"x": x})
    (inner,) = set(ranges) - {"x"}
    want = expected(module, x, ranges, ("x", inner)).numpy()
    assert have["y"].dtype == np.float16

    def off(other: Array) -> float:
        return float(np.linalg.norm(have["y"] - other) / np.linalg.norm(other))

    assert off(want) < 5e-4
    # The same with another scale, or with none, is further off by far.
    assert off(expected(module, x, ranges | {"x": ranges["x"] / 64}, ("x", inner)).numpy()) > 0.05
    exact = module(torch.from_numpy(x.astype(np.float32)))
    assert 0.01 < off(exact[0].numpy()) < 0.06
    # The narrow product has no float8 in it.
    assert np.linalg.norm(have["z"] - exact[1].numpy()) < 1e-3 * np.linalg.norm(exact[1].numpy())


def test_what_calibration_foresaw_is_kept_and_the_rest_saturates(block: Made, tmp_path: Path) -> None:
    path, weights, module = block
    # Of peaks that are powers of two times 448 the scale leaves no room by chance.
    ranges = dict.fromkeys(calibrate(path, weights, {}, []), 7.0)
    target = tmp_path / "block.onnx"
    quantize_graph_float8(path, target, ranges, select=lambda name: name == "query.weight")
    program = OrtProgram(target, weights, {})

    def query(value: float) -> Array:
        x = np.zeros((1, WIDTH), np.float16)
        x[0, 0] = value
        plain = module(torch.from_numpy(x.astype(np.float32)))[0].numpy()
        zero = np.zeros((1, WIDTH), np.float16)
        bias = module(torch.from_numpy(zero.astype(np.float32)))[0].numpy()
        have = program.run({"x": x})["y"] - program.run({"x": zero})["y"]
        column = module.query.weight[:, 0].numpy()
        return np.asarray((have - (plain - bias) + column * value)[0] @ column / (column @ column))

    for value in (7.0, -7.0, 56.0, -56.0):  # seven times eight: the headroom's end
        assert query(value) == pytest.approx(value, rel=0.02)
    for value in (112.0, -112.0):
        assert query(value) == pytest.approx(value / 2, rel=0.02)


def test_the_graph_carries_no_weights_and_activations_are_rounded_once(block: Made, tmp_path: Path) -> None:
    path, weights, _ = block
    target = tmp_path / "block.onnx"
    ranges = calibrate(path, weights, {}, [{"x": np.ones((2, WIDTH), np.float32)}])
    quantize_graph_float8(path, target, ranges)
    external = {spec.name: (spec.dtype.name, spec.shape) for spec in read_graph_file(target).external}
    assert external == {
        "query.weight@float8.T": ("float8_e4m3fn", (WIDTH, WIDTH)),
        "query.weight@float8_scale": ("float16", ()),
        "query.bias": ("float16", (WIDTH,)),
        "key.weight@float8.T": ("float8_e4m3fn", (WIDTH, 2 * WIDTH)),
        "key.weight@float8_scale": ("float16", ()),
        "plain@float8": ("float8_e4m3fn", (2 * WIDTH, WIDTH)),
        "plain@float8_scale": ("float16", ()),
        "narrow.weight": ("float16", (8, WIDTH)),
        "narrow.bias": ("float16", (8,)),
    }
    model = onnx.load(target, load_external_data=False)
    onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True)
    rounded = [node.input[0] for node in model.graph.node if node.op_type == "QuantizeLinear"]
    assert len(rounded) == len(set(rounded)) == 2
    for name in external:
        made = derived(name)
        if made is not None:
            assert made[1](weights[made[0]]).shape == external[name][1]


def test_what_cannot_be_is_refused_and_nothing_is_written(block: Made, tmp_path: Path) -> None:
    path, weights, _ = block
    target = tmp_path / "none.onnx"
    ranges = calibrate(path, weights, {}, [])
    with pytest.raises(ProgramError, match="no matrix product can be in float8"):
        quantize_graph_float8(path, target, ranges, select=lambda name: name == "narrow.weight")
    with pytest.raises(ProgramError, match=r"activation 'x' was not calibrated"):
        quantize_graph_float8(path, target, {})
    with pytest.raises(ProgramError, match="magnitude must be finite"):
        quantize_graph_float8(path, target, dict.fromkeys(ranges, float("inf")))
    assert not target.exists()


def test_measuring_changes_no_result(block: Made) -> None:
    path, weights, _ = block
    measured, plain = Measured(path, weights, {}), OrtProgram(path, weights, {})
    peak = 0.0
    for rows, largest in ((3, 2.0), (0, 1.0), (4, 5.0), (2, 1.0)):
        x = np.zeros((0, WIDTH), np.float32) if not rows else inputs(rows, largest).astype(np.float32)
        have, want = measured.run({"x": x}), plain.run({"x": x})
        assert set(have) == set(want)
        for name in want:
            np.testing.assert_allclose(have[name], want[name], rtol=1e-5, atol=1e-5)
        peak = max(peak, float(np.abs(x).max(initial=0.0)))
        assert measured.ranges["x"] == peak
    assert measured.runs == 4


def test_plans_hold_float8_weights(tmp_path: Path) -> None:
    """A plan of one large product loses as many bytes as float8 saves, whatever else is in it."""
    size = 1024
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(size, size)).eval().requires_grad_(False)
    path = tmp_path / "wide.onnx"
    made = export_program(module, [{"x": torch.randn(n, size)} for n in (5, 1)], {}, ["y"], path,
                          dynamic={"x": {0: "n"}})  # fmt: skip
    weights = {name: value.numpy() for name, value in made.weights.items()}
    half, narrow = tmp_path / "half.onnx", tmp_path / "narrow.onnx"
    narrow_graph(path, half, "float16")
    quantize_graph_float8(path, narrow, {"x": 4.0})
    options = tensorrt.BuildOptions("8.9")
    sizes = [
        len(tensorrt.build_engine(graph, weights, {"n": Sizes(1, 64, 256)}, options))
        for graph in (half, narrow)
    ]
    assert size * size < sizes[1] < sizes[0] - 0.7 * size * size < 3 * size * size
