"""Checks that a graph's state can be updated in place (ours; needs the extra ``export``).

State ``x`` and its successor ``x.next`` share memory at run time. That is right only if one node writes
``x.next`` straight from ``x``, and if every other reader of ``x`` has run by then, in any order a runtime
may choose.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

import onnx

from realtide.engines.runtime.program import ProgramError

_WRITERS = {"ScatterND": 0, "ScatterElements": 0, "TensorScatter": 0}
"""Operators that update their first input where memory is shared, and touch nothing else of it."""

_VIEWS = frozenset({"Identity", "Reshape", "Squeeze", "Unsqueeze", "Flatten"})
"""Operators whose output may share their first input's memory."""


def check_in_place(model: onnx.ModelProto, state: Mapping[str, str]) -> None:
    """Check every state tensor of a graph.

    Args:
        model: the graph.
        state: output name of the successor by input name of the state.

    Raises:
        ProgramError: a state tensor is not written by one in-place operator, or is read by a node that may
            run after the write.
    """
    nodes = list(model.graph.node)
    producer = {name: index for index, node in enumerate(nodes) for name in node.output}
    consumers: dict[str, list[int]] = defaultdict(list)
    for index, node in enumerate(nodes):
        for name in _inputs(node):
            consumers[name].append(index)
    for before, after in state.items():
        if after not in producer:
            raise ProgramError(f"state {before!r} is never updated: nothing writes {after!r}")
        writer = producer[after]
        node = nodes[writer]
        slot = _WRITERS.get(node.op_type)
        if slot is None or node.input[slot] != before:
            raise ProgramError(
                f"state {before!r} cannot be updated in place: {after!r} is written by {node.op_type} from "
                f"{node.input[0]!r}; write the state once, by rows, with index_put or index_copy"
            )
        views = _views(nodes, consumers, before)
        if [name for name in _inputs(node) if name in views] != [before]:
            raise ProgramError(f"state {before!r} is written with values or indices that are itself")
        done = _ancestors(nodes, producer, writer)
        for name in views:
            for reader in consumers[name]:
                if reader not in done and reader != writer and nodes[reader].op_type != "Shape":
                    raise ProgramError(
                        f"state {before!r} is read by {nodes[reader].op_type} {nodes[reader].output[0]!r}, "
                        "which may run after the state's update: read the updated tensor, or make the "
                        "update depend on the read"
                    )


def _ancestors(nodes: list[onnx.NodeProto], producer: Mapping[str, int], index: int) -> set[int]:
    """Nodes that must have run before node `index` can."""
    found: set[int] = set()
    waiting = [index]
    while waiting:
        for name in _inputs(nodes[waiting.pop()]):
            parent = producer.get(name)
            if parent is not None and parent not in found:
                found.add(parent)
                waiting.append(parent)
    return found


def _inputs(node: onnx.NodeProto) -> list[str]:
    """All tensors a node reads, those that its subgraphs (of If, Loop, Scan) capture included."""
    names = list(node.input)
    for attribute in node.attribute:
        for graph in (attribute.g, *attribute.graphs):
            for inner in graph.node:
                names += _inputs(inner)
            names += [value.name for value in graph.output]
    return names


def _views(nodes: list[onnx.NodeProto], consumers: Mapping[str, list[int]], name: str) -> list[str]:
    """The tensor's name, and those of tensors that may share its memory."""
    found = [name]
    for seen in found:  # grows while it is walked
        for index in consumers.get(seen, []):
            if nodes[index].op_type in _VIEWS and nodes[index].input[0] == seen:
                found.extend(nodes[index].output)
    return found
