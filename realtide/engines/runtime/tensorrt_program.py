"""Programs on TensorRT: caches bound in place, one activation buffer for many engines, CUDA graphs (ours).

Arrays that `run` is fed are copied to buffers made once, for the largest shapes of the plan's profile;
outputs are copied back, and that copy is the only thing the host waits for. `run_on_device` takes and gives
what is on the device and waits for nothing. Where shapes and addresses are those of earlier runs, the step is
replayed as one CUDA graph instead of being enqueued kernel by kernel.

**This has not run on a GPU.** The order of calls, addresses, shapes and results are tested with a stand-in
for engine and device that runs the graph with onnxruntime; TensorRT's own behaviour is not.
"""

from __future__ import annotations

import copy
import logging
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from realtide.engines.runtime import tensorrt
from realtide.engines.runtime.cuda_memory import Buffer, CudaDevice, Device
from realtide.engines.runtime.onnx_file import GraphInfo
from realtide.engines.runtime.program import NEXT, Array, FeedChecker, ProgramError, TensorSpec
from realtide.engines.runtime.tensorrt_bindings import (
    Bindings,
    bindings_of,
    check_device_state,
    profile_shapes,
)

log = logging.getLogger(__name__)

MOST_GRAPHS = 8
"""CUDA graphs that a program keeps; shapes not seen for long are captured anew."""

MOST_SEEN = 64
"""Shapes and addresses that a program remembers to have run once."""


class Scratch:
    """One activation buffer for engines that never run at once: those of one session type.

    It grows until it is first used; after that its address is in CUDA graphs, and an engine that needs more
    is refused. Load all engines of a session type before the first one runs.
    """

    def __init__(self, device: Device) -> None:
        self.device = device
        self._size = 0
        self._buffer: Buffer | None = None

    def reserve(self, size: int) -> None:
        """Make sure of at least this many bytes. Raises ProgramError: it is in use and smaller."""
        if self._buffer is not None and size > self._size:
            raise ProgramError(
                f"the shared activation buffer has {self._size} bytes and is in use, the engine needs {size}:"
                " load all engines before one runs"
            )
        self._size = max(self._size, size)

    def use(self) -> Buffer:
        """The buffer; allocated when first asked for."""
        if self._buffer is None:
            self._buffer = self.device.allocate(self._size)
        return self._buffer


@dataclass(frozen=True, slots=True)
class LoadedPlan:
    """A deserialized plan, whose weights are on the device once however many programs use it.

    Attributes:
        package: ``tensorrt`` or ``tensorrt_rtx``.
        runtime: must outlive the engine.
        engine: TensorRT's engine.
        label: what messages call it.
    """

    package: Any
    runtime: Any
    engine: Any
    label: str


def load_plan(plan: bytes, label: str = "plan") -> LoadedPlan:
    """Deserialize a plan, which must come from `plans.PlanCache`: TensorRT trusts what it reads.

    Raises:
        ProgramError: no package, or TensorRT refuses the plan; the message carries what it says.
    """
    trt = tensorrt.load()
    said: list[str] = []
    runtime = trt.Runtime(tensorrt.listener(trt, said))
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise ProgramError(f"{label}: {tensorrt.joined(said) or 'the plan cannot be loaded'}")
    return LoadedPlan(trt, runtime, engine, label)


@dataclass(slots=True)
class _Kept:
    """Shapes and addresses that have an execution context of their own.

    A CUDA graph refers to what its context holds, so no other shapes may be set there; and TensorRT must have
    run once after shapes were set, for what it sets up then cannot be captured.

    Attributes:
        context: set up, and run once.
        shapes: of the outputs.
        replay: runs the CUDA graph; None: not captured yet.
    """

    context: Any
    shapes: dict[str, tuple[int, ...]]
    replay: Callable[[], None] | None = None


class TensorrtProgram:
    """A `Program` over one TensorRT engine. Not thread-safe: one thread runs it.

    Args:
        plan: a serialized plan, or one that was loaded for another program.
        graph: what the plan was built of.
        state: PyTorch's CUDA tensors by name, contiguous, updated in place by every run. The caller owns them
            and may use them between runs, on a stream that is current then.
        label: what messages call it.
        scratch: activation memory shared with other programs, and the device; None: its own, on device 0.
        cuda_graphs: replay steps of known shapes as CUDA graphs.
        share_state: bind states in place that TensorRT does not declare so, on the exporter's word; False:
            copy them, for comparison.

    Raises:
        ProgramError: the plan cannot be loaded or is not of this graph, or a state tensor does not fit.
    """

    def __init__(
        self,
        plan: bytes | LoadedPlan,
        graph: GraphInfo,
        state: Mapping[str, Any],
        *,
        label: str = "plan",
        scratch: Scratch | None = None,
        cuda_graphs: bool = True,
        share_state: bool = True,
    ) -> None:
        self._scratch = scratch or Scratch(CudaDevice())
        self._device = self._scratch.device
        self._plan = load_plan(plan, label) if isinstance(plan, bytes) else plan
        self._label, self._graph, self._cuda_graphs = self._plan.label, graph, cuda_graphs
        engine = self._plan.engine
        self._bindings: Bindings = bindings_of(self._label, engine, graph, share=share_state)
        self._scratch.reserve(int(engine.device_memory_size_v2))
        self._most = {spec.name: most for spec, most in self._bindings.inputs}
        self._inputs: dict[str, Buffer] = {}
        self._empty: dict[str, Buffer] = {}
        self._outputs: dict[str, Buffer] = {}
        self._set_up(state)

    def over(self, state: Mapping[str, Any]) -> TensorrtProgram:
        """The same engine over other state: weights are on the device once. Raises ProgramError.

        Both use the same buffers of inputs, outputs and activations: they must not run at the same time.
        """
        twin = copy.copy(self)
        twin._set_up(state)
        return twin

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """See `Program.inputs`."""
        return self._graph.inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """See `Program.outputs`."""
        return self._graph.outputs

    @property
    def state(self) -> tuple[TensorSpec, ...]:
        """See `Program.state`."""
        return self._graph.state

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """See `Program.run`. Waits for the outputs."""
        checked = self._checker.check(feeds)
        self._device.after_caller()
        given = {}
        for name, array in checked:
            if array.nbytes > self._most[name]:
                raise ProgramError(
                    f"{self._label}: input {name!r} {list(array.shape)} is larger than the plan allows"
                )
            if name not in self._inputs:  # made when the first array comes: tensors need none
                self._inputs[name] = self._device.allocate(self._most[name])
            buffer = self._inputs[name]
            self._device.upload(buffer, array)
            given[name] = array.shape, buffer.address
        shapes = self._step(given)
        results: dict[str, Array] = {}
        for spec in self._graph.outputs:
            results[spec.name] = np.empty(shapes[spec.name], spec.dtype)
            self._device.download(self._outputs[spec.name], results[spec.name])
        self._device.before_caller()
        self._device.wait()
        return results

    def run_on_device(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        """Run once on what is on the device; waits for nothing.

        Args:
            feeds: contiguous CUDA tensors by name, of the inputs' types. They must not change until the
                caller's stream is past this call.

        Returns:
            A tensor for each output, whose memory the next run overwrites.

        Raises:
            ProgramError: a tensor does not fit, or TensorRT refuses the shapes.
        """
        given = {}
        for spec in self._graph.inputs:
            tensor = feeds.get(spec.name)
            kind = str(getattr(tensor, "dtype", None)).rpartition(".")[2]
            if tensor is None or kind != spec.dtype.name or not tensor.is_contiguous():
                raise ProgramError(f"{self._label}: input {spec.name!r} must be contiguous {spec.describe()}")
            given[spec.name] = tuple(tensor.shape), int(tensor.data_ptr()) or self._nowhere(spec.name)
        self._device.after_caller()
        shapes = self._step(given)
        self._device.before_caller()
        return {
            spec.name: self._device.view(self._outputs[spec.name], spec.dtype.name, shapes[spec.name])
            for spec in self._graph.outputs
        }

    def _nowhere(self, name: str) -> int:
        """An address for a tensor without elements: TensorRT wants one, and no two alike."""
        if name not in self._empty:
            self._empty[name] = self._device.allocate(1)
        return self._empty[name].address

    def _set_up(self, state: Mapping[str, Any]) -> None:
        """Contexts of its own for this state."""
        self._checker = FeedChecker(self._graph.inputs)
        self._tensors = dict(state)  # kept alive: contexts have their addresses
        self._where = check_device_state(self._label, self._bindings, state)
        self._copied: dict[str, Buffer] = {}
        for binding in self._bindings.state:
            if not binding.shared:
                size = prod(self._where[binding.spec.name][1]) * binding.spec.dtype.itemsize
                self._copied[binding.spec.name] = self._device.allocate(size)
        self._context = self._new_context()
        self._scratch_bound = False
        self._seen: OrderedDict[Any, None] = OrderedDict()
        self._kept: OrderedDict[Any, _Kept] = OrderedDict()
        self._outputs = self._allocate_outputs()
        self._bind_outputs(self._context)

    def _new_context(self) -> Any:
        """A context with the state bound. Activation memory is ours to give."""
        strategy = self._plan.package.ExecutionContextAllocationStrategy.USER_MANAGED
        context = self._plan.engine.create_execution_context(strategy)
        if context is None:
            raise ProgramError(f"{self._label}: no execution context can be made")
        for name, (address, shape) in self._where.items():
            self._check(context.set_input_shape(name, shape), f"state {name!r} {list(shape)}")
            self._check(context.set_tensor_address(name, address), f"the address of {name!r}")
            copied = self._copied.get(name)
            successor = copied.address if copied else address
            self._check(context.set_tensor_address(name + NEXT, successor), f"the address of {name + NEXT!r}")
        return context

    def _bind_outputs(self, context: Any) -> None:
        for spec in self._graph.outputs:
            address = self._outputs[spec.name].address
            self._check(context.set_tensor_address(spec.name, address), f"output {spec.name!r}")

    def _bind_scratch(self, context: Any) -> None:
        buffer = self._scratch.use()
        context.set_device_memory(buffer.address, buffer.size)

    def _allocate_outputs(self) -> dict[str, Buffer]:
        """Buffers for the largest outputs that the profile allows."""
        names = [spec.name for spec in self._graph.inputs]
        for name, shape in profile_shapes(self._plan.engine, names).items():
            self._check(self._context.set_input_shape(name, shape), f"{name!r} {list(shape)}")
        found = dict(self._outputs)  # of the program that this one is made over
        for spec in self._graph.outputs:
            size = int(self._context.get_max_output_size(spec.name))
            if size < 0:
                raise ProgramError(f"{self._label}: the size of output {spec.name!r} depends on values")
            if spec.name not in found or found[spec.name].size < size:
                found[spec.name] = self._device.allocate(size)
        return found

    def _step(self, given: Mapping[str, tuple[tuple[int, ...], int]]) -> dict[str, tuple[int, ...]]:
        """Enqueue one step. Returns the outputs' shapes.

        What was never seen goes through the context that all such share. What comes again gets a context of
        its own, and from its third run on a CUDA graph.
        """
        if not self._scratch_bound:
            self._bind_scratch(self._context)
            self._scratch_bound = True
        key = tuple(given.items())
        known = self._kept.get(key)
        if known is not None:
            self._kept.move_to_end(key)
            if known.replay is None:
                known.replay = self._capture(known.context)
            known.replay()
            return known.shapes
        if not self._cuda_graphs or key not in self._seen:
            self._seen[key] = None
            if len(self._seen) > MOST_SEEN:
                self._seen.popitem(last=False)
            return self._run_in(self._context, given)
        context = self._new_context()
        self._bind_outputs(context)
        self._bind_scratch(context)
        shapes = self._run_in(context, given)
        self._kept[key] = _Kept(context, shapes)
        if len(self._kept) > MOST_GRAPHS:
            self._device.wait()  # it may be running still
            self._kept.popitem(last=False)
        return shapes

    def _run_in(
        self, context: Any, given: Mapping[str, tuple[tuple[int, ...], int]]
    ) -> dict[str, tuple[int, ...]]:
        for name, (shape, address) in given.items():
            self._check(context.set_input_shape(name, shape), f"input {name!r} {list(shape)}")
            self._check(context.set_tensor_address(name, address), f"the address of {name!r}")
        shapes = {spec.name: tuple(context.get_tensor_shape(spec.name)) for spec in self._graph.outputs}
        self._enqueue(context)
        return shapes

    def _capture(self, context: Any) -> Callable[[], None]:
        replay = self._device.capture(lambda: self._enqueue(context))
        log.debug("%s: captured a CUDA graph", self._label)
        return replay

    def _enqueue(self, context: Any) -> None:
        self._check(context.execute_async_v3(self._device.stream), "the step")
        for name, buffer in self._copied.items():
            self._device.copy_back(self._tensors[name], buffer)

    def _check(self, done: bool, what: str) -> None:
        if not done:
            raise ProgramError(f"{self._label}: TensorRT refuses {what}")
