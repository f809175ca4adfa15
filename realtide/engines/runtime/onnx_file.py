"""Reads what a program needs to know from an ONNX file before it is loaded (ours).

onnxruntime tells a graph's inputs and outputs only after loading, and loading needs the weights. Serving
does not install the ``onnx`` package, so this reads the few fields it needs from the protobuf wire format
(field numbers: onnx/onnx.proto3). Tensor data is skipped, not copied.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from realtide.engines.runtime.program import Dim, ProgramError, TensorSpec, split_state

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5

_DTYPES: dict[int, str] = {
    1: "float32",
    2: "uint8",
    3: "int8",
    4: "uint16",
    5: "int16",
    6: "int32",
    7: "int64",
    9: "bool",
    10: "float16",
    11: "float64",
    12: "uint32",
    13: "uint64",
}
"""TensorProto.DataType values that numpy has too."""

_ML_DTYPES = {16: "bfloat16", 17: "float8_e4m3fn"}
"""Those that numpy lacks. No graph of a CPU has them, and serving does not install the package."""


@dataclass(frozen=True, slots=True)
class GraphInfo:
    """The outside of an ONNX graph."""

    inputs: tuple[TensorSpec, ...]
    """Inputs without the state."""
    outputs: tuple[TensorSpec, ...]
    """Outputs without the next-state tensors."""
    state: tuple[TensorSpec, ...]
    output_names: tuple[str, ...]
    """All outputs in the graph's own order, next-state tensors included."""
    external: tuple[TensorSpec, ...]
    """Initializers whose values are not in the file."""
    metadata: dict[str, str]


@dataclass(frozen=True, slots=True)
class GraphSummary:
    """The inside of an ONNX graph, counted."""

    opsets: dict[str, int]
    """Version by domain; the standard one is ``ai.onnx``."""
    operators: dict[str, int]
    """Nodes by operator."""


def read_graph(data: bytes) -> GraphInfo:
    """Parse a serialized ModelProto.

    Raises:
        ProgramError: the bytes are no ONNX model, or its state tensors break the ``x`` / ``x.next`` rule.
    """
    graph: memoryview | None = None
    metadata: dict[str, str] = {}
    try:
        for number, value in _fields(memoryview(data)):
            if number == 7:
                graph = _view(value)
            elif number == 14:
                key, text = _string_pair(_view(value))
                metadata[key] = text
        if graph is None:
            raise ProgramError("no ONNX model: it has no graph")
        inputs: list[TensorSpec] = []
        outputs: list[TensorSpec] = []
        external: list[TensorSpec] = []
        initialized: set[str] = set()
        for number, value in _fields(graph):
            if number == 5:
                spec, is_external = _initializer(_view(value))
                initialized.add(spec.name)
                if is_external:
                    external.append(spec)
            elif number == 11:
                inputs.append(_value_info(_view(value)))
            elif number == 12:
                outputs.append(_value_info(_view(value)))
    except (IndexError, UnicodeDecodeError, TypeError) as error:
        raise ProgramError(f"no ONNX model: {error}") from error
    fed = [spec for spec in inputs if spec.name not in initialized]
    plain_inputs, plain_outputs, state = split_state(fed, outputs)
    return GraphInfo(
        inputs=plain_inputs,
        outputs=plain_outputs,
        state=state,
        output_names=tuple(spec.name for spec in outputs),
        external=tuple(external),
        metadata=metadata,
    )


def summarize(data: bytes) -> GraphSummary:
    """Count what is in a serialized ModelProto that `read_graph` accepts. Raises ProgramError."""
    opsets: dict[str, int] = {}
    operators: dict[str, int] = {}
    try:
        for number, value in _fields(memoryview(data)):
            if number == 8:
                domain, version = "", 0
                for part, content in _fields(_view(value)):
                    if part == 1:
                        domain = _text(content)
                    elif part == 2:
                        version = _int(content)
                opsets[domain or "ai.onnx"] = version
            elif number == 7:
                for part, content in _fields(_view(value)):
                    if part == 1:
                        kinds = [_text(body) for field, body in _fields(_view(content)) if field == 4]
                        operators[kinds[0]] = operators.get(kinds[0], 0) + 1
    except (IndexError, UnicodeDecodeError, TypeError) as error:
        raise ProgramError(f"no ONNX model: {error}") from error
    return GraphSummary(opsets, operators)


def _fields(view: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """The (field number, value) pairs of one message. Raises IndexError where the message is cut off."""
    at = 0
    while at < len(view):
        tag, at = _varint(view, at)
        number, wire = tag >> 3, tag & 7
        if wire == _VARINT:
            value, at = _varint(view, at)
            yield number, value
            continue
        if wire == _BYTES:
            length, at = _varint(view, at)
        elif wire == _FIXED64:
            length = 8
        elif wire == _FIXED32:
            length = 4
        else:
            raise IndexError(f"wire type {wire} at byte {at}")
        if at + length > len(view):
            raise IndexError(f"cut off at byte {len(view)}")
        yield number, view[at : at + length]
        at += length


def _varint(view: memoryview, at: int) -> tuple[int, int]:
    result = shift = 0
    while True:
        if shift > 63:
            raise IndexError(f"overlong number at byte {at}")
        byte = view[at]
        at += 1
        result |= (byte & 0x7F) << shift
        if byte < 0x80:
            return result, at
        shift += 7


def _view(value: int | memoryview) -> memoryview:
    if not isinstance(value, memoryview):
        raise TypeError("a number where a message belongs")
    return value


def _int(value: int | memoryview) -> int:
    if not isinstance(value, int):
        raise TypeError("a message where a number belongs")
    return value


def _text(value: int | memoryview) -> str:
    return bytes(_view(value)).decode()


def _string_pair(view: memoryview) -> tuple[str, str]:
    key = text = ""
    for number, value in _fields(view):
        if number == 1:
            key = _text(value)
        elif number == 2:
            text = _text(value)
    return key, text


def _dtype(code: int, name: str) -> np.dtype[Any]:
    if code in _ML_DTYPES:
        kind = _ML_DTYPES[code]
        try:
            import ml_dtypes
        except ImportError:
            raise ProgramError(f"tensor {name!r} is {kind}, which needs ml-dtypes (extra export)") from None
        dtype: np.dtype[Any] = np.dtype(getattr(ml_dtypes, kind))
        return dtype
    if code not in _DTYPES:
        raise ProgramError(f"tensor {name!r} has ONNX data type {code}, which numpy lacks")
    return np.dtype(_DTYPES[code])


def _initializer(view: memoryview) -> tuple[TensorSpec, bool]:
    name, code, dims, location = "", 0, list[Dim](), 0
    for number, value in _fields(view):
        if number == 1:
            if isinstance(value, int):
                dims.append(value)
            else:  # packed
                at = 0
                while at < len(value):
                    dim, at = _varint(value, at)
                    dims.append(dim)
        elif number == 2:
            code = _int(value)
        elif number == 8:
            name = _text(value)
        elif number == 14:
            location = _int(value)
    return TensorSpec(name, _dtype(code, name), tuple(dims)), location == 1


def _value_info(view: memoryview) -> TensorSpec:
    name, code, shape = "", 0, list[Dim]()
    for number, value in _fields(view):
        if number == 1:
            name = _text(value)
        elif number == 2:
            for kind, body in _fields(_view(value)):
                if kind != 1:
                    raise ProgramError(f"{name!r} is not a dense tensor")
                for part, content in _fields(_view(body)):
                    if part == 1:
                        code = _int(content)
                    elif part == 2:
                        shape = [_dim(_view(dim)) for which, dim in _fields(_view(content)) if which == 1]
    return TensorSpec(name, _dtype(code, name), tuple(shape))


def _dim(view: memoryview) -> Dim:
    dim: Dim = None
    for number, value in _fields(view):
        if number == 1:
            dim = _int(value)
        elif number == 2:
            dim = _text(value)
    return dim
