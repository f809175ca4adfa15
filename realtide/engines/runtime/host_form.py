"""Graphs in half precision in a form that a processor computes, to judge them without a GPU (ours).

ONNX Runtime has no bfloat16 on processors. So a tensor that is narrow in the graph is float32 here, and every
result that would be narrow is rounded to the narrow type where it is made: to nearest, ties to even, as by a
processor of such a type that sums in float32. What an accelerator does inside of one operator, how it orders
its sums or rounds parts of them, is not in it. Inputs, outputs and state are float32 and hold values of the
narrow type, so what runs the float32 graph runs this one.

Needs the extra ``export``.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

from realtide.engines.runtime.program import NEXT, ProgramError

NARROW = {TensorProto.FLOAT16: "float16", TensorProto.BFLOAT16: "bfloat16"}

_MOVES = frozenset(
    (
        *(
            "Concat",
            "Expand",
            "Flatten",
            "Gather",
            "GatherElements",
            "GatherND",
            "Identity",
            "Pad",
            "Reshape",
        ),
        *("ScatterElements", "ScatterND", "Slice", "Split", "Squeeze", "TensorScatter", "Tile", "Transpose"),
        *("Unsqueeze", "Where", "Max", "Min", "Neg", "Abs", "Relu"),
    )
)
"""Operators whose results are values of their operands, or of the same size: nothing is left to round."""


def host_form(source: Path | str, target: Path | str) -> None:
    """Write the form of a graph that a processor computes.

    Args:
        source: a graph of `narrow.narrow_graph`; also one whose products are in float8 besides.
        target: file to write.

    Raises:
        ProgramError: the graph has subgraphs, tensors whose type cannot be inferred, or no narrow tensor.
    """
    model = onnx.load(source, load_external_data=False)
    try:
        _Widening(model).apply()
    except ProgramError as error:
        raise ProgramError(f"{source}: {error}") from None
    Path(target).write_bytes(model.SerializeToString(deterministic=True))


class _Widening:
    """One graph on its way."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.graph = model.graph
        self.types = _types(model)
        self.kinds = {name: code for name, code in self.types.items() if code in NARROW}
        if not self.kinds:
            raise ProgramError("nothing in it is in half precision")
        self.state = {o.name.removesuffix(NEXT) for o in model.graph.output if o.name.endswith(NEXT)}
        self.nodes: list[NodeProto] = []
        self.rounded: dict[str, str] = {}
        """Inputs and weights, whose own values may be anything: what stands for them inside."""

    def apply(self) -> None:
        for value in (*self.graph.input, *self.graph.output):
            if value.type.tensor_type.elem_type in NARROW:
                value.type.tensor_type.elem_type = TensorProto.FLOAT
        for value in self.graph.input:
            # State starts as zeros and is written by this graph only: it holds rounded values already.
            if value.name in self.kinds and value.name not in self.state:
                self._stand_in(value.name)
        for tensor in self.graph.initializer:
            if tensor.name in self.kinds:
                self._widen_initializer(tensor)
        for node in self.graph.node:
            self._place(node)
        del self.graph.node[:], self.graph.value_info[:]
        self.graph.node.extend(self.nodes)

    def _widen_initializer(self, tensor: TensorProto) -> None:
        if tensor.data_location == TensorProto.EXTERNAL:
            tensor.data_type = TensorProto.FLOAT
            self._stand_in(tensor.name)
        else:
            tensor.CopyFrom(_wide(tensor))

    def _stand_in(self, name: str) -> None:
        self.rounded[name] = f"{name}.rounded"
        self._round(name, self.rounded[name], self.kinds[name])

    def _round(self, name: str, to: str, code: int) -> None:
        self.nodes += [
            helper.make_node("Cast", [name], [f"{to}.narrow"], to=code),
            helper.make_node("Cast", [f"{to}.narrow"], [to], to=TensorProto.FLOAT),
        ]

    def _place(self, node: NodeProto) -> None:
        for index, name in enumerate(node.input):
            node.input[index] = self.rounded.get(name, name)
        narrow = [name for name in node.output if name in self.kinds]
        self._widen_attributes(node)
        if not narrow or node.op_type in _MOVES:
            self.nodes.append(node)
            return
        exact = {}
        for index, name in enumerate(node.output):
            if name in self.kinds:
                exact[name] = node.output[index] = f"{name}.exact"
        self.nodes.append(node)
        for name in narrow:
            self._round(exact[name], name, self.kinds[name])

    def _widen_attributes(self, node: NodeProto) -> None:
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.name == "to" and attribute.i in NARROW:
                attribute.i = TensorProto.FLOAT
            elif attribute.HasField("t") and attribute.t.data_type in NARROW:
                attribute.t.CopyFrom(_wide(attribute.t))


def _wide(tensor: TensorProto) -> TensorProto:
    """A constant of half precision in float32."""
    return numpy_helper.from_array(numpy_helper.to_array(tensor).astype("float32"), tensor.name)


def _types(model: onnx.ModelProto) -> dict[str, int]:
    """Element types of all tensors."""
    types: dict[str, int] = {}
    for name, code in _declared(onnx.shape_inference.infer_shapes(model).graph):
        types[name] = code
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g") or attribute.graphs:
                raise ProgramError(f"{node.op_type} {node.output[0]!r} has a subgraph")
        for name in node.output:
            if name and not types.get(name):
                raise ProgramError(f"the type of {name!r} ({node.op_type}) cannot be inferred")
    return types


def _declared(graph: onnx.GraphProto) -> Iterator[tuple[str, int]]:
    for value in (*graph.value_info, *graph.input, *graph.output):
        yield value.name, value.type.tensor_type.elem_type
    for tensor in graph.initializer:
        yield tensor.name, tensor.data_type
