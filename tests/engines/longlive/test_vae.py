"""The VAE: frames as they come against whole videos."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from realtide.engines.longlive.config import decoder_shapes, encoder_shapes
from realtide.engines.longlive.programs import FrameDecoder, FrameEncoder
from realtide.engines.longlive.torch_programs import decoder_programs, encoder_programs
from realtide.engines.longlive.vae import WanVae, Whole
from realtide.engines.runtime.program import Array


def dirty(shapes: dict[str, tuple[int, int, int, int]]) -> dict[str, Array]:
    """Caches that another stream has left."""
    return {name: np.full(shape, 9.0, np.float32) for name, shape in shapes.items()}


def test_streaming_decode_is_whole_decode(vae: WanVae) -> None:
    latents = torch.randn(6, 3, 4, 5, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        whole = vae.decode(latents[None], Whole())[0].numpy()
    caches = dirty(decoder_shapes(vae.config, 4, 5))
    programs = decoder_programs(vae, caches, 4, 5)
    for _ in range(2):  # a second stream finds the caches of the first
        decoder = FrameDecoder(programs)
        frames = [decoder.decode(latent) for latent in latents.numpy()]
        assert [len(part) for part in frames] == [1, 2, 2, 2, 2, 2]
        np.testing.assert_allclose(np.concatenate(frames), whole, atol=1e-5)


def test_streaming_encode_is_whole_encode(vae: WanVae) -> None:
    video = torch.randn(9, 3, 16, 20, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        whole = vae.encode(video[None], Whole())[0].numpy()
    assert whole.shape == (5, 3, 4, 5)
    encoder = FrameEncoder(encoder_programs(vae, dirty(encoder_shapes(vae.config, 16, 20)), 16, 20))
    chunks = np.split(video.numpy(), range(1, 9, 2))
    np.testing.assert_allclose(np.stack([encoder.encode(chunk) for chunk in chunks]), whole, atol=1e-5)


def test_decoding_goes_on_elsewhere_bit_for_bit(vae: WanVae) -> None:
    latents = np.random.default_rng(0).standard_normal((5, 3, 4, 5)).astype(np.float32)
    shapes = decoder_shapes(vae.config, 4, 5)
    caches = dirty(shapes)
    decoder = FrameDecoder(decoder_programs(vae, caches, 4, 5))
    for latent in latents[:3]:
        decoder.decode(latent)
    moved = {name: array.copy() for name, array in caches.items()}
    other = FrameDecoder(decoder_programs(vae, moved, 4, 5), done=decoder.done)
    for latent in latents[3:]:
        np.testing.assert_array_equal(decoder.decode(latent), other.decode(latent))


@pytest.mark.parametrize("frame", [1, 3])
def test_the_future_changes_nothing(vae: WanVae, frame: int) -> None:
    latents = torch.randn(1, 5, 3, 4, 5, generator=torch.Generator().manual_seed(1))
    changed = latents.clone()
    changed[:, frame:] += 1
    with torch.inference_mode():
        before, after = vae.decode(latents, Whole())[0], vae.decode(changed, Whole())[0]
    known = 1 + 2 * (frame - 1)
    torch.testing.assert_close(before[:known], after[:known])
    assert (before[known:] - after[known:]).abs().max() > 1e-3


def test_batches_do_not_mix(vae: WanVae) -> None:
    latents = torch.randn(2, 3, 3, 4, 5, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        both = vae.decode(latents, Whole())
        for row in range(2):
            torch.testing.assert_close(both[row], vae.decode(latents[row : row + 1], Whole())[0])
