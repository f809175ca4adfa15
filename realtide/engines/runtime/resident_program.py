"""Programs whose state, large inputs and results stay on the device (ours).

What serves from a GPU: arrays that a run is fed go over, tensors are there already, and results are
tensors, so that nothing waits and no cache is copied. The same code runs on the processor. Inputs that
change seldom (a prompt's keys and values) are `Bound`: they lie at one address, which recorded graphs read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from realtide.engines.runtime.device_program import DeviceProgram
from realtide.engines.runtime.program import FeedError, ProgramError
from realtide.engines.runtime.torch_memory import as_tensor

Call = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]
"""Queues one run: inputs by name, all on the device and of their types, to outputs by name."""


class Bound:
    """Inputs of several programs that stay where they are; others' values are copied when they are given.

    Args:
        tensors: by name, on the device. Their contents do not matter.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = dict(tensors)
        self._given: dict[str, Any] = {}

    def follow(self, feeds: Mapping[str, Any]) -> None:
        """Make the tensors what `feeds` has by their names. Raises FeedError."""
        for name, own in self.tensors.items():
            value = _fed(feeds, name)
            if self._given.get(name) is not value:
                own.copy_(value if isinstance(value, Tensor) else as_tensor(value))
                self._given[name] = value  # kept, so that nothing else can be taken for it


class ResidentProgram:
    """See `program.Runs`. Used by one thread.

    Args:
        label: what messages call it.
        call: the backend's.
        types: of the inputs besides the bound ones, by name. Numbers of other types are cast on the device.
        device: where it runs.
        bound: inputs that it shares with other programs.
    """

    def __init__(
        self,
        label: str,
        call: Call,
        types: Mapping[str, torch.dtype],
        device: str | torch.device,
        bound: Bound | None = None,
    ) -> None:
        self._label, self._call, self._types = label, call, dict(types)
        self._device = torch.device(device)
        self._bound = bound or Bound({})

    def run(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        """Queue one run.

        Args:
            feeds: an array, or a tensor on the device, for each input.

        Returns:
            Tensors on the device. Where graphs are recorded the next run overwrites them.

        Raises:
            FeedError: a feed is missing or unknown.
            ProgramError: the backend failed; the state may have been updated in part.
        """
        known = len(self._types) + len(self._bound.tensors)
        with torch.inference_mode():
            given = {name: self._placed(_fed(feeds, name), kind) for name, kind in self._types.items()}
            self._bound.follow(feeds)
            if len(feeds) != known:
                odd = sorted(set(feeds) - set(self._types) - set(self._bound.tensors))
                raise FeedError(f"{self._label}: unknown input {', '.join(map(repr, odd))}")
            try:
                return dict(self._call(given))
            except ProgramError:
                raise
            except Exception as error:
                shapes = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in given.items())
                raise ProgramError(f"{self._label}: run failed with {shapes}: {error}") from error

    def _placed(self, value: Any, kind: torch.dtype) -> Tensor:
        tensor = value if isinstance(value, Tensor) else as_tensor(value)
        return tensor.to(self._device, kind, non_blocking=True)


def named(program: DeviceProgram, outputs: Sequence[str]) -> Call:
    """A module's program as a `Call`; inputs are in the forward's order."""

    def call(given: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return dict(zip(outputs, program.run(*given.values()), strict=True))

    return call


def _fed(feeds: Mapping[str, Any], name: str) -> Any:
    if name not in feeds:
        raise FeedError(f"input {name!r} is missing")
    return feeds[name]
