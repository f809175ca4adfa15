"""Operations counted from shapes are those that PyTorch counts while the modules run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from realtide.engines.ancat.config import NO_CAP, EncoderConfig, state_shapes
from realtide.engines.ancat.model import Encoder
from realtide.engines.ancat.stream import StreamStep
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
from realtide.engines.longlive.vae import DecodeNext, WanVae
from realtide.gpu import images, speech, video
from realtide.gpu.counts import decoded_frame, image_step, speech_frames, video_pass
from realtide.gpu.timing import Rates


def counted(run: Callable[[], object]) -> int:
    """Operations of a run, attention as the matrix products that it is."""
    with torch.inference_mode(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    return int(counter.get_total_flops())


def pass_inputs(config: VideoConfig, frames: int) -> list[Tensor]:
    stream, model = config.stream, config.transformer
    time, *space = model.rotary_pairs
    tables = [torch.zeros(frames, time, 2), torch.zeros(config.frame_tokens, sum(space), 2)]
    if stream.rotary == "relative":
        raise AssertionError
    return [
        torch.zeros(frames, *config.latent_shape),
        torch.zeros(frames, model.freq_dim),
        *tables,
        torch.arange(frames),
        torch.ones(stream.window, dtype=torch.bool),
        *(torch.zeros(shape) for shape in cross_shapes(config).values()),
        *(torch.zeros(rows, *shape) for rows, shape in cache_shapes(config).values()),
    ]


@pytest.mark.parametrize("held", [3, 6, 9])
def test_passes_of_video(held: int) -> None:
    config, _ = video.config(small=True)
    model = WanTransformer(config.transformer)
    inputs = pass_inputs(config, 3)
    for module, predict in ((Denoise(model, config, held), True), (Remember(model, config, held), False)):
        work = video_pass(config, 3, held, 4, predict=predict)
        assert counted(lambda module=module: module(*inputs)) == work.operations  # type: ignore[misc]


def test_a_decoded_frame_of_video() -> None:
    _, vae = video.config(small=True)
    shapes = decoder_shapes(vae, 4, 6).values()
    caches = [torch.zeros(shape) for shape in shapes]
    module = DecodeNext(WanVae(vae))
    run = lambda: module(torch.zeros(1, vae.latent, 4, 6), torch.zeros(1, dtype=torch.int64), *caches)  # noqa: E731
    assert counted(run) == decoded_frame(vae, 4, 6, 4).operations


@pytest.mark.parametrize("size", images.SIZES)
@pytest.mark.parametrize("conditions", [0, 1, 2])
def test_steps_of_images(size: str, conditions: int) -> None:
    config, side, own = images.config(size, small=True)
    model, held, text = FluxTransformer(config), conditions * own * own, config.text_tokens
    inputs: Sequence[Tensor] = [
        torch.zeros(2, side * side, config.channels),
        torch.zeros(2, config.scalars, config.freq_dim),
        torch.zeros(2, config.pooled_dim),
        torch.zeros(2, text, config.text_dim),
        torch.zeros(text + side * side, config.head_dim // 2, 2),
        *(torch.zeros(2, config.heads, held, config.head_dim) for _ in range(2 * config.blocks)),
    ]
    module = ImageDenoise(model)
    assert counted(lambda: module(*inputs)) == image_step(config, 2, side * side, held, 4).operations


def test_frames_of_speech_are_counted_without_attention() -> None:
    config = replace(speech.config("100M", small=True), rule="causal", right=0)
    streams = 3
    module = StreamStep(Encoder(config), 1)
    state = [
        torch.zeros(rows * streams, *shape, dtype=getattr(torch, dtype))
        for rows, shape, dtype in state_shapes(config, 1).values()
    ]
    every, none = torch.arange(streams), torch.zeros(streams, dtype=torch.int64)
    frames = (torch.zeros(streams, config.window, config.mel_bins), every, none, every, none + 1)
    run = lambda: module(*frames, torch.zeros(streams), none + NO_CAP, none, *state)  # noqa: E731
    keys = config.left + 1
    attention = config.layers * streams * 4 * keys * config.dim
    assert counted(run) - attention == speech_frames(config, streams, 4).operations


def test_the_large_models_are_of_the_size_that_is_claimed() -> None:
    def parameters(make: Callable[[], torch.nn.Module]) -> float:
        with torch.device("meta"):
            return sum(p.numel() for p in make().parameters())

    wide, _ = video.config(small=False)
    assert parameters(lambda: WanTransformer(wide.transformer)) == pytest.approx(1.42e9, rel=0.02)
    flux, _, _ = images.config("flux", small=False)
    assert parameters(lambda: FluxTransformer(flux)) == pytest.approx(11.9e9, rel=0.02)
    for size, wanted in (("30M", 30e6), ("100M", 100e6)):
        shapes: EncoderConfig = speech.config(size, small=False)
        assert parameters(lambda shapes=shapes: Encoder(shapes)) == pytest.approx(wanted, rel=0.1)  # type: ignore[misc]


def test_floors_are_work_over_rates() -> None:
    work = video_pass(VideoConfig(video.config(small=True)[0].transformer, StreamConfig()), 3, 12, 2)
    compute, memory = Rates(1e12, 1e9).floors(work)
    assert compute == pytest.approx(work.operations / 1e9)
    assert memory == pytest.approx(work.bytes / 1e6)
    assert np.isfinite([compute, memory]).all()
