"""TensorRT engines made of exported graphs (ours; extra ``trt`` or ``trt-rtx``).

TensorRT and TensorRT for RTX have one interface; the first that is installed is used. Networks are strongly
typed: the graph's own types say what is computed in which precision. Weights come from a mapping, as for
onnxruntime. Building needs no GPU with TensorRT for RTX, which compiles kernels where the engine is loaded.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from realtide.engines.runtime.onnx_file import GraphInfo, read_graph
from realtide.engines.runtime.program import Array, Dim, ProgramError
from realtide.engines.runtime.weights import resolve

log = logging.getLogger(__name__)

PACKAGES = ("tensorrt", "tensorrt_rtx")


@dataclass(frozen=True, slots=True)
class Sizes:
    """What a dynamic dimension may be.

    Attributes:
        least: smallest size.
        usual: the size that kernels are chosen for.
        most: largest size.
    """

    least: int
    usual: int
    most: int

    def __post_init__(self) -> None:
        if not 0 <= self.least <= self.usual <= self.most or not self.most:
            raise ValueError(
                f"sizes must not fall and not be negative, got {(self.least, self.usual, self.most)}"
            )


def load() -> ModuleType:
    """The package that is installed. Raises ProgramError."""
    for name in PACKAGES:
        try:
            return importlib.import_module(name)
        except ImportError:
            continue
    raise ProgramError("neither tensorrt (extra trt) nor tensorrt_rtx (extra trt-rtx) can be imported")


def build_engine(
    graph: Path | str | bytes, weights: Mapping[str, Array], sizes: Mapping[str, Sizes] | None = None
) -> bytes:
    """Compile a graph.

    Args:
        graph: an ONNX file whose weights are external, or such a model's bytes.
        weights: values of the external initializers by name; extra names are ignored.
        sizes: of each dynamic dimension, by its name in the graph.

    Returns:
        The serialized engine.

    Raises:
        ProgramError: no package, a weight is missing or does not fit, a dynamic dimension has no sizes, or
            TensorRT refuses the graph; the message carries what it says.
    """
    trt = load()
    label = "graph" if isinstance(graph, bytes) else str(graph)
    try:
        data = graph if isinstance(graph, bytes) else Path(graph).read_bytes()
    except OSError as error:
        raise ProgramError(f"{label}: {error.strerror}") from error
    info = read_graph(data)
    said: list[str] = []
    builder = trt.Builder(_listener(trt, said))
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if flag is None else 1 << int(flag))
    held = _parse(trt, label, data, info, weights, network, said)
    config = builder.create_builder_config()
    shapes = _shapes(label, info, sizes or {})
    if shapes:
        profile = builder.create_optimization_profile()
        for name, (least, usual, most) in shapes.items():
            profile.set_shape(name, least, usual, most)
        if config.add_optimization_profile(profile) < 0:
            raise ProgramError(f"{label}: {_joined(said) or 'the sizes are refused'}")
    built = builder.build_serialized_network(network, config)
    del held  # weights are read until here
    if built is None:
        raise ProgramError(f"{label}: {_joined(said) or 'no engine could be built'}")
    engine = bytes(built)
    log.info(
        "%s: %s %s, %d layers, %d bytes",
        label,
        trt.__name__,
        trt.__version__,
        network.num_layers,
        len(engine),
    )
    return engine


def _parse(
    trt: ModuleType,
    label: str,
    data: bytes,
    info: GraphInfo,
    weights: Mapping[str, Array],
    network: Any,
    said: list[str],
) -> list[Any]:
    """Fill the network. Returns what must live until it is built."""
    parser = trt.OnnxParser(network, _listener(trt, said))
    arrays: list[Any] = [parser]
    if not parser.load_model_proto(data):
        raise ProgramError(f"{label}: {_complaints(parser, said)}")
    for spec in info.external:
        array = resolve(spec, weights)
        arrays.append(array)
        if not parser.load_initializer(spec.name, array.ctypes.data, array.nbytes):
            raise ProgramError(f"{label}: weight {spec.name!r} is refused: {_complaints(parser, said)}")
    if not parser.parse_model_proto():
        raise ProgramError(f"{label}: {_complaints(parser, said)}")
    return arrays


def _shapes(
    label: str, info: GraphInfo, sizes: Mapping[str, Sizes]
) -> dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]:
    """Least, usual and largest shape of each tensor that has a dynamic dimension."""

    def size(name: str, dim: Dim, which: int) -> int:
        if isinstance(dim, int):
            return dim
        if dim is None or dim not in sizes:
            raise ProgramError(f"{label}: dimension {dim!r} of {name!r} is dynamic: say its sizes")
        given = sizes[dim]
        return (given.least, given.usual, given.most)[which]

    found = {}
    for spec in (*info.inputs, *info.state):
        if not all(isinstance(dim, int) for dim in spec.shape):
            least, usual, most = (
                tuple(size(spec.name, dim, which) for dim in spec.shape) for which in range(3)
            )
            found[spec.name] = (least, usual, most)
    return found


def _listener(trt: ModuleType, said: list[str]) -> Any:
    """A logger that keeps errors, to be told with the exception, and passes the rest on."""

    class Listener(trt.ILogger):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.Severity.ERROR:
                said.append(message)
            elif severity == trt.ILogger.Severity.WARNING:
                log.debug("%s", message)

    return Listener()


def _complaints(parser: Any, said: list[str]) -> str:
    """What the parser found wrong, node by node."""
    errors = [parser.get_error(number) for number in range(parser.num_errors)]
    told = [f"{e.node_operator()} {e.node_name()}: {e.desc()}" for e in errors]
    return _joined([*told, *said]) or "no reason is given"


def _joined(messages: list[str]) -> str:
    return "; ".join(" ".join(message.split()) for message in messages)[:1000]
