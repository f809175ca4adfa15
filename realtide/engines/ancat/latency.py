"""Latency of an encoder whose frames attend to a varying number of future frames: exact definitions.

Frames i = 0..T-1 after subsampling, layers l = 1..L, `depths[l, i]` = how many future frames layer l attends
to at frame i. Nothing here knows the network: depths in, latency out. The relaxed versions that training
uses are in `regularizers`, and equal these at 0/1 arcs.

A layer works through its frames in order (its causal convolution and caches advance frame by frame), so node
(l, i) needs (l, i - 1), and it needs (l - 1, i + depth), which by the same order stands for every nearer
frame. From that follow *algorithmic* latency (`availability`: which future audio an output needs) and
*user-perceived* latency (`simulate`: when one processor gets it done). Both notions are the paper's
(Strimel et al. 2023, "Lookahead When It Matters"); the formulas, the hard cap and the integer clock are ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from heapq import heappop, heappush

import numpy as np
from numpy.typing import ArrayLike, NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

__all__ = [
    "Report",
    "Simulation",
    "algorithmic_latency",
    "availability",
    "cap_depths",
    "clip_depths",
    "depths_from_arcs",
    "schedule",
    "simulate",
    "to_nanoseconds",
]


def depths_from_arcs(arcs: ArrayLike, threshold: float = 0.5) -> Ints:
    """Lookahead depth = largest r whose arc is on (design: hard arcs at inference).

    Args:
        arcs: [..., R] arc weights to frames i + 1 .. i + R.
        threshold: an arc is on from this weight.

    Returns:
        [...] depths 0..R, not yet clipped to the utterance.
    """
    on = np.asarray(arcs) >= threshold
    depths: Ints = np.where(on, np.arange(1, on.shape[-1] + 1), 0).max(-1, initial=0).astype(np.int64)
    return depths


def clip_depths(depths: ArrayLike, lengths: ArrayLike | None = None) -> Ints:
    """Depths cut to the frames that exist; 0 on padding.

    Args:
        depths: [..., L, T] non-negative integers.
        lengths: [...] valid frames of each utterance, 0..T; all T if None.

    Returns:
        [..., L, T].

    Raises:
        ValueError: fewer than two axes, not integers, negative depths, or lengths of another shape or range.
    """
    given = np.asarray(depths)
    if given.ndim < 2 or not np.issubdtype(given.dtype, np.integer):
        raise ValueError("depths must be integers [..., L, T]")
    if (given < 0).any():
        raise ValueError("depths must not be negative")
    steps = given.shape[-1]
    sizes = np.full(given.shape[:-2], steps) if lengths is None else np.asarray(lengths)
    if sizes.shape != given.shape[:-2] or (sizes < 0).any() or (sizes > steps).any():
        raise ValueError(f"lengths must be {given.shape[:-2]} values in 0..{steps}")
    left = sizes[..., None] - 1 - np.arange(steps)
    clipped: Ints = np.minimum(given, np.maximum(left, 0)[..., None, :]).astype(np.int64)
    return clipped


def availability(depths: ArrayLike, lengths: ArrayLike | None = None) -> Ints:
    """The newest input frame that each node needs, directly or through other nodes.

    A[0, i] = i;  A[l, i] = max(A[l, i - 1], A[l - 1, i + depth]).

    Args:
        depths: [..., L, T] non-negative integers.
        lengths: [...] valid frames; all T if None. Padding gets A = i.

    Returns:
        [..., L + 1, T] frame indices; row 0 is the input. Non-decreasing along frames.

    Raises:
        ValueError: as `clip_depths`.
    """
    return cap_depths(depths, None, lengths)[1]


def cap_depths(
    depths: ArrayLike, cap: ArrayLike | None, lengths: ArrayLike | None = None
) -> tuple[Ints, Ints]:
    """Cuts depths so that no output of any layer needs audio more than `cap` frames ahead.

    The effective depth e[l, i] is the largest e <= depth with A[l - 1, i + e] <= i + cap: a node stops
    waiting
    at its deadline, input frame i + cap, and goes on with what it has. A node that was cut so (e < depth)
    has waited until then: A[l, i] = max(A[l, i - 1], i + cap). It cannot give up earlier, whatever it knows
    of the frames below: if the stream ended before the deadline, everything below would be resolved at once
    with the future that exists, and if frame i + cap asked for nothing, it would be there. By induction
    A[l, i] <= i + cap for every node, and no future is needed to decide.

    The end comes after the last frame, T - 1, and nobody knows of it before. So within the recursion a node
    that only the end resolves is available at T (in time for a node whose deadline is later than T - 1, too
    late for all others), and the result says T - 1.

    Args:
        depths: [..., L, T] wanted depths, non-negative integers.
        cap: frames, scalar or [...]; None for no cap.
        lengths: [...] valid frames; all T if None.

    Returns:
        Effective depths [..., L, T] and availability [..., L + 1, T], as `availability` where none is cut.

    Raises:
        ValueError: as `clip_depths`, or a negative cap.
    """
    wanted = clip_depths(depths, lengths)
    steps = wanted.shape[-1]
    at = np.arange(steps)
    # The end is "frame" number `end`. Who asks for more than there is waits for it; padding never does.
    count = np.asarray(steps if lengths is None else lengths)
    end = np.broadcast_to(count[..., None], (*wanted.shape[:-2], steps))
    asked = np.where((at < end)[..., None, :], np.asarray(depths), 0)
    limit: Ints | None = None
    if cap is not None:
        frames = np.asarray(cap)
        if not np.issubdtype(frames.dtype, np.integer) or (frames < 0).any():
            raise ValueError("cap must be a non-negative number of frames")
        limit = np.broadcast_to(frames[..., None], (*wanted.shape[:-2], 1)) + at
    rows = [np.broadcast_to(at, (*wanted.shape[:-2], steps)).astype(np.int64)]
    effective = np.empty_like(wanted)
    for layer in range(wanted.shape[-2]):
        below, depth = rows[-1], wanted[..., layer, :]
        if limit is not None:
            # A[l - 1] does not decrease, so the frames in time are a prefix: count them.
            kept = np.zeros_like(depth)
            for r in range(1, int(depth.max(initial=0)) + 1):
                frame = np.broadcast_to(np.minimum(at + r, steps - 1), below.shape)
                kept += (r <= depth) & (np.take_along_axis(below, frame, -1) <= limit)
            depth = kept
        given_up = end if limit is None else np.minimum(limit, end)
        cut = np.where(depth < asked[..., layer, :], given_up, -1)
        effective[..., layer, :] = depth
        newest = np.take_along_axis(below, at + depth, -1)
        rows.append(np.maximum.accumulate(np.maximum(newest, cut), -1))
    return effective, np.minimum(np.stack(rows, -2), np.maximum(end - 1, at)[..., None, :])


def algorithmic_latency(depths: ArrayLike, lengths: ArrayLike | None = None) -> Ints:
    """D[L, i] = A[L, i] - i in frames, [..., T]; 0 on padding. Arguments and errors as `availability`."""
    top = availability(depths, lengths)[..., -1, :]
    latency: Ints = top - np.arange(top.shape[-1])
    return latency


@dataclass(frozen=True, slots=True)
class Report:
    """Latency of many frames. Milliseconds, the front end's own fixed lookahead *not* included.

    Percentiles interpolate linearly between order statistics.
    """

    frames: int
    mean_ms: float
    p50_ms: float
    p90_ms: float
    p99_ms: float
    frontend_ms: float = 0.0

    @classmethod
    def of(cls, milliseconds: ArrayLike, frontend_ms: float = 0.0) -> Report:
        """Summarises one value per frame (any shape, padding already removed).

        Raises:
            ValueError: no values.
        """
        values = np.asarray(milliseconds, np.float64).ravel()
        if values.size == 0:
            raise ValueError("no frames to report on")
        p50, p90, p99 = (float(p) for p in np.percentile(values, (50, 90, 99)))
        return cls(values.size, float(values.mean()), p50, p90, p99, frontend_ms)

    @classmethod
    def of_depths(
        cls,
        depths: ArrayLike,
        lengths: ArrayLike | None = None,
        *,
        frame_ms: float,
        frontend_ms: float = 0.0,
    ) -> Report:
        """Algorithmic latency of all valid frames of depths [..., L, T] (see `algorithmic_latency`).

        Raises:
            ValueError: as `clip_depths`, or no valid frame.
        """
        latency = algorithmic_latency(depths, lengths)
        if lengths is None:
            return cls.of(latency * frame_ms, frontend_ms)
        valid = np.arange(latency.shape[-1]) < np.asarray(lengths)[..., None]
        return cls.of(latency[valid] * frame_ms, frontend_ms)

    def with_frontend(self) -> Report:
        """The same with the front end's lookahead added to every figure: latency against the audio itself."""
        extra = self.frontend_ms
        return Report(
            self.frames, self.mean_ms + extra, self.p50_ms + extra, self.p90_ms + extra, self.p99_ms + extra
        )


@dataclass(frozen=True, slots=True)
class Simulation:
    """One utterance on one processor; seconds on the arrivals' clock.

    ready: [L, T] when each node's inputs were done. finish: [L, T]. upl: [T] user-perceived latency,
    finish of the top layer minus arrival.
    """

    ready: Floats
    finish: Floats
    upl: Floats


def to_nanoseconds(seconds: ArrayLike) -> Ints:
    """Seconds to whole nanoseconds, the clock of `schedule`."""
    return np.rint(np.asarray(seconds, np.float64) * 1e9).astype(np.int64)


def simulate(
    depths: ArrayLike, cost_seconds: float, frame_seconds: float, arrival: ArrayLike | None = None
) -> Simulation:
    """User-perceived latency: every node is a job of `cost_seconds` on one processor.

    Args:
        depths: [L, T] non-negative integers; clipped to the utterance.
        cost_seconds: processor time of one node.
        frame_seconds: length of a frame.
        arrival: [T] seconds at which each input frame is there, non-decreasing; (i + 1) * frame_seconds if
            None (live audio).

    Times are rounded to whole nanoseconds first, so that ties are ties and not rounding.

    Raises:
        ValueError: as `clip_depths` and `schedule`.
    """
    wanted = clip_depths(depths)
    steps = wanted.shape[-1]
    times = (np.arange(steps) + 1) * frame_seconds if arrival is None else np.asarray(arrival, np.float64)
    clock = to_nanoseconds(times)
    ready, finish = schedule(wanted, clock, int(to_nanoseconds(cost_seconds)))
    top = finish[-1] if len(finish) else clock
    seconds = (x.astype(np.float64) * 1e-9 for x in (ready, finish, top - clock))
    return Simulation(*seconds)


def schedule(depths: ArrayLike, arrival: Ints, cost: int) -> tuple[Ints, Ints]:
    """Event-exact schedule of all nodes of one utterance: first come, first served by readiness.

    Node (l, i) is ready when (l, i - 1) and (l - 1, i + depth) are done (layer 0 is done on arrival). The
    processor never idles while a node is ready and never interrupts one; equal readiness goes by frame,
    then by layer.

    Args:
        depths: [L, T] non-negative integers; clipped to the utterance.
        arrival: [T] non-decreasing nanoseconds.
        cost: nanoseconds of each node.

    Returns:
        ready [L, T] and finish [L, T] in nanoseconds.

    Raises:
        ValueError: as `clip_depths`, depths with a batch axis, decreasing arrivals, or a negative cost.
    """
    wanted = clip_depths(depths)
    if wanted.ndim != 2:
        raise ValueError("a schedule is for one utterance: depths [L, T]")
    layers, steps = wanted.shape
    if arrival.shape != (steps,) or (np.diff(arrival) < 0).any():
        raise ValueError(f"arrival must be {steps} non-decreasing times")
    if cost < 0:
        raise ValueError("the cost must not be negative")
    awaited: list[list[int]] = (wanted + np.arange(steps)).tolist()
    ready = [[0] * steps for _ in range(layers)]
    finish = [[0] * steps for _ in range(layers)]
    there: list[int] = arrival.tolist()
    # A layer goes frame by frame: its one candidate, frame done[l], is in the queue or awaits one below.
    done = [0] * layers
    queue: list[tuple[int, int, int]] = []
    if layers and steps:
        queue.append((there[awaited[0][0]], 0, 0))
    free = 0
    while queue:
        since, i, layer = heappop(queue)
        free = max(free, since) + cost
        ready[layer][i], finish[layer][i] = since, free
        done[layer] = i + 1
        if i + 1 < steps:
            needs = awaited[layer][i + 1]
            if layer == 0:
                heappush(queue, (max(free, there[needs]), i + 1, 0))
            elif needs < done[layer - 1]:
                heappush(queue, (free, i + 1, layer))
        above = layer + 1
        if above < layers:
            j = done[above]
            if awaited[above][j] == i:
                heappush(queue, (free, j, above))
    shape = (layers, steps)
    return np.asarray(ready, np.int64).reshape(shape), np.asarray(finish, np.int64).reshape(shape)
