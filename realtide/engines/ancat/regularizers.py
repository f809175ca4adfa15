"""Latency penalties on soft lookahead arcs: relaxed versions of the definitions in `latency`.

Three penalties, each equal to its exact counterpart when all arcs are 0 or 1, and differentiable between:

* `naive_penalty`: mean arc weight (paper: the simple regularizer);
* `algorithmic_penalty`: mean algorithmic latency in frames;
* `compute_penalty`: mean user-perceived latency in seconds, backlog on one processor included.

The relaxation is ours: an arc weight is read as a probability, ``reach[i, r]`` = P(depth at frame i >= r),
and a time that depends on the depth is replaced by its expectation over that one node's depth,

    E[x(depth)] = x(0) + sum over r of reach[r] * (x(r) - x(r - 1)),

given relaxed times of everything below. Every arc has a gradient this way, not only the one that binds, and
an arc's price does not fade as it saturates. For span arcs (a[r] = prod p[s]) reach is the arc itself; for
independent arcs reach[r] = 1 - prod over s >= r of (1 - a[s]).

Frames past an utterance's end do not exist: an arc to them waits for the last frame at most, and arcs of
padding frames are ignored whatever they hold.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from realtide.engines.ancat.latency import Ints, depths_from_arcs, schedule, to_nanoseconds

__all__ = [
    "Penalty",
    "algorithmic_penalty",
    "compute_penalty",
    "naive_penalty",
    "relaxed_availability",
    "relaxed_finish",
]

# Later than any real time in nanoseconds, and small enough for float64 to count single ones: 46 days.
_NEVER = 4.0e15


class Penalty(NamedTuple):
    """A penalty per utterance [B] and its mean over utterances, in the unit of the function that made it."""

    each: Tensor
    mean: Tensor


def naive_penalty(arcs: Tensor, lengths: Tensor) -> Penalty:
    """Mean weight of the arcs that lead to frames of the utterance; 0 if there is none (one frame).

    Args:
        arcs: [B, L, T, R] weights in [0, 1] of layer l's arc from frame i to i + 1 + r.
        lengths: [B] valid frames, 1..T.

    Returns:
        Dimensionless, in [0, 1].

    Raises:
        ValueError: shapes or lengths out of range.
    """
    clean = _clean(arcs, lengths)
    layers, steps, right = arcs.shape[1:]
    at = torch.arange(steps, device=arcs.device)[:, None]
    target = at + torch.arange(1, right + 1, device=arcs.device)
    exists = (target < lengths[:, None, None])[:, None]  # [B, 1, T, R]
    count = exists.sum((1, 2, 3)) * layers
    each = torch.where(exists, clean, 0.0).sum((1, 2, 3)) / count.clamp(min=1)
    return _penalty(each, arcs)


def algorithmic_penalty(arcs: Tensor, lengths: Tensor, *, independent: bool = False) -> Penalty:
    """Relaxed mean over frames of D[L, i] (`latency.algorithmic_latency`), in frames.

    Args:
        arcs: as in `naive_penalty`; spans (non-increasing along R) unless `independent`.
        lengths: [B] valid frames, 1..T.
        independent: arcs count one by one instead of as spans.

    Raises:
        ValueError: as `naive_penalty`.
    """
    newest = relaxed_availability(arcs, lengths, independent=independent)
    at = torch.arange(arcs.shape[2], device=arcs.device)
    return _penalty(_frame_mean(newest - at, lengths), arcs)


def relaxed_availability(arcs: Tensor, lengths: Tensor, *, independent: bool = False) -> Tensor:
    """Relaxed A[L, i] (`latency.availability`) as [B, T] float64 frame indices; A = i on padding.

    A[l, i] = max(A[l, i - 1], E[A[l - 1, i + depth]]). Arguments and errors as `algorithmic_penalty`.
    """
    reach = _reach(_clean(arcs, lengths).double(), independent)
    batch, layers, steps, right = reach.shape
    frame = _frames(steps, right, lengths)
    newest = torch.arange(steps, device=arcs.device, dtype=torch.float64).expand(batch, steps)
    for layer in range(layers):
        newest = _expect(_at(newest, frame), reach[:, layer]).cummax(1).values
    return newest


def compute_penalty(
    arcs: Tensor,
    lengths: Tensor,
    *,
    cost_seconds: float,
    frame_seconds: float,
    independent: bool = False,
) -> Penalty:
    """Relaxed mean over frames of user-perceived latency of live audio (`latency.simulate`), in seconds.

    Args:
        arcs: as in `algorithmic_penalty`.
        lengths: [B] valid frames, 1..T.
        cost_seconds: processor time of one node (one layer, one frame).
        frame_seconds: length of a frame.
        independent: arcs count one by one instead of as spans.

    Raises:
        ValueError: as `naive_penalty`, or a negative cost.
    """
    finish, arrival = relaxed_finish(
        arcs, lengths, cost_seconds=cost_seconds, frame_seconds=frame_seconds, independent=independent
    )
    return _penalty(_frame_mean(finish - arrival, lengths), arcs)


def relaxed_finish(
    arcs: Tensor,
    lengths: Tensor,
    *,
    cost_seconds: float,
    frame_seconds: float,
    independent: bool = False,
) -> tuple[Tensor, Tensor]:
    """Relaxed finish times of the top layer under first come, first served on one processor.

    A soft arc makes a node wait for a time that comes before some of what it waits for, so relaxed times
    alone cannot be simulated event by event. Instead the exact schedule at the hard arcs (weight >= 0.5)
    is the backdrop, and layers are relaxed in turn, each against the queue of all layers' nodes: relaxed
    ones up to this layer, hard ones above it. With X the relaxed finish below (X = arrival for the lowest
    layer), c the cost, and s the hard time from readiness to finish:

        turn[i]     = ready[i - 1] + s[i - 1]                      when the layer's previous frame is done
        ready[i]    = max(turn[i], E[X[i + depth]])                this node's place in the queue
        asked[i, r] = max(turn[i], X[i + r])                       the place it would have with depth r
        backlog(t)  = max over nodes m ready before t of ready[m] + c * (number of nodes ready from m until t)
        start[i, r] = max(asked[i, r], backlog(asked[i, r]))
        finish[i]   = max(finish[i - 1], E[start[i, depth]]) + c

    At 0/1 arcs, induction over layers makes each of these the exact value. (A depth that asks for a place
    behind the node's own meets the node itself there and pays c more; no hard arc does.) Between, the result
    is continuous but for places in the queue that swap and arcs that cross 0.5, and the gradient is that of
    the formulas. It never says that waiting longer pays. Times are nanoseconds in float64, whole where arcs
    are hard, so ties in the queue are true ties.

    Arguments and errors as `compute_penalty`.

    Returns:
        finish and arrival, [B, T] float64 seconds; both the arrival on padding.
    """
    clean = _clean(arcs, lengths)
    reach = _reach(clean.double(), independent)
    batch, layers, steps, right = reach.shape
    device = arcs.device
    cost = int(to_nanoseconds(cost_seconds))
    clock = to_nanoseconds((np.arange(steps) + 1) * frame_seconds)
    hard_ready, sojourn = _hard(clean, lengths, clock, cost)

    frame = _frames(steps, right, lengths)
    valid = torch.arange(steps, device=device) < lengths[:, None]
    arrival = torch.from_numpy(clock.astype(np.float64)).to(device).expand(batch, steps)
    slope = torch.arange(steps, device=device, dtype=torch.float64) * cost
    queue = list(hard_ready.unbind(1))
    finish = arrival
    for layer in range(layers):
        below = _at(finish, frame)  # [B, T, R + 1]
        wanted = _expect(below, reach[:, layer])
        # turn[i] depends on ready[i - 1]: unrolled, with the hard times summed over frames taken out.
        after = sojourn[:, layer].cumsum(1)
        turn = (wanted - (after - sojourn[:, layer])).cummax(1).values + after
        turn = torch.cat((arrival[:, :1], turn[:, :-1]), 1)  # the first frame follows none
        ready = _later(wanted, turn)
        asked = _later(below, turn[..., None])
        queue[layer] = torch.where(valid, ready, _NEVER)
        start = _later(asked, _backlog(queue, asked, layer, cost))
        own = _expect(start, reach[:, layer]) + cost
        finish = torch.where(valid, (own - slope).cummax(1).values + slope, arrival)
    return finish * 1e-9, arrival * 1e-9


def _backlog(queue: list[Tensor], asked: Tensor, layer: int, cost: int) -> Tensor:
    """When the processor is through with all nodes ahead of each question.

    Args:
        queue: L readiness times [B, T] of all nodes.
        asked: [B, T, Q] times; question (i, q) stands in the queue just ahead of node (layer, i) if that has
            the same time.
        layer: index into `queue`.
        cost: nanoseconds of a node.

    Returns:
        [B, T, Q] nanoseconds; far in the past where nothing is ahead.
    """
    batch, steps, questions = asked.shape
    # Laid out by frame, then layer, so that a stable sort by time breaks ties as `schedule` does. Soft times
    # that mean the same moment may differ in the last bit: the order goes by whole nanoseconds.
    nodes = torch.stack(queue, 2)
    lower, upper = nodes[..., :layer], nodes[..., layer:]
    times = torch.cat((lower, asked, upper), 2).flatten(1)
    is_node = torch.ones(steps, len(queue) + questions, dtype=torch.bool, device=asked.device)
    is_node[:, layer : layer + questions] = False
    order = times.detach().round().argsort(dim=1, stable=True)
    rank = torch.arange(order.shape[1], device=order.device).expand_as(order)
    place = torch.empty_like(order).scatter_(1, order, rank).view(batch, steps, -1)
    node = is_node.flatten()[order]
    work = node.cumsum(1) * cost  # through each entry, itself included
    # Lindley: through(k) = max over nodes m <= k of ready[m] + c * (nodes m..k); m begins the busy spell.
    head = torch.where(node, times.gather(1, order) - work + cost, -_NEVER)
    through = head.cummax(1).values + work
    question = place[..., layer : layer + questions].flatten(1)
    return through.gather(1, question).view_as(asked)


@torch.no_grad()
def _hard(clean: Tensor, lengths: Tensor, clock: Ints, cost: int) -> tuple[Tensor, Tensor]:
    """Exact schedules at the hard arcs: readiness (never on padding) and time until finish, [B, L, T]."""
    depths = depths_from_arcs(clean.detach().float().cpu().numpy())
    ready = np.full(depths.shape, _NEVER)
    sojourn = np.zeros(depths.shape)
    for b, n in enumerate(lengths.tolist()):
        since, finish = schedule(depths[b, :, :n], clock[:n], cost)
        ready[b, :, :n], sojourn[b, :, :n] = since, finish - since
    return torch.from_numpy(ready).to(clean.device), torch.from_numpy(sojourn).to(clean.device)


def _clean(arcs: Tensor, lengths: Tensor) -> Tensor:
    """Checks the arguments; arcs with padding frames set to 0 (so that even NaN there does no harm)."""
    if arcs.dim() != 4 or not arcs.is_floating_point():
        raise ValueError(f"arcs must be floats [B, L, T, R], not {arcs.dtype} {tuple(arcs.shape)}")
    steps = arcs.shape[2]
    if lengths.shape != arcs.shape[:1] or bool(((lengths < 1) | (lengths > steps)).any()):
        raise ValueError(f"lengths must be {arcs.shape[0]} values in 1..{steps}")
    valid = torch.arange(steps, device=arcs.device) < lengths[:, None]
    return arcs.masked_fill(~valid[:, None, :, None], 0.0)


def _reach(arcs: Tensor, independent: bool) -> Tensor:
    """P(depth >= r), [B, L, T, R]."""
    return 1.0 - (1.0 - arcs).flip(-1).cumprod(-1).flip(-1) if independent else arcs


def _frames(steps: int, right: int, lengths: Tensor) -> Tensor:
    """Frame i + r for r = 0..R, at most the utterance's last (padding: itself), [B, T, R + 1]."""
    at = torch.arange(steps, device=lengths.device)[:, None]
    last = torch.maximum(lengths[:, None, None] - 1, at)
    return torch.minimum(at + torch.arange(right + 1, device=lengths.device), last)


def _at(values: Tensor, frame: Tensor) -> Tensor:
    """Looks up values [B, T] at frame [B, T, R + 1]."""
    return values.gather(1, frame.flatten(1)).view(frame.shape)


def _expect(values: Tensor, reach: Tensor) -> Tensor:
    """Expectation over the depth of values [..., R + 1] given reach [..., R]."""
    return values[..., 0] + (reach * values.diff(dim=-1)).sum(-1)


def _later(path: Tensor, other: Tensor) -> Tensor:
    """Maximum whose gradient goes to `path` alone at a tie: ties abound, and `path` leads to arcs."""
    return torch.where(other > path, other, path)


def _frame_mean(values: Tensor, lengths: Tensor) -> Tensor:
    """Mean of values [B, T] over the valid frames, [B]."""
    valid = torch.arange(values.shape[1], device=values.device) < lengths[:, None]
    return torch.where(valid, values, 0.0).sum(1) / lengths


def _penalty(each: Tensor, arcs: Tensor) -> Penalty:
    """In the arcs' own type, or float32 if that is narrower."""
    wide = each.to(torch.promote_types(arcs.dtype, torch.float32))
    return Penalty(wide, wide.mean())
