"""Rewrites an exported graph so that its products run in float8 (e4m3) on a GPU (ours; extra ``export``).

A product's activation and its weight each pass through float8: QuantizeLinear and DequantizeLinear around
the activation, DequantizeLinear behind the weight, which is stored in float8. That is how TensorRT is told
of such products (explicit quantization in its documentation); it fuses them into one kernel, whose sums
are float32. The rest of the graph is half precision (`narrow`): float16, which ONNX Runtime computes on a
processor as well, so that what is built can be measured, and of which a product's result keeps three bits
more than in bfloat16.

Scales are constants. A weight's follows from the weight when the graph is loaded (`quantize`); an
activation's is measured beforehand (`products.calibrate`). All are powers of two, one for a whole tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

from realtide.engines.runtime.narrow import narrow_model
from realtide.engines.runtime.products import bias_of, external, location_of, products, replace
from realtide.engines.runtime.program import ProgramError
from realtide.engines.runtime.quantize import FLOAT8, FLOAT8_SCALE, TRANSPOSED, float8_scale

MULTIPLE = 16
"""Both widths of a product in float8 must be multiples of this."""
HEADROOM = 8.0
"""How far beyond what calibration saw an activation may go before it is cut off. Three of e4m3's 17 binades:
outputs of the bundles here are as near with 64 as with 1, and four times as far off with a half.
"""

_PREFIX = "float8."
_ZERO = _PREFIX + "zero"


def quantize_graph_float8(
    source: Path | str,
    target: Path | str,
    ranges: Mapping[str, float],
    *,
    select: Callable[[str], bool] = lambda name: True,
) -> list[str]:
    """Write the variant of an exported graph with products in float8, and the rest in float16.

    Args:
        source: a graph that `export_program` wrote (float32).
        target: file to write.
        ranges: what `products.calibrate` measured.
        select: tells by name which weights may be float8; those that do not fit (`MULTIPLE`) never are.

    Returns:
        The names of the weights that are float8 now.

    Raises:
        ProgramError: no product can be float8, an activation was not calibrated or is not finite, or the rest
            cannot be narrowed.
    """
    model = onnx.load(source, load_external_data=False)
    rewrite = _Rewrite(ranges)
    try:
        for node, tensor, stored_transposed in products(model.graph):
            if tensor is None or any(dim % MULTIPLE for dim in tensor.dims) or not select(tensor.name):
                rewrite.nodes.append(node)
            else:
                rewrite.product(node, tensor, stored_transposed)
        if not rewrite.done:
            raise ProgramError("no matrix product can be in float8")
        replace(model.graph, rewrite.nodes, rewrite.wanted.values())
        narrow_model(model, "float16")  # scales narrow with the rest, exactly
    except ProgramError as error:
        raise ProgramError(f"{source}: {error}") from None
    Path(target).write_bytes(model.SerializeToString(deterministic=True))
    return rewrite.done


class _Rewrite:
    """The graph under construction."""

    def __init__(self, ranges: Mapping[str, float]) -> None:
        self.ranges = ranges
        self.nodes: list[NodeProto] = []
        self.wanted = {_ZERO: helper.make_tensor(_ZERO, TensorProto.FLOAT8E4M3FN, [], [0.0])}
        """New initializers by name. A zero point, which says that a result is float8."""
        self.rounded: dict[str, str] = {}
        """Activations that went through float8: products of one activation share that."""
        self.weights: dict[str, str] = {}
        self.done: list[str] = []

    def product(self, node: NodeProto, tensor: TensorProto, stored_transposed: bool) -> None:
        """Activation [..., K] times weight [K, N] (plus bias)."""
        activation = self._activation(node.input[0])
        weight = self._weight(tensor, stored_transposed)
        output, bias = node.output[0], bias_of(node)
        inner = f"{_PREFIX}{output}" if bias else output
        self.nodes.append(helper.make_node("MatMul", [activation, weight], [inner]))
        if bias:
            self.nodes.append(helper.make_node("Add", [inner, bias], [output]))
        if tensor.name not in self.done:
            self.done.append(tensor.name)

    def _activation(self, name: str) -> str:
        if name not in self.rounded:
            if name not in self.ranges:
                raise ProgramError(f"activation {name!r} was not calibrated")
            own = _PREFIX + name
            scale = f"{own}.scale"
            value = np.float32(float8_scale(self.ranges[name] * HEADROOM))
            self.wanted[scale] = numpy_helper.from_array(np.asarray(value), scale)
            self.nodes += [
                helper.make_node("QuantizeLinear", [name, scale, _ZERO], [f"{own}.float8"]),
                helper.make_node("DequantizeLinear", [f"{own}.float8", scale, _ZERO], [own]),
            ]
            self.rounded[name] = own
        return self.rounded[name]

    def _weight(self, tensor: TensorProto, stored_transposed: bool) -> str:
        name = tensor.name + FLOAT8 + (TRANSPOSED if stored_transposed else "")
        if name not in self.weights:
            shape = list(tensor.dims)[:: -1 if stored_transposed else 1]
            scale, location = tensor.name + FLOAT8_SCALE, location_of(tensor)
            self.wanted[name] = external(name, TensorProto.FLOAT8E4M3FN, shape, location)
            self.wanted[scale] = external(scale, TensorProto.FLOAT, [], location)
            wide = f"{_PREFIX}{name}"
            self.nodes.append(helper.make_node("DequantizeLinear", [name, scale, _ZERO], [wide]))
            self.weights[name] = wide
        return self.weights[name]
