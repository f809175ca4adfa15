"""Where the nodes of a call lie in the rings: follows from counts alone, for all layers at once (ours).

See `stream` for the rings. A call has as many *lanes* for each stream and layer as it can resolve nodes; lane
o is the node that is o after those already resolved.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from realtide.engines.ancat.config import GROUP, EncoderConfig


def group_size(config: EncoderConfig, lanes: int) -> int:
    """Nodes of a stream that attend together: a divisor of the lanes. Without lookahead all leave at once."""
    if config.rule == "causal":
        return lanes
    return next(size for size in range(min(GROUP, lanes), 0, -1) if lanes % size == 0)


@dataclass(slots=True)
class Where:
    """Rows of one layer's nodes, or of all layers' before `layer` takes them apart; lane o is node done + o.

    Q lanes a stream; the lanes of all streams, and of all layers, are numbered through.
    """

    long: Tensor  # [layers * B * Q, heads], of every lane in the long rings
    short: Tensor  # [layers * B * Q], in the short rings
    taps: Tensor  # [layers * B * Q, kernel], in the short rings, oldest first
    # Of each group of a stream's lanes: G groups, numbered through like lanes.
    keys: Tensor  # [layers, B * G, keys], of the first head in the long rings: from first node - left on
    reach: Tensor  # [layers, B * G, 1, 1, keys], key less first node; far ahead before the stream began


@dataclass(slots=True)
class Waiting:
    """What a layer's decisions need to know of all layers, each [layers, B, n]; Q + 1 nodes, R after each.

    The last four are counted in `Positions.clock`.
    """

    queue: Tensor  # rows in the short rings of each of the Q + 1 nodes, from done on, and the R after it
    head: Tensor  # rows of the Q + 1 nodes
    position: Tensor  # of the queue
    limit: Tensor  # when the cap ends the waiting of the Q + 1 nodes, the end of the stream included
    last: Tensor  # availability of the newest resolved node
    lasts: Tensor  # the same, Q + 1 times


class Positions:
    """Places of nodes.

    Args:
        config: the architecture.
        step_frames: what the rings were made for.
        lanes: Q, most nodes of a stream and layer in a call; at most `step_frames`.
        clock: type of availabilities: float64 or int64.
    """

    def __init__(self, config: EncoderConfig, step_frames: int, lanes: int, clock: torch.dtype) -> None:
        if not 1 <= lanes <= step_frames:
            raise ValueError(f"lanes must be in 1..{step_frames} (step_frames), got {lanes}")
        self.config, self.lanes, self.clock = config, lanes, clock
        self.group = group_size(config, lanes)
        self.long, self.short = config.long_ring(step_frames), config.short_ring(step_frames)

    def rows(self, position: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Rows of position [B, Q] in the long rings [B * Q * heads] and in the short ones [B * Q]."""
        heads = torch.arange(self.config.heads, device=slots.device) * self.long
        first = (slots * (self.long * self.config.heads)).unsqueeze(1)
        long = (first + position % self.long).unsqueeze(2) + heads
        return long.flatten(), ((slots * self.short).unsqueeze(1) + position % self.short).flatten()

    def where(self, done: Tensor, slots: Tensor) -> Where:
        """Rows in the rings; done [layers, B, 1], nodes that each layer has resolved; slots [B]."""
        config, lanes, device = self.config, self.lanes, done.device
        left, right, kernel, heads = config.left, config.right, config.kernel, config.heads
        key_at = done + torch.arange(-left, lanes + right, device=device)
        place = (slots * (self.long * heads)).unsqueeze(1) + key_at % self.long  # [layers, B, columns]
        head = torch.arange(heads, device=device) * self.long
        long = (place[:, :, left : left + lanes].unsqueeze(3) + head).flatten(0, 2)
        short = self._short(done, slots, 1 - kernel, lanes)
        column = torch.arange(lanes, device=device).unsqueeze(1) + torch.arange(kernel, device=device)
        taps = short.index_select(2, column.flatten()).view(-1, kernel)
        offset = torch.arange(-left, self.group + right, device=device)
        first = torch.arange(0, lanes, self.group, device=device)
        window, shape = (first.unsqueeze(1) + offset + left).flatten(), (len(done), -1, len(offset))
        keys = place.index_select(2, window).view(shape)
        reach = torch.where(key_at.index_select(2, window).view(shape) >= 0, offset, self.long)
        return Where(long, short[:, :, kernel - 1 :].flatten(), taps, keys, reach.unsqueeze(2).unsqueeze(2))

    def waiting(self, done: Tensor, newest: Tensor, arrived: Tensor, cap: Tensor, slots: Tensor) -> Waiting:
        """done [layers, B, 1]; newest [B, layers], arrived [B], cap [B]."""
        columns = self.lanes + 1
        rows = self._short(done, slots, 0, self.config.waiting(self.lanes))
        position = done + torch.arange(self.config.waiting(self.lanes), device=done.device)
        order = torch.arange(columns, device=done.device).unsqueeze(1)
        window = (order + torch.arange(self.config.right + 1, device=done.device)).flatten()
        # What only the end resolves comes one frame later than the last: whoever's deadline that frame was
        # has given up, whether or not the end was known by then.
        limit = torch.minimum(position[:, :, :columns] + cap.unsqueeze(1), arrived.unsqueeze(1))
        last = newest.t().unsqueeze(2)
        return Waiting(
            rows.index_select(2, window),
            rows[:, :, :columns],
            position.index_select(2, window).to(self.clock),
            limit.to(self.clock),
            last,
            last.expand(-1, -1, columns),
        )

    def _short(self, done: Tensor, slots: Tensor, begin: int, end: int) -> Tensor:
        """Rows [layers, B, end - begin] of the short rings of nodes done + begin and on."""
        position = done + torch.arange(begin, end, device=done.device)
        return (slots * self.short).unsqueeze(1) + position % self.short
