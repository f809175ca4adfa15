"""How an engine's tensors are bound, as data: which buffer each reads or writes, and how large it is (ours).

Worked out once when a program is made, from the engine and the graph it was built of, and checked before
anything is enqueued. State ``x`` and its successor ``x.next`` share one buffer. TensorRT promises that this
is right where the engine itself says that the output is the input's memory (KV_CACHE_UPDATE, made of
TensorScatter). For states that are written by ScatterND it promises nothing: there it should be right because
the exporter has checked that nothing reads the old rows after the write (`in_place.check_in_place`), or
`shared` is False and the successor is copied back.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from realtide.engines.runtime.onnx_file import GraphInfo
from realtide.engines.runtime.program import NEXT, ProgramError, TensorSpec

_DTYPES = {
    "FLOAT": "float32",
    "HALF": "float16",
    "BF16": "bfloat16",
    "INT8": "int8",
    "UINT8": "uint8",
    "INT32": "int32",
    "INT64": "int64",
    "BOOL": "bool",
}
"""TensorRT's types that programs have, by the names that numpy gives them."""


@dataclass(frozen=True, slots=True)
class StateBinding:
    """A state tensor.

    Attributes:
        spec: dtype and shape as the graph has them.
        declared: the engine says that the successor is this tensor's memory.
        shared: both names are bound to one buffer; else the successor has its own and is copied back.
    """

    spec: TensorSpec
    declared: bool
    shared: bool


@dataclass(frozen=True, slots=True)
class Bindings:
    """All tensors of an engine.

    Attributes:
        inputs: what every run is fed, with the most bytes that the profile allows.
        outputs: what every run gives.
        state: see there.
        fixed: no shape changes from run to run, so that one CUDA graph serves all runs.
    """

    inputs: tuple[tuple[TensorSpec, int], ...]
    outputs: tuple[TensorSpec, ...]
    state: tuple[StateBinding, ...]
    fixed: bool


def bindings_of(label: str, engine: Any, graph: GraphInfo, *, share: bool = True) -> Bindings:
    """Work out the bindings.

    Args:
        label: what messages call the engine.
        engine: TensorRT's engine.
        graph: of which it was built.
        share: bind states in place that the engine does not declare so, on the exporter's word.

    Raises:
        ProgramError: the engine has other tensors than the graph, or of another type.
    """
    have = {engine.get_tensor_name(index) for index in range(engine.num_io_tensors)}
    successors = [_successor(spec) for spec in graph.state]
    want = [*graph.inputs, *graph.outputs, *graph.state, *successors]
    odd = sorted(have ^ {spec.name for spec in want})
    if odd:
        raise ProgramError(f"{label}: tensor {odd[0]!r} is in the graph or in the engine, not in both")
    for spec in want:
        kind = str(engine.get_tensor_dtype(spec.name)).rpartition(".")[2]
        if _DTYPES.get(kind) != spec.dtype.name:
            raise ProgramError(
                f"{label}: tensor {spec.name!r} is {spec.dtype.name} in the graph, {kind} in the engine"
            )
        if str(engine.get_tensor_location(spec.name)).endswith("HOST"):
            raise ProgramError(f"{label}: tensor {spec.name!r} decides shapes, and must be a constant")
    state = tuple(_state(engine, spec, share) for spec in graph.state)
    inputs = tuple((spec, _most_bytes(label, engine, spec)) for spec in graph.inputs)
    shapes = [spec.shape for spec in (*graph.inputs, *graph.state)]
    fixed = all(isinstance(dim, int) for shape in shapes for dim in shape)
    return Bindings(inputs, graph.outputs, state, fixed)


def check_device_state(
    label: str, bindings: Bindings, tensors: Mapping[str, Any]
) -> dict[str, tuple[int, tuple[int, ...]]]:
    """Address and shape of each state tensor on the device, by name.

    Args:
        label: what messages call the engine.
        bindings: whose state this is to be.
        tensors: PyTorch's CUDA tensors by name.

    Raises:
        ProgramError: one is missing, unknown, does not fit, is not contiguous, or overlaps another.
    """
    specs = {binding.spec.name: binding.spec for binding in bindings.state}
    odd = sorted(set(specs) ^ set(tensors))
    if odd:
        raise ProgramError(f"{label}: state {odd[0]!r} is {'missing' if odd[0] in specs else 'unknown'}")
    found: dict[str, tuple[int, tuple[int, ...]]] = {}
    taken: list[tuple[int, int, str]] = []
    for name, spec in specs.items():
        tensor = tensors[name]
        shape = tuple(tensor.shape)
        fits = len(shape) == len(spec.shape) and all(
            not isinstance(dim, int) or dim == size for dim, size in zip(spec.shape, shape, strict=True)
        )
        kind = str(tensor.dtype).rpartition(".")[2]
        if not fits or kind != spec.dtype.name:
            raise ProgramError(f"{label}: state {name!r} must be {spec.describe()}, not {kind}{list(shape)}")
        if not tensor.is_contiguous():
            raise ProgramError(f"{label}: state {name!r} must be contiguous")
        begin = int(tensor.data_ptr())
        end = begin + prod(shape) * spec.dtype.itemsize
        for other_begin, other_end, other in taken:
            if begin < other_end and other_begin < end:
                raise ProgramError(f"{label}: state {name!r} shares memory with state {other!r}")
        taken.append((begin, end, name))
        found[name] = begin, shape
    return found


def profile_shapes(engine: Any, names: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """The largest shape of each input that the engine's profile allows."""
    return {
        name: tuple(engine.get_tensor_profile_shape(name, 0)[2])
        if -1 in tuple(engine.get_tensor_shape(name))
        else tuple(engine.get_tensor_shape(name))
        for name in names
    }


def _successor(spec: TensorSpec) -> TensorSpec:
    return TensorSpec(spec.name + NEXT, spec.dtype, spec.shape)


def _state(engine: Any, spec: TensorSpec, share: bool) -> StateBinding:
    ask = getattr(engine, "get_aliased_input_tensor", None)  # TensorRT 10.15 and newer
    declared = ask is not None and ask(spec.name + NEXT) == spec.name
    return StateBinding(spec, declared, declared or share)


def _most_bytes(label: str, engine: Any, spec: TensorSpec) -> int:
    (shape,) = profile_shapes(engine, [spec.name]).values()
    if len(shape) != len(spec.shape) or any(
        isinstance(dim, int) and dim != size for dim, size in zip(spec.shape, shape, strict=True)
    ):
        raise ProgramError(
            f"{label}: input {spec.name!r} is {spec.describe()} in the graph, {list(shape)} in the engine"
        )
    return prod(shape) * spec.dtype.itemsize
