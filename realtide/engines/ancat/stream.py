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

`stream_positions` says where things lie, `stream_layer` is one layer's part, `stream_static` the same step
for runtimes that need to know every shape in advance.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from realtide.engines.ancat.config import state_shapes
from realtide.engines.ancat.model import Block, Encoder
from realtide.engines.ancat.stream_layer import ABSENT, FOUND, LayerStep, Nodes, write_rows
from realtide.engines.ancat.stream_positions import Positions


class StreamStep(nn.Module):
    """The encoder's step. `step_frames` bounds the new frames of one stream in one call."""

    def __init__(self, encoder: Encoder, step_frames: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.config = encoder.config
        self.step_frames = step_frames
        self.positions = Positions(self.config, step_frames, step_frames, torch.float64)
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
        places = self.positions
        long, short = slots * (places.long * self.config.heads), slots * places.short
        rows = long.index_select(0, stream) + position % places.long
        heads = torch.arange(self.config.heads, device=slots.device) * places.long
        nodes = Nodes(
            self.encoder.subsample(windows),
            (rows.unsqueeze(1) + heads).flatten(),
            short.index_select(0, stream) + position % places.short,
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
        run, lanes = LayerStep(self.positions), self.step_frames
        done = counts[:, 0]
        where = self.positions.where(done.view(1, -1, 1), slots)
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
        run, lanes, layers = LayerStep(self.positions), self.step_frames, self.config.layers
        device, streams = slots.device, slots.shape[0]
        done = counts.t().unsqueeze(2)  # [layers, B, 1]
        where = self.positions.where(done, slots)
        waiting = self.positions.waiting(done, newest, arrived, cap, slots)
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
            depth = run.depth(scores, nodes.position, limits)
            run.wait(states, layer, nodes.short, residual, depth, nodes.available)
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
            grouped = count.view(1, -1, run.group)
            live = grouped.select(2, 0).flatten().nonzero().squeeze(1)  # nodes leave in order
            lane = grouped.amax((0, 1)).nonzero().squeeze(1)  # 0 .. most nodes of a group - 1
            used = grouped.index_select(1, live).index_select(2, lane)
            place = used.flatten().nonzero().squeeze(1)
            padded = run.padded(used)
            until = end.reshape(1, -1, run.group).index_select(1, live).index_select(2, lane)
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
