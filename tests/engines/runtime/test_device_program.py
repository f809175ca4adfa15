"""`DeviceProgram`: state in place, refusals, and models that never wait for the device inside a run."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from realtide.engines.ancat.config import NO_CAP, static_shapes
from realtide.engines.ancat.model import Encoder
from realtide.engines.ancat.stream_static import StaticStep
from realtide.engines.easycontrol.steps import Denoise as ImageDenoise
from realtide.engines.easycontrol.transformer import FluxTransformer
from realtide.engines.longlive.config import (
    StreamConfig,
    VideoConfig,
    cache_shapes,
    cross_shapes,
    decoder_shapes,
)
from realtide.engines.longlive.steps import Denoise, Remember
from realtide.engines.longlive.transformer import WanTransformer
from realtide.engines.longlive.vae import DecodeFirst, DecodeNext, WanVae
from realtide.engines.runtime.device_program import DeviceProgram
from realtide.engines.runtime.program import ProgramError
from realtide.gpu import images, speech, video


class Sum(nn.Module):
    """Adds its input to its state and returns twice that; `copied`: as a new state tensor."""

    def __init__(self, copied: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.copied = copied

    def forward(self, x: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
        following = total + x * self.weight if self.copied else total.add_(x * self.weight)
        return 2 * following, following


def test_bound_tensors_are_read_where_they_are() -> None:
    x, total = torch.ones(2), torch.zeros(2)
    program = DeviceProgram(Sum(False), [total], [x])
    program.run()
    x.fill_(5)
    (out,) = program.run()
    assert out.tolist() == [12.0, 12.0]
    with pytest.raises(ProgramError, match="a state or bound tensor is on meta"):
        DeviceProgram(Sum(False), [total], [torch.ones(2, device="meta")])


@pytest.mark.parametrize("copied", [False, True])
def test_state_is_updated_in_place(copied: bool) -> None:
    total = torch.zeros(2)
    program = DeviceProgram(Sum(copied), [total])
    for count in (1, 2):
        (out,) = program.run(torch.full((2,), 3.0))
        assert total.tolist() == [3.0 * count] * 2
        assert out.tolist() == [6.0 * count] * 2


def test_graphs_need_a_device_that_has_them() -> None:
    with pytest.raises(ProgramError, match="CUDA graphs need a CUDA device, the module is on cpu"):
        DeviceProgram(Sum(False), [torch.zeros(2)], record=True)


def test_tensors_elsewhere_are_refused() -> None:
    with pytest.raises(ProgramError, match="a state or bound tensor is on meta, the module on cpu"):
        DeviceProgram(Sum(False), [torch.zeros(2, device="meta")])
    with pytest.raises(ProgramError, match="Sum: an input is on meta, not on cpu"):
        DeviceProgram(Sum(False), [torch.zeros(2)]).run(torch.zeros(2, device="meta"))


@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a CUDA device; `make gpu-check` compares there"
)
def test_a_recorded_graph_gives_what_the_module_does() -> None:
    total = torch.zeros(2, device="cuda")
    program = DeviceProgram(Sum(False).cuda(), [total], record=True)
    for count in (1, 2, 3):
        (out,) = program.run(torch.full((2,), 3.0, device="cuda"))
        assert out.tolist() == [6.0 * count] * 2
    assert total.tolist() == [9.0, 9.0]


class NoWaiting(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Fails at operators whose result or whose result's shape is known to the processor only by waiting."""

    WAITS = (
        "aten::_local_scalar_dense",
        "aten::nonzero",
        "aten::masked_select",
        "aten::_unique2",
        "aten::item",
    )

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen += 1
        name = func.name().partition(".")[0]
        masks: list[Tensor] = []
        if name in ("aten::index", "aten::index_put", "aten::index_put_"):
            # How many elements a mask picks is known only by waiting.
            masks = [index for index in args[1] if index is not None and index.dtype == torch.bool]
        if name in self.WAITS or masks:
            raise AssertionError(f"{func.name()} waits for the device")
        return func(*args, **(kwargs or {}))


def test_the_mode_catches_what_waits() -> None:
    waits: list[Callable[[Tensor], object]] = [
        lambda x: x.sum().item(),
        lambda x: bool(x.any()),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
    ]
    for wait in waits:
        with NoWaiting(), pytest.raises(AssertionError, match="waits for the device"):
            wait(torch.ones(2))


def video_inputs(config: VideoConfig, frames: int, held: int, dtype: torch.dtype) -> list[Tensor]:
    torch.manual_seed(1)
    model, stream = config.transformer, config.stream
    time, *space = model.rotary_pairs
    return [
        torch.randn(frames, *config.latent_shape).to(dtype),
        torch.randn(frames, model.freq_dim).to(dtype),
        torch.randn(frames, time, 2),
        torch.randn(config.frame_tokens, sum(space), 2),
        torch.arange(held - frames, held),
        torch.arange(stream.window) < held,
        *([torch.randn(stream.window, time, 2)] if stream.rotary == "relative" else []),
        *(torch.randn(shape).to(dtype) for shape in cross_shapes(config).values()),
    ]


def video_state(config: VideoConfig, dtype: torch.dtype) -> list[Tensor]:
    torch.manual_seed(2)
    return [torch.randn(rows, *shape).to(dtype) for rows, shape in cache_shapes(config).values()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_pass_of_video_waits_for_the_device(dtype: torch.dtype) -> None:
    config, vae = video.config(small=True)
    model = WanTransformer(config.transformer).to(dtype)
    inputs, state = video_inputs(config, 3, 9, dtype), video_state(config, dtype)
    decoder = WanVae(vae).to(dtype)
    caches = [torch.zeros(shape, dtype=dtype) for shape in decoder_shapes(vae, 4, 4).values()]
    latents, row = torch.randn(1, vae.latent, 4, 4).to(dtype), torch.zeros(1, dtype=torch.int64)
    with NoWaiting() as mode:
        for held in (None, 9):
            DeviceProgram(Denoise(model, config, held), state).run(*inputs)
            DeviceProgram(Remember(model, config, held), state).run(*inputs)
        for stage in (DecodeFirst, DecodeNext):
            DeviceProgram(stage(decoder), caches).run(latents, row)
    assert mode.seen > 100


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_step_of_images_waits_for_the_device(dtype: torch.dtype) -> None:
    config, side, own = images.config("flux", small=True)
    caches = [
        torch.randn(1, config.heads, own * own, config.head_dim).to(dtype) for _ in range(2 * config.blocks)
    ]
    inputs = [
        torch.randn(1, side * side, config.channels).to(dtype),
        torch.randn(1, config.scalars, config.freq_dim).to(dtype),
        torch.randn(1, config.pooled_dim).to(dtype),
        torch.randn(1, config.text_tokens, config.text_dim).to(dtype),
        torch.randn(config.text_tokens + side * side, config.head_dim // 2, 2),
    ]
    program = DeviceProgram(ImageDenoise(FluxTransformer(config).to(dtype)), [])
    with NoWaiting() as mode:
        (velocity,) = program.run(*inputs, *caches)
    assert mode.seen > 100
    assert velocity.dtype == dtype


def test_no_step_of_speech_waits_for_the_device() -> None:
    config, streams, lanes = speech.config("100M", small=True), 3, 4
    state = [
        torch.zeros(rows * (streams + 1), *shape, dtype=getattr(torch, dtype))
        for rows, shape, dtype in static_shapes(config, lanes).values()
    ]
    program = DeviceProgram(StaticStep(Encoder(config), lanes, lanes), state)
    found = 0
    for frame in range(0, 3 * lanes, lanes):
        windows = torch.randn(streams, lanes, config.window, config.mel_bins)
        fresh, slots = torch.tensor([lanes, lanes, 1]), torch.arange(streams)
        arrived = torch.tensor([frame + lanes, frame + lanes, frame // lanes + 1])
        least, cap = torch.zeros(streams), torch.full((streams,), NO_CAP)
        with NoWaiting() as mode:
            _, _, count, _ = program.run(windows, fresh, slots, arrived, least, cap, torch.zeros_like(cap))
        assert mode.seen > 100
        found += int(count.sum())
    assert found > 0


@pytest.mark.parametrize("rotary", ["absolute", "relative"])
@pytest.mark.parametrize("held", [3, 6, 9])
def test_a_window_cut_to_length_gives_what_a_masked_one_does(rotary: Any, held: int) -> None:
    small, _ = video.config(small=True)
    config = VideoConfig(small.transformer, StreamConfig(height=4, width=4, window=9, rotary=rotary))
    torch.manual_seed(0)
    model = WanTransformer(config.transformer)
    inputs = video_inputs(config, 3, held, torch.float32)
    for make in (Denoise, Remember):
        masked, cut = video_state(config, torch.float32), video_state(config, torch.float32)
        want = DeviceProgram(make(model, config), masked).run(*inputs)
        have = DeviceProgram(make(model, config, held), cut).run(*inputs)
        for one, other in zip((*want, *masked), (*have, *cut), strict=True):
            torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-5)


def test_bfloat16_is_close_to_float32() -> None:
    config, _ = video.config(small=True)
    torch.manual_seed(0)
    model = WanTransformer(config.transformer)
    wide = DeviceProgram(Denoise(model, config, 9), video_state(config, torch.float32)).run(
        *video_inputs(config, 3, 9, torch.float32)
    )[0]
    narrow = DeviceProgram(
        Denoise(model.to(torch.bfloat16), config, 9), video_state(config, torch.bfloat16)
    ).run(*video_inputs(config, 3, 9, torch.bfloat16))[0]
    assert narrow.dtype == torch.bfloat16
    assert 0 < float((narrow.float() - wide).norm() / wide.norm()) < 0.02


class Branches(nn.Module):
    """Needs a value before it can go on."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight if x.sum() > 0 else x


@pytest.mark.parametrize("varying", [False, True])
def test_a_compiled_program_does_the_same(captured: list[str], varying: bool) -> None:
    total = torch.zeros(2)
    program = DeviceProgram(Sum(False), [total], compiled=True, varying=varying)
    address = total.data_ptr()
    for number in (1.0, 2.0, 3.0):
        (out,) = program.run(torch.full((2,), number))
    assert out.tolist() == [12.0, 12.0]
    assert total.tolist() == [6.0, 6.0]
    assert total.data_ptr() == address
    assert captured == ["Sum"]


def test_what_is_no_single_graph_is_refused(captured: list[str]) -> None:
    with pytest.raises(ProgramError, match="Branches cannot be compiled: "):
        DeviceProgram(Branches(), [], compiled=True).run(torch.ones(1))


@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="needs a C++ compiler")
def test_the_compiler_does_the_same() -> None:
    total = torch.zeros(2)
    program = DeviceProgram(Sum(False), [total], compiled=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the compiler's own
        outs = [program.run(torch.ones(2))[0].tolist() for _ in range(2)]
    torch._dynamo.reset()
    assert outs == [[2.0, 2.0], [4.0, 4.0]]
    assert total.tolist() == [2.0, 2.0]
