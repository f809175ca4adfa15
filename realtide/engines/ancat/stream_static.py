"""The encoder's step with shapes that depend on no value: for CUDA graphs and TensorRT (ours).

`stream.StreamStep` works on those nodes alone that a call resolves, which only a processor that waits for
its own results can do. Here every stream has Q lanes in every layer and all of them are computed; counts say
which of them are real. Rings, names and contents are those of `stream`, with two exceptions. Availabilities
are int64, since TensorRT has no float64. And places beyond a layer's newest input hold anything: whoever
reads them looks at the counts first, and a later input overwrites them. Lanes that hold nothing overwrite
only what nobody reads any more: at most ``right`` inputs of a layer wait, and rings have room for
`step_frames` >= Q more.

Streams of a call need slots of their own. To fill a call up to a size, use a slot that is nobody's, any
number of times, with `fresh`, `arrived` and `final` zero: nothing is counted there.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from realtide.engines.ancat.config import static_shapes
from realtide.engines.ancat.model import Block, Encoder
from realtide.engines.ancat.stream import StreamStep
from realtide.engines.ancat.stream_layer import FOUND, LayerStep, write_rows
from realtide.engines.ancat.stream_positions import Positions

STATIC_OUTPUTS = ("encoded", "available", "count", "more")


class StaticStep(nn.Module):
    """The encoder's step.

    Args:
        encoder: the network.
        step_frames: what the rings are made for.
        lanes: Q, most new frames of a stream, and nodes of it in a layer, in one call; 1 .. `step_frames`.
    """

    def __init__(self, encoder: Encoder, step_frames: int, lanes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.config = encoder.config
        self.positions = Positions(self.config, step_frames, lanes, torch.int64)
        self.names = tuple(static_shapes(self.config, step_frames))

    def forward(
        self,
        windows: Tensor,
        fresh: Tensor,
        slots: Tensor,
        arrived: Tensor,
        least: Tensor,
        cap: Tensor,
        final: Tensor,
        *state: Tensor,
    ) -> tuple[Tensor, ...]:
        """Advance B streams.

        windows [B, Q, 7, mel] float32, normalised, the first fresh [B] of each stream; slots, arrived, least,
        cap, final [B] and calling again for `more` as in `StreamStep.forward`. `state` as named by
        `config.static_shapes`. The causal rule needs none of least, cap and final.

        Returns encoded [B, Q, J] and availability [B, Q], both zero in lanes that hold nothing; count [B],
        lanes that hold something; `more` [B]; then the next state.
        """
        states = dict(zip(self.names, state, strict=True))
        run, places, lanes = LayerStep(self.positions), self.positions, self.positions.lanes
        counts = states["counts"].index_select(0, slots)  # [B, layers]
        newest = states["newest"].index_select(0, slots)
        done = counts.t().unsqueeze(2)  # [layers, B, 1]
        where = places.where(done, slots)
        wait = places.waiting(done, newest, arrived, cap, slots)
        long_rows, short_rows, taps, least_of = (
            where.long.view(len(done), -1),
            where.short.view(len(done), -1),
            where.taps.view(len(done), -1, self.config.kernel),
            least.unsqueeze(1).expand(-1, lanes).reshape(-1, 1),
        )
        order = torch.arange(lanes, device=slots.device)
        position = (arrived - fresh).unsqueeze(1) + order  # [B, Q], of a layer's inputs
        long, short = places.rows(position, slots)
        available = position.flatten()
        x = self.encoder.subsample(windows).flatten(0, 1)  # [B * Q, dim]
        inputs = arrived.view(1, -1, 1)  # of the layer so far
        # No frame that is yet to come is available before this; at the end none comes.
        coming = torch.where(final.view(1, -1, 1) == 0, inputs, run.absent)
        resolved, latest, beyond = [], [], []
        for layer, module in enumerate(self.encoder.blocks):
            block: Block = module  # type: ignore[assignment]
            residual, key, value, scores = block.arrive(x)
            run.remember(states, layer, long, key, value)
            this = slice(layer, layer + 1)
            last = wait.last[this]
            if self.config.rule == "causal":  # nothing waits: inputs leave in the lanes in which they came
                ready = torch.where(order < fresh.unsqueeze(1), position, run.absent).unsqueeze(0)
                end, over = (order + 1).expand_as(ready), torch.full_like(last, run.absent)
            else:
                depth = run.depth(scores, position.flatten(), least_of)
                run.wait(states, layer, short, residual, depth, available)
                ready, end, over = run.readiness(
                    states,
                    layer,
                    wait.queue[this],
                    wait.head[this],
                    wait.position[this],
                    wait.limit[this],
                    wait.lasts[this],
                    inputs,
                    coming,
                )
                residual = F.embedding(short_rows[layer], states[f"residual_{layer}"])
            leaves = ready < FOUND  # [1, B, Q]
            long, short = long_rows[layer], short_rows[layer]
            until = end.reshape(1, -1, run.group).unsqueeze(2).unsqueeze(4)
            queries = (
                block.queries(residual)
                .view(1, -1, run.group, self.config.heads, self.config.head_dim)
                .transpose(2, 3)
            )
            mixed = run.mix(
                block, layer, states, queries, run.of_heads(where.keys[this]), where.reach[layer] < until
            )
            x = residual + block.attention_out(mixed.transpose(2, 3).reshape(-1, self.config.dim))
            x = run.convolve(block, layer, states, x, short, taps[layer])
            position, available = done[layer] + order, ready.flatten()
            inputs = done[this] + leaves.to(torch.int64).sum(2, keepdim=True)
            resolved.append(inputs)
            latest.append(torch.where(leaves, ready, last).amax(2, keepdim=True))
            beyond.append(over)
            # What did not fit into this call comes later, but is available no later than now.
            coming = torch.maximum(torch.minimum(coming, over), latest[-1])
        more = (torch.cat(beyond).amin(0) < FOUND).squeeze(1).to(torch.int64)
        done_all, latest_all = (torch.cat(parts).squeeze(2).t() for parts in (resolved, latest))
        count = done_all[:, -1] - counts[:, -1]
        held = order < count.unsqueeze(1)
        seen_last = torch.minimum(available.view_as(held), (arrived - 1).unsqueeze(1))
        states["counts"] = write_rows(states["counts"], slots, done_all)
        states["newest"] = write_rows(states["newest"], slots, latest_all)
        encoded = torch.where(
            held.unsqueeze(2), self.encoder.leave(x).view(-1, lanes, self.config.joiner_dim), 0.0
        )
        return (
            encoded,
            torch.where(held, seen_last, 0),
            count,
            more,
            *(states[name] for name in self.names),
        )


class WithoutDial(nn.Module):
    """The step of a causal encoder, whose graph has no dial: inputs are those before `least`."""

    def __init__(self, step: StreamStep | StaticStep, inputs: int) -> None:
        super().__init__()
        self.encoder = step.encoder
        self._step, self._inputs = (step,), inputs  # not a submodule: its weights are listed once

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Inputs, then state; see the step's own forward."""
        given, state = tensors[: self._inputs], tensors[self._inputs :]
        none = torch.zeros_like(given[-1])
        return self._step[0].forward(*given, none.float(), none, none, *state)
