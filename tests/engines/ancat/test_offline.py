"""The encoder over whole utterances: padding, arcs, and gradients through closed ones."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from realtide.engines.ancat.frontend import Frontend
from realtide.engines.ancat.model import Block
from realtide.engines.ancat.offline import (
    attend,
    depth_arcs,
    encode,
    fixed_depth,
    given_arcs,
    hard_arcs,
    hard_depth,
    windows_of,
)
from tests.engines.ancat.conftest import Clip
from tests.engines.ancat.oracle import small_config, wild

CLOSE = 1e-4


def some(frames: int, seed: int = 0) -> Tensor:
    return torch.randn(1, frames, 7, 80, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("rule", "right"), [("adaptive", 3), ("causal", 0), ("layerwise", 2), ("chunked", 3)]
)
def test_padding_changes_nothing(rule: str, right: int) -> None:
    config = small_config(rule=rule, right=right)
    model = wild(config)
    one, two = some(20, 1), some(13, 2)
    batch = torch.cat([one, torch.cat([two, some(7, 3)], 1)])
    with torch.no_grad():
        both = encode(model.encoder, batch, torch.tensor([20, 13]), hard_arcs(config, 1.0)).rows
        for row, alone in zip(both, (one, two), strict=True):
            n = alone.shape[1]
            want = encode(model.encoder, alone, torch.tensor([n]), hard_arcs(config, 1.0)).rows[0]
            assert float((row[:n] - want).abs().max()) < CLOSE


def test_a_frame_sees_its_left_context_and_its_arcs_and_nothing_else() -> None:
    config = small_config(layers=1, right=3, left=4, kernel=1)
    model = wild(config)
    x = some(20)
    depths = torch.zeros(1, 1, 20, dtype=torch.long)
    depths[0, 0, 10] = 2
    lengths = torch.tensor([20])
    with torch.no_grad():
        want = encode(model.encoder, x, lengths, given_arcs(depths, 3)).rows[0]
        for changed in range(20):
            y = x.clone()
            y[0, changed] += 1.0
            moved = (encode(model.encoder, y, lengths, given_arcs(depths, 3)).rows[0] - want).abs().amax(
                -1
            ) > 0
            seen = {i for i in range(20) if changed - i <= (2 if i == 10 else 0) and i - changed <= 4}
            assert set(moved.nonzero().flatten().tolist()) == seen


def test_closed_arcs_have_finite_gradients_that_can_open_them() -> None:
    config = small_config(right=3)
    model = wild(config)
    arcs = torch.zeros(1, 12, 3, requires_grad=True)
    rows = encode(model.encoder, some(12), torch.tensor([12]), lambda *_: arcs).rows
    (gradient,) = torch.autograd.grad(rows.square().sum(), arcs)
    assert torch.isfinite(gradient).all()
    assert (gradient[0, :9] != 0).all()
    assert (gradient[0, 11] == 0).all()  # beyond the end there is nothing to see


def test_depths_of_scores() -> None:
    scores = torch.tensor([[1.0, 2.0, -1.0, 3.0], [-1.0, 2.0, 2.0, 2.0], [1.0, 1.0, 1.0, 1.0], [-1.0] * 4])
    assert hard_depth(scores, 0.0).tolist() == [2, 0, 4, 0]
    assert hard_depth(scores, 0.0, is_span=False).tolist() == [4, 4, 4, 0]
    assert hard_depth(scores, torch.full((4, 1), 1.5)).tolist() == [0, 0, 0, 0]
    assert depth_arcs(torch.tensor([0, 2]), 3).tolist() == [[0, 0, 0], [1, 1, 0]]


def test_fixed_depths() -> None:
    chunked = small_config(rule="chunked", right=3)
    assert fixed_depth(chunked, 6).tolist() == [3, 2, 1, 0, 3, 2]
    assert fixed_depth(small_config(rule="layerwise", right=2), 3).tolist() == [2, 2, 2]


def test_windows_are_those_of_the_front_end(clips: dict[str, Clip]) -> None:
    clip = clips["digit-three"]
    front = Frontend(clip.rate)
    front.push(clip.samples)
    front.finish()
    want = torch.from_numpy(front.take())
    have = windows_of(torch.from_numpy(clip.features)[None], small_config())[0]
    torch.testing.assert_close(have, want)


def test_a_frame_that_attends_to_itself_alone_does_so_however_low_its_score() -> None:
    config = small_config(right=3, layers=1)
    model = wild(config)
    block = model.encoder.blocks[0]
    assert isinstance(block, Block)
    with torch.no_grad():
        for norm, shift in ((block.query_norm, -1e6), (block.key_norm, 1.0)):
            norm.weight.zero_()  # scores far below any finite stand-in for "masked"
            norm.bias.fill_(shift)
        x = torch.randn(1, 6, config.dim, generator=torch.Generator().manual_seed(4))
        residual, key, value, _ = block.arrive(x)
        closed = torch.zeros(1, 6, 3)
        out = attend(block, residual, key, value, closed, torch.tensor([6]), config)
        alone = residual[:, :1] + block.attention_out(value[:, :1].flatten(2))
    torch.testing.assert_close(out[:, :1], alone)


def test_attention_does_not_sharpen_however_large_the_weights_of_queries_and_keys_grow() -> None:
    config = small_config(right=3, layers=1)
    block = wild(config).encoder.blocks[0]
    assert isinstance(block, Block)
    with torch.no_grad():
        x = torch.randn(1, 12, config.dim, generator=torch.Generator().manual_seed(4))

        def mixed() -> torch.Tensor:
            residual, key, value, _ = block.arrive(x)
            return attend(block, residual, key, value, torch.ones(1, 12, 3), torch.tensor([12]), config)

        before = mixed()
        for layer in (block.query, block.key):
            layer.weight.mul_(1e3)
            layer.bias.mul_(1e3)
        torch.testing.assert_close(mixed(), before, atol=1e-4, rtol=1e-3)
        block.query_norm.weight.mul_(10)  # what the gain is for
        assert not torch.allclose(mixed(), before, atol=1e-2)
