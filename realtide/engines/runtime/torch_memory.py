"""Tensors of PyTorch as an engine's memory: on a GPU, or on the processor by the same code (ours)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from realtide.engines.runtime.program import Array, ProgramError


class TorchMemory:
    """See `memory.Memory`.

    On a GPU work is queued: `put`, `fill`, `join` and `mix` do not wait; `get`, `pixels` and `wait` do.

    Args:
        device: as PyTorch writes it.
    """

    def __init__(self, device: str = "cpu") -> None:
        self._device = torch.device(device)

    @property
    def device(self) -> str:
        """See `Memory.device`."""
        return str(self._device)

    @property
    def index(self) -> int:
        """Which of the devices of its kind."""
        return self._device.index or 0

    def enter(self) -> None:
        """See `Memory.enter`: the thread gets a stream of its own."""
        if self._device.type == "cuda":
            torch.cuda.set_stream(torch.cuda.Stream(self._device))  # type: ignore[no-untyped-call]

    def zeros(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor for state."""
        return torch.zeros(tuple(shape), dtype=dtype, device=self._device)

    def put(self, array: Array) -> Tensor:
        """See `Memory.put`. On the processor it shares the array's memory."""
        return as_tensor(array).to(self._device, non_blocking=True)

    def get(self, values: Tensor) -> Array:
        """See `Memory.get`: always a copy, since programs overwrite what they returned before."""
        wide = torch.float32 if values.dtype == torch.bfloat16 else values.dtype
        array: Array = values.detach().to("cpu", wide, copy=True).numpy()
        return array

    def fill(self, values: Tensor, array: Array) -> None:
        """See `Memory.fill`."""
        values.copy_(as_tensor(array))

    def join(self, parts: Sequence[Tensor], axis: int = 0) -> Tensor:
        """See `Memory.join`."""
        return torch.cat(tuple(parts), axis)

    def mix(self, a: float, x: Tensor, b: float, y: Tensor) -> Tensor:
        """See `Memory.mix`."""
        return (x.double() * float(a) + y.double() * float(b)).float()

    def pixels(self, planes: Tensor) -> NDArray[np.uint8]:
        """See `Memory.pixels`. Only bytes go to the host."""
        levels = ((planes.float() + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8)
        array: NDArray[np.uint8] = levels.permute(0, 2, 3, 1).contiguous().cpu().numpy()
        return array

    def wait(self) -> None:
        """See `Memory.wait`."""
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()


def as_tensor(array: Array) -> Tensor:
    """An array as a tensor of the processor; one that is read-only is copied, since PyTorch warns of it."""
    return torch.from_numpy(array if array.flags.writeable else array.copy())


@contextlib.contextmanager
def out_of_memory(what: str) -> Iterator[None]:
    """A device without room for `what` is a ProgramError."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ProgramError(f"the device has too little memory for {what}: {error}") from error
