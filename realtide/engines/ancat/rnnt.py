"""RNN-T (transducer) loss in plain PyTorch.

The loss is minus the log probability of a label sequence under the transducer lattice of Graves
(2012, "Sequence Transduction with Recurrent Neural Networks", section 2.4): at node (t, u) a *blank* moves
to (t + 1, u) and the next label moves to (t, u + 1); a path ends with a blank from the last node.

Two entry points share the lattice:

* `rnnt_loss` takes ready logits [B, T, U + 1, V];
* `fused_rnnt_loss` takes the two projections that a joiner adds, and the joiner's output layer. It never
  holds the logits or their gradient for more than one small group of utterances, and skips padding, so it is
  both the leaner and the faster one for training.

Ours: within a column u the forward variable is a running log-sum-exp over frames once the blanks' prefix sums
are taken out, so the lattice is solved in U + 1 vectorised scans (not T + U steps). Prefix sums are
subtracted, so the lattice is kept in float64; it is small (no vocabulary axis).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Reduction = Literal["mean", "sum", "none"]

__all__ = ["fused_rnnt_loss", "rnnt_loss"]


def rnnt_loss(
    logits: Tensor,
    targets: Tensor,
    frames: Tensor,
    lengths: Tensor,
    *,
    blank: int = 0,
    fastemit: float = 0.0,
    reduction: Reduction = "mean",
) -> Tensor:
    """Transducer loss of unnormalised joiner outputs.

    Args:
        logits: [B, T, U + 1, V], finite, of any floating type; computed in float32 (float64 stays so).
        targets: [B, U] label ids; entries from `lengths` on are padding of any value.
        frames: [B] valid encoder frames, 1..T.
        lengths: [B] valid labels, 0..U.
        blank: index of the blank in V.
        fastemit: lambda of FastEmit (Yu et al. 2021, section 3.2): the gradient that reaches each
            label's log probability is scaled by 1 + lambda. The loss *value* does not change.
        reduction: "mean" over utterances, "sum", or "none" for [B].

    Returns:
        Loss in nats, scalar or [B]. Its gradient is zero on padding.

    Raises:
        ValueError: shapes, ranges, or a blank among the labels.
    """
    if logits.dim() != 4:
        raise ValueError(f"logits must be [B, T, U + 1, V], not {tuple(logits.shape)}")
    batch, steps, columns, vocabulary = logits.shape
    _check(targets, frames, lengths, batch, steps, columns, vocabulary, blank, fastemit)
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be mean, sum or none, not {reduction!r}")
    losses: Tensor = _Loss.apply(  # type: ignore[no-untyped-call]
        logits, targets.long(), frames.long(), lengths.long(), blank, fastemit
    )
    if reduction == "none":
        return losses
    return losses.mean() if reduction == "mean" else losses.sum()


def fused_rnnt_loss(
    encoder: Tensor,
    predictor: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    frames: Tensor,
    lengths: Tensor,
    *,
    blank: int = 0,
    fastemit: float = 0.0,
    reduction: Literal["mean", "sum"] = "mean",
    group_cells: int = 2048,
) -> Tensor:
    """`rnnt_loss` of ``tanh(encoder[:, :, None] + predictor[:, None]) @ weight.T + bias``.

    The gradients are formed together with the loss, a group of utterances of similar length at a time, so the
    peak extra memory is about ``3 * group_cells * V`` floats (or one utterance, if that is larger).

    Args:
        encoder: [B, T, J] encoder projection.
        predictor: [B, U + 1, J] prediction network projection.
        weight: [V, J] output layer.
        bias: [V] or None.
        targets: [B, U], as in `rnnt_loss`.
        frames: [B], as in `rnnt_loss`.
        lengths: [B], as in `rnnt_loss`.
        blank: as in `rnnt_loss`.
        fastemit: as in `rnnt_loss`.
        reduction: "mean" over utterances or "sum".
        group_cells: most lattice nodes (padding included) handled at once.

    The matrix products run in the type of `encoder`, the softmax and the gradient sums in float32 or wider.

    Raises:
        ValueError: as `rnnt_loss`.
    """
    if encoder.dim() != 3 or predictor.dim() != 3 or weight.dim() != 2:
        raise ValueError("encoder must be [B, T, J], predictor [B, U + 1, J] and weight [V, J]")
    batch, steps, joint = encoder.shape
    vocabulary = weight.shape[0]
    if predictor.shape[0] != batch or predictor.shape[2] != joint or weight.shape[1] != joint:
        raise ValueError(
            f"encoder {tuple(encoder.shape)}, predictor {tuple(predictor.shape)} and weight "
            f"{tuple(weight.shape)} disagree"
        )
    if bias is not None and bias.shape != (vocabulary,):
        raise ValueError(f"bias must be [{vocabulary}], not {tuple(bias.shape)}")
    _check(targets, frames, lengths, batch, steps, predictor.shape[1], vocabulary, blank, fastemit)
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction must be mean or sum, not {reduction!r}")
    trained = [x for x in (encoder, predictor, weight, bias) if x is not None and x.requires_grad]
    total: Tensor = _FusedLoss.apply(  # type: ignore[no-untyped-call]
        encoder,
        predictor,
        weight,
        bias,
        targets.long(),
        frames.long(),
        lengths.long(),
        (blank, fastemit, group_cells, torch.is_grad_enabled() and bool(trained)),
    )
    return total / batch if reduction == "mean" else total


def _check(
    targets: Tensor,
    frames: Tensor,
    lengths: Tensor,
    batch: int,
    steps: int,
    columns: int,
    vocabulary: int,
    blank: int,
    fastemit: float,
) -> None:
    """Refuses what would otherwise index out of range or train on nonsense."""
    if batch < 1:
        raise ValueError("the batch is empty")
    if targets.shape != (batch, columns - 1):
        raise ValueError(f"targets must be {(batch, columns - 1)}, not {tuple(targets.shape)}")
    for name, value, low, high in (("frames", frames, 1, steps), ("lengths", lengths, 0, columns - 1)):
        if value.shape != (batch,):
            raise ValueError(f"{name} must be [{batch}], not {tuple(value.shape)}")
        if bool(((value < low) | (value > high)).any()):
            raise ValueError(f"{name} must be {low}..{high}")
    if not 0 <= blank < vocabulary:
        raise ValueError(f"blank must be 0..{vocabulary - 1}")
    if not fastemit >= 0.0:
        raise ValueError("fastemit must not be negative")
    used = torch.arange(columns - 1, device=targets.device) < lengths.to(targets.device)[:, None]
    wrong = used & ((targets < 0) | (targets >= vocabulary) | (targets == blank))
    if bool(wrong.any()):
        raise ValueError(f"labels must be 0..{vocabulary - 1} and not the blank {blank}")


def _lattice(
    blanks: Tensor, labels: Tensor, frames: Tensor, lengths: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Forward-backward over the lattice.

    Args:
        blanks: [B, T, U + 1] log probability of blank, finite on padding too.
        labels: [B, T, U] log probability of the next label, finite on padding too.
        frames: [B].
        lengths: [B].

    Returns:
        log likelihood [B], and the posterior probability that a path uses each blank [B, T, U + 1] and each
        label [B, T, U] arc, which is the derivative of the log likelihood by the arc's log probability.
    """
    batch, steps, columns = blanks.shape
    blanks, labels = blanks.double(), labels.double()
    at = torch.arange(steps, device=blanks.device)
    inside = at < frames[:, None]  # [B, T]
    minus_inf = float("-inf")
    # Blanks summed over earlier frames of the same column: [B, T, U + 1]; over all of them: [B, U + 1].
    masked = blanks.masked_fill(~inside[..., None], 0.0)
    before = masked.cumsum(1) - masked
    whole = masked.sum(1)

    alpha = [before[:, :, 0]]
    for u in range(1, columns):
        entered = alpha[-1] + labels[:, :, u - 1] - before[:, :, u]
        alpha.append(torch.logcumsumexp(entered, 1) + before[:, :, u])

    outside = ~inside
    beta: list[Tensor] = []
    for u in range(columns - 1, -1, -1):
        column = before[:, :, u]
        last = whole[:, u, None] - column  # only blanks remain
        if not beta:
            rest = torch.full_like(column, minus_inf)
        else:
            leaves = (column + labels[:, :, u] + beta[-1]).masked_fill(outside, minus_inf)
            rest = torch.logcumsumexp(leaves.flip(1), 1).flip(1) - column
        done = (lengths == u)[:, None]
        beta.append(torch.where(done, last, rest))
    beta.reverse()

    forward = torch.stack(alpha, 2).masked_fill(outside[..., None], minus_inf)
    backward = torch.stack(beta, 2).masked_fill(outside[..., None], minus_inf)
    likelihood = backward[:, 0, 0]
    base = forward - likelihood[:, None, None]
    after = torch.cat((backward[:, 1:], torch.full_like(backward[:, :1], minus_inf)), 1)
    # The final blank of each utterance leads out of the lattice.
    rows = torch.arange(batch, device=blanks.device)
    after[rows, frames - 1, lengths] = 0.0
    by_blank = (base + blanks + after).exp()
    by_label = (base[:, :, :-1] + labels + backward[:, :, 1:]).exp()
    return likelihood, by_blank, by_label


def _pick(log_probs: Tensor, targets: Tensor, blank: int) -> tuple[Tensor, Tensor]:
    """Blank and next-label entries of log_probs [..., T, U + 1, V] for targets [..., U]."""
    index = targets.clamp(0, log_probs.shape[-1] - 1)[..., None, :, None]
    index = index.expand(*log_probs.shape[:-2], targets.shape[-1], 1)
    return log_probs[..., blank], log_probs[..., :-1, :].gather(-1, index).squeeze(-1)


def _logit_gradient(probs: Tensor, by_blank: Tensor, by_label: Tensor, targets: Tensor, blank: int) -> Tensor:
    """Turns softmax outputs [..., T, U + 1, V] into the loss gradient by the logits, in place.

    d(-log likelihood)/d logits = (arcs that leave the node) * softmax - one-hot(blank, label) arcs.
    """
    leaving = by_blank.clone()
    leaving[..., :-1] += by_label
    probs.mul_(leaving[..., None])
    probs[..., blank] -= by_blank
    index = targets.clamp(0, probs.shape[-1] - 1)[..., None, :, None]
    index = index.expand(*by_label.shape, 1)
    probs[..., :-1, :].scatter_add_(-1, index, -by_label[..., None])
    return probs


class _Loss(torch.autograd.Function):
    """Per-utterance loss [B]. Keeps the logits and posteriors; works on one utterance at a time."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        targets: Tensor,
        frames: Tensor,
        lengths: Tensor,
        blank: int,
        fastemit: float,
    ) -> Tensor:
        batch, steps, columns, _ = logits.shape
        kind = torch.promote_types(logits.dtype, torch.float32)
        blanks = logits.new_zeros((batch, steps, columns), dtype=kind)
        labels = logits.new_zeros((batch, steps, columns - 1), dtype=kind)
        sizes = list(zip(frames.tolist(), lengths.tolist(), strict=True))
        for b, (t, u) in enumerate(sizes):
            log_probs = torch.log_softmax(logits[b, :t, : u + 1].to(kind), -1)
            blanks[b, :t, : u + 1], labels[b, :t, :u] = _pick(log_probs, targets[b, :u], blank)
        likelihood, by_blank, by_label = _lattice(blanks, labels, frames, lengths)
        ctx.save_for_backward(logits, targets, by_blank.to(kind), by_label.mul_(1.0 + fastemit).to(kind))
        ctx.sizes, ctx.blank = sizes, blank
        return -likelihood.to(kind)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        logits, targets, by_blank, by_label = ctx.saved_tensors
        gradient = torch.zeros_like(logits)
        scale = upstream[:, None, None]
        by_blank, by_label = by_blank * scale, by_label * scale
        for b, (t, u) in enumerate(ctx.sizes):
            probs = torch.softmax(logits[b, :t, : u + 1].to(by_blank.dtype), -1)
            block = _logit_gradient(
                probs, by_blank[b, :t, : u + 1], by_label[b, :t, :u], targets[b, :u], ctx.blank
            )
            gradient[b, :t, : u + 1] = block
        return gradient, None, None, None, None, None


def _groups(frames: list[int], lengths: list[int], limit: int) -> Iterator[tuple[list[int], int, int]]:
    """Utterances of similar size together: (batch indices, frames, columns), padded cells at most `limit`."""
    group: list[int] = []
    steps = columns = 0
    for b in sorted(range(len(frames)), key=lambda b: (frames[b], lengths[b]), reverse=True):
        wider = (max(steps, frames[b]), max(columns, lengths[b] + 1))
        if group and (len(group) + 1) * wider[0] * wider[1] > limit:
            yield group, steps, columns
            group, wider = [], (frames[b], lengths[b] + 1)
        group.append(b)
        steps, columns = wider
    yield group, steps, columns


class _FusedLoss(torch.autograd.Function):
    """Sum of losses. The upstream gradient is one number, so the forward pass can form all gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        encoder: Tensor,
        predictor: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        frames: Tensor,
        lengths: Tensor,
        options: tuple[int, float, int, bool],
    ) -> Tensor:
        blank, fastemit, group_cells, training = options
        kind = torch.promote_types(encoder.dtype, torch.float32)
        matrix = weight.to(encoder.dtype)
        shift = None if bias is None else bias.to(encoder.dtype)
        total = torch.zeros((), dtype=torch.float64, device=encoder.device)
        if training:
            d_encoder = torch.zeros_like(encoder, dtype=kind)
            d_predictor = torch.zeros_like(predictor, dtype=kind)
            d_weight = torch.zeros_like(weight, dtype=kind)
            d_bias = torch.zeros(weight.shape[0], dtype=kind, device=weight.device)
        for members, t, u1 in _groups(frames.tolist(), lengths.tolist(), group_cells):
            pick = torch.tensor(members, device=encoder.device)
            hidden = (encoder[pick, :t, None] + predictor[pick, None, :u1].to(encoder.dtype)).tanh_()
            logits = torch.nn.functional.linear(hidden, matrix, shift)
            log_probs = torch.log_softmax(logits.to(kind), -1)
            labels = targets[pick, : u1 - 1]
            likelihood, by_blank, by_label = _lattice(
                *_pick(log_probs, labels, blank), frames[pick], lengths[pick]
            )
            total -= likelihood.sum()
            if not training:
                continue
            by_label *= 1.0 + fastemit
            d_logits = _logit_gradient(log_probs.exp_(), by_blank.to(kind), by_label.to(kind), labels, blank)
            flat = d_logits.flatten(0, 2)
            low = flat.to(encoder.dtype)
            d_weight += (low.t() @ hidden.flatten(0, 2)).to(kind)
            d_bias += flat.sum(0)
            d_hidden = (low @ matrix).to(kind).view(hidden.shape)
            d_hidden.addcmul_(d_hidden * hidden, hidden.to(kind), value=-1.0)  # d tanh = 1 - tanh^2
            d_encoder[pick, :t] = d_hidden.sum(2)
            d_predictor[pick, :u1] = d_hidden.sum(1)
        if training:
            ctx.save_for_backward(
                d_encoder.to(encoder.dtype),
                d_predictor.to(predictor.dtype),
                d_weight.to(weight.dtype),
                None if bias is None else d_bias.to(bias.dtype),
            )
        return total.to(kind)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        gradients = (None if x is None else x * upstream.to(x.dtype) for x in ctx.saved_tensors)
        return (*gradients, None, None, None, None)
