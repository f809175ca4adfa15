"""Half-precision graphs made of float32 ones, for accelerators (ours; needs the extra ``export``).

Exported graphs carry no weights, so a graph in another precision is a matter of types: no module is traced
anew, and every bundle can have it. Matrix products, convolutions, inputs, outputs and state become narrow.
What half precision would spoil stays in float32: reductions, normalisations, softmax, squares, and the
arithmetic that follows them until something is moved or multiplied as a matrix (mixed precision as in
Micikevicius et al. 2018, section 3). TensorRT fuses the casts into the arithmetic around them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, numpy_helper

from realtide.engines.runtime.in_place import check_in_place
from realtide.engines.runtime.program import NEXT, ProgramError

Narrow = Literal["float16", "bfloat16"]

_CODES = {"float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16}

_BFLOAT16_OPSET = 22

_WIDE = frozenset(
    (
        *("CumSum", "Cos", "Exp", "Log", "Pow", "Range", "Reciprocal", "Sin", "Softplus", "Sqrt"),
        *("GroupNormalization", "InstanceNormalization", "LayerNormalization", "RMSNormalization"),
        *("LogSoftmax", "Softmax", "ReduceL2", "ReduceLogSumExp", "ReduceMean", "ReduceProd", "ReduceSum"),
        "ReduceSumSquare",
    )
)
"""Operators that are always computed in float32."""

_FOLLOWS = frozenset(
    (
        *("Abs", "Add", "Clip", "Div", "Erf", "Gelu", "Max", "Min", "Mul", "Neg", "Sigmoid", "Sub", "Sum"),
        *("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Tanh", "Where"),
    )
)
"""Elementwise operators: float32 if one of their operands is."""

_KEPT_INPUTS = {"Resize": (1, 2)}
"""Operands whose type the operator fixes."""


def narrow_graph(source: Path | str, target: Path | str, precision: Narrow) -> None:
    """Write a graph's variant in half precision: the same names, float32 inputs, outputs and state narrow.

    Args:
        source: a float32 graph that `export_program` wrote.
        target: file to write; nothing is written if the graph is refused.
        precision: ``float16`` or ``bfloat16``.

    Raises:
        ProgramError: the graph has subgraphs, or tensors whose type cannot be inferred, or its state could
            not be updated in place any more.
    """
    model = onnx.load(source, load_external_data=False)
    try:
        narrow_model(model, precision)
    except ProgramError as error:
        raise ProgramError(f"{source}: {error}") from None
    Path(target).write_bytes(model.SerializeToString(deterministic=True))


def narrow_model(model: onnx.ModelProto, precision: Narrow) -> None:
    """The same for a model in memory, which is changed. Raises ProgramError."""
    if precision == "bfloat16":
        _raise_opset(model)
    _Narrowing(model, _CODES[precision]).apply()
    state = {o.name.removesuffix(NEXT): o.name for o in model.graph.output if o.name.endswith(NEXT)}
    check_in_place(model, state)


def _raise_opset(model: onnx.ModelProto) -> None:
    """Say the opset from which convolutions and the like take bfloat16; what is between only adds types."""
    for domain in model.opset_import:
        if domain.domain in ("", "ai.onnx") and domain.version < _BFLOAT16_OPSET:
            odd = [n.output[0] for n in model.graph.node if n.op_type == "GroupNormalization"]
            if odd:  # the one operator that means something else since 21
                raise ProgramError(f"GroupNormalization {odd[0]!r} has no bfloat16 at opset {domain.version}")
            domain.version = _BFLOAT16_OPSET


class _Narrowing:
    """One graph on its way. A tensor is `wide` if it is float32 in the new graph."""

    def __init__(self, model: onnx.ModelProto, code: int) -> None:
        self.graph, self.code = model.graph, code
        self.floats = set(_floats(model))
        self.initializers = {tensor.name: tensor for tensor in self.graph.initializer}
        self.wide: set[str] = set()
        self.nodes: list[NodeProto] = []
        self.cast: dict[str, str] = {}
        self.readers: dict[str, set[bool]] = defaultdict(set)
        """Of initializers: whether wide and whether narrow nodes read them."""

    def apply(self) -> None:
        plan = [(node, self._is_wide(node)) for node in self.graph.node]
        for node, wide in plan:
            for index, name in enumerate(node.input):
                if name in self.initializers and name in self.floats:
                    self.readers[name].add(wide or index in _KEPT_INPUTS.get(node.op_type, ()))
        for name, kinds in self.readers.items():
            if kinds == {True}:
                self.wide.add(name)
        for node, wide in plan:
            self._place(node, wide)
        self._settle_outputs()
        for name, tensor in self.initializers.items():
            if name in self.floats and name not in self.wide:
                self._narrow_initializer(tensor)
        for value in (*self.graph.input, *self.graph.output):
            if value.type.tensor_type.elem_type == TensorProto.FLOAT:
                value.type.tensor_type.elem_type = self.code
        del self.graph.node[:], self.graph.value_info[:]
        self.graph.node.extend(self.nodes)

    def _is_wide(self, node: NodeProto) -> bool:
        """Decide for a node whose operands were decided, and mark its results."""
        operands = [name for name in node.input if name in self.floats]
        square = node.op_type == "Mul" and len(set(node.input)) == 1
        from_integer = node.op_type == "Cast" and not operands  # may be beyond what half precision counts to
        number = node.op_type == "Constant" and not any(a.HasField("t") for a in node.attribute)
        wide = node.op_type in _WIDE or square or from_integer or number
        wide = wide or (node.op_type in _FOLLOWS and any(name in self.wide for name in operands))
        if wide:
            self.wide.update(name for name in node.output if name in self.floats)
        return wide

    def _place(self, node: NodeProto, wide: bool) -> None:
        kept = _KEPT_INPUTS.get(node.op_type, ())
        for index, name in enumerate(node.input):
            if name not in self.floats:
                continue
            wanted = wide or index in kept
            if wanted != (name in self.wide):
                node.input[index] = self._other(name, wanted)
        if not wide:
            self._narrow_attributes(node)
        self.nodes.append(node)

    def _other(self, name: str, wide: bool) -> str:
        """The tensor in the other type."""
        if name not in self.cast:
            self.cast[name] = f"{name}.{'wide' if wide else 'narrow'}"
            to = TensorProto.FLOAT if wide else self.code
            self.nodes.append(onnx.helper.make_node("Cast", [name], [self.cast[name]], to=to))
        return self.cast[name]

    def _narrow_attributes(self, node: NodeProto) -> None:
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.name == "to" and attribute.i == TensorProto.FLOAT:
                attribute.i = self.code
            elif attribute.HasField("t") and attribute.t.data_type == TensorProto.FLOAT:
                attribute.t.CopyFrom(self._narrowed(attribute.t))

    def _settle_outputs(self) -> None:
        """Results that are wide get a cast of their own; their names stay those of the results."""
        for value in self.graph.output:
            if value.name not in self.wide:
                continue
            inner = f"{value.name}.inner"
            for node in self.nodes:
                for names in (node.input, node.output):
                    for index, name in enumerate(names):
                        if name == value.name:
                            names[index] = inner
            self.nodes.append(onnx.helper.make_node("Cast", [inner], [value.name], to=self.code))

    def _narrow_initializer(self, tensor: TensorProto) -> None:
        if tensor.data_location == TensorProto.EXTERNAL:
            tensor.data_type = self.code  # its values are cast when they are loaded
        else:
            tensor.CopyFrom(self._narrowed(tensor))

    def _narrowed(self, tensor: TensorProto) -> TensorProto:
        """A constant; what is beyond half precision's range masks, and masks as well at the range's end."""
        values = numpy_helper.to_array(tensor)
        if self.code == TensorProto.FLOAT16:
            top = np.finfo(np.float16).max
            finite = np.isfinite(values)
            narrow = np.where(finite, np.clip(values, -top, top), values).astype(np.float16)
            return numpy_helper.from_array(narrow, tensor.name)
        made = onnx.helper.make_tensor(tensor.name, self.code, values.shape, values.ravel())
        return made


def _floats(model: onnx.ModelProto) -> Iterator[str]:
    """Names of all float32 tensors."""
    graph = model.graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g") or attribute.graphs:
                raise ProgramError(f"{node.op_type} {node.output[0]!r} has a subgraph")
    inferred = onnx.shape_inference.infer_shapes(model).graph
    types = {value.name: value.type.tensor_type.elem_type for value in inferred.value_info}
    types |= {v.name: v.type.tensor_type.elem_type for v in (*inferred.input, *inferred.output)}
    types |= {tensor.name: tensor.data_type for tensor in inferred.initializer}
    for node in graph.node:
        for name in node.output:
            if name and not types.get(name):
                raise ProgramError(f"the type of {name!r} ({node.op_type}) cannot be inferred")
    return (name for name, code in types.items() if code == TensorProto.FLOAT)
