"""Plans as programs of an engine whose tensors lie on the device (ours).

`tensorrt_program` binds a plan; here it is given what engines give, like any `ResidentProgram`: arrays or
tensors of any type, bound inputs at fixed addresses, and results that are tensors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from realtide.engines.runtime.program import ProgramError, TensorSpec
from realtide.engines.runtime.resident_program import Bound, ResidentProgram
from realtide.engines.runtime.tensorrt import Plan
from realtide.engines.runtime.tensorrt_program import Scratch, TensorrtProgram


class PlanPrograms:
    """Programs over one plan, whose weights are on the device once.

    Args:
        plan: loaded when the first program is made.
        scratch: activation memory shared with programs that never run at once, and the device.
        device: as PyTorch names it.
        graphs: replay CUDA graphs. Inputs are copied to memory of their own then, so that addresses do not
            change; else they are read where they lie.
        kept: results are the caller's to keep, not overwritten by the next run.

    Raises:
        ProgramError: see `TensorrtProgram`.
    """

    def __init__(
        self, plan: Plan, scratch: Scratch, device: str, *, graphs: bool = True, kept: bool = False
    ) -> None:
        self._plan, self._scratch, self._device = plan, scratch, device
        self._graphs, self._kept = graphs, kept
        self._first: TensorrtProgram | None = None

    def over(self, state: Mapping[str, Tensor], bound: Bound | None = None) -> ResidentProgram:
        """A program over state, which may be the only one, and over bound inputs. Raises ProgramError."""
        plan, bound = self._plan, bound or Bound({})
        if self._first is None:
            self._first = program = TensorrtProgram(
                plan.data,
                plan.graph,
                state,
                label=plan.label,
                scratch=self._scratch,
                cuda_graphs=self._graphs,
            )
        else:
            program = self._first.over(state)
        inputs = plan.graph.inputs
        for spec in inputs:
            if spec.name in bound.tensors and bound.tensors[spec.name].dtype != torch_type(spec):
                raise ProgramError(f"{plan.label}: input {spec.name!r} must be {spec.describe()}")
        types = {spec.name: torch_type(spec) for spec in inputs if spec.name not in bound.tensors}
        call = _Call(program, bound, self._graphs, self._kept)
        return ResidentProgram(plan.label, call, types, self._device, bound)


class _Call:
    """See `resident_program.Call`."""

    def __init__(self, program: TensorrtProgram, bound: Bound, copied: bool, kept: bool) -> None:
        self._program, self._bound, self._copied, self._kept = program, bound.tensors, copied, kept
        self._own: dict[tuple[str, torch.Size], Tensor] = {}

    def __call__(self, given: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        feeds = {name: self._placed(name, tensor) for name, tensor in given.items()}
        made = self._program.run_on_device(feeds | self._bound)
        return {name: tensor.clone() for name, tensor in made.items()} if self._kept else made

    def _placed(self, name: str, tensor: Tensor) -> Tensor:
        if not self._copied:
            return tensor.contiguous()
        own = self._own.get((name, tensor.shape))
        if own is None:
            own = self._own[name, tensor.shape] = tensor.contiguous().clone()
        return own.copy_(tensor)


def torch_type(spec: TensorSpec) -> torch.dtype:
    """PyTorch's type of a tensor."""
    found: torch.dtype = getattr(torch, spec.dtype.name)
    return found


def zeros(specs: Sequence[TensorSpec], device: str) -> dict[str, Tensor]:
    """Tensors of fixed shapes, by name. Raises ProgramError: a shape is not fixed."""
    found = {}
    for spec in specs:
        shape = [dim for dim in spec.shape if isinstance(dim, int)]
        if len(shape) < len(spec.shape):
            raise ProgramError(f"{spec.name!r} must have a fixed shape, not {spec.describe()}")
        found[spec.name] = torch.zeros(shape, dtype=torch_type(spec), device=device)
    return found
