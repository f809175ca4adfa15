"""What a compiled graph looks like to an engine: named tensors in, named tensors out, caches in place (ours).

A `Program` knows nothing of slots, streams or models. Its *state* tensors (caches) are arrays that the caller
allocated and goes on owning; a run reads and updates them in place and never copies them. The graph behind a
program expresses that functionally: a state tensor ``x`` is an input ``x`` and an output ``x.next`` of the
same dtype and shape, and both names are bound to the same memory.

Numpy only: nothing here imports a framework.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Dim = int | str | None
"""Size of a dimension: an int is fixed, a str is dynamic and named, None is dynamic and unnamed."""

NEXT = ".next"
"""Suffix that an updated state tensor's output has."""


class ProgramError(Exception):
    """A graph could not be loaded, or a run failed inside the backend; the message names the graph."""


class FeedError(ValueError):
    """A tensor handed to a program is missing, unknown or does not fit its spec; the message names it."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Name, dtype and shape of one tensor of a program."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[Dim, ...]

    def describe(self) -> str:
        """The spec as people write it, for example ``float32[rows, 64]``."""
        dims = ", ".join("?" if d is None else str(d) for d in self.shape)
        return f"{self.dtype.name}[{dims}]"

    def accepts(self, array: Array) -> bool:
        """True if the array has this dtype and rank and agrees with every fixed dimension."""
        return (
            array.dtype == self.dtype
            and array.ndim == len(self.shape)
            and all(not isinstance(d, int) or d == n for d, n in zip(self.shape, array.shape, strict=True))
        )


class Runs(Protocol):
    """What an engine asks of a program, wherever its tensors lie (see `memory`). One thread at a time."""

    def run(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        """As `Program.run`, with tensors of the engine's memory in and out.

        What it returns may be overwritten by the next run.
        """
        ...


class Program(Protocol):
    """A graph with named tensors and in-place state. Owned by one thread at a time."""

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """What every run must be fed (state excluded)."""
        ...

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """What every run returns (next-state tensors excluded)."""
        ...

    @property
    def state(self) -> tuple[TensorSpec, ...]:
        """The tensors that were bound at construction and that a run updates in place."""
        ...

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Run once and update the state in place.

        Args:
            feeds: one array for each of `inputs`; they are read during the call only.

        Returns:
            One new array for each of `outputs`; the caller owns them.

        Raises:
            FeedError: a feed is missing, unknown, or has the wrong dtype or shape (before anything has run).
            ProgramError: the backend failed; the state may have been updated in part.
        """
        ...


def split_state(
    inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]
) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """Tell a graph's state from its inputs and outputs by the ``x`` / ``x.next`` rule.

    Returns:
        (inputs, outputs, state), each in the graph's order.

    Raises:
        ProgramError: an output ``x.next`` has no input ``x``, or the two differ in dtype or in a fixed
            dimension.
    """
    by_name = {spec.name: spec for spec in inputs}
    state_names: set[str] = set()
    for out in outputs:
        if not out.name.endswith(NEXT):
            continue
        name = out.name.removesuffix(NEXT)
        if name not in by_name:
            raise ProgramError(f"output {out.name!r} has no state input {name!r}")
        spec = by_name[name]
        same_shape = len(spec.shape) == len(out.shape) and all(
            a == b or not (isinstance(a, int) and isinstance(b, int))
            for a, b in zip(spec.shape, out.shape, strict=True)
        )
        if spec.dtype != out.dtype or not same_shape:
            raise ProgramError(f"state {name!r} is {spec.describe()} but {out.name!r} is {out.describe()}")
        state_names.add(name)
    return (
        tuple(spec for spec in inputs if spec.name not in state_names),
        tuple(spec for spec in outputs if not spec.name.endswith(NEXT)),
        tuple(spec for spec in inputs if spec.name in state_names),
    )


def allocate_state(specs: Sequence[TensorSpec], dims: Mapping[str, int] | None = None) -> dict[str, Array]:
    """Zeroed arrays for the state tensors; pages that are never written are never committed.

    Args:
        specs: the state's specs.
        dims: sizes of the dynamic dimensions by name, for example ``{"rows": 4097}``.

    Raises:
        FeedError: a dynamic dimension has no size in `dims`.
    """
    sizes = dims or {}
    arrays: dict[str, Array] = {}
    for spec in specs:
        shape = []
        for dim in spec.shape:
            if isinstance(dim, int):
                shape.append(dim)
            elif dim is not None and dim in sizes:
                shape.append(sizes[dim])
            else:
                raise FeedError(
                    f"state {spec.name!r} is {spec.describe()}: no size given for {dim or 'a dimension'}"
                )
        # np.zeros, not np.empty: calloc hands out untouched zero pages, so unused slots cost no memory.
        arrays[spec.name] = np.zeros(shape, spec.dtype)
    return arrays


def check_state(specs: Sequence[TensorSpec], arrays: Mapping[str, Array]) -> dict[str, Array]:
    """Check arrays that are about to be bound as state; the result is in the specs' order.

    Raises:
        FeedError: names differ, an array does not fit its spec, is not C-contiguous, writeable and aligned,
            or shares memory with another one.
    """
    unknown = sorted(set(arrays) - {spec.name for spec in specs})
    if unknown:
        raise FeedError(f"unknown state {', '.join(map(repr, unknown))}")
    bound: dict[str, Array] = {}
    for spec in specs:
        if spec.name not in arrays:
            raise FeedError(f"state {spec.name!r} ({spec.describe()}) is missing")
        array = arrays[spec.name]
        if not spec.accepts(array):
            raise FeedError(f"state {spec.name!r} must be {spec.describe()}, not {_actual(array)}")
        if not (array.flags.c_contiguous and array.flags.writeable and array.flags.aligned):
            raise FeedError(f"state {spec.name!r} must be C-contiguous, writeable and aligned")
        for name, other in bound.items():
            if np.may_share_memory(array, other):
                raise FeedError(f"state {spec.name!r} shares memory with state {name!r}")
        bound[spec.name] = array
    return bound


class FeedChecker:
    """Checks the feeds of every run against the specs; written for speed, it is on the hot path."""

    __slots__ = ("_plan", "_specs")

    def __init__(self, specs: Sequence[TensorSpec]) -> None:
        self._specs = tuple(specs)
        self._plan = tuple(
            (
                spec.name,
                spec.dtype,
                len(spec.shape),
                tuple((axis, dim) for axis, dim in enumerate(spec.shape) if isinstance(dim, int)),
            )
            for spec in specs
        )

    def check(self, feeds: Mapping[str, Array]) -> list[tuple[str, Array]]:
        """The feeds as (name, C-contiguous array) in the specs' order. Raises FeedError."""
        checked = []
        for name, dtype, rank, fixed in self._plan:
            array = feeds.get(name)
            # Any of these being wrong ends in _explain, which finds out which and says it.
            if type(array) is not np.ndarray or array.dtype != dtype:
                raise self._explain(feeds)
            shape = array.shape
            if len(shape) != rank:
                raise self._explain(feeds)
            for axis, dim in fixed:
                if shape[axis] != dim:
                    raise self._explain(feeds)
            checked.append((name, array if array.flags.c_contiguous else np.ascontiguousarray(array)))
        if len(feeds) != len(checked):
            raise self._explain(feeds)
        return checked

    def _explain(self, feeds: Mapping[str, Array]) -> FeedError:
        for spec in self._specs:
            if spec.name not in feeds:
                return FeedError(f"input {spec.name!r} ({spec.describe()}) is missing")
            value = feeds[spec.name]
            if type(value) is not np.ndarray:
                return FeedError(
                    f"input {spec.name!r} must be a numpy array {spec.describe()}, not {type(value).__name__}"
                )
            if not spec.accepts(value):
                return FeedError(f"input {spec.name!r} must be {spec.describe()}, not {_actual(value)}")
        unknown = sorted(set(feeds) - {spec.name for spec in self._specs})
        return FeedError(f"unknown input {', '.join(map(repr, unknown))}")


def _actual(array: Array) -> str:
    return f"{array.dtype.name}[{', '.join(map(str, array.shape))}]"
