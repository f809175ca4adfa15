"""The VAE against diffusers', and the preview projection."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from realtide.engines.easycontrol.config import VaeConfig
from realtide.engines.easycontrol.vae import Projection, Vae
from realtide.engines.runtime.golden import difference
from realtide.engines.runtime.torch_program import load
from tests.engines.easycontrol.conftest import GOLDEN

CONFIG = VaeConfig(latent=4, widths=(8, 16, 16), layers=1, groups=4, scaling=0.36, shift=0.12)


def test_it_computes_what_diffusers_does() -> None:
    case = load_file(GOLDEN / "flux_vae_seed51.safetensors")
    vae = load(Vae(CONFIG), load_file(GOLDEN / "flux_vae_weights_seed51.safetensors"))
    with torch.inference_mode():
        encoded = vae.encode(torch.from_numpy(case["pixels"])).numpy()
        decoded = vae.decode(torch.from_numpy(case["latents"])).numpy()
    assert difference(encoded, case["encoded_mean"]).rel_l2 < 1e-5
    assert difference(decoded, case["decoded_unclamped"]).rel_l2 < 1e-5


def test_weights_that_do_not_fit_are_named() -> None:
    weights = load_file(GOLDEN / "flux_vae_weights_seed51.safetensors")
    weights.pop("encoder.conv_in.bias")
    with pytest.raises(ValueError, match=r"lack 'encoder\.conv_in\.bias'"):
        load(Vae(CONFIG), weights)


def test_a_preview_is_linear_in_each_latent_pixel() -> None:
    projection = Projection(4, 2)
    torch.nn.init.normal_(projection.weight)
    latents = torch.zeros(1, 4, 3, 5)
    latents[0, :, 1, 2] = torch.tensor([1.0, 2.0, 3.0, 4.0])
    with torch.inference_mode():
        pixels = projection(latents).numpy()
    assert pixels.shape == (1, 3, 6, 10)
    assert set(zip(*np.nonzero(pixels[0].any(0)), strict=True)) == {(2, 4), (2, 5), (3, 4), (3, 5)}
