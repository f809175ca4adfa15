"""How long something takes on a device: medians of runs that take turns, within a budget of time (ours)."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from realtide.gpu.counts import Work

Run = Callable[[], object]
_WARM_UP = 2
_MOST_RUNS = 50


@dataclass(frozen=True, slots=True)
class Timing:
    """Milliseconds of several runs.

    Attributes:
        runs: of each run, in their order.
        peak_bytes: most memory that was allocated on the device meanwhile; None: it does not tell.
    """

    runs: tuple[float, ...]
    peak_bytes: int | None

    @property
    def median(self) -> float:
        """Their median."""
        return statistics.median(self.runs)


@dataclass(frozen=True, slots=True)
class Rates:
    """What the machine was seen to do: the best of several sizes.

    Attributes:
        operations: per second, of matrix products in the working type.
        bytes: per second, read and written by copies within the device's memory.
    """

    operations: float
    bytes: float

    def floors(self, work: Work) -> tuple[float, float]:
        """Milliseconds below which `work` cannot lie: for its operations, for its bytes."""
        return 1e3 * work.operations / self.operations, 1e3 * work.bytes / self.bytes


class Budget:
    """Seconds from now that may be used.

    Args:
        seconds: all of them.
        now: a monotonic clock.
    """

    def __init__(self, seconds: float, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._end = now() + seconds

    @property
    def left(self) -> float:
        """Seconds left; negative once it is used up."""
        return self._end - self._now()


class Clock:
    """Times runs on a device: with CUDA's events there, with the machine's clock on the processor.

    Args:
        device: where the runs compute.
        least: rounds that are made in any case.
    """

    def __init__(self, device: torch.device, least: int = 3) -> None:
        self.device = device
        self._least = least
        self._cuda = device.type == "cuda"

    def paired(self, runs: Mapping[str, Run], seconds: float) -> dict[str, Timing]:
        """Time several things in turn, so that a change of the machine's speed meets all of them.

        Args:
            runs: what to time, by name.
            seconds: after so long no further round is begun, if there were enough.
        """
        for run in runs.values():
            for _ in range(_WARM_UP):
                run()
        self.wait()
        if self._cuda:
            torch.cuda.reset_peak_memory_stats(self.device)
        found: dict[str, list[float]] = {name: [] for name in runs}
        budget = Budget(seconds)
        for number in range(_MOST_RUNS):
            if number >= self._least and budget.left <= 0:
                break
            for name, run in runs.items():
                found[name].append(self._once(run))
        peak = torch.cuda.max_memory_allocated(self.device) if self._cuda else None
        return {name: Timing(tuple(values), peak) for name, values in found.items()}

    def one(self, run: Run, seconds: float) -> Timing:
        """Time one thing; see `paired`."""
        return self.paired({"": run}, seconds)[""]

    def wait(self) -> None:
        """Wait until the device has done all it was given."""
        if self._cuda:
            torch.cuda.synchronize(self.device)

    def _once(self, run: Run) -> float:
        if not self._cuda:
            begin = time.perf_counter()
            run()
            return 1e3 * (time.perf_counter() - begin)
        event: Any = torch.cuda.Event
        before, after = event(enable_timing=True), event(enable_timing=True)
        before.record()
        run()
        after.record()
        after.synchronize()
        return float(before.elapsed_time(after))


def measure_rates(clock: Clock, dtype: torch.dtype, sizes: tuple[int, ...], copy_bytes: int) -> Rates:
    """The machine's rates: square matrix products of `sizes`, copies of `copy_bytes`."""
    best = 0.0
    for size in sizes:
        left, right = (torch.randn(size, size, device=clock.device).to(dtype) for _ in range(2))
        out = torch.empty_like(left)
        timing = clock.one(lambda a=left, b=right, c=out: torch.mm(a, b, out=c), 1.0)  # type: ignore[misc]
        best = max(best, 2e3 * size**3 / min(timing.runs))
    source = torch.zeros(copy_bytes, dtype=torch.uint8, device=clock.device)
    target = torch.empty_like(source)
    copied = clock.one(lambda: target.copy_(source), 1.0)
    return Rates(best, 2e3 * copy_bytes / min(copied.runs))
