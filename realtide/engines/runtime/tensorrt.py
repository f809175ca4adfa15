"""TensorRT engines made of exported graphs (ours; extra ``trt`` or ``trt-rtx``).

TensorRT and TensorRT for RTX have one interface; the first that is installed is used. Networks are strongly
typed: the graph's own types say what is computed in which precision. Weights come from a mapping, as for
onnxruntime. Building needs no GPU with TensorRT for RTX, which compiles kernels where the engine is loaded.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from realtide.engines.runtime.onnx_file import GraphInfo, read_graph
from realtide.engines.runtime.plan_key import ANY, PORTABLE, Gpu, PlanKey, graph_digest, weights_digest
from realtide.engines.runtime.program import Array, Dim, ProgramError

log = logging.getLogger(__name__)

PACKAGES = ("tensorrt", "tensorrt_rtx")
PORTABLE_PACKAGE = "tensorrt_rtx"
"""Compiles kernels where a plan is loaded."""

Progress = Callable[[str, int, int], None]
"""Told what TensorRT works on, the steps of it that are done, and how many there are."""


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


@dataclass(frozen=True, slots=True)
class Plan:
    """A serialized plan.

    Attributes:
        label: what messages call it.
        data: as the plan cache or the builder gives it.
        graph: what it was built of.
    """

    label: str
    data: bytes = field(repr=False)
    graph: GraphInfo = field(repr=False)


PlanOf = Callable[[str], Plan]
"""The plan of a program, by the program's name. Raises ProgramError: there is none, in one sentence."""


class TimingCache:
    """What TensorRT measured of kernels, kept from one build for the next.

    Args:
        data: what an earlier build left; empty: nothing yet.
    """

    def __init__(self, data: bytes = b"") -> None:
        self.data = data


@dataclass(frozen=True, slots=True)
class BuildOptions:
    """How an engine is built.

    Attributes:
        capability: compute capability of the GPU it is for; ``any``: what TensorRT does by itself, which is
            the GPU that is here, or with TensorRT for RTX any that it supports.
        timing: read before and written after the build, where the package times kernels.
        on_progress: called from the builder's threads.
    """

    capability: str = ANY
    timing: TimingCache | None = None
    on_progress: Progress | None = None


def load() -> ModuleType:
    """The package that is installed. Raises ProgramError."""
    for name in PACKAGES:
        try:
            return importlib.import_module(name)
        except ImportError:
            continue
    raise ProgramError("neither tensorrt (extra trt) nor tensorrt_rtx (extra trt-rtx) can be imported")


def times_kernels(trt: ModuleType) -> bool:
    """True if building measures kernels on the GPU that is here; then a timing cache is worth keeping."""
    return trt.__name__ != PORTABLE_PACKAGE


def target(wanted: Gpu | None, here: Gpu | None) -> Gpu:
    """The GPU that plans are built for, as their keys name it.

    Args:
        wanted: what was asked for; None: what suits the installed package.
        here: the GPU of this machine, if there is one (`gpu.detect`).

    Returns:
        For TensorRT for RTX the wanted one, or `PORTABLE`; for TensorRT the one that is here.

    Raises:
        ProgramError: no package; or TensorRT without a GPU, or for another than the one that is here.
    """
    if not times_kernels(load()):
        return wanted or PORTABLE
    if here is None:
        raise ProgramError("gpu: TensorRT builds plans on the GPU that they are for, and there is none here")
    if wanted not in (None, here):
        raise ProgramError(
            f"gpu: TensorRT builds plans for the GPU that is here, {here.name} {here.capability}"
        )
    return here


def plan_key(
    graph: bytes,
    weights: Mapping[str, Array],
    sizes: Mapping[str, Sizes],
    precision: str,
    gpu: Gpu,
) -> PlanKey:
    """The key of the plan that `build_engine` makes of the same arguments; reads all weights of the graph.

    Raises:
        ProgramError: no package, no ONNX model, a weight is missing, or a dynamic dimension has no sizes.
    """
    trt, info = load(), read_graph(graph)
    _shapes("graph", info, sizes)
    return PlanKey(
        graph=graph_digest(graph),
        weights=weights_digest(info, weights),
        flavour=trt.__name__,
        version=trt.__version__,
        gpu=gpu.name,
        capability=gpu.capability,
        driver=gpu.driver,
        precision=precision,
        profile=describe_sizes(info, sizes),
    )


def describe_sizes(info: GraphInfo, sizes: Mapping[str, Sizes]) -> str:
    """The sizes of a graph's dynamic dimensions: ``batch=1:2:8 tokens=16:64:256`` (least, usual, most)."""
    names = {dim for spec in (*info.inputs, *info.state) for dim in spec.shape if isinstance(dim, str)}
    return " ".join(
        f"{name}={sizes[name].least}:{sizes[name].usual}:{sizes[name].most}"
        for name in sorted(names & set(sizes))
    )


def build_engine(
    graph: Path | str | bytes,
    weights: Mapping[str, Array],
    sizes: Mapping[str, Sizes] | None = None,
    options: BuildOptions | None = None,
    label: str | None = None,
) -> bytes:
    """Compile a graph.

    Args:
        graph: an ONNX file whose weights are external, or such a model's bytes.
        weights: values of the external initializers by name; extra names are ignored.
        sizes: of each dynamic dimension, by its name in the graph.
        options: target, timing cache, progress.
        label: what messages call the graph; None: its path.

    Returns:
        The serialized engine.

    Raises:
        ProgramError: no package, a weight is missing or does not fit, a dynamic dimension has no sizes, or
            TensorRT refuses the graph; the message carries what it says.
    """
    trt, options = load(), options or BuildOptions()
    label = label or ("graph" if isinstance(graph, bytes) else str(graph))
    try:
        data = graph if isinstance(graph, bytes) else Path(graph).read_bytes()
    except OSError as error:
        raise ProgramError(f"{label}: {error.strerror}") from error
    info = read_graph(data)
    said: list[str] = []
    builder = trt.Builder(listener(trt, said))
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
            raise ProgramError(f"{label}: {joined(said) or 'the sizes are refused'}")
    config.clear_flag(trt.BuilderFlag.TF32)  # a graph in float32 means float32
    _set_target(trt, config, options.capability)
    timing = options.timing if times_kernels(trt) else None
    if timing is not None and not config.set_timing_cache(config.create_timing_cache(timing.data), False):
        raise ProgramError(f"{label}: {joined(said) or 'the timing cache is refused'}")
    monitor = _monitor(trt, options.on_progress) if options.on_progress else None
    config.progress_monitor = monitor
    built = builder.build_serialized_network(network, config)
    del held  # weights are read until here
    if monitor is not None and monitor.raised is not None:
        raise monitor.raised
    if built is not None and timing is not None:
        timing.data = bytes(config.get_timing_cache().serialize())
    if built is None:
        raise ProgramError(f"{label}: {joined(said) or 'no engine could be built'}")
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
    # Here, because it needs safetensors, which a machine that only replays golden cases may lack.
    from realtide.engines.runtime.weights import resolve

    parser = trt.OnnxParser(network, listener(trt, said))
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


def listener(trt: ModuleType, said: list[str]) -> Any:
    """TensorRT's logger that keeps errors, to be told with the exception, and passes the rest on."""

    class Listener(trt.ILogger):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.Severity.ERROR:
                said.append(message)
            elif severity == trt.ILogger.Severity.WARNING:
                log.debug("%s", message)

    return Listener()


def _set_target(trt: ModuleType, config: Any, capability: str) -> None:
    if capability == ANY or times_kernels(trt):
        return  # TensorRT builds for the GPU that is here
    name = "SM" + capability.replace(".", "")
    known = getattr(trt.ComputeCapability, name, None)
    if known is None:
        names = sorted(n.removeprefix("SM") for n in vars(trt.ComputeCapability) if n.startswith("SM"))
        offered = ", ".join(f"{n[:-1]}.{n[-1]}" for n in sorted(names, key=int))
        raise ProgramError(f"gpu: {trt.__name__} builds for compute capabilities {offered}, not {capability}")
    config.num_compute_capabilities = 1
    if not config.set_compute_capability(known, 0):
        raise ProgramError(f"gpu: {trt.__name__} refuses compute capability {capability}")


def _monitor(trt: ModuleType, on_progress: Progress) -> Any:
    """Passes progress on. An exception must not unwind through TensorRT: it ends the build, and is kept."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.totals: dict[str, int] = {}
            self.raised: BaseException | None = None

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            self.totals[phase] = steps
            self.tell(phase, 0)

        def step_complete(self, phase: str, step: int) -> bool:
            self.tell(phase, step + 1)
            return self.raised is None

        def phase_finish(self, phase: str) -> None:
            self.tell(phase, self.totals.get(phase, 0))

        def tell(self, phase: str, done: int) -> None:
            try:
                if self.raised is None:
                    on_progress(phase, done, self.totals.get(phase, 0))
            except BaseException as error:
                self.raised = error

    return Monitor()


def _complaints(parser: Any, said: list[str]) -> str:
    """What the parser found wrong, node by node."""
    errors = [parser.get_error(number) for number in range(parser.num_errors)]
    told = [f"{e.node_operator()} {e.node_name()}: {e.desc()}" for e in errors]
    return joined([*told, *said]) or "no reason is given"


def joined(messages: list[str]) -> str:
    """What a listener kept, as one line."""
    return "; ".join(" ".join(message.split()) for message in messages)[:1000]
