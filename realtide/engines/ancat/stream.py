"""One streaming step of the encoder for many streams at once: the graph that serves ANCAT (ours).

Every layer is a queue of nodes in frame order. A frame that arrives at a layer at once gets its keys,
values and lookahead depth; it leaves as soon as the frames it attends to exist, never earlier and never
later. So a call may resolve none or many nodes of a stream in any layer. All linear work runs on *packed*
rows (only real nodes, of all streams together); only attention is padded: it works on groups of up to 4
neighbouring nodes of a stream, which share their keys, in as many lanes as the call's largest group has. A
stream without news costs nothing, and a burst costs what its nodes would cost one step at a time.

A call resolves at most Q = `step_frames` nodes of a stream in a layer. Where a burst leaves more, `more` is
set for the stream and the caller calls again at once with no new frames; layers above know of the backlog
and do not mistake it for missing future.

State per layer, in row rings of W positions a slot, so that nothing ever moves; position p of a slot lies
at place ``p % W`` of each:

    long    key, value [head dim]  of inputs, a row for each head: ``(slot * heads + head) * W + p % W``
    short   residual [dim]         inputs that wait
            depth, available []    of those
            conv [dim]             gated inputs of the depthwise kernel

and ``counts`` [slots, layers], nodes resolved so far, ``newest`` [slots, layers], the availability of the
last of them. What follows from ``counts`` alone (where a layer's nodes, keys and taps lie) is worked out
for all layers at once, before the first. *Availability* of a node is the index of the newest encoder input
frame that had to exist for it; minus the node's own index it is the algorithmic latency (design/ancat.md,
with the past included in the maximum because a node needs its left context too). With a cap of K frames a
node i stops waiting once input frame i + K has been seen, so the latency of every output is at most K
whatever the schedulers ask for. The end of the stream comes after its last frame: inside it counts as one
more frame. Availabilities are float64, which is exact for any frame index and has a running maximum.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from realtide.engines.ancat.config import EncoderConfig, state_shapes
from realtide.engines.ancat.model import Block, Encoder
from realtide.engines.ancat.offline import hard_depth

ABSENT = float(1 << 50)  # availability of a frame that does not exist yet: later than any deadline
FOUND = float(1 << 49)  # anything below is the availability of something that exists
GROUP = 4  # most nodes that attend together


def write_rows(ring: Tensor, index: Tensor, rows: Tensor) -> Tensor:
    """Write rows [n, ...] at index [n].

    Exported as ScatterND, which runtimes do in place when input and output share memory.
    """
    if torch.compiler.is_exporting():
        out: Tensor = torch.ops.aten.index_put(ring, [index], rows)
        return out
    return ring.index_copy_(0, index, rows)


def group_size(config: EncoderConfig, step_frames: int) -> int:
    """Nodes of a stream that attend together: a divisor of the lanes. Without lookahead all leave at once."""
    if config.rule == "causal":
        return step_frames
    return next(size for size in range(min(GROUP, step_frames), 0, -1) if step_frames % size == 0)


@dataclass(slots=True)
class Nodes:
    """Packed nodes between layers."""

    x: Tensor  # [N, dim]; the rest [N] but where it says otherwise
    long: Tensor  # rows in the long rings [N * heads]
    short: Tensor  # row in the short rings
    stream: Tensor  # 0..B-1
    position: Tensor
    available: Tensor  # float64


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
    """What a layer's decisions need to know of all layers, each [layers, B, n]; Q + 1 nodes, R after each."""

    queue: Tensor  # rows in the short rings of each of the Q + 1 nodes, from done on, and the R after it
    head: Tensor  # rows of the Q + 1 nodes
    position: Tensor  # float64, of the queue
    limit: Tensor  # float64, when the cap ends the waiting of the Q + 1 nodes, the end of the stream included
    last: Tensor  # float64, availability of the newest resolved node
    lasts: Tensor  # the same, Q + 1 times


class StreamStep(nn.Module):
    """The encoder's step. `step_frames` bounds the new frames of one stream in one call."""

    def __init__(self, encoder: Encoder, step_frames: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.config = encoder.config
        self.step_frames = step_frames
        self.group = group_size(self.config, step_frames)
        self.long, self.short = self.config.long_ring(step_frames), self.config.short_ring(step_frames)
        self.names = tuple(state_shapes(self.config, step_frames))

    def forward(
        self,
        windows: Tensor,
        stream: Tensor,
        position: Tensor,
        slots: Tensor,
        arrived: Tensor,
        least: Tensor,
        cap: Tensor,
        final: Tensor,
        *state: Tensor,
    ) -> tuple[Tensor, ...]:
        """Advance B streams by N new frames in all.

        windows [N, 7, mel] float32, normalised; stream [N], each frame's stream 0..B-1, ascending;
        position [N], its frame index; slots [B]; arrived [B], frames of each stream including these;
        least [B] float32, `config.threshold` of the bias; cap [B], frames; final [B], 1 to resolve all
        that waits. Integers are int64. `state` as named by `state_shapes`. The causal rule needs none of
        least, cap and final and leaves them out of its graph.

        Returns encoded [M, J], its stream [M], position [M] and availability [M], `more` [B] int64, then
        the next state.
        """
        states = dict(zip(self.names, state, strict=True))
        counts = states["counts"].index_select(0, slots)  # [B, layers]
        newest = states["newest"].index_select(0, slots)
        long, short = slots * (self.long * self.config.heads), slots * self.short
        rows = long.index_select(0, stream) + position % self.long
        heads = torch.arange(self.config.heads, device=slots.device) * self.long
        nodes = Nodes(
            self.encoder.subsample(windows),
            (rows.unsqueeze(1) + heads).flatten(),
            short.index_select(0, stream) + position % self.short,
            stream,
            position,
            position.to(torch.float64),
        )
        if self.config.rule == "causal":
            return self._causal(nodes, counts, newest, arrived, slots, states)
        return self._adaptive(nodes, counts, newest, arrived, least, cap, final, slots, states)

    def _causal(
        self,
        nodes: Nodes,
        counts: Tensor,
        newest: Tensor,
        arrived: Tensor,
        slots: Tensor,
        states: dict[str, Tensor],
    ) -> tuple[Tensor, ...]:
        """Without lookahead nothing waits: all layers are at the same frame and share all indices."""
        run, lanes = LayerStep(self.config, self.step_frames), self.step_frames
        done = counts[:, 0]
        where = self._where(done.view(1, -1, 1), slots)
        offset = nodes.position - done.index_select(0, nodes.stream)
        taps = where.taps.index_select(0, nodes.stream * lanes + offset)
        new = torch.arange(lanes, device=slots.device) < (arrived - done).unsqueeze(1)
        lane = new.amax(0).nonzero().squeeze(1)
        place = nodes.stream * new.to(torch.int64).sum(1).amax(0) + offset
        padded = run.padded(new.to(torch.int64).unsqueeze(0)).index_select(2, lane)
        seen = where.reach <= lane.unsqueeze(1)
        keys = run.of_heads(where.keys)
        for layer, module in enumerate(self.encoder.blocks):
            block: Block = module  # type: ignore[assignment]
            residual, key, value, _ = block.arrive(nodes.x)
            run.remember(states, layer, nodes.long, key, value)
            q = block.queries(residual)
            mixed = run.attend(block, layer, states, q, padded, place, lane, keys, seen)
            nodes.x = run.convolve(
                block, layer, states, residual + block.attention_out(mixed), nodes.short, taps
            )
        # As a maximum with what was read, so that no runtime may update the state before it is read.
        resolved = torch.maximum(counts, arrived.unsqueeze(1))
        latest = torch.maximum(newest, (arrived - 1).to(torch.float64).unsqueeze(1))
        more = torch.zeros_like(arrived)
        # Every output is a tensor of its own: an input may not be handed back as an output.
        stream, position, available = nodes.stream + 0, nodes.position + 0, nodes.position + 0
        return self._out(nodes.x, stream, position, available, more, resolved, latest, slots, states)

    def _adaptive(
        self,
        nodes: Nodes,
        counts: Tensor,
        newest: Tensor,
        arrived: Tensor,
        least: Tensor,
        cap: Tensor,
        final: Tensor,
        slots: Tensor,
        states: dict[str, Tensor],
    ) -> tuple[Tensor, ...]:
        """Layer by layer: take what arrives, decide what leaves, compute it."""
        run, lanes, layers = LayerStep(self.config, self.step_frames), self.step_frames, self.config.layers
        device, streams = slots.device, slots.shape[0]
        done = counts.t().unsqueeze(2)  # [layers, B, 1]
        where = self._where(done, slots)
        waiting = self._waiting(done, newest, arrived, cap, slots)
        keys, reach, queue, head, position, limit, last, lasts = (
            torch.split(table, 1)
            for table in (
                where.keys,
                where.reach,
                waiting.queue,
                waiting.head,
                waiting.position,
                waiting.limit,
                waiting.last,
                waiting.lasts,
            )
        )
        first = torch.split(torch.arange(layers, device=device) * (streams * lanes), 1)  # lane of each layer
        begin = torch.split(done.to(torch.float64), 1)
        column = torch.arange(lanes, device=device).unsqueeze(0)
        lane_stream, lane_offset, lane_least = (
            table.expand(streams, lanes).flatten()
            for table in (torch.arange(streams, device=device).unsqueeze(1), column, least.unsqueeze(1))
        )
        lane_least = lane_least.unsqueeze(1)
        limits = least.index_select(0, nodes.stream).unsqueeze(1)
        inputs = arrived.to(torch.float64).view(1, -1, 1)  # of the layer so far
        # No frame that is yet to come is available before this; at the end none comes.
        coming = torch.where(final.view(1, -1, 1) == 0, inputs, ABSENT)
        resolved, latest, beyond = [], [], []
        for layer, module in enumerate(self.encoder.blocks):
            block: Block = module  # type: ignore[assignment]
            residual, key, value, scores = block.arrive(nodes.x)
            run.remember(states, layer, nodes.long, key, value)
            run.wait(states, layer, nodes, residual, run.depth(scores, nodes, limits))
            ready, end, over = run.readiness(
                states,
                layer,
                queue[layer],
                head[layer],
                position[layer],
                limit[layer],
                lasts[layer],
                inputs,
                coming,
            )
            leaves = ready < FOUND  # [1, B, Q]
            count = leaves.to(torch.int64)
            resolving = count.sum(2, keepdim=True)
            flat = count.flatten().nonzero().squeeze(1)
            here = flat + first[layer]
            short = where.short.index_select(0, here)
            # Attention is for groups that resolve something, in as many lanes as the largest of them needs.
            grouped = count.view(1, -1, self.group)
            live = grouped.select(2, 0).flatten().nonzero().squeeze(1)  # nodes leave in order
            lane = grouped.amax((0, 1)).nonzero().squeeze(1)  # 0 .. most nodes of a group - 1
            used = grouped.index_select(1, live).index_select(2, lane)
            place = used.flatten().nonzero().squeeze(1)
            padded = run.padded(used)
            until = end.reshape(1, -1, self.group).index_select(1, live).index_select(2, lane)
            until = until.unsqueeze(2).unsqueeze(4)
            seen = reach[layer].index_select(1, live) < until
            waited = states[f"residual_{layer}"].index_select(0, short)
            q = block.queries(waited)
            mixed = run.attend(
                block,
                layer,
                states,
                q,
                padded,
                place,
                lane,
                run.of_heads(keys[layer].index_select(1, live)),
                seen,
            )
            x = waited + block.attention_out(mixed)
            x = run.convolve(block, layer, states, x, short, where.taps.index_select(0, here))
            stream = lane_stream.index_select(0, flat)
            at = counts[:, layer].index_select(0, stream) + lane_offset.index_select(0, flat)
            available = ready.flatten().index_select(0, flat)
            nodes = Nodes(x, where.long.index_select(0, here).flatten(), short, stream, at, available)
            limits = lane_least.index_select(0, flat)
            inputs = begin[layer] + resolving
            resolved.append(inputs)
            latest.append(torch.where(leaves, ready, last[layer]).amax(2, keepdim=True))
            beyond.append(over)
            # What did not fit into this call comes later, but is available no later than now.
            coming = torch.maximum(torch.minimum(coming, over), latest[-1])
        more = (torch.cat(beyond).amin(0) < FOUND).squeeze(1).to(torch.int64)
        resolved_all = torch.cat(resolved).squeeze(2).t().to(torch.int64)
        latest_all = torch.cat(latest).squeeze(2).t()
        seen_last = (arrived - 1).to(torch.float64).index_select(0, nodes.stream)
        available = torch.minimum(nodes.available, seen_last).to(torch.int64)
        return self._out(
            nodes.x, nodes.stream, nodes.position, available, more, resolved_all, latest_all, slots, states
        )

    def _out(
        self,
        x: Tensor,
        stream: Tensor,
        position: Tensor,
        available: Tensor,
        more: Tensor,
        counts: Tensor,
        newest: Tensor,
        slots: Tensor,
        states: dict[str, Tensor],
    ) -> tuple[Tensor, ...]:
        states["counts"] = write_rows(states["counts"], slots, counts)
        states["newest"] = write_rows(states["newest"], slots, newest)
        encoded = self.encoder.leave(x)
        return (encoded, stream, position, available, more, *(states[name] for name in self.names))

    def _where(self, done: Tensor, slots: Tensor) -> Where:
        """done [layers, B, 1], nodes that each layer has resolved."""
        config, lanes, device = self.config, self.step_frames, done.device
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

    def _waiting(self, done: Tensor, newest: Tensor, arrived: Tensor, cap: Tensor, slots: Tensor) -> Waiting:
        """done [layers, B, 1]; newest [B, layers], arrived [B], cap [B]."""
        columns = self.step_frames + 1
        rows = self._short(done, slots, 0, self.config.waiting(self.step_frames))
        position = done + torch.arange(self.config.waiting(self.step_frames), device=done.device)
        order = torch.arange(columns, device=done.device).unsqueeze(1)
        window = (order + torch.arange(self.config.right + 1, device=done.device)).flatten()
        # What only the end resolves comes one frame later than the last: whoever's deadline that frame was
        # has given up, whether or not the end was known by then.
        limit = torch.minimum(position[:, :, :columns] + cap.unsqueeze(1), arrived.unsqueeze(1))
        last = newest.t().unsqueeze(2)
        return Waiting(
            rows.index_select(2, window),
            rows[:, :, :columns],
            position.index_select(2, window).to(torch.float64),
            limit.to(torch.float64),
            last,
            last.expand(-1, -1, columns),
        )

    def _short(self, done: Tensor, slots: Tensor, begin: int, end: int) -> Tensor:
        """Rows [layers, B, end - begin] of the short rings of nodes done + begin and on."""
        position = done + torch.arange(begin, end, device=done.device)
        return (slots * self.short).unsqueeze(1) + position % self.short


class LayerStep:
    """One layer's part of a call; takes its rings out of `states` and puts the updated ones back."""

    def __init__(self, config: EncoderConfig, step_frames: int) -> None:
        self.config = config
        self.lanes = step_frames
        self.group = group_size(config, step_frames)

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
        ring = self.config.long_ring(self.lanes)
        head = torch.arange(self.config.heads, device=keys.device) * ring
        return keys.unsqueeze(2) + head.unsqueeze(1)

    def wait(
        self, states: dict[str, Tensor], layer: int, nodes: Nodes, residual: Tensor, depth: Tensor
    ) -> None:
        """Inputs enter the queue."""
        for name, values in (("residual", residual), ("depth", depth), ("available", nodes.available)):
            self.write(states, name, layer, nodes.short, values)

    def depth(self, scores: Tensor | None, nodes: Nodes, least: Tensor) -> Tensor:
        """Frames ahead that each input [N] asks for; least [N, 1] as `StreamStep.forward` has it."""
        if scores is not None:
            return hard_depth(scores, least, is_span=self.config.span)
        if self.config.rule == "chunked":
            return self.config.right - nodes.position % (self.config.right + 1)
        return torch.full_like(nodes.stream, self.config.right)

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
        available = torch.where(position < inputs, states[f"available_{layer}"][queue], ABSENT)
        depth = states[f"depth_{layer}"][head]
        # When the cap is lowered a node may already be later than it: what it has waited for, it uses.
        deadline = torch.maximum(limit, available[:, :, ::span])
        # Availability never falls from one node to the next, so a node has all that it asks for, or knows
        # that it cannot, by the newest of it alone. What exists is never later than what is yet to come.
        asked = available.gather(2, depth + order * span)
        own = torch.minimum(asked, torch.where(coming <= deadline, ABSENT, deadline))
        running = F.max_pool1d(torch.cat([last, own], 2), lanes + 2, 1)
        usable = available.view(1, -1, lanes + 1, span) <= deadline.unsqueeze(3)
        end = torch.minimum(usable.to(torch.int64).sum(3), depth + 1) + order % self.group
        return running[:, :, :lanes], end[:, :, :lanes], running[:, :, lanes:]

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
        heads, left, right, dim = self.config.heads, self.config.left, self.config.right, self.config.dim
        device = lane.device
        q = queries[padded].transpose(2, 3)
        k = F.embedding(keys, states[f"key_{layer}"])
        v = F.embedding(keys, states[f"value_{layer}"])
        # Depends on weights alone; the table's ends stand for what no query may see.
        reach = torch.arange(self.group + left + right, device=device)
        offset = reach - torch.arange(self.group, device=device).unsqueeze(1)
        table = F.pad(block.relative, (1, 1), value=-1e9)
        bias = table.index_select(1, (offset + 1).clamp(0, left + right + 2).flatten())
        bias = bias.view(heads, self.group, self.group + left + right).index_select(1, lane)
        score = torch.matmul(q, k.transpose(-1, -2)) + bias
        probs = torch.where(seen, score, -1e9).softmax(-1)
        mixed = torch.matmul(probs, v).transpose(2, 3).reshape(-1, dim)
        return mixed.index_select(0, place)

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
