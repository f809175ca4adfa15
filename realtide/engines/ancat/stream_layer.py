"""One layer's part of a streaming step: what it remembers, when its nodes leave, what they attend to (ours).

See `stream` for the rings, and for which node leaves when.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from realtide.engines.ancat.model import Block
from realtide.engines.ancat.offline import hard_depth
from realtide.engines.ancat.stream_positions import Positions

ABSENT = float(1 << 50)  # availability of a frame that does not exist yet: later than any deadline
FOUND = float(1 << 49)  # anything below is the availability of something that exists


def write_rows(ring: Tensor, index: Tensor, rows: Tensor) -> Tensor:
    """Write rows [n, ...] at index [n].

    Exported as ScatterND, which runtimes do in place when input and output share memory.
    """
    if torch.compiler.is_exporting():
        out: Tensor = torch.ops.aten.index_put(ring, [index], rows)
        return out
    return ring.index_copy_(0, index, rows)


@dataclass(slots=True)
class Nodes:
    """Packed nodes between layers."""

    x: Tensor  # [N, dim]; the rest [N] but where it says otherwise
    long: Tensor  # rows in the long rings [N * heads]
    short: Tensor  # row in the short rings
    stream: Tensor  # 0..B-1
    position: Tensor
    available: Tensor  # float64


class LayerStep:
    """One layer's part of a call; takes its rings out of `states` and puts the updated ones back."""

    def __init__(self, positions: Positions) -> None:
        self.config = positions.config
        self.lanes, self.group, self.ring = positions.lanes, positions.group, positions.long
        # A scalar of the other kind would make float32 of integers, which is not exact.
        self.absent = ABSENT if positions.clock.is_floating_point else int(ABSENT)

    def write(self, states: dict[str, Tensor], name: str, layer: int, index: Tensor, values: Tensor) -> None:
        """Write rows [n, ...] of a ring of this layer."""
        states[f"{name}_{layer}"] = write_rows(states[f"{name}_{layer}"], index, values)

    def remember(
        self, states: dict[str, Tensor], layer: int, long: Tensor, key: Tensor, value: Tensor
    ) -> None:
        """Keys and values [N, heads, head dim] of inputs into rows long [N * heads]."""
        self.write(states, "key", layer, long, key.flatten(0, 1))
        self.write(states, "value", layer, long, value.flatten(0, 1))

    def of_heads(self, keys: Tensor) -> Tensor:
        """Rows [1, S, K] of the first head's keys -> [1, S, heads, K] of all heads'."""
        head = torch.arange(self.config.heads, device=keys.device) * self.ring
        return keys.unsqueeze(2) + head.unsqueeze(1)

    def wait(
        self,
        states: dict[str, Tensor],
        layer: int,
        short: Tensor,
        residual: Tensor,
        depth: Tensor,
        available: Tensor,
    ) -> None:
        """Inputs [N, dim] enter the queue at rows short [N], with depth [N] and availability [N]."""
        for name, values in (("residual", residual), ("depth", depth), ("available", available)):
            self.write(states, name, layer, short, values)

    def depth(self, scores: Tensor | None, position: Tensor, least: Tensor) -> Tensor:
        """Frames ahead that inputs at position [N] ask for; least [N, 1] as `StreamStep.forward` has it."""
        if scores is not None:
            return hard_depth(scores, least, is_span=self.config.span)
        if self.config.rule == "chunked":
            return self.config.right - position % (self.config.right + 1)
        return torch.full_like(position, self.config.right)

    def readiness(
        self,
        states: dict[str, Tensor],
        layer: int,
        queue: Tensor,
        head: Tensor,
        position: Tensor,
        limit: Tensor,
        last: Tensor,
        inputs: Tensor,
        coming: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """When the nodes of the queue can be resolved, and what they attend to.

        Tables as in `Waiting`, of this layer [1, B, n]; inputs [1, B, 1], of this layer so far; coming
        [1, B, 1], the least availability of an input that is yet to come.

        Returns availability [1, B, Q], which is `ABSENT` where a node or one before it has to wait; the end
        [1, B, Q] of the frames that each attends to, exclusive and counted from its group's first node; the
        availability [1, B, 1] of one node more than fits into the call, `ABSENT` where it has to wait too.
        """
        lanes, span = self.lanes, self.config.right + 1
        order = torch.arange(lanes + 1, device=queue.device)
        # Of each node and of those that it may ask for, one after the other.
        available = torch.where(position < inputs, states[f"available_{layer}"][queue], self.absent)
        depth = states[f"depth_{layer}"][head]
        # When the cap is lowered a node may already be later than it: what it has waited for, it uses.
        deadline = torch.maximum(limit, available[:, :, ::span])
        # Availability never falls from one node to the next, so a node has all that it asks for, or knows
        # that it cannot, by the newest of it alone. What exists is never later than what is yet to come.
        asked = available.gather(2, depth + order * span)
        own = torch.minimum(asked, torch.where(coming <= deadline, self.absent, deadline))
        running = self._running(last, own)
        usable = available.view(1, -1, lanes + 1, span) <= deadline.unsqueeze(3)
        end = torch.minimum(usable.to(torch.int64).sum(3), depth + 1) + order % self.group
        return running[:, :, :lanes], end[:, :, :lanes], running[:, :, lanes:]

    def _running(self, last: Tensor, own: Tensor) -> Tensor:
        """Running maximum of last [1, B, Q + 1], all the same, and own [1, B, Q + 1]."""
        if own.is_floating_point():
            return F.max_pool1d(torch.cat([last, own], 2), self.lanes + 2, 1)
        order = torch.arange(self.lanes + 1, device=own.device)
        seen = order <= order.unsqueeze(1)
        return torch.where(seen, own.unsqueeze(2), last.unsqueeze(3)).amax(3)

    def padded(self, used: Tensor) -> Tensor:
        """Packed row [1, B, L] of each lane, or of some other one where used [1, B, L] is 0, not 1."""
        return (used.flatten().cumsum(0) - 1).view_as(used)

    def attend(
        self,
        block: Block,
        layer: int,
        states: dict[str, Tensor],
        queries: Tensor,
        padded: Tensor,
        place: Tensor,
        lane: Tensor,
        keys: Tensor,
        seen: Tensor,
    ) -> Tensor:
        """Attention of packed queries [M, heads, head dim] -> [M, dim].

        S groups have queries. lane [L] counts up to the most nodes of one, which is known only at run time;
        padded [1, S, L], the query of each lane; place [M], group * L + lane; keys [1, S, heads, K], rows of
        the rings; seen [1, S, 1, L, K].
        """
        q = queries[padded].transpose(2, 3)
        mixed = self.mix(block, layer, states, q, keys, seen, lane)
        return mixed.transpose(2, 3).reshape(-1, self.config.dim).index_select(0, place)

    def mix(
        self,
        block: Block,
        layer: int,
        states: dict[str, Tensor],
        q: Tensor,
        keys: Tensor,
        seen: Tensor,
        lane: Tensor | None = None,
    ) -> Tensor:
        """Attention of the queries q [1, S, heads, L, head dim] of groups; gives the same shape.

        The rest as in `attend`; without `lane` a group has all its lanes.
        """
        heads, left, right = self.config.heads, self.config.left, self.config.right
        device = q.device
        k = F.embedding(keys, states[f"key_{layer}"])
        v = F.embedding(keys, states[f"value_{layer}"])
        # Depends on weights alone; the table's ends stand for what no query may see.
        reach = torch.arange(self.group + left + right, device=device)
        offset = reach - torch.arange(self.group, device=device).unsqueeze(1)
        table = F.pad(block.relative, (1, 1), value=-1e9)
        bias = table.index_select(1, (offset + 1).clamp(0, left + right + 2).flatten())
        bias = bias.view(heads, self.group, self.group + left + right)
        if lane is not None:
            bias = bias.index_select(1, lane)
        score = torch.matmul(q, k.transpose(-1, -2)) + bias
        probs = torch.where(seen, score, -1e9).softmax(-1)
        return torch.matmul(probs, v)

    def convolve(
        self,
        block: Block,
        layer: int,
        states: dict[str, Tensor],
        x: Tensor,
        index: Tensor,
        taps: Tensor,
    ) -> Tensor:
        """Causal convolution over the ring, then the block's end; x [M, dim] -> [M, dim].

        index [M] and taps [M, kernel] are rows of the short rings. A fresh slot's ring is zero, which is
        what stands before the first frame.
        """
        self.write(states, "conv", layer, index, block.conv.enter(x))
        past = F.embedding(taps, states[f"conv_{layer}"])
        return block.finish(x, block.conv.leave(past))
