"""The encoder over whole utterances: training with soft arcs; with hard arcs what streaming must equal.

Arcs follow design/ancat.md: frame i of a layer attends to `left` past frames, to itself, and to frame i+r
with weight a[i, r], as attention weights proportional to a * exp(score). The multiplicative form (instead
of adding log a) keeps the gradient of a closed arc finite, which is what lets a straight-through estimate
reopen it (ours).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from realtide.engines.ancat.config import EncoderConfig, threshold
from realtide.engines.ancat.model import Block, Encoder

Arcs = Callable[[int, "Tensor | None", int], Tensor]
"""(layer, keep scores [B, T, R] or None, frames T) -> arc weights [B or 1, T, right] in [0, 1]."""


@dataclass(slots=True)
class Encoded:
    """Result of `encode`: joiner-space rows [B, T, J] and the arcs of every layer [B or 1, L, T, right].

    `tapped` [B, T, dim] is the output of block `tap`, counted from 1 (0: the subsampling).
    """

    rows: Tensor
    arcs: Tensor
    tapped: Tensor


def windows_of(features: Tensor, config: EncoderConfig) -> Tensor:
    """Normalised log-mel [B, F, mel] -> windows [B, F // stride, window, mel], zeros before the first."""
    padded = F.pad(features, (0, 0, config.window - config.stride, 0))
    count = features.shape[1] // config.stride
    return padded.unfold(1, config.window, config.stride)[:, :count].transpose(2, 3)


def span(logits: Tensor) -> Tensor:
    """Span arcs a[r] = prod over s <= r of p[s] from the logits [..., R] of the keep probabilities p.

    As a sum of logarithms: the gradient of a plain product divides by probabilities that may be zero.
    """
    return F.logsigmoid(logits).cumsum(-1).exp()


def hard_depth(scores: Tensor, least: Tensor | float, *, is_span: bool = True) -> Tensor:
    """Lookahead depth [...] from keep scores [..., R]: largest r whose arc is open at zero temperature.

    `least` is the smallest score of an open arc (`config.threshold` of the bias). With span arcs the
    depth is the number of leading open ones, with independent arcs the last open one.
    """
    right = scores.shape[-1]
    if is_span:
        closed = (scores < least).to(torch.int64)
        return F.pad(closed, (0, 1), value=1).argmax(-1)
    order = torch.arange(1, right + 1, device=scores.device)
    return ((scores >= least).to(torch.int64) * order).amax(-1)


def depth_arcs(depth: Tensor, right: int) -> Tensor:
    """Depths [..., T] -> 0/1 span arcs [..., T, right]."""
    return (torch.arange(1, right + 1, device=depth.device) <= depth.unsqueeze(-1)).float()


def fixed_depth(config: EncoderConfig, frames: int) -> Tensor:
    """Depths [frames] of the rules that do not look at the signal."""
    i = torch.arange(frames)
    if config.rule == "chunked":
        return config.right - i % (config.right + 1)
    return torch.full((frames,), config.right)


def hard_arcs(config: EncoderConfig, bias: float = 0.0) -> Arcs:
    """Arcs as at inference, with an additive bias on the keep logits.

    Hard arcs are always a span: once frame i+r is awaited every nearer frame is there and is attended to,
    also where arcs were trained to open independently of each other.
    """
    least = threshold(bias)

    def arcs(_: int, scores: Tensor | None, frames: int) -> Tensor:
        if scores is None:
            return depth_arcs(fixed_depth(config, frames), config.right).unsqueeze(0)
        return depth_arcs(hard_depth(scores, least, is_span=config.span), config.right)

    return arcs


def given_arcs(depths: Tensor, right: int) -> Arcs:
    """Arcs from known depths [B, L, T], for example those a streaming run decided."""
    return lambda layer, _scores, _frames: depth_arcs(depths[:, layer], right)


def attend(
    block: Block,
    residual: Tensor,
    key: Tensor,
    value: Tensor,
    arcs: Tensor,
    lengths: Tensor,
    config: EncoderConfig,
) -> Tensor:
    """Self-attention with arc weights.

    residual [B, T, D], key and value [B, T, heads, head dim], arcs [B, T, R] -> [B, T, D].
    """
    frames, left, right = residual.shape[1], config.left, config.right
    i = torch.arange(frames, device=residual.device)
    rel = i[None, :] - i[:, None]  # key minus query
    past = ((rel <= 0) & (rel >= -left)).float()
    weight = past.unsqueeze(0)
    if right:
        ahead = ((rel >= 1) & (rel <= right)).float()
        index = (rel - 1).clamp(0, right - 1).expand(arcs.shape[0], -1, -1)
        weight = weight + ahead * arcs.gather(2, index)
    weight = weight * (i[None, None, :] < lengths[:, None, None])  # [B, T, T]
    q, k, v = (x.transpose(1, 2) for x in (block.queries(residual), key, value))
    bias = block.relative[:, (rel + left).clamp(0, left + right)]
    score = torch.matmul(q, k.transpose(-1, -2)).float() + bias
    seen = weight.unsqueeze(1)
    top = score.detach().masked_fill(seen < 0.5, -torch.inf).amax(-1, keepdim=True)
    # An open key's score is at most the top; a closed one's gradient must not explode however high it is.
    mass = torch.exp((score - top).clamp(max=1.0)) * seen
    probs = mass / mass.sum(-1, keepdim=True).clamp_min(1e-6)
    mixed = torch.matmul(probs.to(v.dtype), v).transpose(1, 2).flatten(2)
    out: Tensor = residual + block.attention_out(mixed)
    return out


def encode(
    encoder: Encoder, windows: Tensor, lengths: Tensor, arcs: Arcs, *, dropout: float = 0.0, tap: int = 0
) -> Encoded:
    """Run the encoder over windows [B, T, 7, mel] whose first `lengths` [B] frames exist.

    Arcs that point past an utterance's end attend to nothing: at the end a node is resolved with the
    future that exists.
    """
    config = encoder.config
    x = encoder.subsample(windows)
    tapped = x
    used: list[Tensor] = []
    for layer, module in enumerate(encoder.blocks):
        block: Block = module  # type: ignore[assignment]
        residual, key, value, scores = block.arrive(x)
        a = arcs(layer, scores, x.shape[1])
        used.append(a)
        x = attend(block, residual, key, value, a, lengths, config)
        x = block.finish(x, F.dropout(block.conv.whole(block.conv.enter(x)), dropout, encoder.training))
        if layer + 1 == tap:
            tapped = x
    if dropout:
        x = F.dropout(x, dropout, encoder.training)
    return Encoded(encoder.leave(x), torch.stack(used, 1), tapped)
