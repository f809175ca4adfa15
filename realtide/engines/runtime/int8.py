"""Rewrites an exported graph so that its matrix products run in int8 on the CPU (ours; extra ``export``).

The weights stay the bundle's float weights: the rewritten graph asks for initializers such as ``w@int8.T``
and ``w@scale.T``, which `quantize` computes when the graph is loaded. Activations are quantized as they
come, in one of three ways:

- ``row``: each row by its own scale, symmetric. A row's result does not depend on what else is in the
  batch, so a stream gets the same words whoever shares its step. Costs a few small operators per product.
- ``tensor``: the whole tensor by one scale (ONNX DynamicQuantizeLinear), which onnxruntime fuses with the
  product. Faster, but the streams of a batch influence each other's rounding.
- ``static``: the whole tensor by one constant scale that `products.calibrate` measured beforehand. As fast,
  and independent of the batch; values beyond what calibration saw are cut off.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper

from realtide.engines.runtime.products import bias_of, external, location_of, products, replace
from realtide.engines.runtime.program import ProgramError
from realtide.engines.runtime.quantize import COPY, INT8, SCALE, TRANSPOSED

Activations = Literal["row", "tensor", "static"]

_PREFIX = "int8."
_PRODUCT, _DOMAIN = "MatMulIntegerToFloat", "com.microsoft"


@dataclass
class _Rewrite:
    """The graph under construction."""

    activations: Activations
    ranges: Mapping[str, float]
    nodes: list[NodeProto] = field(default_factory=list)
    uses: Counter[str] = field(default_factory=Counter)
    """Products so far by weight."""
    wanted: dict[str, TensorProto] = field(default_factory=dict)
    """New initializers by name."""
    quantized: dict[str, tuple[str, str, str, str]] = field(default_factory=dict)
    """What `_activation` returned, by activation: products of one activation share it."""

    def add(self, op: str, inputs: Sequence[str], output: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(op, list(inputs), [output], **attributes))
        return output

    def constant(self, name: str, value: Any) -> str:
        self.wanted.setdefault(
            _PREFIX + name, onnx.numpy_helper.from_array(np.asarray(value), _PREFIX + name)
        )
        return _PREFIX + name

    def external(self, name: str, dtype: int, shape: Sequence[int], location: str) -> str:
        self.wanted.setdefault(name, external(name, dtype, shape, location))
        return name


def quantize_graph(
    source: Path | str,
    target: Path | str,
    *,
    activations: Activations = "row",
    ranges: Mapping[str, float] | None = None,
    select: Callable[[str], bool] = lambda name: True,
    min_elements: int = 4096,
) -> list[str]:
    """Write the int8 variant of an exported graph.

    Args:
        source: a graph that `export_program` wrote (float32).
        target: file to write.
        activations: how activations are quantized, see above.
        ranges: for ``static``: what `products.calibrate` returned.
        select: tells by name which weights to quantize.
        min_elements: weights with fewer elements stay float: quantizing would cost more than it saves.

    Returns:
        The names of the weights that are int8 now.

    Raises:
        ProgramError: nothing in the graph can be quantized, or `ranges` lacks an activation.
    """
    model = onnx.load(source, load_external_data=False)
    graph = model.graph
    rewrite = _Rewrite(activations, ranges or {})
    done: list[str] = []
    for node, tensor, stored_transposed in products(graph):
        if tensor is None or tensor.dims[0] * tensor.dims[1] < min_elements or not select(tensor.name):
            rewrite.nodes.append(node)
            continue
        _product(rewrite, node, tensor, stored_transposed)
        if tensor.name not in done:
            done.append(tensor.name)
    if not done:
        raise ProgramError(f"{source}: no matrix product can be quantized")
    replace(graph, rewrite.nodes, rewrite.wanted.values())
    model.opset_import.add(domain=_DOMAIN, version=1)
    Path(target).write_bytes(model.SerializeToString(deterministic=True))
    return done


def _product(rewrite: _Rewrite, node: NodeProto, tensor: TensorProto, stored_transposed: bool) -> None:
    """Append the int8 form of ``node``: activation [..., K] times weight [K, N] (plus bias)."""
    output = node.output[0]
    own = _PREFIX + output
    suffix = TRANSPOSED if stored_transposed else ""
    shape = list(tensor.dims)[:: -1 if stored_transposed else 1]
    location = location_of(tensor)
    # Each product has its own weight: prepacking copies it for each anyway, and onnxruntime 1.32 cannot
    # load a graph that shares one when it turns weights into uint8 (session.x64quantprecision).
    use = rewrite.uses[tensor.name]
    rewrite.uses[tensor.name] += 1
    copy = f"{COPY}{use}" if use else ""
    weight = rewrite.external(tensor.name + INT8 + suffix + copy, TensorProto.INT8, shape, location)
    scale = rewrite.external(tensor.name + SCALE + suffix, TensorProto.FLOAT, shape[1:], location)
    bias = bias_of(node)
    quantized, activation_scale, zero, peak = _activation(rewrite, node.input[0])
    # onnxruntime's own operator: the product, both scales and the bias in one kernel.
    inputs = [quantized, weight, activation_scale, scale, zero]
    if not peak:
        rewrite.add(_PRODUCT, [*inputs, "", bias] if bias else inputs, output, domain=_DOMAIN)
        return
    product = rewrite.add(_PRODUCT, inputs, own + ".product", domain=_DOMAIN)
    result = rewrite.add("Mul", [product, peak], own + ".scaled" if bias else output)
    if bias:
        rewrite.add("Add", [result, bias], output)


def _activation(rewrite: _Rewrite, name: str) -> tuple[str, str, str, str]:
    """Quantize an activation [..., K] to uint8, once however many products read it.

    Returns:
        Names of the quantized activation, its scale (one number), its zero point, and what each row [...,
        1] of the product is to be multiplied with ("" for nothing).
    """
    if name in rewrite.quantized:
        return rewrite.quantized[name]
    own = _PREFIX + name
    if rewrite.activations == "tensor":
        outputs = (own + ".uint8", own + ".scale", own + ".zero")
        rewrite.nodes.append(helper.make_node("DynamicQuantizeLinear", [name], list(outputs)))
        rewrite.quantized[name] = (*outputs, "")
        return rewrite.quantized[name]
    zero = rewrite.constant("zero", np.uint8(128))
    if rewrite.activations == "static":
        if name not in rewrite.ranges:
            raise ProgramError(f"activation {name!r} was not calibrated")
        scale = rewrite.constant(own + ".scale", np.float32(max(rewrite.ranges[name], 1e-30) / 127))
        uint8 = rewrite.add("QuantizeLinear", [name, scale, zero], own + ".uint8")
        rewrite.quantized[name] = (uint8, scale, zero, "")
        return rewrite.quantized[name]
    # Rows are divided by their largest magnitude, and then have one constant scale and a product like any
    # other. (A scale for each row cannot be given to the product: its kernel takes the first for all rows,
    # unchecked.)
    step = rewrite.constant("step", np.float32(1 / 127))
    last = rewrite.constant("last_axis", np.array([-1], np.int64))
    size = rewrite.add("Abs", [name], own + ".abs")
    peak = rewrite.add("ReduceMax", [size, last], own + ".peak", keepdims=1)
    # A row of zeros must not be divided by zero.
    peak = rewrite.add("Max", [peak, rewrite.constant("tiny", np.float32(1e-30))], own + ".divisor")
    ratio = rewrite.add("Div", [name, peak], own + ".ratio")
    uint8 = rewrite.add("QuantizeLinear", [ratio, step, zero], own + ".uint8")
    rewrite.quantized[name] = (uint8, step, zero, peak)
    return rewrite.quantized[name]
