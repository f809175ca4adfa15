"""A stand-in for the package `tensorrt` that builds and loads plans which onnxruntime computes.

A plan holds the graph, the weights that the parser was given and the sizes of the profile: whatever serves
from it goes through building, keys, the cache, deserializing, bindings and execution as with the real one.
"""

from __future__ import annotations

import ctypes
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest

from realtide.engines.runtime import cuda_memory, tensorrt
from realtide.engines.runtime.onnx_file import GraphInfo, read_graph
from realtide.engines.runtime.program import Array
from realtide.engines.runtime.tensorrt import Sizes
from tests.engines.runtime.tensorrt_stand_in import Engine, HostDevice

Shapes = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]


class ILogger:
    """What the listener derives from."""

    Severity = SimpleNamespace(ERROR=1, WARNING=2)

    def log(self, severity: int, message: str) -> None:
        """Overridden."""


class IProgressMonitor:
    """What the monitor derives from."""


class Network:
    """What was parsed."""

    graph = b""
    num_layers = 1

    def __init__(self) -> None:
        self.weights: dict[str, Array] = {}


class OnnxParser:
    """Takes a model and its weights."""

    num_errors = 0

    def __init__(self, network: Network, logger: ILogger) -> None:
        self._network = network

    def load_model_proto(self, data: bytes) -> bool:
        self._network.graph, self._info = data, read_graph(data)
        return True

    def load_initializer(self, name: str, address: int, size: int) -> bool:
        (spec,) = [spec for spec in self._info.external if spec.name == name]
        raw = np.frombuffer(ctypes.string_at(address, size), spec.dtype)
        self._network.weights[name] = raw.reshape([int(dim or 0) for dim in spec.shape])
        return True

    def parse_model_proto(self) -> bool:
        return set(self._network.weights) == {spec.name for spec in self._info.external}


class Profile(dict[str, Shapes]):
    """Shapes by input."""

    def set_shape(self, name: str, least: Any, usual: Any, most: Any) -> None:
        self[name] = least, usual, most


class Config:
    """What a plan is built with."""

    progress_monitor: Any = None
    tf32 = True

    def __init__(self) -> None:
        self.profile = Profile()

    def add_optimization_profile(self, profile: Profile) -> int:
        self.profile = profile
        return 0

    def clear_flag(self, flag: str) -> None:
        assert flag == "TF32"
        self.tf32 = False

    def create_timing_cache(self, data: bytes) -> bytes:
        return data

    def set_timing_cache(self, cache: bytes, ignore: bool) -> bool:
        return True

    def get_timing_cache(self) -> Any:
        return SimpleNamespace(serialize=lambda: b"timed")


class Builder:
    """Makes plans; `refuse`: says so and makes none."""

    refuse = False
    built = 0

    def __init__(self, logger: ILogger) -> None:
        self._logger = logger

    def create_network(self, flags: int) -> Network:
        return Network()

    def create_builder_config(self) -> Config:
        return Config()

    def create_optimization_profile(self) -> Profile:
        return Profile()

    def build_serialized_network(self, network: Network, config: Config) -> bytes | None:
        assert not config.tf32
        if config.progress_monitor:
            config.progress_monitor.phase_start("tactics", None, 1)
            config.progress_monitor.step_complete("tactics", 0)
            config.progress_monitor.phase_finish("tactics")
        if Builder.refuse:
            self._logger.log(1, "no tactic")
            return None
        Builder.built += 1
        sizes = _sizes(read_graph(network.graph), config.profile)
        return pickle.dumps((_settled(network.graph), _renamed(network.weights), sizes))


class Runtime:
    """Loads plans."""

    def __init__(self, logger: ILogger) -> None:
        pass

    def deserialize_cuda_engine(self, plan: bytes) -> Engine:
        graph, weights, sizes = pickle.loads(plan)
        return Engine(HostDevice(), graph, weights, sizes)


def _settled(graph: bytes) -> bytes:
    """The graph with other names for what was computed from weights: onnxruntime is to take it as it is."""
    model = onnx.load_model_from_string(graph)
    names = {tensor.name for tensor in model.graph.initializer}
    for tensor in model.graph.initializer:
        tensor.name = _own(tensor.name)
    for node in model.graph.node:
        node.input[:] = [_own(name) if name in names else name for name in node.input]
    settled: bytes = model.SerializeToString()
    return settled


def _renamed(weights: dict[str, Array]) -> dict[str, Array]:
    return {_own(name): array for name, array in weights.items()}


def _own(name: str) -> str:
    return name.replace("@", "~")


def _sizes(info: GraphInfo, profile: Profile) -> dict[str, Sizes]:
    found = {}
    for spec in (*info.inputs, *info.state):
        for axis, dim in enumerate(spec.shape):
            if isinstance(dim, str):
                found[dim] = Sizes(*(shape[axis] for shape in profile[spec.name]))
    return found


PACKAGE = SimpleNamespace(
    __name__="tensorrt",
    __version__="11.4.0",
    Builder=Builder,
    BuilderFlag=SimpleNamespace(TF32="TF32"),
    ExecutionContextAllocationStrategy=SimpleNamespace(USER_MANAGED="user managed"),
    ILogger=ILogger,
    IProgressMonitor=IProgressMonitor,
    NetworkDefinitionCreationFlag=SimpleNamespace(),
    OnnxParser=OnnxParser,
    Runtime=Runtime,
)


@contextmanager
def installed(devices: list[HostDevice] | None = None) -> Iterator[type[Builder]]:
    """While this lasts TensorRT is this package, and CUDA devices are the host; `devices` gets them."""
    made = devices if devices is not None else []

    def device(index: int = 0) -> HostDevice:
        made.append(HostDevice(index))
        return made[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tensorrt, "load", lambda: PACKAGE)
        patch.setattr(cuda_memory, "CudaDevice", device)
        patch.setattr(Builder, "built", 0)
        patch.setattr(Builder, "refuse", False)
        yield Builder
