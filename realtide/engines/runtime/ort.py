"""Programs on ONNX Runtime: state bound once, weights injected at load, nothing copied per call (ours).

Each state tensor's memory is bound both as the input ``x`` and as the output ``x.next``; a graph that
writes it with one ScatterND (what export.py checks) then updates it in place, whatever its size. Weights
come from a mapping, not from the graph file: `SessionOptions.add_external_initializers` copies them into
the session, before graph optimization, so that constants fold and matrices are prepacked, and our arrays
can be freed afterwards (documented in onnxruntime's C API: "the user provided buffers can then be
deallocated"; a test checks it).
"""

from __future__ import annotations

import copy
import ctypes
import functools
import logging
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from realtide.engines.runtime.onnx_file import GraphInfo, read_graph
from realtide.engines.runtime.program import (
    NEXT,
    Array,
    FeedChecker,
    ProgramError,
    TensorSpec,
    check_state,
)
from realtide.engines.runtime.weights import resolve

log = logging.getLogger(__name__)

CPU = "CPUExecutionProvider"
# Of glibc's mallopt: arrays up to so many bytes come from the heap, of whose free end so many are kept.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_KEPT_ARRAY, _KEPT = 4 << 20, 16 << 20
_FLOAT8 = 17
"""ONNX's code of e4m3."""


@dataclass(frozen=True, slots=True)
class OrtOptions:
    """How a session is created.

    One thread without spinning is the default: threads that spin steal the time of the threads that serve.
    """

    providers: Sequence[str] = (CPU,)
    provider_options: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    intra_op_num_threads: int = 1
    allow_spinning: bool = False
    config: Mapping[str, str] = field(default_factory=dict)
    """Further session configuration entries, passed on as they are."""

    def __post_init__(self) -> None:
        if not self.providers:
            raise ValueError("providers must name at least one execution provider")
        if self.intra_op_num_threads < 1:
            raise ValueError(f"intra_op_num_threads must be at least 1, not {self.intra_op_num_threads}")
        unknown = sorted(set(self.provider_options) - set(self.providers))
        if unknown:
            raise ValueError(f"provider_options for {', '.join(unknown)}, which providers does not name")


def read_graph_file(path: Path | str) -> GraphInfo:
    """Inputs, outputs, state and wanted weights of an ONNX file, without loading it. Raises ProgramError."""
    try:
        return read_graph(Path(path).read_bytes())
    except OSError as error:
        raise ProgramError(f"{path}: {error.strerror}") from error
    except ProgramError as error:
        raise ProgramError(f"{path}: {error}") from error


class OrtProgram:
    """A `Program` over one onnxruntime session. Not thread-safe: one thread runs it.

    Args:
        graph: an ONNX file whose weights are external, or such a model's bytes.
        weights: values of the external initializers by name (for example a `WeightFile`); extra names are
            ignored. They are read during construction only.
        state: one array for each state tensor (see `allocate_state`), updated in place by every run. The
            caller owns them and may read and write them between runs.
        options: providers and threads.

    Raises:
        ProgramError: the graph cannot be read or loaded, or a weight is missing or does not fit.
        FeedError: a state array is missing, unknown or does not fit.
    """

    def __init__(
        self,
        graph: Path | str | bytes,
        weights: Mapping[str, Array],
        state: Mapping[str, Array],
        options: OrtOptions | None = None,
    ) -> None:
        options = options or OrtOptions()
        self._label = "graph" if isinstance(graph, bytes) else str(graph)
        try:
            data = graph if isinstance(graph, bytes) else Path(graph).read_bytes()
            self._info = read_graph(data)
        except OSError as error:
            raise ProgramError(f"{self._label}: {error.strerror}") from error
        except ProgramError as error:
            raise ProgramError(f"{self._label}: {error}") from error
        self._state = check_state(self._info.state, state)
        self._session = _create_session(self._label, data, self._info, weights, options)
        self._checker = FeedChecker(self._info.inputs)
        self._bind_state()

    def over(self, state: Mapping[str, Array]) -> OrtProgram:
        """The same loaded graph over other state: no weight is loaded again. For one session per state.

        Several of them may run at the same time, each in one thread. Raises FeedError.
        """
        twin = copy.copy(self)
        twin._state = check_state(self._info.state, state)
        twin._checker = FeedChecker(self._info.inputs)
        twin._bind_state()
        return twin

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """See `Program.inputs`."""
        return self._info.inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """See `Program.outputs`."""
        return self._info.outputs

    @property
    def state(self) -> tuple[TensorSpec, ...]:
        """See `Program.state`."""
        return self._info.state

    @property
    def metadata(self) -> Mapping[str, str]:
        """The graph's metadata properties, as the exporter wrote them."""
        return self._info.metadata

    @property
    def providers(self) -> tuple[str, ...]:
        """The execution providers that are really in use."""
        return tuple(self._session.get_providers())

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """See `Program.run`."""
        native = self._native
        # Bindings point into the arrays: keep them, and those that had to be made contiguous, until the
        # next run.
        self._fed = checked = self._checker.check(feeds)
        for name, array in checked:
            native.bind_input(name, array)
        # An output that onnxruntime allocated stays bound, with the shape it had: bind it anew to free it.
        for name, _ in self._fetched:
            native.bind_output(name, self._host)
        try:
            self._session.run_with_iobinding(self._binding)
        except Exception as error:  # onnxruntime's exceptions share no base class
            shapes = ", ".join(f"{name} {list(array.shape)}" for name, array in checked)
            raise ProgramError(f"{self._label}: run failed with {shapes}: {error}") from error
        results = self._binding.get_outputs_as_ortvaluevector()
        return {name: results[index].numpy() for name, index in self._fetched}

    def _bind_state(self) -> None:
        self._binding = self._session.io_binding()
        # The public bind_output makes a device object at every call, which costs more than the binding
        # itself.
        self._native = self._binding._iobinding
        self._host = ort.OrtDevice.make("cpu", 0)._get_c_device()
        # Outputs are listed in the order in which they were bound: state first, once and for all.
        for name, array in self._state.items():
            value = ort.OrtValue.ortvalue_from_numpy(array)
            if value.data_ptr() != array.ctypes.data:
                raise ProgramError(f"{self._label}: onnxruntime copied state {name!r} instead of binding it")
            self._binding.bind_ortvalue_input(name, value)
            self._binding.bind_ortvalue_output(name + NEXT, value)
        offset = len(self._state)
        self._fetched = tuple((spec.name, offset + index) for index, spec in enumerate(self._info.outputs))


def _create_session(
    label: str, data: bytes, info: GraphInfo, weights: Mapping[str, Array], options: OrtOptions
) -> ort.InferenceSession:
    available = ort.get_available_providers()
    asked = [name for name in options.providers if name in available]
    settings = ort.SessionOptions()
    settings.intra_op_num_threads = options.intra_op_num_threads
    settings.inter_op_num_threads = 1
    # Errors reach the caller as exceptions; onnxruntime's own copy of them on stderr says nothing more.
    settings.log_severity_level = 4
    config = {
        "session.intra_op.allow_spinning": str(int(options.allow_spinning)),
        # Without this, weights that prepacking replaced would stay in the arena as holes.
        "session.use_device_allocator_for_initializers": "1",
        "session.x64quantprecision": str(int(_int8_saturates())),
        **options.config,
    }
    for key, text in config.items():
        settings.add_session_config_entry(key, text)
    names = [spec.name for spec in info.external]
    try:
        if names:
            values = [_ort_value(resolve(spec, weights)) for spec in info.external]
            settings.add_external_initializers(names, values)
        session = ort.InferenceSession(
            data,
            settings,
            providers=asked or [CPU],
            provider_options=[dict(options.provider_options.get(name, {})) for name in asked or [CPU]],
            enable_fallback=0,  # a provider that fails is an error, not a line on stdout and another provider
        )
    except ProgramError as error:
        raise ProgramError(f"{label}: {error}") from error
    except Exception as error:  # onnxruntime's exceptions share no base class
        raise ProgramError(f"{label}: onnxruntime cannot load it: {error}") from error
    missing = [name for name in options.providers if name not in session.get_providers()]
    if missing:
        log.warning(
            "%s: %s not usable here, running on %s", label, ", ".join(missing), session.get_providers()
        )
    if info.state and session.get_providers()[0] != CPU:
        log.warning(
            "%s: state is in host memory and is copied at every call on %s", label, session.get_providers()[0]
        )
    if names:
        del values
        _settle_memory()
    return session


def _ort_value(array: Array) -> ort.OrtValue:
    """An array as onnxruntime's; float8 is told by its code, because numpy has no such type."""
    if array.dtype.name == "float8_e4m3fn":
        return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array.view(np.uint8), _FLOAT8)
    return ort.OrtValue.ortvalue_from_numpy(array)


def _settle_memory() -> None:
    """Give the pages of the freed weight arrays back to the system, and keep what steps free from now on.

    glibc would keep the former and, as it comes, return each step's arrays, whose pages the next step then
    has to fault in anew: up to a third of the time of a step's NumPy operations.
    """
    if sys.platform == "linux":
        library = ctypes.CDLL(None)
        trim: Any = getattr(library, "malloc_trim", None)  # absent in musl
        if trim is not None:
            library.mallopt(_M_MMAP_THRESHOLD, _KEPT_ARRAY)
            library.mallopt(_M_TRIM_THRESHOLD, _KEPT)
            trim(0)


@functools.cache
def _int8_saturates() -> bool:
    """True on an x86 without VNNI, whose fast u8 x s8 product saturates at 16 bits: ask for the exact one."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    try:
        flags = Path("/proc/cpuinfo").read_text().partition("flags")[2].partition("\n")[0].split()
    except OSError:
        return True  # unknown: exact
    return not {"avx512_vnni", "avx_vnni"} & set(flags)
