"""Graphs compiled by TensorRT for RTX, which needs no GPU for that."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import Tensor, nn

from realtide.engines.runtime import tensorrt
from realtide.engines.runtime.export import export_program
from realtide.engines.runtime.plan_key import PORTABLE, Gpu
from realtide.engines.runtime.plans import PlanCache
from realtide.engines.runtime.program import Array, ProgramError
from realtide.engines.runtime.tensorrt import BuildOptions, Sizes, TimingCache, build_engine, plan_key

PlanKeyArguments = tuple[bytes, Mapping[str, Array], Mapping[str, Sizes], str, Gpu]


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


def test_a_build_tells_how_far_it_is_and_can_be_stopped(product: tuple[Path, dict[str, Array]]) -> None:
    graph, weights = product
    told: list[tuple[str, int, int]] = []
    build_engine(graph, weights, {"n": Sizes(1, 4, 16)}, BuildOptions(on_progress=lambda *a: told.append(a)))
    phases = [phase for phase, _, _ in told]
    assert len(set(phases)) > 1
    assert all(0 <= done <= total for _, done, total in told)
    assert [done for phase, done, total in told if phase == phases[0]][-1] == told[0][2]

    def stop(phase: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_engine(graph, weights, {"n": Sizes(1, 4, 16)}, BuildOptions(on_progress=stop))


def test_a_target_is_built_for_or_refused(product: tuple[Path, dict[str, Array]]) -> None:
    graph, weights = product
    sizes = {"n": Sizes(1, 4, 16)}
    any_gpu = build_engine(graph, weights, sizes)
    assert build_engine(graph, weights, sizes, BuildOptions("8.9")) != any_gpu
    with pytest.raises(ProgramError, match=r"^gpu: tensorrt_rtx builds for .*8\.9, .*, not 9\.0$"):
        build_engine(graph, weights, sizes, BuildOptions("9.0"))


def test_which_gpu_a_package_builds_for(monkeypatch: pytest.MonkeyPatch) -> None:
    here, other = Gpu("NVIDIA L4", "8.9", "580.95"), Gpu("NVIDIA H100", "9.0", "580.95")
    assert tensorrt.target(None, None) == tensorrt.target(None, here) == PORTABLE
    assert tensorrt.target(other, here) == other
    monkeypatch.setattr(tensorrt, "load", lambda: SimpleNamespace(__name__="tensorrt"))
    assert tensorrt.target(None, here) == tensorrt.target(here, here) == here
    with pytest.raises(ProgramError, match="there is none here"):
        tensorrt.target(other, None)
    with pytest.raises(ProgramError, match=r"for the GPU that is here, NVIDIA L4 8\.9"):
        tensorrt.target(other, here)


def test_a_key_follows_from_what_is_built(product: tuple[Path, dict[str, Array]]) -> None:
    graph, weights = product
    data, sizes = graph.read_bytes(), {"n": Sizes(1, 4, 16), "other": Sizes(1, 1, 1)}
    key = plan_key(data, weights, sizes, "float16", PORTABLE)
    package = tensorrt.load()
    assert (key.flavour, key.version, key.profile) == (package.__name__, package.__version__, "n=1:4:16")
    changes: dict[str, PlanKeyArguments] = {
        "graph": (data + b"\x12\x00", weights, sizes, "float16", PORTABLE),
        "weights": (data, {"weight": 2 * weights["weight"]}, sizes, "float16", PORTABLE),
        "profile": (data, weights, {"n": Sizes(1, 4, 8)}, "float16", PORTABLE),
        "precision": (data, weights, sizes, "bfloat16", PORTABLE),
        "gpu": (data, weights, sizes, "float16", Gpu("NVIDIA L4", "any", "any")),
        "capability": (data, weights, sizes, "float16", Gpu("any", "8.9", "any")),
        "driver": (data, weights, sizes, "float16", Gpu("any", "any", "580.95")),
    }
    for field, arguments in changes.items():
        (difference,) = key.differences(plan_key(*arguments))
        assert difference.startswith(f"{field} ")
    with pytest.raises(ProgramError, match="dimension 'n' of 'x' is dynamic"):
        plan_key(data, weights, {}, "float16", PORTABLE)


def test_a_real_plan_is_kept_and_not_built_again(
    product: tuple[Path, dict[str, Array]], tmp_path: Path
) -> None:
    graph, weights = product
    sizes, cache, builds = {"n": Sizes(1, 4, 16)}, PlanCache(tmp_path / "plans"), 0
    key = plan_key(graph.read_bytes(), weights, sizes, "float16", PORTABLE)

    def build() -> bytes:
        nonlocal builds
        builds += 1
        return build_engine(graph, weights, sizes)

    first = cache.get("product", key, build)
    assert cache.get("product", key, build) == first
    assert builds == 1
    other = plan_key(graph.read_bytes(), {"weight": 2 * weights["weight"]}, sizes, "float16", PORTABLE)
    with pytest.raises(ProgramError, match=r"does not fit: weights \w{12} -> \w{12}: "):
        cache.get("product", other)


def test_what_kernels_took_is_kept_where_they_are_timed(
    product: tuple[Path, dict[str, Array]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """TensorRT itself, played by TensorRT for RTX, with a stand-in for the calls that are no-ops there."""
    graph, weights = product
    real = tensorrt.load()
    held: list[bytes] = []

    class Config:
        def __init__(self, config: Any) -> None:
            object.__setattr__(self, "config", config)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.config, name)

        def __setattr__(self, name: str, value: Any) -> None:
            setattr(self.config, name, value)

        def create_timing_cache(self, data: bytes) -> bytes:
            return data

        def set_timing_cache(self, cache: bytes, ignore_mismatch: bool) -> bool:
            held.append(cache)
            return cache != b"of another GPU"

        def get_timing_cache(self) -> Any:
            return SimpleNamespace(serialize=lambda: held[-1] + b"+")

    class Builder:
        def __init__(self, listener: Any) -> None:
            self.builder = real.Builder(listener)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.builder, name)

        def create_builder_config(self) -> Config:
            return Config(self.builder.create_builder_config())

        def build_serialized_network(self, network: Any, config: Config) -> Any:
            return self.builder.build_serialized_network(network, config.config)

    package = SimpleNamespace(
        **{name: getattr(real, name) for name in dir(real) if not name.startswith("__")}
    )
    package.Builder, package.__name__, package.__version__ = Builder, "tensorrt", "11.4"
    monkeypatch.setattr(tensorrt, "load", lambda: package)
    timing = TimingCache(b"a")
    for expected in (b"a+", b"a++"):
        build_engine(graph, weights, {"n": Sizes(1, 4, 16)}, BuildOptions(timing=timing))
        assert timing.data == expected
    with pytest.raises(ProgramError, match="the timing cache is refused"):
        build_engine(
            graph, weights, {"n": Sizes(1, 4, 16)}, BuildOptions(timing=TimingCache(b"of another GPU"))
        )
