"""Stand-ins for TensorRT's engine and a CUDA device: host memory, calls recorded, graphs run by onnxruntime.

An engine reads and writes the addresses it was given, as the real one does, so a wrong address, shape or
order gives wrong numbers here too.
"""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Callable, Mapping
from math import prod
from types import SimpleNamespace
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
import torch

from realtide.engines.runtime.cuda_memory import shaped
from realtide.engines.runtime.onnx_file import GraphInfo, read_graph
from realtide.engines.runtime.ort import OrtProgram
from realtide.engines.runtime.program import NEXT, Array, TensorSpec
from realtide.engines.runtime.tensorrt import Sizes
from realtide.engines.runtime.tensorrt_program import LoadedPlan

PACKAGE = SimpleNamespace(ExecutionContextAllocationStrategy=SimpleNamespace(USER_MANAGED="user managed"))
KINDS = {"float32": "FLOAT", "float16": "HALF", "int64": "INT64", "bool": "BOOL", "int32": "INT32"}


_STREAMS = itertools.count(77)
_DEVICES: WeakValueDictionary[int, HostDevice] = WeakValueDictionary()
"""By the handle of their stream: an engine has no other way to know where it runs."""


class Memory:
    """A buffer in host memory."""

    def __init__(self, size: int) -> None:
        self.array = np.zeros(max(size, 1), np.uint8)
        self.address, self.size = self.array.ctypes.data, size


class HostDevice:
    """A device whose stream runs everything at once."""

    def __init__(self, index: int = 0) -> None:
        self.stream = next(_STREAMS)
        _DEVICES[self.stream] = self
        self.calls: list[str] = []
        self.recording: list[Callable[[], None]] | None = None
        self.buffers: list[Memory] = []

    def enqueue(self, work: Callable[[], None]) -> None:
        if self.recording is not None:
            self.recording.append(work)
        else:
            work()

    def allocate(self, size: int) -> Memory:
        self.buffers.append(Memory(size))
        return self.buffers[-1]

    def upload(self, buffer: Any, array: Array) -> None:
        self.calls.append("upload")
        flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        buffer.array[: flat.size] = flat

    def download(self, buffer: Any, array: Array) -> None:
        self.calls.append("download")
        array.reshape(-1).view(np.uint8)[:] = buffer.array[: array.nbytes]

    def copy_back(self, tensor: torch.Tensor, buffer: Any) -> None:
        def work() -> None:
            self.calls.append("copy back")
            flat = tensor.view(-1).view(torch.uint8)
            flat.copy_(torch.from_numpy(buffer.array[: flat.numel()]))

        self.enqueue(work)

    def view(self, buffer: Any, dtype: str, shape: tuple[int, ...]) -> torch.Tensor:
        view: torch.Tensor = shaped(torch.from_numpy(buffer.array), getattr(torch, dtype), shape)
        return view

    def wait(self) -> None:
        self.calls.append("wait")

    def after_caller(self) -> None:
        self.calls.append("after caller")

    def before_caller(self) -> None:
        self.calls.append("before caller")

    def capture(self, enqueue: Callable[[], None]) -> Callable[[], None]:
        self.calls.append("capture")
        recorded: list[Callable[[], None]] = []
        self.recording = recorded
        try:
            enqueue()
        finally:
            self.recording = None

        def replay() -> None:
            self.calls.append("replay")
            for work in recorded:
                work()

        return replay


class Engine:
    """An engine of a graph."""

    def __init__(
        self,
        device: HostDevice,
        graph: bytes,
        weights: Mapping[str, Array],
        sizes: Mapping[str, Sizes] | None = None,
        declared: frozenset[str] = frozenset(),
        activations: int = 1000,
    ) -> None:
        self.device, self.info = device, read_graph(graph)
        self.sizes, self.declared = dict(sizes or {}), declared
        self.device_memory_size_v2 = activations
        successors = [TensorSpec(s.name + NEXT, s.dtype, s.shape) for s in self.info.state]
        self.tensors = {
            s.name: s for s in (*self.info.inputs, *self.info.outputs, *self.info.state, *successors)
        }
        state = {s.name: np.zeros(self.largest(s.name), s.dtype) for s in self.info.state}
        self.program = OrtProgram(graph, weights, state)
        self.output_bytes: dict[str, int] = {}
        self.location = "TensorLocation.DEVICE"

    @property
    def num_io_tensors(self) -> int:
        return len(self.tensors)

    def get_tensor_name(self, index: int) -> str:
        return list(self.tensors)[index]

    def get_tensor_dtype(self, name: str) -> str:
        return f"DataType.{KINDS[self.tensors[name].dtype.name]}"

    def get_tensor_location(self, name: str) -> str:
        return self.location

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return tuple(dim if isinstance(dim, int) else -1 for dim in self.tensors[name].shape)

    def get_tensor_profile_shape(self, name: str, index: int) -> list[tuple[int, ...]]:
        assert index == 0
        found = []
        for which in ("least", "usual", "most"):
            found.append(
                tuple(
                    dim if isinstance(dim, int) else getattr(self.sizes[str(dim)], which)
                    for dim in self.tensors[name].shape
                )
            )
        return found

    def largest(self, name: str) -> tuple[int, ...]:
        return self.get_tensor_profile_shape(name, 0)[2]

    def get_aliased_input_tensor(self, name: str) -> str | None:
        base = name.removesuffix(NEXT)
        return base if name.endswith(NEXT) and base in self.declared else None

    def create_execution_context(self, strategy: str) -> Context:
        assert strategy == "user managed"
        return Context(self)

    def loaded(self) -> LoadedPlan:
        return LoadedPlan(PACKAGE, None, self, "plan")


class Context:
    """Runs the engine on the addresses that were set."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.addresses: dict[str, int] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.scratch: tuple[int, int] | None = None
        self.refuse: set[str] = set()
        self.settled = False
        self.captured = False

    def call(self, what: str) -> bool:
        self.engine.device.calls.append(what)
        return what.partition(" ")[0] not in self.refuse

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        least, _, most = self.engine.get_tensor_profile_shape(name, 0)
        within = len(shape) == len(most)
        if not within or not all(a <= n <= b for a, n, b in zip(least, shape, most, strict=True)):
            return False
        assert not self.captured  # a CUDA graph relies on what is here
        self.settled = self.settled and self.shapes[name] == tuple(shape)
        self.shapes[name] = tuple(shape)
        return self.call(f"shape {name}")

    def set_tensor_address(self, name: str, address: int) -> bool:
        assert address
        self.addresses[name] = address
        return self.call(f"address {name}")

    def set_device_memory(self, address: int, size: int) -> None:
        assert size >= self.engine.device_memory_size_v2
        self.scratch = address, size
        self.call("scratch")

    def dims(self) -> dict[str, int]:
        found: dict[str, int] = {}
        for name, shape in self.shapes.items():
            pairs = zip(self.engine.tensors[name].shape, shape, strict=True)
            found |= {dim: size for dim, size in pairs if isinstance(dim, str)}
        return found

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        dims, spec = self.dims(), self.engine.tensors[name]
        # The exporter names sizes that follow from others by formulas, such as 4*height.
        return tuple(dim if isinstance(dim, int) else int(eval(str(dim), {}, dims)) for dim in spec.shape)

    def get_max_output_size(self, name: str) -> int:
        spec = self.engine.tensors[name]
        return self.engine.output_bytes.get(name, prod(self.get_tensor_shape(name)) * spec.dtype.itemsize)

    def execute_async_v3(self, stream: int) -> bool:
        device = _DEVICES[stream]
        assert self.scratch is not None
        engine, addresses, shapes = self.engine, dict(self.addresses), dict(self.shapes)
        assert set(addresses) == set(engine.tensors)  # TensorRT wants every tensor bound
        if device.recording is not None:
            assert self.settled  # after new shapes TensorRT sets things up, which cannot be captured
            assert not self.captured
            self.captured = True
        self.settled = True
        outputs = {spec.name: self.get_tensor_shape(spec.name) for spec in engine.info.outputs}

        def work() -> None:
            device.calls.append("execute")

            def at(name: str, shape: tuple[int, ...], address: int | None = None) -> Array:
                spec = engine.tensors[name]
                size = prod(shape) * spec.dtype.itemsize
                memory = (ctypes.c_ubyte * size).from_address(address or addresses[name])
                return np.ctypeslib.as_array(memory).view(spec.dtype).reshape(shape)

            state = {spec.name: at(spec.name, shapes[spec.name]) for spec in engine.info.state}
            apart = {name for name in state if addresses[name] != addresses[name + NEXT]}
            moved = {name: state[name].copy() for name in apart}
            feeds = {spec.name: at(spec.name, shapes[spec.name]).copy() for spec in engine.info.inputs}
            results = engine.program.over(state | moved).run(feeds)
            for name, array in results.items():
                at(name, outputs[name])[...] = array
            for name, array in moved.items():
                at(name + NEXT, array.shape)[...] = array

        self.call("enqueue")
        device.enqueue(work)
        return "enqueue" not in self.refuse


def tensors(info: GraphInfo, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Random state of a graph, as tensors."""
    found = {}
    for spec in info.state:
        shape = [dim for dim in spec.shape if isinstance(dim, int)]
        value = 0.5 * torch.randn(*shape, generator=generator)
        found[spec.name] = value.to(getattr(torch, spec.dtype.name))
    return found
