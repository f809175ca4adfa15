"""Slots' state in a device's memory, exported as from the host's (ours; numpy only)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from realtide.engines.ancat.config import EncoderConfig, state_shapes
from realtide.engines.runtime.memory import Memory, Values
from realtide.engines.runtime.program import Array
from realtide.engines.runtime.slots import SlotState


class DeviceRows:
    """As `slots.SlotState`. A checkpoint holds the types of `config.state_shapes`: any replica resumes it.

    Args:
        memory: where the tensors are.
        tensors: by name as in `config.static_shapes`, in the device's own types.
        config: the architecture.
        step_frames: of the bundle.
        slots: that sessions have; the tensors may have more.
    """

    def __init__(
        self,
        memory: Memory,
        tensors: Mapping[str, Values],
        config: EncoderConfig,
        step_frames: int,
        slots: int,
    ) -> None:
        self._memory, self._slots = memory, slots
        self._tensors = dict(tensors)
        self._shapes = state_shapes(config, step_frames)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(int(tensor.nbytes) for tensor in self._tensors.values())

    def zero(self, slot: int) -> None:
        """Zero all rows of a slot. Raises IndexError."""
        self._fill(slot, self._blank())

    def export(self, slot: int) -> bytes:
        """See `SlotState.export`. Waits for the device."""
        host = self._blank()
        for name, view in self._views(slot).items():
            host[name][...] = self._memory.get(view)
        return self._state(host).export(0)

    def load(self, slot: int, data: bytes) -> None:
        """See `SlotState.load`."""
        host = self._blank()
        self._state(host).load(0, data)
        self._fill(slot, host)

    def _fill(self, slot: int, host: Mapping[str, Array]) -> None:
        for name, view in self._views(slot).items():
            self._memory.fill(view, host[name])

    def _views(self, slot: int) -> dict[str, Values]:
        if not 0 <= slot < self._slots:
            raise IndexError(f"slot {slot} is not in 0..{self._slots - 1}")
        return {
            name: self._tensors[name][slot * rows : (slot + 1) * rows]
            for name, (rows, _, _) in self._shapes.items()
        }

    def _blank(self) -> dict[str, Array]:
        return {name: np.zeros((rows, *shape), dtype) for name, (rows, shape, dtype) in self._shapes.items()}

    def _state(self, host: Mapping[str, Array]) -> SlotState:
        return SlotState(host, {name: rows for name, (rows, _, _) in self._shapes.items()}, 1)
