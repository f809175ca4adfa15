"""The streaming encoder written down literally: node by node, frame by frame, with no batch and no ring.

What `stream.StreamStep` must equal, whatever the chunks: a node (layer l, frame i) is resolved at the first
input frame at which all that it attends to exists, or at its deadline i + cap, or at the end.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from realtide.engines.ancat.config import NO_CAP, EncoderConfig, threshold
from realtide.engines.ancat.model import Block, Encoder, Transducer
from realtide.engines.ancat.offline import hard_depth


def small_config(**changes: Any) -> EncoderConfig:
    """Dim 32, 3 layers; left context shorter than the clips, so that rings wrap around."""
    values: dict[str, Any] = {
        "dim": 32,
        "layers": 3,
        "heads": 2,
        "ff_dim": 48,
        "left": 6,
        "right": 4,
        "kernel": 5,
        "vocab": 20,
        "joiner_dim": 16,
        "subsample_channels": 16,
    }
    return EncoderConfig(**(values | changes))


def wild(config: EncoderConfig, seed: int = 0) -> Transducer:
    """A model whose weights are random also where training starts from zero: depths and positions matter."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Transducer(config).eval()
        for module in model.encoder.blocks:
            block: Block = module  # type: ignore[assignment]
            torch.nn.init.normal_(block.relative)
            for branch in (block.ff1.down, block.ff2.down, block.attention_out, block.conv.out):
                torch.nn.init.normal_(branch.weight, std=0.4)
            if block.scheduler is not None:
                torch.nn.init.normal_(block.scheduler.out.weight, std=2.0)
    return model


@dataclass
class Dial:
    """What is in force for one input frame."""

    bias: float = 0.0
    cap: int = NO_CAP


@dataclass
class Layer:
    """Nodes of one layer in frame order; lists grow as nodes arrive or leave."""

    residual: list[Tensor] = field(default_factory=list)
    key: list[Tensor] = field(default_factory=list)
    value: list[Tensor] = field(default_factory=list)
    conv: list[Tensor] = field(default_factory=list)
    wanted: list[int] = field(default_factory=list)
    used: list[int] = field(default_factory=list)
    # Availability of inputs and of resolved nodes. What only the end resolves counts as one frame later than
    # the last frame: the end comes after it.
    below: list[int] = field(default_factory=list)
    available: list[int] = field(default_factory=list)


class Oracle:
    """One stream."""

    def __init__(self, encoder: Encoder) -> None:
        self.encoder, self.config = encoder, encoder.config
        self.layers = [Layer() for _ in range(self.config.layers)]
        self.rows: list[Tensor] = []
        self.available: list[int] = []  # of rows
        self.seen = -1

    @torch.no_grad()
    def feed(self, windows: Tensor, dial: Callable[[int], Dial] | Dial, *, final: bool) -> Oracle:
        """Take windows [T, 7, mel] one by one; `dial` may depend on the frame."""
        for k, window in enumerate(windows):
            self.seen += 1
            now = dial if isinstance(dial, Dial) else dial(self.seen)
            self.advance(self.encoder.subsample(window), now, closing=False)
            if final and k == len(windows) - 1:
                self.advance(None, now, closing=True)
        return self

    def advance(self, frame: Tensor | None, dial: Dial, *, closing: bool) -> None:
        fresh = [] if frame is None else [(frame, self.seen)]
        for index, layer in enumerate(self.layers):
            block: Block = self.encoder.blocks[index]  # type: ignore[assignment]
            for x, available in fresh:
                residual, key, value, scores = block.arrive(x)
                layer.residual.append(residual)
                layer.key.append(key)
                layer.value.append(value)
                layer.below.append(available)
                layer.wanted.append(self.depth(scores, len(layer.below) - 1, dial.bias))
            fresh = []
            while len(layer.used) < len(layer.below):
                found = self.resolve(layer, len(layer.used), dial.cap, closing=closing)
                if found is None:
                    break
                layer.used.append(found[0])
                layer.available.append(max(found[1], *layer.available[-1:], -1))
                fresh.append((self.compute(block, layer, len(layer.used) - 1), layer.available[-1]))
        self.rows += [self.encoder.leave(x) for x, _ in fresh]
        self.available += [min(available, self.seen) for _, available in fresh]

    def depth(self, scores: Tensor | None, i: int, bias: float) -> int:
        right = self.config.right
        if scores is not None:
            return int(hard_depth(scores, threshold(bias), is_span=self.config.span))
        if self.config.rule == "chunked":
            return right - i % (right + 1)
        return right

    def resolve(self, layer: Layer, i: int, cap: int, *, closing: bool) -> tuple[int, int] | None:
        """Depth and availability of node i, or None if it has to wait."""
        deadline = max(i + cap, layer.below[i])
        for r in range(1, layer.wanted[i] + 1):
            if i + r < len(layer.below):
                if layer.below[i + r] > deadline:
                    return r - 1, max(layer.below[i + r - 1], deadline)
            elif closing or self.seen >= deadline:
                return r - 1, max(layer.below[i + r - 1], min(deadline, self.seen + closing))
            else:
                return None
        return layer.wanted[i], layer.below[i + layer.wanted[i]]

    def compute(self, block: Block, layer: Layer, i: int) -> Tensor:
        config = self.config
        around = list(range(max(0, i - config.left), i + layer.used[i] + 1))
        query = block.queries(layer.residual[i]).unsqueeze(1)
        key = torch.stack([layer.key[j] for j in around]).transpose(0, 1)
        value = torch.stack([layer.value[j] for j in around]).transpose(0, 1)
        bias = block.relative[:, [j - i + config.left for j in around]]
        weight = ((query * key).sum(-1) + bias).softmax(-1)
        mixed = (weight.unsqueeze(-1) * value).sum(1).flatten()
        x = layer.residual[i] + block.attention_out(mixed)
        layer.conv.append(block.conv.enter(x))
        past = [layer.conv[j] if j >= 0 else torch.zeros_like(x) for j in range(i - config.kernel + 1, i + 1)]
        return block.finish(x, block.conv.leave(torch.stack(past)))

    @property
    def output(self) -> Tensor:
        """Rows [M, J] so far."""
        return torch.stack(self.rows) if self.rows else torch.zeros(0, self.config.joiner_dim)

    @property
    def wanted(self) -> list[list[int]]:
        """Depths [L][T] that the layers asked for."""
        return [layer.wanted for layer in self.layers]

    @property
    def used(self) -> list[list[int]]:
        """Depths [L][T] that they got."""
        return [layer.used for layer in self.layers]
