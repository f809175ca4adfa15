"""One streaming step of the encoder for many streams at once: the graph that serves ANCAT (ours).

Every layer is a queue of nodes in frame order. A frame that arrives at a layer at once gets its keys,
values and lookahead depth; it leaves as soon as the frames it attends to exist, never earlier and never
later. So a call may resolve none or many nodes of a stream in any layer. All linear work runs on *packed*
rows (only real nodes, of all streams together); only attention is padded, to as many lanes a stream as the
call's busiest stream resolves. A stream without news costs nothing.

A call resolves at most Q = `step_frames` nodes of a stream in a layer. Where a burst leaves more, `more` is
set for the stream and the caller calls again at once with no new frames; layers above know of the backlog
and do not mistake it for missing future.

State per layer, in row rings of W rows a slot, addressed ``slot * W + position % W``, so that nothing
ever moves and an index serves all rings of one length, of a layer and of the next:

    long    key, value [dim]       of inputs
    short   residual [dim]         inputs that wait
            depth, available []    of those
            conv [dim]             gated inputs of the depthwise kernel

and ``counts`` [slots, layers], nodes resolved so far, ``newest`` [slots, layers], the availability of the
last of them. *Availability* of a node is the index of the newest encoder input frame that had to exist
for it; minus the node's own index it is the algorithmic latency (design/ancat.md, with the past included
in the maximum because a node needs its left context too). With a cap of K frames a node i stops waiting
once input frame i + K has been seen, so the latency of every output is at most K whatever the schedulers
ask for. The end of the stream comes after its last frame: inside it counts as one more frame.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from realtide.engines.ancat.config import EncoderConfig, state_shapes
from realtide.engines.ancat.model import Block, Encoder
from realtide.engines.ancat.offline import hard_depth

ABSENT = 1 << 50  # availability of a frame that does not exist yet: later than any deadline


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

    x: Tensor  # [N, dim]; the rest [N]
    long: Tensor  # row in the long rings
    short: Tensor  # row in the short rings
    stream: Tensor  # 0..B-1
    position: Tensor
    available: Tensor


@dataclass(slots=True)
class Streams:
    """What a layer needs to know of the B streams, each [B, 1]."""

    long: Tensor  # first row in the long rings
    short: Tensor  # first row in the short rings
    seen: Tensor  # newest input frame
    least: Tensor  # least keep score of an open arc
    cap: Tensor
    open: Tensor  # bool, more frames may come
    arrived: Tensor  # inputs of the next layer so far
    more: Tensor  # bool, an earlier layer has nodes that are ready but did not fit into this call
    lanes: Tensor  # [B * Q], the stream of every lane


class StreamStep(nn.Module):
    """The encoder's step. `step_frames` bounds the new frames of one stream in one call."""

    def __init__(self, encoder: Encoder, step_frames: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.config = encoder.config
        self.step_frames = step_frames
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
        counts = torch.split(states["counts"].index_select(0, slots), 1, 1)
        newest = torch.split(states["newest"].index_select(0, slots), 1, 1)
        inputs, long, short = arrived.unsqueeze(1), slots * self.long, slots * self.short
        nodes = Nodes(
            self.encoder.subsample(windows),
            long.index_select(0, stream) + position % self.long,
            short.index_select(0, stream) + position % self.short,
            stream,
            position,
            position,
        )
        lanes = (
            torch.arange(slots.shape[0], device=slots.device)
            .unsqueeze(1)
            .expand(-1, self.step_frames)
            .flatten()
        )
        none = (inputs < 0) & (inputs > 0)
        streams = Streams(
            long.unsqueeze(1),
            short.unsqueeze(1),
            inputs - 1,
            least.unsqueeze(1),
            cap.unsqueeze(1),
            final.unsqueeze(1) == 0,
            inputs,
            none,
            lanes,
        )
        resolved, latest = [], []
        run = LayerStep(self.config, self.step_frames)
        step = run.causal if self.config.rule == "causal" else run.adaptive
        for layer, module in enumerate(self.encoder.blocks):
            block: Block = module  # type: ignore[assignment]
            nodes, last = step(block, layer, states, nodes, streams, counts[layer], newest[layer])
            resolved.append(streams.arrived)
            latest.append(last)
        states["counts"] = write_rows(states["counts"], slots, torch.cat(resolved, 1))
        states["newest"] = write_rows(states["newest"], slots, torch.cat(latest, 1))
        more = streams.more.squeeze(1).to(torch.int64)
        encoded = self.encoder.leave(nodes.x)
        # Every output is a tensor of its own: an input may not be handed back as an output.
        available = torch.minimum(nodes.available, streams.seen.flatten().index_select(0, nodes.stream))
        stream, position = nodes.stream + 0, nodes.position + 0
        return (encoded, stream, position, available, more, *(states[name] for name in self.names))


class LayerStep:
    """One layer's part of a call; takes its rings out of `states` and puts the updated ones back."""

    def __init__(self, config: EncoderConfig, step_frames: int) -> None:
        self.config = config
        self.lanes = step_frames
        self.long, self.short = config.long_ring(step_frames), config.short_ring(step_frames)

    def adaptive(
        self,
        block: Block,
        layer: int,
        states: dict[str, Tensor],
        nodes: Nodes,
        streams: Streams,
        done: Tensor,
        last: Tensor,
    ) -> tuple[Nodes, Tensor]:
        """Take N inputs in, give M resolved nodes out.

        Also returns the availability [B, 1] of each stream's newest resolved node. done [B, 1], nodes that
        this layer has resolved; last [B, 1], availability of the last of them.
        """
        residual, key, value, scores = block.arrive(nodes.x)
        depth = self.depth(scores, nodes, streams.least)
        self.write(states, "key", layer, nodes.long, key)
        self.write(states, "value", layer, nodes.long, value)
        for name, values in (("residual", residual), ("depth", depth), ("available", nodes.available)):
            self.write(states, name, layer, nodes.short, values)

        recent = self.recent(streams, done)
        node = done + torch.arange(self.lanes + 1, device=done.device)
        count, attended, available = self.readiness(states, layer, recent, node, streams, done, last)
        fit = count.clamp(max=self.lanes)
        ready = torch.arange(self.lanes, device=done.device) < fit
        flat = ready.flatten().nonzero().squeeze(1)  # lane numbers of resolved nodes, stream * Q + lane
        stream, position = streams.lanes.index_select(0, flat), pick(node[:, : self.lanes], flat)
        kernel = self.config.kernel
        short = pick(recent[:, kernel - 1 : kernel - 1 + self.lanes], flat)
        long = streams.long.flatten().index_select(0, stream) + position % self.long
        waited = states[f"residual_{layer}"].index_select(0, short)
        lane = ready.to(torch.int64).amax(0).nonzero().squeeze(1)  # 0 .. most nodes of a stream - 1
        offset = position - done.flatten().index_select(0, stream)
        mixed = self.attend(
            block, layer, states, block.queries(waited), stream, offset, lane, streams, done, attended
        )
        x = self.convolve(block, layer, states, waited + block.attention_out(mixed), flat, short, recent)
        available = available[:, : self.lanes]
        latest = torch.where(ready, available, last).amax(1, keepdim=True)
        streams.arrived = done + fit
        streams.more = streams.more | (count > self.lanes)
        return Nodes(x, long, short, stream, position, pick(available, flat)), latest

    def causal(
        self,
        block: Block,
        layer: int,
        states: dict[str, Tensor],
        nodes: Nodes,
        streams: Streams,
        done: Tensor,
        last: Tensor,
    ) -> tuple[Nodes, Tensor]:
        """The same layer without lookahead: nothing waits, so nothing is scheduled, queued or packed anew."""
        residual, key, value, _ = block.arrive(nodes.x)
        self.write(states, "key", layer, nodes.long, key)
        self.write(states, "value", layer, nodes.long, value)
        recent = self.recent(streams, done)
        offset = nodes.position - done.flatten().index_select(0, nodes.stream)
        flat = nodes.stream * self.lanes + offset
        new = torch.arange(self.lanes, device=done.device) < streams.arrived - done
        lane = new.to(torch.int64).amax(0).nonzero().squeeze(1)
        queries = block.queries(residual)
        mixed = self.attend(block, layer, states, queries, nodes.stream, offset, lane, streams, done, None)
        nodes.x = self.convolve(
            block, layer, states, residual + block.attention_out(mixed), flat, nodes.short, recent
        )
        # As a maximum with what was read, so that no runtime may update the state before it is read.
        streams.arrived = torch.maximum(streams.arrived, done)
        return nodes, torch.maximum(streams.seen, last)

    def write(self, states: dict[str, Tensor], name: str, layer: int, index: Tensor, values: Tensor) -> None:
        """Write rows [n, ...] of a ring of this layer."""
        states[f"{name}_{layer}"] = write_rows(states[f"{name}_{layer}"], index, values)

    def recent(self, streams: Streams, done: Tensor) -> Tensor:
        """Short ring rows [B, kernel - 1 + waiting] of positions from done - kernel + 1 on, in order."""
        width = self.config.waiting(self.lanes)
        offset = torch.arange(1 - self.config.kernel, width, device=done.device)
        return streams.short + (done + offset) % self.short

    def depth(self, scores: Tensor | None, nodes: Nodes, least: Tensor) -> Tensor:
        """Frames ahead that each input [N] asks for."""
        if scores is not None:
            return hard_depth(scores, least.index_select(0, nodes.stream), is_span=self.config.span)
        if self.config.rule == "chunked":
            return self.config.right - nodes.position % (self.config.right + 1)
        return torch.full_like(nodes.position, self.config.right)

    def readiness(
        self,
        states: dict[str, Tensor],
        layer: int,
        recent: Tensor,
        node: Tensor,
        streams: Streams,
        done: Tensor,
        last: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Which nodes can be resolved, and what they attend to.

        Returns how many can be, 0 .. Q + 1 [B, 1]; the number of frames that each attends to from itself on
        [B, Q + 1]; their availability [B, Q + 1]. Column o is node done + o. Nodes leave in order; column Q
        only tells whether one more node than fits is ready.
        """
        right, columns, device = self.config.right, self.lanes + 1, done.device
        order, reach = torch.arange(columns, device=device), torch.arange(right + 1, device=device)
        inputs = streams.arrived - done
        rows = recent[:, self.config.kernel - 1 :]
        there = torch.arange(rows.shape[1], device=device) < inputs
        available = torch.where(there, lookup(states[f"available_{layer}"], rows), ABSENT)
        depth = lookup(states[f"depth_{layer}"], rows[:, :columns])
        # When the cap is lowered a node may already be later than it: what it has waited for, it uses.
        own = torch.where(there, available, -1)[:, :columns]
        deadline = torch.maximum(node + streams.cap, own)
        steps = (order.unsqueeze(1) + reach).flatten()
        future = available.index_select(1, steps).view(-1, columns, right + 1)
        usable = (future <= deadline.unsqueeze(2)) & (reach <= depth.unsqueeze(2))
        attended = usable.to(torch.int64).sum(2)  # 0 for a node that is not there
        short = attended <= depth
        may_come = (streams.open & (streams.seen < deadline)) | streams.more | (attended == 0)
        blocked = (short & may_come & (order + attended >= inputs)).to(torch.int64)
        count = torch.cat([blocked, torch.ones_like(inputs)], 1).argmax(1, keepdim=True)
        # What only the end resolves comes one frame later than the last: whoever's deadline that frame was
        # has given up, whether or not the end was known by then.
        when = torch.where(usable, future, -1).amax(2)
        when = torch.where(short, torch.maximum(when, torch.minimum(deadline, streams.seen + 1)), when)
        running = torch.where(order <= order.unsqueeze(1), when.unsqueeze(1), -1).amax(2)
        return count, attended, torch.maximum(running, last)

    def attend(
        self,
        block: Block,
        layer: int,
        states: dict[str, Tensor],
        queries: Tensor,
        stream: Tensor,
        offset: Tensor,
        lane: Tensor,
        streams: Streams,
        done: Tensor,
        attended: Tensor | None,
    ) -> Tensor:
        """Attention of packed queries [M, dim], node done + `offset` [M] of `stream` [M], -> [M, dim].

        `lane` [L] counts up to the most nodes of a stream, which is known only at run time; `attended` [B,
        Q+1],
        frames that each lane attends to from itself on; None: itself only.
        """
        heads, left, right, dim = self.config.heads, self.config.left, self.config.right, self.config.dim
        batch, lanes, device = done.shape[0], lane.shape[0], done.device
        padded = queries.new_zeros(batch * lanes, dim)
        place = stream * lanes + offset
        q = torch.ops.aten.index_put(padded, [place], queries).view(batch, lanes, heads, dim // heads)
        q = q.transpose(1, 2)
        # Keys from done - left to the last lane's last: what is common to all lanes, then one for each.
        reach = torch.cat([torch.arange(-left, right, device=device), lane + right])
        key_at = done + reach
        rows = streams.long + key_at % self.long
        k, v = (
            F.embedding(rows, states[f"{name}_{layer}"])
            .view(batch, left + right + lanes, heads, dim // heads)
            .transpose(1, 2)
            for name in ("key", "value")
        )
        rel = reach - lane.unsqueeze(1)  # [L, K]
        table = F.pad(block.relative, (1, 1), value=-1e9)  # its ends stand for what no query may see
        bias = table.index_select(1, (rel + left + 1).clamp(0, left + right + 2).flatten())
        if attended is None:
            seen = (key_at >= 0).unsqueeze(1) & (rel <= 0)
        else:
            seen = (key_at >= 0).unsqueeze(1) & (rel < attended.index_select(1, lane).unsqueeze(2))
        score = torch.matmul(q, k.transpose(-1, -2)) + bias.view(heads, lanes, left + right + lanes)
        probs = torch.where(seen.unsqueeze(1), score, -1e9).softmax(-1)
        mixed = torch.matmul(probs, v).transpose(1, 2).reshape(batch * lanes, dim)
        return mixed.index_select(0, place)

    def convolve(
        self,
        block: Block,
        layer: int,
        states: dict[str, Tensor],
        x: Tensor,
        flat: Tensor,
        index: Tensor,
        recent: Tensor,
    ) -> Tensor:
        """Causal convolution over the ring, then the block's end; x [M, dim] -> [M, dim].

        A fresh slot's ring is zero, which is what stands before the first frame.
        """
        kernel, device = self.config.kernel, x.device
        self.write(states, "conv", layer, index, block.conv.enter(x))
        lane = torch.arange(self.lanes, device=device).unsqueeze(1)
        columns = (lane + torch.arange(kernel, device=device)).flatten()
        taps = recent.index_select(1, columns).view(-1, kernel)  # [B * Q, kernel]
        past = F.embedding(taps.index_select(0, flat), states[f"conv_{layer}"])
        return block.finish(x, block.conv.leave(past))


def pick(table: Tensor, flat: Tensor) -> Tensor:
    """Entries of table [B, Q] at lane numbers `flat` [M]."""
    return table.flatten().index_select(0, flat)


def lookup(ring: Tensor, rows: Tensor) -> Tensor:
    """Entries of a one-dimensional ring at rows [B, n]."""
    return ring.index_select(0, rows.flatten()).view(rows.shape)
