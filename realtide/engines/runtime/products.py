"""Matrix products with a stored weight: found in an exported graph, measured, and replaced (ours).

What rewrites a graph's products in fewer bits (`int8`, `fp8_graph`) starts here. Needs the extra ``export``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import onnx
from onnx import NodeProto, TensorProto, helper

from realtide.engines.runtime.ort import OrtProgram
from realtide.engines.runtime.program import Array

_PEAK = ".calibrated"


class Measured:
    """A graph that computes what it always does, and notes how large each product's activation gets.

    Args:
        source: a graph that `export_program` wrote (float32).
        weights: values of its external initializers by name.
        state: its state arrays, updated by the runs.

    Attributes:
        runs: how often it was run.
        ranges: the largest magnitude of every activation that is multiplied with a weight, by its name in the
            graph.

    Raises:
        ProgramError, FeedError: as OrtProgram does.
    """

    def __init__(self, source: Path | str, weights: Mapping[str, Array], state: Mapping[str, Array]) -> None:
        model = onnx.load(source, load_external_data=False)
        graph = model.graph
        self.runs = 0
        self.ranges = {node.input[0]: 0.0 for node, tensor, _ in products(graph) if tensor is not None}
        for name in self.ranges:
            # Reduced in the graph: the activations of a large model would not fit beside each other.
            graph.node.append(helper.make_node("Abs", [name], [f"{name}.magnitude"]))
            graph.node.append(
                helper.make_node("ReduceMax", [f"{name}.magnitude"], [name + _PEAK], keepdims=0)
            )
            graph.output.append(helper.make_tensor_value_info(name + _PEAK, TensorProto.FLOAT, []))
        self._program = OrtProgram(model.SerializeToString(), weights, state)

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """See `Program.run`."""
        found = self._program.run(feeds)
        self.runs += 1
        for name in self.ranges:
            # Of no rows the largest is the lowest there is.
            self.ranges[name] = max(self.ranges[name], float(found.pop(name + _PEAK)))
        return found


def calibrate(
    source: Path | str,
    weights: Mapping[str, Array],
    state: Mapping[str, Array],
    runs: Iterable[Mapping[str, Array]],
) -> dict[str, float]:
    """The ranges of a `Measured` after representative runs, fed in order; raises what it raises."""
    program = Measured(source, weights, state)
    for feeds in runs:
        program.run(feeds)
    return program.ranges


def products(graph: onnx.GraphProto) -> Iterator[tuple[NodeProto, TensorProto | None, bool]]:
    """Every node, with the stored float matrix it multiplies with if it does, and whether that is [N, K]."""
    external = {
        t.name: t
        for t in graph.initializer
        if t.data_location == TensorProto.EXTERNAL and len(t.dims) == 2 and t.data_type == TensorProto.FLOAT
    }
    transposed = {
        node.output[0]: node.input[0]
        for node in graph.node
        if node.op_type == "Transpose" and node.input[0] in external
    }
    for node in graph.node:
        weight, stored_transposed = _weight_of(node, external, transposed)
        yield node, external.get(weight), stored_transposed


def bias_of(node: NodeProto) -> str:
    """What a product of `products` adds to its result; empty: nothing."""
    return node.input[2] if node.op_type == "Gemm" and len(node.input) > 2 else ""


def location_of(tensor: TensorProto) -> str:
    """The file that an external initializer names."""
    return next(entry.value for entry in tensor.external_data if entry.key == "location")


def external(name: str, dtype: int, shape: Iterable[int], location: str) -> TensorProto:
    """An initializer whose values are given when the graph is loaded."""
    tensor = TensorProto(name=name, data_type=dtype, dims=shape, data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value=location)
    return tensor


def replace(graph: onnx.GraphProto, nodes: list[NodeProto], wanted: Iterable[TensorProto]) -> None:
    """Put new nodes and initializers in, and take out what nobody reads any more."""
    results = {value.name for value in graph.output}
    while True:
        readers = Counter(name for node in nodes for name in node.input)
        alive = [n for n in nodes if any(name in readers or name in results for name in n.output)]
        if len(alive) == len(nodes):
            break
        nodes = alive
    initializers = [t for t in graph.initializer if t.name in readers]
    initializers += [t for t in wanted if t.name in readers]
    del graph.node[:], graph.initializer[:]
    graph.node.extend(nodes)
    graph.initializer.extend(initializers)


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
