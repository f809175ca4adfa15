"""The transducer loss against enumeration of every alignment, and against autograd of a plain recursion."""

from __future__ import annotations

import itertools
import math
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from realtide.engines.ancat.rnnt import fused_rnnt_loss, rnnt_loss


def problem(
    batch: int, steps: int, columns: int, vocabulary: int, seed: int = 0, blank: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Random float64 logits, labels other than the blank, and sizes that include the full one."""
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(batch, steps, columns, vocabulary, generator=g, dtype=torch.float64)
    labels = torch.randint(0, vocabulary - 1, (batch, columns - 1), generator=g)
    labels = labels + (labels >= blank)
    frames = torch.randint(1, steps + 1, (batch,), generator=g)
    lengths = torch.randint(0, columns, (batch,), generator=g)
    frames[0], lengths[0] = steps, columns - 1
    return logits, labels, frames, lengths


def enumerated(logits: Tensor, labels: list[int], blank: int) -> float:
    """Minus log of the summed probability of all alignments of one utterance [T, U + 1, V]."""
    log_probs = logits.log_softmax(-1)
    steps, u_total = logits.shape[0], len(labels)
    total = 0.0
    # An alignment is a choice of which of the first T - 1 + U moves are labels; the last move is a blank.
    for chosen in itertools.combinations(range(steps - 1 + u_total), u_total):
        t = u = 0
        score = 0.0
        for move in range(steps - 1 + u_total):
            if move in chosen:
                score += float(log_probs[t, u, labels[u]])
                u += 1
            else:
                score += float(log_probs[t, u, blank])
                t += 1
        assert (t, u) == (steps - 1, u_total)
        total += math.exp(score + float(log_probs[t, u, blank]))
    return -math.log(total)


def recursion(log_probs: Tensor, labels: Tensor, frames: Tensor, lengths: Tensor, blank: int = 0) -> Tensor:
    """Textbook forward recursion, one node at a time, differentiated by autograd: [B]."""
    losses = []
    for b in range(log_probs.shape[0]):
        steps, u_total = int(frames[b]), int(lengths[b])
        alpha: dict[tuple[int, int], Tensor] = {(0, 0): log_probs.new_zeros(())}
        for t, u in itertools.product(range(steps), range(u_total + 1)):
            ways = []
            if t > 0:
                ways.append(alpha[t - 1, u] + log_probs[b, t - 1, u, blank])
            if u > 0:
                ways.append(alpha[t, u - 1] + log_probs[b, t, u - 1, labels[b, u - 1]])
            if ways:
                alpha[t, u] = torch.logsumexp(torch.stack(ways), 0)
        losses.append(-alpha[steps - 1, u_total] - log_probs[b, steps - 1, u_total, blank])
    return torch.stack(losses)


@pytest.mark.parametrize("blank", [0, 2, 3])
@pytest.mark.parametrize(("steps", "labels"), [(1, 0), (1, 3), (4, 0), (3, 2), (4, 3), (2, 4)])
def test_equals_enumeration_of_all_alignments(steps: int, labels: int, blank: int) -> None:
    logits, targets, frames, lengths = problem(1, steps, labels + 1, 4, seed=steps * 10 + labels, blank=blank)
    loss = rnnt_loss(logits, targets, frames, lengths, blank=blank, reduction="none")
    assert loss.item() == pytest.approx(enumerated(logits[0], targets[0].tolist(), blank), rel=1e-12)


def test_value_and_gradient_equal_autograd_of_the_recursion() -> None:
    logits, targets, frames, lengths = problem(5, 7, 5, 6, seed=3, blank=1)
    weights = torch.rand(5, dtype=torch.float64)
    ours, theirs = (logits.clone().requires_grad_() for _ in range(2))
    a = rnnt_loss(ours, targets, frames, lengths, blank=1, reduction="none")
    b = recursion(theirs.log_softmax(-1), targets, frames, lengths, blank=1)
    torch.autograd.backward((a * weights).sum())
    torch.autograd.backward((b * weights).sum())
    torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)
    assert ours.grad is not None
    assert theirs.grad is not None
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-11)
    assert ours.grad.abs().max() > 1e-2


def test_gradcheck() -> None:
    logits, targets, frames, lengths = problem(3, 4, 4, 3, seed=5)
    assert torch.autograd.gradcheck(
        lambda x: rnnt_loss(x, targets, frames, lengths, reduction="none"), (logits.requires_grad_(),)
    )


def test_reductions() -> None:
    logits, targets, frames, lengths = problem(4, 5, 3, 4, seed=6)
    each = rnnt_loss(logits, targets, frames, lengths, reduction="none")
    assert each.shape == (4,)
    torch.testing.assert_close(rnnt_loss(logits, targets, frames, lengths), each.mean())
    torch.testing.assert_close(rnnt_loss(logits, targets, frames, lengths, reduction="sum"), each.sum())


def test_padding_changes_nothing_and_gets_no_gradient() -> None:
    logits, targets, frames, lengths = problem(4, 6, 4, 5, seed=7)
    wide = torch.full((4, 9, 7, 5), 1e4, dtype=torch.float64)
    wide[:, :6, :4] = logits
    junk = torch.full((4, 6), -1)
    junk[:, :3] = targets
    for b in range(4):  # junk everywhere outside each utterance too
        wide[b, frames[b] :] = -1e4
        wide[b, :, lengths[b] + 1 :] = 77.0
        junk[b, lengths[b] :] = 10**6
    wide.requires_grad_()
    padded = rnnt_loss(wide, junk, frames, lengths, reduction="none")
    torch.testing.assert_close(padded, rnnt_loss(logits, targets, frames, lengths, reduction="none"))
    torch.autograd.backward(padded.sum())
    assert wide.grad is not None
    for b in range(4):
        alone = logits[b : b + 1, : frames[b], : lengths[b] + 1].clone().requires_grad_()
        torch.autograd.backward(
            rnnt_loss(alone, targets[b : b + 1, : lengths[b]], frames[b : b + 1], lengths[b : b + 1])
        )
        expected = torch.zeros_like(wide.grad[b])
        assert alone.grad is not None
        expected[: frames[b], : lengths[b] + 1] = alone.grad[0]
        torch.testing.assert_close(wide.grad[b], expected, rtol=1e-10, atol=1e-12)


def label_scaled(logits: Tensor, targets: Tensor, frames: Tensor, lengths: Tensor, fastemit: float) -> Tensor:
    """FastEmit's gradient by definition: autograd of the recursion with label log probabilities hooked."""
    x = logits.clone().requires_grad_()
    log_probs = x.log_softmax(-1)

    def scale(gradient: Tensor) -> Tensor:
        out = gradient.clone()
        out[..., 1:] *= 1.0 + fastemit  # blank is 0; only label arcs reach the others
        return out

    log_probs.register_hook(scale)  # type: ignore[no-untyped-call]
    torch.autograd.backward(recursion(log_probs, targets, frames, lengths).sum())
    assert x.grad is not None
    return x.grad


def test_fastemit_scales_the_gradient_of_labels_and_leaves_the_value() -> None:
    logits, targets, frames, lengths = problem(4, 5, 4, 5, seed=8)
    x = logits.clone().requires_grad_()
    loss = rnnt_loss(x, targets, frames, lengths, fastemit=0.3, reduction="sum")
    torch.testing.assert_close(loss, rnnt_loss(logits, targets, frames, lengths, reduction="sum"))
    torch.autograd.backward(loss)
    assert x.grad is not None
    torch.testing.assert_close(x.grad, label_scaled(logits, targets, frames, lengths, 0.3))
    plain = label_scaled(logits, targets, frames, lengths, 0.0)
    assert (x.grad - plain).abs().max() > 1e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_logits_are_summed_in_float32(dtype: torch.dtype) -> None:
    logits, targets, frames, lengths = problem(3, 40, 9, 12, seed=9)
    low = logits.to(dtype).requires_grad_()
    exact = low.detach().double().requires_grad_()
    a = rnnt_loss(low, targets, frames, lengths, reduction="none")
    b = rnnt_loss(exact, targets, frames, lengths, reduction="none")
    assert a.dtype == torch.float32
    torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-4)
    torch.autograd.backward(a.sum())
    torch.autograd.backward(b.sum())
    assert low.grad is not None
    assert exact.grad is not None
    assert low.grad.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(low.grad.double(), exact.grad, rtol=tolerance, atol=tolerance / 10)


def test_long_and_very_improbable_utterances_stay_finite() -> None:
    logits = torch.zeros(1, 800, 30, 8)
    logits[..., 0] = -60.0  # 800 blanks of about -62 nats each
    logits.requires_grad_()
    targets = torch.ones(1, 29, dtype=torch.long)
    loss = rnnt_loss(logits, targets, torch.tensor([800]), torch.tensor([29]))
    # Every alignment has the same score except in the last column's choice: count them.
    blank = -60.0 - math.log(7 + math.exp(-60))
    label = -math.log(7 + math.exp(-60))
    count = math.lgamma(829) - math.lgamma(800) - math.lgamma(30)
    assert loss.item() == pytest.approx(-(800 * blank + 29 * label + count), rel=1e-6)
    torch.autograd.backward(loss)
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


def fused(tensors: list[Tensor], sizes: tuple[Tensor, Tensor, Tensor], **options: Any) -> Tensor:
    encoder, predictor, weight, bias = tensors
    return fused_rnnt_loss(encoder, predictor, weight, bias, *sizes, **options)


def fused_inputs(seed: int) -> tuple[list[Tensor], tuple[Tensor, Tensor, Tensor]]:
    _, targets, frames, lengths = problem(6, 8, 5, 7, seed=seed)
    g = torch.Generator().manual_seed(seed + 100)
    shapes = [(6, 8, 3), (6, 5, 3), (7, 3), (7,)]
    tensors = [torch.randn(*s, generator=g, dtype=torch.float64).requires_grad_() for s in shapes]
    return tensors, (targets, frames, lengths)


@pytest.mark.parametrize("cells", [1, 60, 10**6])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_fused_equals_unfused(cells: int, with_bias: bool, reduction: Literal["mean", "sum"]) -> None:
    (enc, pred, weight, bias), sizes = fused_inputs(11)
    shift = bias if with_bias else None
    a = fused_rnnt_loss(
        enc,
        pred,
        weight,
        shift,
        *sizes,
        fastemit=0.2,
        reduction=reduction,
        group_cells=cells,
    )
    logits = torch.nn.functional.linear(torch.tanh(enc[:, :, None] + pred[:, None]), weight, shift)
    b = rnnt_loss(logits, *sizes, fastemit=0.2, reduction=reduction)
    torch.testing.assert_close(a, b)
    wanted = [enc, pred, weight] + ([bias] if with_bias else [])
    # An upstream factor, as from a sum of losses or gradient accumulation.
    ours = torch.autograd.grad(3.0 * a, wanted)
    for mine, reference in zip(ours, torch.autograd.grad(3.0 * b, wanted), strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-9, atol=1e-12)


def test_fused_gradcheck_and_evaluation_without_gradient() -> None:
    tensors, sizes = fused_inputs(12)
    assert torch.autograd.gradcheck(lambda *x: fused(list(x), sizes, group_cells=50), tensors)
    value = fused(tensors, sizes)
    with torch.no_grad():
        quiet = fused(tensors, sizes)
    assert not quiet.requires_grad
    torch.testing.assert_close(quiet, value.detach())


def test_fused_in_bfloat16_returns_gradients_in_the_types_given() -> None:
    tensors, sizes = fused_inputs(13)
    types = [torch.bfloat16] * 2 + [torch.float32] * 2
    low = [t.detach().to(d).requires_grad_() for t, d in zip(tensors, types, strict=True)]
    loss = fused(low, sizes)
    torch.autograd.backward(loss)
    assert loss.dtype == torch.float32
    assert [t.grad.dtype for t in low if t.grad is not None] == [t.dtype for t in low]
    assert loss.item() == pytest.approx(fused(tensors, sizes).item(), rel=3e-2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"frames": torch.tensor([0, 3])}, "frames"),
        ({"frames": torch.tensor([4, 3])}, "frames"),
        ({"lengths": torch.tensor([3, 1])}, "lengths"),
        ({"lengths": torch.tensor([1])}, "lengths"),
        ({"targets": torch.tensor([[1, 0], [1, 1]])}, "blank"),
        ({"targets": torch.tensor([[1, 4], [1, 1]])}, "labels"),
        ({"targets": torch.tensor([[1], [1]])}, "targets"),
        ({"blank": 4}, "blank"),
        ({"fastemit": -0.1}, "fastemit"),
        ({"reduction": "median"}, "reduction"),
        ({"logits": torch.zeros(3, 3, 4)}, "logits"),
    ],
)
def test_refuses(change: dict[str, object], message: str) -> None:
    good: dict[str, object] = {
        "logits": torch.zeros(2, 3, 3, 4),
        "targets": torch.tensor([[1, 2], [3, 1]]),
        "frames": torch.tensor([3, 2]),
        "lengths": torch.tensor([2, 1]),
    }
    assert torch.isfinite(rnnt_loss(**good))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=message):
        rnnt_loss(**(good | change))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("index", "shape", "message"),
    [(0, (6, 8), "encoder"), (1, (6, 5, 4), "disagree"), (3, (6,), "bias"), (1, (6, 4, 3), "targets")],
)
def test_fused_refuses(index: int, shape: tuple[int, ...], message: str) -> None:
    tensors, sizes = fused_inputs(14)
    tensors[index] = torch.zeros(shape, dtype=torch.float64)
    with pytest.raises(ValueError, match=message):
        fused(tensors, sizes)
