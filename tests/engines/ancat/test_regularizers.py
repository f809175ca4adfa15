"""Relaxed penalties against the exact definitions at 0/1 arcs, and their gradients against differences."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor

from realtide.engines.ancat.latency import Ints, algorithmic_latency, availability, depths_from_arcs, simulate
from realtide.engines.ancat.regularizers import (
    Penalty,
    algorithmic_penalty,
    compute_penalty,
    naive_penalty,
    relaxed_availability,
    relaxed_finish,
)

quick = settings(max_examples=150, deadline=None)
FRAME = 0.04


@st.composite
def batches(draw: st.DrawFn) -> tuple[Ints, Ints]:
    """Depths [B, L, T] and lengths [B]."""
    shape = draw(st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 9)))
    depths = draw(hnp.arrays(np.int64, shape, elements=st.integers(0, 3)))
    lengths = draw(hnp.arrays(np.int64, shape[0], elements=st.integers(1, shape[2])))
    return depths, lengths


def span(depths: Ints, right: int = 3) -> Tensor:
    """Hard span arcs [..., R] of given depths."""
    return torch.from_numpy((np.arange(1, right + 1) <= depths[..., None]).astype(np.float32))


def soft_arcs(seed: int, shape: tuple[int, ...], independent: bool) -> Tensor:
    """Random float64 weights that keep clear of the 0.5 where a hard decision would flip."""
    g = torch.Generator().manual_seed(seed)
    arcs = torch.rand(*shape, generator=g, dtype=torch.float64)
    if not independent:
        arcs = arcs.sort(-1, descending=True).values
    return torch.where(arcs < 0.5, arcs * 0.9 + 0.01, arcs * 0.9 + 0.09)


PENALTIES: dict[str, Callable[..., Penalty]] = {
    "algorithmic": algorithmic_penalty,
    "compute-idle": partial(compute_penalty, cost_seconds=0.0, frame_seconds=FRAME),
    "compute-light": partial(compute_penalty, cost_seconds=0.0013, frame_seconds=FRAME),
    "compute-busy": partial(compute_penalty, cost_seconds=0.012, frame_seconds=FRAME),
    "compute-overloaded": partial(compute_penalty, cost_seconds=0.02, frame_seconds=FRAME),
}


@given(batches())
@quick
def test_availability_is_exact_at_hard_arcs(batch: tuple[Ints, Ints]) -> None:
    depths, lengths = batch
    relaxed = relaxed_availability(span(depths), torch.from_numpy(lengths))
    np.testing.assert_array_equal(relaxed.numpy(), availability(depths, lengths)[:, -1])
    penalty = algorithmic_penalty(span(depths), torch.from_numpy(lengths))
    for b, n in enumerate(lengths):
        exact = algorithmic_latency(depths[b, :, :n]).mean()
        assert penalty.each[b].item() == pytest.approx(exact, rel=1e-6)
    assert penalty.mean.item() == pytest.approx(penalty.each.mean().item())


@given(batches(), st.one_of(st.sampled_from([0.0, 0.001, 0.01, 0.02]), st.floats(0.0, 0.06)))
@quick
def test_finish_is_exact_at_hard_arcs(batch: tuple[Ints, Ints], cost: float) -> None:
    depths, lengths = batch
    sizes = torch.from_numpy(lengths)
    finish, arrival = relaxed_finish(span(depths), sizes, cost_seconds=cost, frame_seconds=FRAME)
    penalty = compute_penalty(span(depths), sizes, cost_seconds=cost, frame_seconds=FRAME)
    for b, n in enumerate(lengths):
        exact = simulate(depths[b, :, :n], cost, FRAME)
        np.testing.assert_allclose((finish - arrival)[b, :n].numpy(), exact.upl, rtol=0, atol=1e-12)
        np.testing.assert_allclose(finish[b, :n].numpy(), exact.finish[-1], rtol=0, atol=1e-12)
        assert (finish[b, n:] == arrival[b, n:]).all()
        assert penalty.each[b].item() == pytest.approx(exact.upl.mean(), rel=1e-6)


@given(st.data(), st.sampled_from([0.0, 0.003, 0.02]))
@quick
def test_independent_arcs_are_exact_too(data: st.DataObject, cost: float) -> None:
    arcs = data.draw(hnp.arrays(np.float64, (2, 3, 7, 3), elements=st.sampled_from([0.0, 1.0])))
    lengths = data.draw(hnp.arrays(np.int64, 2, elements=st.integers(1, 7)))
    depths, sizes, given_arcs = depths_from_arcs(arcs), torch.from_numpy(lengths), torch.from_numpy(arcs)
    newest = relaxed_availability(given_arcs, sizes, independent=True)
    np.testing.assert_array_equal(newest.numpy(), availability(depths, lengths)[:, -1])
    finish, arrival = relaxed_finish(
        given_arcs, sizes, cost_seconds=cost, frame_seconds=FRAME, independent=True
    )
    for b, n in enumerate(lengths):
        exact = simulate(depths[b, :, :n], cost, FRAME).upl
        np.testing.assert_allclose((finish - arrival)[b, :n].numpy(), exact, rtol=0, atol=1e-12)


def test_naive_is_the_mean_over_arcs_that_exist() -> None:
    arcs = torch.rand(3, 2, 5, 3, dtype=torch.float64)
    lengths = torch.tensor([5, 3, 1])
    each, mean = naive_penalty(arcs, lengths)
    for b, n in enumerate(lengths.tolist()):
        weights = [
            arcs[b, layer, i, r].item()
            for layer in range(2)
            for i in range(n)
            for r in range(3)
            if i + r + 1 < n
        ]
        assert each[b].item() == pytest.approx(sum(weights) / max(len(weights), 1))
    assert mean.item() == pytest.approx(each.mean().item())
    assert naive_penalty(torch.ones(1, 2, 5, 3), lengths[:1]).mean.item() == 1.0


@pytest.mark.parametrize("independent", [False, True])
@pytest.mark.parametrize("name", PENALTIES)
@pytest.mark.parametrize("seed", range(6))
def test_gradient_equals_finite_differences(name: str, independent: bool, seed: int) -> None:
    arcs = soft_arcs(seed, (1, 3, 7, 3), independent).requires_grad_()
    length = 7 - seed % 3
    penalty = partial(PENALTIES[name], independent=independent)
    (gradient,) = torch.autograd.grad(penalty(arcs, torch.tensor([length])).each.sum(), arcs)
    # Every weight moved up and down by itself, all as one batch.
    count, step = arcs.numel(), 1e-6
    moves = step * torch.eye(count, dtype=torch.float64).view(count, *arcs.shape[1:])
    with torch.no_grad():
        each = penalty(torch.cat((arcs + moves, arcs - moves)), torch.full((2 * count,), length)).each
    numeric = (each[:count] - each[count:]) / (2 * step)
    torch.testing.assert_close(gradient.flatten(), numeric, rtol=1e-5, atol=1e-8)
    assert gradient.abs().max() > 1e-4


@pytest.mark.parametrize("seed", [584, 604, 674, 974, 1244, 1324, 1604, 2624])
def test_moments_that_differ_in_the_last_bit_keep_their_place_in_the_queue(seed: int) -> None:
    """In a long backlog soft times coincide by different sums; rounding must not reorder nodes."""
    arcs = soft_arcs(seed, (2, 3, 8, 3), independent=False).requires_grad_()
    direction = torch.randn(arcs.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    lengths = torch.tensor([8, 5])

    def value(x: Tensor) -> Tensor:
        return compute_penalty(x, lengths, cost_seconds=0.05, frame_seconds=FRAME).each.sum()

    (gradient,) = torch.autograd.grad(value(arcs), arcs)
    step = 1e-6
    with torch.no_grad():
        numeric = (value(arcs + step * direction) - value(arcs - step * direction)) / (2 * step)
    assert (gradient * direction).sum().item() == pytest.approx(numeric.item(), rel=1e-5)


@pytest.mark.parametrize("independent", [False, True])
@pytest.mark.parametrize("name", PENALTIES)
def test_gradient_never_rewards_waiting(name: str, independent: bool) -> None:
    for seed in range(20):
        arcs = soft_arcs(100 + seed, (2, 4, 12, 3), independent).requires_grad_()
        penalty = PENALTIES[name](arcs, torch.tensor([12, 7]), independent=independent)
        (gradient,) = torch.autograd.grad(penalty.mean, arcs)
        assert (gradient >= -1e-12).all()


@given(st.integers(0, 10**6), st.data())
@quick
def test_algorithmic_penalty_rises_with_every_arc(seed: int, data: st.DataObject) -> None:
    arcs = soft_arcs(seed, (1, 3, 6, 3), independent=False)
    raised = arcs + data.draw(st.floats(0.0, 1.0)) * (1 - arcs)
    lengths = torch.tensor([6])
    low, high = relaxed_availability(arcs, lengths), relaxed_availability(raised, lengths)
    assert (high >= low - 1e-12).all()
    everything = relaxed_availability(torch.ones_like(arcs), lengths)
    assert (high <= everything + 1e-12).all()


@pytest.mark.parametrize("name", ["naive", *PENALTIES])
def test_padding_does_not_matter_and_gets_no_gradient(name: str) -> None:
    penalty = naive_penalty if name == "naive" else PENALTIES[name]
    arcs = soft_arcs(3, (1, 3, 6, 3), independent=False)
    padded = torch.full((2, 3, 10, 3), float("nan"), dtype=torch.float64)
    padded[0, :, :6] = arcs[0]
    padded[1] = soft_arcs(4, (3, 10, 3), independent=False)
    padded.requires_grad_()
    each = penalty(padded, torch.tensor([6, 10])).each
    torch.testing.assert_close(each[:1], penalty(arcs, torch.tensor([6])).each)
    (gradient,) = torch.autograd.grad(each.sum(), padded)
    assert (gradient[0, :, 6:] == 0).all()
    assert gradient.isfinite().all()
    # The last frame has no future at all, whatever its arcs say.
    assert (gradient[0, :, 5] == 0).all()


def test_worked_example() -> None:
    # One layer, two frames, an arc of weight a: D = (a * 1 + 0) / 2.
    arcs = torch.full((1, 1, 2, 1), 0.25, dtype=torch.float64, requires_grad=True)
    penalty = algorithmic_penalty(arcs, torch.tensor([2]))
    assert penalty.mean.item() == pytest.approx(0.125)
    assert torch.autograd.grad(penalty.mean, arcs)[0].flatten().tolist() == [0.5, 0.0]
    # With cost c, frame 0 is done at E[start] + c, frame 1 at once (frame 0 has left by then).
    timed = compute_penalty(arcs, torch.tensor([2]), cost_seconds=0.1, frame_seconds=1.0)
    assert timed.mean.item() == pytest.approx((0.25 + 0.1 + 0.1) / 2)


@pytest.mark.parametrize("name", ["naive", *PENALTIES])
def test_descent_from_full_lookahead_reaches_the_causal_encoder(name: str) -> None:
    """Saturated arcs must still feel a price, or training could never switch them off."""
    penalty = naive_penalty if name == "naive" else PENALTIES[name]
    keep = torch.full((1, 2, 8, 2), 1.0, dtype=torch.float64)
    lengths = torch.tensor([8])
    for _ in range(300):
        keep.requires_grad_()
        value = penalty(keep.cumprod(-1), lengths).mean
        (gradient,) = torch.autograd.grad(value, keep)
        keep = (keep.detach() - 0.05 * gradient / gradient.abs().max().clamp(min=1e-12)).clamp(0.0, 1.0)
    depths = depths_from_arcs(keep.cumprod(-1).numpy())[0]
    assert algorithmic_latency(depths).max() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_types(dtype: torch.dtype) -> None:
    arcs = torch.ones(1, 2, 4, 2, dtype=dtype, requires_grad=True)
    for penalty in (naive_penalty, *PENALTIES.values()):
        each, mean = penalty(arcs, torch.tensor([4]))
        assert each.dtype == torch.promote_types(dtype, torch.float32)
        assert torch.autograd.grad(mean, arcs)[0].dtype == dtype


@pytest.mark.parametrize("name", ["naive", *PENALTIES])
def test_refuses(name: str) -> None:
    penalty = naive_penalty if name == "naive" else PENALTIES[name]
    arcs = torch.ones(2, 2, 4, 2)
    for bad in (arcs[0], arcs.long()):
        with pytest.raises(ValueError, match="arcs"):
            penalty(bad, torch.tensor([4, 4]))
    for lengths in ([4], [4, 0], [5, 4]):
        with pytest.raises(ValueError, match="lengths"):
            penalty(arcs, torch.tensor(lengths))
    if name.startswith("compute"):
        with pytest.raises(ValueError, match="cost"):
            compute_penalty(arcs, torch.tensor([4, 4]), cost_seconds=-1.0, frame_seconds=FRAME)
