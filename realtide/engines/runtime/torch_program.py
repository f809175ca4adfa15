"""Programs on PyTorch, eager: the interface of `Program` over a module (ours).

The forward takes the inputs and then the state tensors, by position, and returns the outputs and then the
next-state tensors. It may write a state tensor in place and return it, and then nothing is copied.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from realtide.engines.runtime.program import (
    Array,
    FeedChecker,
    FeedError,
    ProgramError,
    TensorSpec,
    check_state,
)
from realtide.engines.runtime.torch_memory import as_tensor

M = TypeVar("M", bound=nn.Module)
State = Mapping[str, Array] | Mapping[str, Tensor]
"""State tensors by name: arrays for a module on the processor, tensors for one on another device."""


class TorchProgram:
    """A `Program` over a module. Not thread-safe: one thread runs it.

    Args:
        module: put into evaluation mode; called as ``module(*inputs, *state) -> (*outputs, *next_state)``.
        inputs: specs of the inputs, in the forward's order.
        outputs: specs of the outputs, in the forward's order.
        state: specs of the state tensors, in the forward's order.
        arrays: one array for each state tensor, updated in place by every run. Numpy arrays for a module on
            the CPU; for a module on another device, tensors on that device.

    Raises:
        FeedError: a state array is missing, unknown or does not fit.
        ProgramError: a state tensor is not on the module's device.
    """

    def __init__(
        self,
        module: nn.Module,
        inputs: Sequence[TensorSpec],
        outputs: Sequence[TensorSpec],
        state: Sequence[TensorSpec],
        arrays: State,
    ) -> None:
        self._module = module.eval()
        self._device = _device_of(module)
        self._inputs, self._outputs, self._specs = tuple(inputs), tuple(outputs), tuple(state)
        self._checker = FeedChecker(inputs)
        for name, value in arrays.items():
            if isinstance(value, Tensor) and value.device != self._device:
                raise ProgramError(f"state {name!r} is on {value.device}, the module on {self._device}")
            if not isinstance(value, Tensor) and self._device.type != "cpu":
                raise ProgramError(f"state {name!r} is in host memory, the module on {self._device}")
        if self._device.type == "cpu":
            # Views of one memory: the module writes what the caller reads.
            views = {name: v.numpy() if isinstance(v, Tensor) else v for name, v in arrays.items()}
            self._state = [torch.from_numpy(array) for array in check_state(state, views).values()]
        else:
            check_state(state, {name: _stand_in(v) for name, v in arrays.items()})
            self._state = [v for v in (arrays[spec.name] for spec in state) if isinstance(v, Tensor)]

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """See `Program.inputs`."""
        return self._inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """See `Program.outputs`."""
        return self._outputs

    @property
    def state(self) -> tuple[TensorSpec, ...]:
        """See `Program.state`."""
        return self._specs

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """See `Program.run`."""
        checked = self._checker.check(feeds)
        with torch.inference_mode():
            values = [as_tensor(array).to(self._device) for _, array in checked]
            try:
                results = self._module(*values, *self._state)
            except Exception as error:
                shapes = ", ".join(f"{name} {list(array.shape)}" for name, array in checked)
                raise ProgramError(
                    f"{type(self._module).__name__}: run failed with {shapes}: {error}"
                ) from error
            if isinstance(results, Tensor):
                results = (results,)
            count = len(self._outputs)
            if len(results) != count + len(self._state):
                raise ProgramError(
                    f"{type(self._module).__name__} returned {len(results)} tensors, "
                    f"not {count} outputs and {len(self._state)} states"
                )
            # Outputs first: they may be views of the old state.
            owned = {
                s.name: _detached(t, values, self._state)
                for s, t in zip(self._outputs, results, strict=False)
            }
            for tensor, following in zip(self._state, results[count:], strict=True):
                if not _same_memory(tensor, following):
                    tensor.copy_(following)
        return owned


def load(module: M, weights: Mapping[str, Array]) -> M:
    """The module with these weights, as float32, in evaluation mode.

    Raises:
        ValueError: a weight is missing, unexpected or of another shape; the message names it.
    """
    wanted = module.state_dict()
    missing, unexpected = sorted(set(wanted) - set(weights)), sorted(set(weights) - set(wanted))
    if missing or unexpected:
        what = f"lack {missing[0]!r}" if missing else f"have {unexpected[0]!r}, which the model has not"
        more = len(missing) + len(unexpected) - 1
        raise ValueError(f"the weights {what}" + (f" (and {more} more differences)" if more else ""))
    values = {name: torch.from_numpy(np.asarray(weights[name], np.float32).copy()) for name in wanted}
    for name, value in values.items():
        if value.shape != wanted[name].shape:
            raise ValueError(f"weight {name!r} is {list(value.shape)}, not {list(wanted[name].shape)}")
    module.load_state_dict(values, assign=True)
    return module.eval().requires_grad_(False)


def state_tensors(shapes: Mapping[str, Sequence[int]], given: State) -> list[Tensor]:
    """State as tensors, in the order of `shapes`; arrays are not copied.

    Raises:
        FeedError: one is missing or has another shape.
    """
    found = []
    for name, shape in shapes.items():
        if name not in given or tuple(given[name].shape) != tuple(shape):
            have = list(given[name].shape) if name in given else "missing"
            raise FeedError(f"state {name!r} must be {list(shape)}, not {have}")
        value = given[name]
        found.append(value if isinstance(value, Tensor) else torch.from_numpy(value))
    return found


def _device_of(module: nn.Module) -> torch.device:
    for tensor in (*module.parameters(), *module.buffers()):
        return tensor.device
    return torch.device("cpu")


def _stand_in(value: Any) -> Array:
    # For checking dtype and shape as on the CPU; never written, so that it commits no memory.
    dtype = torch.zeros((), dtype=value.dtype).numpy().dtype
    return np.zeros(tuple(value.shape), dtype)


def _same_memory(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride()


def _detached(result: Tensor, values: Sequence[Tensor], state: Sequence[Tensor]) -> Array:
    """The result as an array that the caller may keep: a copy if its memory is an input's or a state's."""
    owned = result.cpu()
    storage = owned.untyped_storage().data_ptr()
    if any(storage == t.untyped_storage().data_ptr() for t in (*values, *state)):
        owned = owned.clone()
    array: Array = owned.contiguous().numpy()
    return array
