"""How far a graph in another precision is from the float32 one, output by output (ours; on ONNX Runtime)."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from realtide.engines.runtime.ort import OrtProgram, read_graph_file
from realtide.engines.runtime.program import Array, ProgramError, TensorSpec


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
    """As `worst` of `measure_each`."""
    return worst(measure_each(reference, candidate, weights, *samples))


def worst(measured: Sequence[Sequence[Quality]]) -> list[Quality]:
    """Of each output, the sample on which it is furthest off."""
    found: dict[str, Quality] = {}
    for quality in itertools.chain.from_iterable(measured):
        if quality.output not in found or quality.relative > found[quality.output].relative:
            found[quality.output] = quality
    return list(found.values())


def measure_each(
    reference: Path,
    candidate: Path,
    weights: Mapping[str, Array],
    *samples: Sample,
    state_of: Path | None = None,
) -> list[list[Quality]]:
    """Run both graphs on the same inputs; of each sample, all outputs.

    `state_of` is a graph in whose types the candidate's state is held, where those are not the candidate's
    own (a host form): what it starts with is rounded to them.

    Of integers it is the share that differs. What has another shape, or is not finite where float32 is, gets
    infinity.

    Raises:
        ProgramError: a graph cannot be loaded or run here, or the two have other outputs.
    """
    found: list[list[Quality]] = []
    runs = _run(reference, weights, samples), _run(candidate, weights, samples, state_of)
    for want, have in zip(*runs, strict=True):
        if set(want) != set(have):
            odd = sorted(set(want) ^ set(have))[0]
            raise ProgramError(f"{candidate}: {odd!r} is an output of one of the two graphs only")
        found.append([_compare(name, want[name], have[name]) for name in want])
    return found


def _run(
    graph: Path, weights: Mapping[str, Array], samples: Sequence[Sample], state_of: Path | None = None
) -> Iterator[dict[str, list[Array]]]:
    """All outputs of all calls of each sample, and the state after them."""
    loaded: OrtProgram | None = None
    held = read_graph_file(graph).state
    start = held if state_of is None else read_graph_file(state_of).state
    for sample in samples:
        state = {name: np.zeros(array.shape, array.dtype) for name, array in sample.state.items()}
        state |= _typed(_typed(sample.state, start), held)
        loaded = program = loaded.over(state) if loaded else OrtProgram(graph, weights, state)
        types = {spec.name: spec.dtype for spec in program.inputs}
        found: dict[str, list[Array]] = {spec.name: [] for spec in program.outputs}
        for call in sample.calls:
            feeds = {name: np.asarray(array, types.get(name)) for name, array in call.items()}
            for name, array in program.run(feeds).items():
                found[name].append(array)
        yield found | {f"{name}.next": [array] for name, array in state.items()}


def _typed(values: Mapping[str, Array], specs: Sequence[TensorSpec]) -> dict[str, Array]:
    """Copies of state in a graph's types."""
    return {
        spec.name: np.array(values[spec.name], spec.dtype, order="C") for spec in specs if spec.name in values
    }


def _compare(name: str, want: Sequence[Array], have: Sequence[Array]) -> Quality:
    peak = max((float(np.abs(array.astype(np.float64)).max(initial=0.0)) for array in want), default=0.0)
    same_shape = all(a.shape == b.shape for a, b in zip(want, have, strict=True))
    if not same_shape:
        return Quality(name, np.inf, np.inf, peak)
    if all(array.dtype.kind != "f" for array in want):
        differing = sum(int(np.count_nonzero(a != b)) for a, b in zip(want, have, strict=True))
        gaps = (np.abs(b.astype(np.float64) - a) for a, b in zip(want, have, strict=True))
        far = max((float(gap.max(initial=0.0)) for gap in gaps), default=0.0)
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
