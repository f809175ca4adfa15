"""Modules on a GPU, fed with tensors that are there already: nothing waits for the device (ours).

`TorchProgram` takes and gives arrays, so every run waits for its results. A `DeviceProgram` takes tensors and
gives tensors, and its work is only queued. For each set of shapes it can record a CUDA graph once and replay
it: a pass of thousands of small kernels is then one call, which matters where launching them takes longer
than they do.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from realtide.engines.runtime.program import ProgramError

# Libraries choose kernels and allocate their workspaces in the first runs; that cannot be recorded.
_WARM_UP = 2

# While one graph is recorded no thread may begin with another: it would wait for the whole device.
_RECORDING = threading.Lock()

_FORMS = 64
"""So often one piece of code may be compiled; more is taken for a mistake, and refused."""

Shapes = tuple[tuple[torch.Size, torch.dtype], ...]


@dataclass(slots=True)
class _Recorded:
    """A graph with the memory that it reads its inputs from and leaves its outputs in."""

    graph: Any
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]


class DeviceProgram:
    """A module over state tensors on its device. Used by one thread.

    Args:
        module: called as ``module(*inputs, *bound, *state) -> (*outputs, *next_state)``; it must not wait for
            the device (no branch on values), and its outputs' shapes follow from its inputs'.
        state: tensors on the module's device; every run updates them in place.
        bound: inputs that stay where they are: graphs read them in place, and the caller may write to them
            between runs. Large ones belong here, since others are copied for a graph.
        record: replay CUDA graphs. What `run` returns is then overwritten by the next run of these shapes.
        compiled: compile the module with `torch.compile`, as one graph. The first run of each set of shapes
            then takes as long as the compiler does: a minute or more for a large model.
        varying: sizes change from run to run: compile for any size once a second one has come.
        pool: memory for what is computed inside graphs, shared by programs that never run at once
            (`torch.cuda.graph_pool_handle`); None: each graph has its own.

    Raises:
        ProgramError: graphs are wanted on a device that has none, or a state or bound tensor is elsewhere.
    """

    def __init__(
        self,
        module: nn.Module,
        state: Sequence[Tensor],
        bound: Sequence[Tensor] = (),
        *,
        record: bool = False,
        compiled: bool = False,
        varying: bool = False,
        pool: Any = None,
    ) -> None:
        self._state, self._bound = tuple(state), tuple(bound)
        device = next(iter((*module.parameters(), *module.buffers(), *self._state))).device
        if record and device.type != "cuda":
            raise ProgramError(f"CUDA graphs need a CUDA device, the module is on {device}")
        for tensor in (*self._bound, *self._state):
            if tensor.device != device:
                raise ProgramError(f"a state or bound tensor is on {tensor.device}, the module on {device}")
        self._device = device
        self._name = type(module).__name__
        self._call: Any = module.eval()
        if compiled:
            # Sessions, fill levels of a window and sizes each have a form of their own of the same code.
            limits: Any = torch._dynamo.config
            limits.recompile_limit = max(limits.recompile_limit, _FORMS)
            self._call = torch.compile(self._call, dynamic=None if varying else False, fullgraph=True)
        self._record, self._pool = record, pool
        self._recorded: dict[Shapes, _Recorded] = {}

    def run(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Queue one run.

        Args:
            inputs: on the module's device, in the forward's order.

        Returns:
            The outputs, on the device; they are valid for what is queued after them.

        Raises:
            ProgramError: an input is on another device.
        """
        for tensor in inputs:
            if tensor.device != self._device:
                raise ProgramError(f"{self._name}: an input is on {tensor.device}, not on {self._device}")
        with torch.inference_mode():
            if not self._record:
                return self._eager(inputs)
            shapes = tuple((tensor.shape, tensor.dtype) for tensor in inputs)
            recorded = self._recorded.get(shapes)
            if recorded is None:
                recorded = self._recorded[shapes] = self._made(inputs)
            for own, tensor in zip(recorded.inputs, inputs, strict=True):
                own.copy_(tensor)
            recorded.graph.replay()
            return recorded.outputs

    def _eager(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        try:
            results = self._call(*inputs, *self._bound, *self._state)
        except RuntimeError as error:
            from torch._dynamo.exc import TorchDynamoException  # slow to import, and seldom wanted

            if not isinstance(error, TorchDynamoException):
                raise
            first = str(error).strip().partition("\n")[0]
            raise ProgramError(f"{self._name} cannot be compiled: {first}") from error
        if isinstance(results, Tensor):
            results = (results,)
        count = len(results) - len(self._state)
        for tensor, following in zip(self._state, results[count:], strict=True):
            if tensor.data_ptr() != following.data_ptr():
                tensor.copy_(following)
        return tuple(results[:count])

    def _made(self, inputs: Sequence[Tensor]) -> _Recorded:
        """Record a graph. The runs that warm up change the state, so it is put back.

        Raises:
            ProgramError: it cannot be recorded.
        """
        kept = [tensor.clone() for tensor in self._state]
        own = tuple(tensor.clone() for tensor in inputs)
        current: Any = torch.cuda.current_stream(self._device)
        aside: Any = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        aside.wait_stream(current)
        with torch.cuda.stream(aside):
            for _ in range(_WARM_UP):
                self._eager(own)
        graph = torch.cuda.CUDAGraph()
        with _RECORDING:
            try:
                # Other threads go on with their own work meanwhile, and may allocate.
                with torch.cuda.graph(
                    graph, pool=self._pool, stream=aside, capture_error_mode="thread_local"
                ):
                    outputs = self._eager(own)
            except RuntimeError as error:
                raise ProgramError(f"{self._name} cannot be recorded as a CUDA graph: {error}") from error
        current.wait_stream(aside)
        for tensor, before in zip(self._state, kept, strict=True):
            tensor.copy_(before)
        return _Recorded(graph, own, outputs)
