"""Where an engine's tensors lie: in host memory, or on a device of PyTorch's (ours).

Engines that keep state between steps compute a little outside their programs: they mix latents with noise,
join frames, and read what goes to a client or into a checkpoint. They do so through a `Memory`, so that one
engine serves from arrays without PyTorch and from tensors without copies to the host. Arrays and tensors
alike have shapes, ``nbytes``, and slices along their first axis. Numpy only; `torch_memory` is for devices.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from realtide.engines.runtime.program import Array

Values = Any
"""An array, or a tensor on the memory's device."""


class Memory(Protocol):
    """Used by any thread that has entered it; see `enter`."""

    @property
    def device(self) -> str:
        """Its name as PyTorch writes it: ``cpu``, ``cuda:0``."""
        ...

    def enter(self) -> None:
        """Called once in each thread, besides the first, that works here: its work overlaps the others'."""
        ...

    def put(self, array: Array) -> Values:
        """The array here. It must not be changed afterwards."""
        ...

    def get(self, values: Values) -> Array:
        """Values in host memory, to be read only; bfloat16 as float32. Waits for them."""
        ...

    def fill(self, values: Values, array: Array) -> None:
        """Overwrite values by those of an array of the same shape."""
        ...

    def join(self, parts: Sequence[Values], axis: int = 0) -> Values:
        """Concatenate."""
        ...

    def mix(self, a: float, x: Values, b: float, y: Values) -> Values:
        """a * x + b * y, computed in float64 and rounded to float32."""
        ...

    def pixels(self, planes: Values) -> NDArray[np.uint8]:
        """Planes [n, 3, height, width] from -1 to 1 as images [n, height, width, 3] in host memory."""
        ...

    def wait(self) -> None:
        """Wait until all that this thread has asked for is computed."""
        ...


class HostMemory:
    """Arrays. What is asked for is computed at once."""

    @property
    def device(self) -> str:
        """See `Memory.device`."""
        return "cpu"

    def enter(self) -> None:
        """See `Memory.enter`."""

    def put(self, array: Array) -> Values:
        """See `Memory.put`: the array itself."""
        return array

    def get(self, values: Values) -> Array:
        """See `Memory.get`: the array itself."""
        array: Array = values
        return array

    def fill(self, values: Values, array: Array) -> None:
        """See `Memory.fill`."""
        values[...] = array

    def join(self, parts: Sequence[Values], axis: int = 0) -> Values:
        """See `Memory.join`."""
        return np.concatenate(parts, axis)

    def mix(self, a: float, x: Values, b: float, y: Values) -> Values:
        """See `Memory.mix`."""
        wide = np.asarray(x, np.float64) * a + np.asarray(y, np.float64) * b
        return wide.astype(np.float32)

    def pixels(self, planes: Values) -> NDArray[np.uint8]:
        """See `Memory.pixels`."""
        wide = np.clip(np.rint((planes.astype(np.float32, copy=False) + 1.0) * 127.5), 0, 255)
        return np.ascontiguousarray(wide.astype(np.uint8).transpose(0, 2, 3, 1))

    def wait(self) -> None:
        """See `Memory.wait`."""


HOST = HostMemory()
