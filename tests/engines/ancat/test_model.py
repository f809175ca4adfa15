"""The modules: convolution both ways, predictor and joiner, what training starts from."""

from __future__ import annotations

import torch

from realtide.engines.ancat.model import JoinerProgram, Subsample, Transducer, keep_logits
from tests.engines.ancat.oracle import small_config, wild


def test_the_convolution_is_the_same_over_everything_and_frame_by_frame() -> None:
    config = small_config()
    conv = wild(config).encoder.blocks[0].conv
    x = torch.randn(2, 11, config.dim)
    with torch.no_grad():
        entered = conv.enter(x)  # type: ignore[operator, union-attr]
        padded = torch.cat([torch.zeros(2, config.kernel - 1, config.dim), entered], 1)
        taps = padded.unfold(1, config.kernel, 1).transpose(2, 3)
        torch.testing.assert_close(conv.whole(entered), conv.leave(taps))  # type: ignore[operator, union-attr]


def test_subsampling_is_two_strided_convolutions() -> None:
    config = small_config()
    module = Subsample(config)
    windows = torch.randn(3, 7, config.mel_bins)
    mel, channels = config.mel_bins, config.subsample_channels
    with torch.no_grad():
        first = module.first.weight.view(channels, 3, mel).transpose(1, 2)
        hidden = torch.nn.functional.conv1d(windows.transpose(1, 2), first, module.first.bias, stride=2)
        second = module.second.weight.view(config.dim, 3, channels).transpose(1, 2)
        out = torch.nn.functional.conv1d(
            torch.nn.functional.silu(hidden), second, module.second.bias, stride=2
        )
        torch.testing.assert_close(module(windows), module.norm(out[..., 0]), atol=1e-5, rtol=1e-4)


def test_the_joiner_gives_log_probabilities_that_depend_on_both_tokens() -> None:
    config = small_config()
    model = wild(config)
    encoded = torch.randn(1, config.joiner_dim).expand(3, -1)
    with torch.no_grad():
        out = JoinerProgram(model)(encoded, torch.tensor([[0, 1], [1, 0], [2, 1]]))
    torch.testing.assert_close(out.exp().sum(-1), torch.ones(3))
    assert not torch.allclose(out[0], out[1])
    assert not torch.allclose(out[0], out[2])


def test_training_starts_with_arcs_that_are_slightly_open_and_positions_that_do_not_matter() -> None:
    model = Transducer(small_config())
    for block in model.encoder.blocks:
        assert not block.relative.any()  # type: ignore[operator]
        scores = block.scheduler(torch.randn(9, 32))  # type: ignore[operator]
        torch.testing.assert_close(scores, torch.full((9, 4), 0.5))
    assert 0 < float(keep_logits(torch.tensor(0.5))) < 0.5
    assert float(keep_logits(torch.tensor(1e6))) == 6.0
