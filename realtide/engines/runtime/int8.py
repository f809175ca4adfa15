"""Rewrites an exported graph so that its matrix products run in int8 on the CPU (ours; extra ``export``).

The weights stay the bundle's float weights: the rewritten graph asks for initializers such as ``w@int8.T``
and ``w@scale.T``, which `quantize` computes when the graph is loaded. Activations are quantized as they
come (dynamic quantization), in one of two ways:

- ``row``: each row by its own scale, symmetric. A row's result does not depend on what else is in the
  batch, so a stream gets the same words whoever shares its step. Costs a few small operators per product.
- ``tensor``: the whole tensor by one scale (ONNX DynamicQuantizeLinear), which onnxruntime fuses with the
  product. A little faster, but the streams of a batch influence each other's rounding.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper

from realtide.engines.runtime.program import ProgramError
from realtide.engines.runtime.quantize import COPY, INT8, SCALE, TRANSPOSED

Activations = Literal["row", "tensor"]

_PREFIX = "int8."


@dataclass
class _Rewrite:
    """The graph under construction."""

    activations: Activations
    nodes: list[NodeProto] = field(default_factory=list)
    uses: Counter[str] = field(default_factory=Counter)
    """Products so far by weight."""
    wanted: dict[str, TensorProto] = field(default_factory=dict)
    """New initializers by name."""
    quantized: dict[str, tuple[str, str, str]] = field(default_factory=dict)
    """(quantized, scale, zero point) by the activation's name; products of one activation share it."""

    def add(self, op: str, inputs: Sequence[str], output: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(op, list(inputs), [output], **attributes))
        return output

    def constant(self, name: str, value: Any) -> str:
        self.wanted.setdefault(
            _PREFIX + name, onnx.numpy_helper.from_array(np.asarray(value), _PREFIX + name)
        )
        return _PREFIX + name

    def external(self, name: str, dtype: int, shape: Sequence[int], location: str) -> str:
        tensor = TensorProto(name=name, data_type=dtype, dims=shape, data_location=TensorProto.EXTERNAL)
        tensor.external_data.add(key="location", value=location)
        self.wanted.setdefault(name, tensor)
        return name


def quantize_graph(
    source: Path | str,
    target: Path | str,
    *,
    activations: Activations = "row",
    select: Callable[[str], bool] = lambda name: True,
    min_elements: int = 4096,
) -> list[str]:
    """Write the int8 variant of an exported graph.

    Args:
        source: a graph that `export_program` wrote (float32).
        target: file to write.
        activations: how activations are quantized, see above.
        select: tells by name which weights to quantize.
        min_elements: weights with fewer elements stay float: quantizing would cost more than it saves.

    Returns:
        The names of the weights that are int8 now.

    Raises:
        ProgramError: nothing in the graph can be quantized.
    """
    model = onnx.load(source, load_external_data=False)
    graph = model.graph
    external = {t.name: t for t in graph.initializer if t.data_location == TensorProto.EXTERNAL}
    transposed = {
        node.output[0]: node.input[0]
        for node in graph.node
        if node.op_type == "Transpose" and node.input[0] in external and list(_perm(node, 2)) == [1, 0]
    }
    rewrite = _Rewrite(activations)
    done: list[str] = []
    for node in graph.node:
        weight, stored_transposed = _weight_of(node, external, transposed)
        tensor = external.get(weight)
        if (
            tensor is None
            or len(tensor.dims) != 2
            or tensor.data_type != TensorProto.FLOAT
            or tensor.dims[0] * tensor.dims[1] < min_elements
            or not select(weight)
        ):
            rewrite.nodes.append(node)
            continue
        _product(rewrite, node, tensor, stored_transposed)
        if weight not in done:
            done.append(weight)
    if not done:
        raise ProgramError(f"{source}: no matrix product can be quantized")
    _replace(graph, rewrite)
    Path(target).write_bytes(model.SerializeToString(deterministic=True))
    return done


def _weight_of(
    node: NodeProto, external: dict[str, TensorProto], transposed: dict[str, str]
) -> tuple[str, bool]:
    """The stored weight that is the right factor of a product, and whether it is stored as [N, K]."""
    if node.op_type == "MatMul":
        if node.input[1] in transposed:
            return transposed[node.input[1]], True
        return node.input[1], False
    if node.op_type == "Gemm":
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        plain = attributes.get("alpha", 1.0) == attributes.get("beta", 1.0) == 1.0
        if plain and not attributes.get("transA", 0):
            return node.input[1], bool(attributes.get("transB", 0))
    return "", False


def _product(rewrite: _Rewrite, node: NodeProto, tensor: TensorProto, stored_transposed: bool) -> None:
    """Append the int8 form of ``node``: activation [..., K] times weight [K, N] (plus bias)."""
    output = node.output[0]
    own = _PREFIX + output
    suffix = TRANSPOSED if stored_transposed else ""
    shape = list(tensor.dims)[:: -1 if stored_transposed else 1]
    location = next(e.value for e in tensor.external_data if e.key == "location")
    # Each product has its own weight: prepacking copies it for each anyway, and onnxruntime 1.32 cannot
    # load a graph that shares one when it turns weights into uint8 (session.x64quantprecision).
    use = rewrite.uses[tensor.name]
    rewrite.uses[tensor.name] += 1
    copy = f"{COPY}{use}" if use else ""
    weight = rewrite.external(tensor.name + INT8 + suffix + copy, TensorProto.INT8, shape, location)
    scale = rewrite.external(tensor.name + SCALE + suffix, TensorProto.FLOAT, shape[1:], location)
    bias = node.input[2] if node.op_type == "Gemm" and len(node.input) > 2 and node.input[2] else ""
    result = own + ".scaled" if bias else output
    activation, activation_scale, zero = _activation(rewrite, node.input[0])
    product = rewrite.add("MatMulInteger", [activation, weight, zero], own + ".product")
    floats = rewrite.add("Cast", [product], own + ".float", to=TensorProto.FLOAT)
    if rewrite.activations == "tensor":
        # The form that onnxruntime fuses with the product.
        scales = rewrite.add("Mul", [activation_scale, scale], own + ".scales")
        rewrite.add("Mul", [floats, scales], result)
    else:
        # Not the product of both scales: onnxruntime 1.32 fuses that too, and then takes the first row's
        # scale for all rows (its MatMulIntegerToFloat has one scale for the activation and does not check
        # the shape).
        columns = rewrite.add("Mul", [floats, scale], own + ".columns")
        rewrite.add("Mul", [columns, activation_scale], result)
    if bias:
        rewrite.add("Add", [result, bias], output)


def _activation(rewrite: _Rewrite, name: str) -> tuple[str, str, str]:
    """Quantize an activation [..., K] to uint8, once however many products read it."""
    if name in rewrite.quantized:
        return rewrite.quantized[name]
    own = _PREFIX + name
    if rewrite.activations == "tensor":
        outputs = (own + ".uint8", own + ".scale", own + ".zero")
        rewrite.nodes.append(helper.make_node("DynamicQuantizeLinear", [name], list(outputs)))
    else:
        zero = rewrite.constant("zero", np.uint8(128))
        last = rewrite.constant("last_axis", np.array([-1], np.int64))
        size = rewrite.add("Abs", [name], own + ".abs")
        peak = rewrite.add("ReduceMax", [size, last], own + ".peak", keepdims=1)
        # A row of zeros must not divide by zero: its scale is tiny and its quantized values are 0.
        peak = rewrite.add("Max", [peak, rewrite.constant("tiny", np.float32(1e-30))], own + ".divisor")
        # A quotient, not a product with 1/127: see _product on what a product would be fused to.
        scale = rewrite.add("Div", [peak, rewrite.constant("steps", np.float32(127))], own + ".scale")
        ratio = rewrite.add("Div", [name, scale], own + ".ratio")
        rounded = rewrite.add("Round", [ratio], own + ".rounded")
        shifted = rewrite.add("Add", [rounded, rewrite.constant("shift", np.float32(128))], own + ".shifted")
        outputs = (rewrite.add("Cast", [shifted], own + ".uint8", to=TensorProto.UINT8), scale, zero)
    rewrite.quantized[name] = outputs
    return outputs


def _replace(graph: onnx.GraphProto, rewrite: _Rewrite) -> None:
    """Put the new nodes and initializers in, and take out what nobody reads any more."""
    nodes = rewrite.nodes
    results = {value.name for value in graph.output}
    while True:
        readers = Counter(name for node in nodes for name in node.input)
        alive = [n for n in nodes if any(name in readers or name in results for name in n.output)]
        if len(alive) == len(nodes):
            break
        nodes = alive
    initializers = [t for t in graph.initializer if t.name in readers]
    initializers += [t for t in rewrite.wanted.values() if t.name in readers]
    del graph.node[:], graph.initializer[:]
    graph.node.extend(nodes)
    graph.initializer.extend(initializers)


def _perm(node: NodeProto, rank: int) -> Sequence[int]:
    for attribute in node.attribute:
        if attribute.name == "perm":
            return list(attribute.ints)
    return list(range(rank))[::-1]
