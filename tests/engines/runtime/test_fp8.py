"""Layers in float8: how close they are, what is refused, and that they do not wait for the device."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from realtide.engines.longlive.steps import Denoise
from realtide.engines.longlive.transformer import WanTransformer
from realtide.engines.runtime import fp8
from realtide.engines.runtime.device_program import DeviceProgram
from realtide.engines.runtime.fp8 import Fp8Linear, convert
from realtide.engines.runtime.program import ProgramError
from realtide.gpu import video
from tests.engines.runtime.test_device_program import NoWaiting, video_inputs, video_state


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_a_layer_is_close_to_its_original(dtype: torch.dtype, bias: bool, size: float) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(64, 48, bias=bias).to(dtype)
    x = (size * torch.randn(2, 5, 64)).to(dtype)
    with torch.inference_mode():
        want, have = layer(x).float(), Fp8Linear(layer)(x)
    assert have.dtype == dtype
    assert have.shape == (2, 5, 48)
    # Three bits of mantissa: an error of 2^-4 at most, of each factor; they average out.
    assert 0 < float((have.float() - want).norm() / want.norm()) < 0.06


def test_zeros_stay_zeros() -> None:
    layer = Fp8Linear(nn.Linear(16, 16, bias=False))
    assert torch.equal(layer(torch.zeros(3, 16)), torch.zeros(3, 16))


def test_widths_that_do_not_fit_are_refused_and_left_alone() -> None:
    with pytest.raises(
        ProgramError, match="a layer of 16 to 24 cannot be in float8: widths must be multiples"
    ):
        Fp8Linear(nn.Linear(16, 24))
    module = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 24))
    assert convert(module) == 1
    assert [type(child) for child in module] == [Fp8Linear, nn.GELU, nn.Linear]
    assert module(torch.randn(2, 16)).shape == (2, 24)


def test_an_old_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    wanted = "products in float8 need compute capability 8.9, this device has 8.6"
    assert fp8.refusal(torch.device("cuda")) == wanted
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert fp8.refusal(torch.device("cuda")) is None
    assert fp8.refusal(torch.device("cpu")) is None


@pytest.mark.parametrize("fuse", [False, True])
def test_a_pass_of_video_in_float8(fuse: bool) -> None:
    config, _ = video.config(small=True)
    torch.manual_seed(0)
    model = WanTransformer(config.transformer)
    inputs = video_inputs(config, 3, 9, torch.float32)
    (want,) = DeviceProgram(Denoise(model, config, 9), video_state(config, torch.float32)).run(*inputs)
    if fuse:
        model.fuse()
    assert convert(model.blocks) == config.transformer.layers * (8 if fuse else 10)
    program = DeviceProgram(Denoise(model, config, 9), video_state(config, torch.float32))
    with NoWaiting():
        (have,) = program.run(*inputs)
    assert 0 < float((have - want).norm() / want.norm()) < 0.1
