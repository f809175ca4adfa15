"""What the timed parts have in common: device, type, clock, rates, and how a time is written down (ours)."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from realtide.gpu.counts import Work
from realtide.gpu.timing import Clock, Rates, Timing

M = TypeVar("M", bound=nn.Module)


class Skipped(Exception):
    """A part cannot be timed on this machine; the message says why, as a sentence."""


@dataclass(frozen=True)
class Bench:
    """A machine under test.

    Attributes:
        device: where models run.
        dtype: that they work in.
        small: time tiny models instead, to try the program itself.
        clock: of the device.
        rates: of the device.
    """

    device: torch.device
    dtype: torch.dtype
    small: bool
    clock: Clock
    rates: Rates

    @property
    def cuda(self) -> bool:
        """True on a GPU."""
        return self.device.type == "cuda"

    @property
    def seconds(self) -> float:
        """For which one thing is timed."""
        return 0.0 if self.small else 4.0

    @property
    def itemsize(self) -> int:
        """Bytes of a number."""
        return self.dtype.itemsize

    def room(self, wanted: int, what: str) -> None:
        """Raise Skipped unless the device has `wanted` bytes left for `what`."""
        if not self.cuda:
            return
        gc.collect()  # what an earlier part left refers to itself
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(self.device)
        if free < wanted:
            raise Skipped(
                f"{what} needs some {wanted / 1e9:.0f} GB, of the device's {total / 1e9:.0f} GB"
                f" {free / 1e9:.0f} are free"
            )

    def random(self, *shape: int) -> Tensor:
        """Normal noise on the device, in the working type."""
        return torch.randn(*shape, device=self.device).to(self.dtype)

    def model(self, make: Callable[[], M]) -> M:
        """A model with random weights, made on the device in the working type: no copy in float32 exists."""
        with _default(self.dtype), torch.device(self.device):
            made = make()
        return made.to(self.device, self.dtype).eval().requires_grad_(False)

    def entry(self, timing: Timing, work: Work | None = None) -> dict[str, Any]:
        """A time as it stands in the result."""
        found: dict[str, Any] = {
            "ms": round(timing.median, 4),
            "fastest_ms": round(min(timing.runs), 4),
            "slowest_ms": round(max(timing.runs), 4),
            "runs": len(timing.runs),
            "peak_bytes": timing.peak_bytes,
        }
        if work is not None:
            compute, memory = self.rates.floors(work)
            found |= {
                "operations": work.operations,
                "bytes": work.bytes,
                "floor_operations_ms": round(compute, 4),
                "floor_bytes_ms": round(memory, 4),
                "over_floor": round(timing.median / max(compute, memory), 2),
            }
        return found


@contextlib.contextmanager
def _default(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
