"""How far a graph in another precision is from the float32 one, output by output (ours; on ONNX Runtime)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from realtide.engines.runtime.ort import OrtProgram, read_graph_file
from realtide.engines.runtime.program import Array, ProgramError


@dataclass(frozen=True, slots=True)
class Sample:
    """What a program is run on.

    Attributes:
        calls: feeds of consecutive calls on one state, in float32.
        state: what the state is before the first, in float32; of programs that have one.
    """

    calls: Sequence[Mapping[str, Array]]
    state: Mapping[str, Array]


@dataclass(frozen=True, slots=True)
class Quality:
    """One output, or one state tensor after the calls, against float32.

    Attributes:
        output: its name; a state tensor's with ``.next``.
        relative: L2 norm of the difference over the L2 norm of what float32 gives, over all calls.
        largest: largest absolute difference.
        peak: largest magnitude that float32 gives.
    """

    output: str
    relative: float
    largest: float
    peak: float


def measure(
    reference: Path, candidate: Path, weights: Mapping[str, Array], *samples: Sample
) -> list[Quality]:
    """Run both graphs on the same inputs; of each output, the sample on which it is furthest off.

    Of integers it is the share that differs. What has another shape, or is not finite where float32 is, gets
    infinity.

    Raises:
        ProgramError: a graph cannot be loaded or run here, or the two have other outputs.
    """
    worst: dict[str, Quality] = {}
    runs = (_run(graph, weights, samples) for graph in (reference, candidate))
    for want, have in zip(*runs, strict=True):
        if set(want) != set(have):
            odd = sorted(set(want) ^ set(have))[0]
            raise ProgramError(f"{candidate}: {odd!r} is an output of one of the two graphs only")
        for name in want:
            found = _compare(name, want[name], have[name])
            if name not in worst or found.relative > worst[name].relative:
                worst[name] = found
    return list(worst.values())


def _run(
    graph: Path, weights: Mapping[str, Array], samples: Sequence[Sample]
) -> Iterator[dict[str, list[Array]]]:
    """All outputs of all calls of each sample, and the state after them."""
    loaded: OrtProgram | None = None
    for sample in samples:
        state = {name: np.zeros(array.shape, array.dtype) for name, array in sample.state.items()}
        bound = _bound(graph, sample, state)
        loaded = program = loaded.over(bound) if loaded else OrtProgram(graph, weights, bound)
        types = {spec.name: spec.dtype for spec in program.inputs}
        found: dict[str, list[Array]] = {spec.name: [] for spec in program.outputs}
        for call in sample.calls:
            feeds = {name: np.asarray(array, types.get(name)) for name, array in call.items()}
            for name, array in program.run(feeds).items():
                found[name].append(array)
        yield found | {f"{name}.next": [array] for name, array in state.items()}


def _bound(graph: Path, sample: Sample, state: dict[str, Array]) -> dict[str, Array]:
    """State arrays in the graph's types, with the sample's values."""
    for spec in read_graph_file(graph).state:
        if spec.name in sample.state:
            state[spec.name] = np.array(sample.state[spec.name], spec.dtype, order="C")
    return state


def _compare(name: str, want: Sequence[Array], have: Sequence[Array]) -> Quality:
    peak = max((float(np.abs(array.astype(np.float64)).max(initial=0.0)) for array in want), default=0.0)
    same_shape = all(a.shape == b.shape for a, b in zip(want, have, strict=True))
    if not same_shape:
        return Quality(name, np.inf, np.inf, peak)
    if all(array.dtype.kind != "f" for array in want):
        differing = sum(int(np.count_nonzero(a != b)) for a, b in zip(want, have, strict=True))
        far = max(
            float(np.abs(b.astype(np.float64) - a).max(initial=0.0)) for a, b in zip(want, have, strict=True)
        )
        return Quality(name, differing / max(sum(a.size for a in want), 1), far, peak)
    gap = [b.astype(np.float64) - a.astype(np.float64) for a, b in zip(want, have, strict=True)]
    if any(not np.isfinite(g[np.isfinite(a)]).all() for g, a in zip(gap, want, strict=True)):
        return Quality(name, np.inf, np.inf, peak)
    finite = [np.where(np.isfinite(a), g, 0.0) for g, a in zip(gap, want, strict=True)]
    norm = np.sqrt(sum(float(np.square(a[np.isfinite(a)].astype(np.float64)).sum()) for a in want))
    off = np.sqrt(sum(float(np.square(g).sum()) for g in finite))
    largest = max((float(np.abs(g).max(initial=0.0)) for g in finite), default=0.0)
    relative = float(off / norm) if norm else (0.0 if not off else np.inf)
    return Quality(name, relative, largest, peak)
