"""Exports a module to an ONNX graph that carries no weights (ours; needs the extra ``export``).

What leaves here is small, the same on every machine, and fit to be bound by `ort.OrtProgram`: initializers
named and laid out as in the module's state_dict but without values, state tensors ``x`` updated by one
write to ``x.next``, and outputs that were compared with the module's on the caller's examples.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx_ir
import torch
from onnxscript.rewriter.rules.common import slice_split_rule
from torch import Tensor, nn

from realtide.engines.runtime.in_place import check_in_place
from realtide.engines.runtime.onnx_file import GraphInfo, read_graph
from realtide.engines.runtime.ort import OrtOptions, OrtProgram
from realtide.engines.runtime.program import NEXT, Array, ProgramError
from realtide.engines.runtime.torch_program import TorchProgram

log = logging.getLogger(__name__)

WEIGHTS_LOCATION = "weights.safetensors"
"""Where external initializers claim to be; loading goes by their names, not by this."""

_MAX_INLINE_BYTES = 65536


@dataclass(frozen=True, slots=True)
class ExportedProgram:
    """What `export_program` wrote."""

    info: GraphInfo
    weights: dict[str, Tensor]
    """The values of the graph's external initializers, by the names the graph uses."""
    max_error: float | None
    """Largest absolute difference between the graph's results and the module's over all examples."""


def export_program(
    module: nn.Module,
    examples: Sequence[Mapping[str, Tensor]],
    state: Mapping[str, Tensor],
    outputs: Sequence[str],
    path: Path | str,
    *,
    dynamic: Mapping[str, Mapping[int, str]] | None = None,
    opset: int = 20,
    rename: Callable[[str], str] = str,
    tolerance: float = 1e-4,
    check: bool = True,
) -> ExportedProgram:
    """Export, check and write one graph.

    Args:
        module: called as ``module(*inputs, *state) -> (*outputs, *next_state)``. It may write state in place.
        examples: inputs by name, in the forward's order. The first is traced; all are run in turn on one
            state, by the module and by the graph, and must agree. Give the dynamic dimensions several
            sizes, zero included.
        state: initial state tensors by name, in the forward's order; also their example shapes.
        outputs: names of the outputs in order, next-state tensors excluded.
        path: file to write; nothing is written if a check fails.
        dynamic: names of dynamic dimensions by tensor and axis, for example ``{"x": {0: "rows"}}``.
        opset: ONNX opset, 18 to 24 (what TensorRT and onnxruntime share).
        rename: maps a state_dict name of the module to the weight's name in the bundle.
        tolerance: largest absolute difference allowed between module and graph.
        check: False: run nothing. Parameters, inputs and state must lie on the meta device, so that a model
            of any size is exported without its weights.

    Raises:
        ProgramError: the graph cannot be bound in place, holds a large unnamed constant, or does not agree
            with the module.
    """
    names = _check_call(examples, state, outputs, dynamic or {}, opset)
    module = module.eval()
    if len({rename(name) for name in module.state_dict()}) < len(module.state_dict()):
        raise ValueError("rename gives two weights one name")
    stored = {rename(name): value.detach() for name, value in module.state_dict().items()}
    with _buffers_on_meta(module, not check) as buffers:
        model = _trace(module, examples[0], state, outputs, dynamic or {}, opset, buffers)
    _tidy(model.graph)
    kept = _strip(model, rename, set(module.state_dict()))
    check_in_place(model, {name: name + NEXT for name in state})
    data = model.SerializeToString(deterministic=True)
    info = read_graph(data)
    if tuple(s.name for s in info.inputs) != names or {s.name for s in info.state} != set(state):
        raise ProgramError("the exporter dropped an input or a state tensor that the graph does not use")
    weights = {name: stored[name] for name in kept}
    error = _verify(module, data, info, weights, examples, state) if check else None
    if error is not None and error > tolerance:
        raise ProgramError(f"graph and module differ by {error:.3g}, more than {tolerance:.3g}")
    Path(path).write_bytes(data)
    log.info("%s: %d nodes, %d bytes, error %s", path, len(model.graph.node), len(data), error)
    return ExportedProgram(info, weights, error)


def _check_call(
    examples: Sequence[Mapping[str, Tensor]],
    state: Mapping[str, Tensor],
    outputs: Sequence[str],
    dynamic: Mapping[str, Mapping[int, str]],
    opset: int,
) -> tuple[str, ...]:
    """Refuse calls that could only fail obscurely later. Returns the inputs' names."""
    if not examples:
        raise ValueError("examples must hold at least one set of inputs")
    if not 18 <= opset <= 24:
        raise ValueError(f"opset must be in 18..24, not {opset}")
    names = tuple(examples[0])
    for number, example in enumerate(examples):
        if tuple(example) != names:
            raise ValueError(f"example {number} has inputs {tuple(example)}, not {names}")
    taken: set[str] = set()
    for name in (*names, *state, *outputs):
        if not name or name.endswith(NEXT) or "@" in name:
            raise ValueError(f"{name!r} is not a tensor name")
        if name in taken:
            raise ValueError(f"tensor name {name!r} is used twice")
        taken.add(name)
    for name in dynamic:
        if name not in names and name not in state:
            raise ValueError(f"dynamic names {name!r}, which is neither input nor state")
    return names


def _trace(
    module: nn.Module,
    example: Mapping[str, Tensor],
    state: Mapping[str, Tensor],
    outputs: Sequence[str],
    dynamic: Mapping[str, Mapping[int, str]],
    opset: int,
    buffers: Mapping[str, Tensor],
) -> onnx.ModelProto:
    arguments = {**example, **{name: value.clone() for name, value in state.items()}}
    with warnings.catch_warnings(), torch.no_grad():
        # The exporter warns about its own deprecated internals.
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            module,
            tuple(arguments.values()),
            dynamo=True,
            input_names=list(arguments),
            output_names=[*outputs, *(name + NEXT for name in state)],
            dynamic_shapes=_by_parameter(module, arguments, dynamic),
            opset_version=opset,
            optimize=False,
            verbose=False,
        )
    if program is None:
        raise ProgramError("the exporter returned no graph")
    # Weights become inputs while the graph is optimized, so that nothing is folded into them: the graph
    # must ask for them by their own names and in their own layout.
    graph = program.model.graph
    for name, buffer in buffers.items():
        if name in graph.initializers:
            graph.initializers[name].const_value = onnx_ir.tensor(buffer.numpy(), name=name)
    opaque = []
    for name in sorted(set(module.state_dict()) & set(graph.initializers)):
        value = graph.initializers.pop(name)
        assert value.dtype is not None
        assert isinstance(value.shape, onnx_ir.Shape)
        empty = onnx_ir.ExternalTensor(
            WEIGHTS_LOCATION, None, None, value.dtype, shape=value.shape, name=name
        )
        opaque.append((value, empty))
        value.const_value = None
        graph.inputs.append(value)
    with _without_split_search():
        program.optimize()
    for value, tensor in opaque:
        graph.inputs.remove(value)
        value.const_value = tensor
        graph.register_initializer(value)
    model: onnx.ModelProto = program.model_proto
    return model


@contextlib.contextmanager
def _without_split_search() -> Iterator[None]:
    """Leave out one of the optimizer's rules while it runs.

    It looks for two slices that make one split, for every node among all slices of the graph, and so takes
    most of the time that a deep model's export takes. What it would find saves next to nothing.
    """
    slice_split_rule.try_rewrite = lambda *_, **__: None
    try:
        yield
    finally:
        del slice_split_rule.try_rewrite


@contextlib.contextmanager
def _buffers_on_meta(module: nn.Module, needed: bool) -> Iterator[dict[str, Tensor]]:
    """Put buffers that are not stored on the meta device for a while; gives their values by name."""
    taken: dict[str, Tensor] = {}
    stored = module.state_dict()
    try:
        for name, value in list(module.named_buffers()):
            if needed and name not in stored:
                taken[name] = value
                _set_buffer(module, name, value.to("meta"))
        yield taken
    finally:
        for name, value in taken.items():
            _set_buffer(module, name, value)


def _set_buffer(module: nn.Module, name: str, value: Tensor) -> None:
    owner, _, last = name.rpartition(".")
    module.get_submodule(owner)._buffers[last] = value


def _by_parameter(
    module: nn.Module, arguments: Mapping[str, Tensor], dynamic: Mapping[str, Mapping[int, str]]
) -> tuple[object, ...]:
    """The dynamic dimensions in the form torch.export wants: nested as the forward's arguments are."""
    shapes = [dict(dynamic[name]) if name in dynamic else None for name in arguments]
    nested: list[object] = []
    for parameter in inspect.signature(module.forward).parameters.values():
        if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
            nested.append(tuple(shapes[len(nested) :]))
            break
        if len(nested) < len(shapes):
            nested.append(shapes[len(nested)])
    return tuple(nested)


def _tidy(graph: onnx.GraphProto) -> None:
    """Shorten what the exporter writes for indexing: where little is computed, every operator costs.

    Vectors are not flattened, rows are gathered by their numbers as they are, and the positions of what is
    true are not transposed before they are flattened. Graphs with subgraphs are left alone.
    """
    if any(
        attribute.HasField("g") or attribute.graphs for node in graph.node for attribute in node.attribute
    ):
        return
    ranks = {
        value.name: len(value.type.tensor_type.shape.dim)
        for value in (*graph.value_info, *graph.input)
        if value.type.tensor_type.HasField("shape")
    } | {tensor.name: len(tensor.dims) for tensor in graph.initializer}
    constants = {
        tensor.name: onnx.numpy_helper.to_array(tensor).tolist()
        for tensor in graph.initializer
        if tensor.data_type == onnx.TensorProto.INT64 and list(tensor.dims) == [1]
    }
    made = {name: node for node in graph.node for name in node.output}
    results = {value.name for value in graph.output}
    flat, column = "tidy.flat", "tidy.column"
    same: dict[str, str] = {}

    def by(name: str, op: str) -> onnx.NodeProto | None:
        node = made.get(same.get(name, name))
        return node if node is not None and node.op_type == op else None

    for node in graph.node:
        for index, name in enumerate(node.input):
            node.input[index] = same.get(name, name)
        wanted = constants.get(node.input[1]) if len(node.input) > 1 else None
        if node.op_type == "Reshape" and wanted == [-1] and ranks.get(node.input[0]) == 1:
            if node.output[0] not in results:
                same[node.output[0]] = node.input[0]
        elif node.op_type == "GatherND" and not any(attribute.i for attribute in node.attribute):
            index_node = by(node.input[1], "Unsqueeze")
            if index_node is not None and constants.get(index_node.input[1]) == [-1]:
                del node.attribute[:]
                node.op_type, node.input[1] = "Gather", index_node.input[0]
        elif node.op_type == "Unsqueeze" and wanted in ([-1], [1]):
            source = by(node.input[0], "Reshape")
            if source is not None and constants.get(source.input[1]) == [-1]:
                node.op_type, node.input[0], node.input[1] = "Reshape", source.input[0], column
        elif node.op_type == "Squeeze" and wanted == [1]:
            turned = by(node.input[0], "Transpose")
            found = by(turned.input[0], "NonZero") if turned is not None else None
            if found is not None and ranks.get(found.input[0]) == 1:
                node.op_type, node.input[0], node.input[1] = "Reshape", found.output[0], flat
    for name, value in ((flat, [-1]), (column, [-1, 1])):
        if any(name in node.input for node in graph.node):
            graph.initializer.append(onnx.numpy_helper.from_array(np.array(value, np.int64), name))
    while True:
        read = {name for node in graph.node for name in node.input} | results
        dead = [node for node in graph.node if not read & set(node.output)]
        if not dead:
            return
        for node in dead:
            graph.node.remove(node)


def _strip(model: onnx.ModelProto, rename: Callable[[str], str], names: set[str]) -> list[str]:
    """Take out weight values, the exporting machine's file paths and shapes. Returns weight names."""
    del model.metadata_props[:]
    graph = model.graph
    del graph.metadata_props[:], graph.value_info[:]
    graph.doc_string = ""
    graph.name = "program"
    renamed = {name: rename(name) for name in names}
    for node in graph.node:
        del node.metadata_props[:]
        node.doc_string = ""
        for index, name in enumerate(node.input):
            node.input[index] = renamed.get(name, name)
    for value in (*graph.input, *graph.output):
        del value.metadata_props[:]
        value.doc_string = ""
    kept = []
    for tensor in graph.initializer:
        tensor.doc_string = ""
        del tensor.metadata_props[:]
        if tensor.name in names:
            tensor.name = renamed[tensor.name]
            tensor.ClearField("raw_data")
            tensor.data_location = onnx.TensorProto.EXTERNAL
            del tensor.external_data[:]
            tensor.external_data.add(key="location", value=WEIGHTS_LOCATION)
            kept.append(tensor.name)
        elif len(tensor.raw_data) > _MAX_INLINE_BYTES:
            raise ProgramError(
                f"constant {tensor.name!r} {list(tensor.dims)} would be stored in the graph: make it a "
                "parameter or a persistent buffer"
            )
    return sorted(kept)


def _verify(
    module: nn.Module,
    data: bytes,
    info: GraphInfo,
    weights: Mapping[str, Tensor],
    examples: Sequence[Mapping[str, Tensor]],
    state: Mapping[str, Tensor],
) -> float:
    """Run module and graph side by side over the examples; the largest absolute difference anywhere."""
    mine = {name: value.detach().cpu().numpy().copy() for name, value in state.items()}
    theirs = {name: array.copy() for name, array in mine.items()}
    by_name = {spec.name: spec for spec in info.state}
    reference = TorchProgram(module, info.inputs, info.outputs, [by_name[name] for name in state], theirs)
    arrays = {name: value.cpu().numpy() for name, value in weights.items()}
    program = OrtProgram(data, arrays, mine, OrtOptions())
    worst = 0.0
    for example in examples:
        feeds = {name: value.cpu().numpy() for name, value in example.items()}
        expected, got = reference.run(feeds), program.run(feeds)
        for name, want in (*expected.items(), *theirs.items()):
            have = mine[name] if name in mine else got[name]
            worst = max(worst, _difference(name, want, have))
    return worst


def _difference(name: str, want: Array, have: Array) -> float:
    if want.shape != have.shape or want.dtype != have.dtype:
        raise ProgramError(
            f"{name!r} is {have.dtype}{list(have.shape)}, the module gives {want.dtype}{list(want.shape)}"
        )
    if not want.size:
        return 0.0
    if want.dtype.kind != "f":
        return float(np.any(want != have))
    # Where both are infinite of one sign or both NaN they agree; elsewhere a NaN must not pass for a small
    # number.
    gap = np.where(
        (want == have) | (np.isnan(want) & np.isnan(have)), 0.0, np.abs(want.astype(np.float64) - have)
    )
    return float(np.where(np.isnan(gap), np.inf, gap).max())
