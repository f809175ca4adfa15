"""The recipe's endless streams: their layouts are what a rollout sees, their scenes follow their pictures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from realtide.engines.longlive import schedule
from realtide.engines.longlive.packed import Packed
from realtide.engines.longlive.rollout import Rollout
from realtide.engines.longlive.transformer import WanTransformer
from tests.engines.longlive.conftest import Player, video_config


@pytest.mark.parametrize("switched", [False, True])
def test_layouts_are_what_the_sampler_sees(emoji: Callable[[str], Any], switched: bool) -> None:
    player = Player(video_config(rotary="relative", window=8, places=6))
    config, model = player.config, player.model
    text = torch.from_numpy(np.stack([player.padded(0), player.padded(1)]))[None]
    torch.manual_seed(4)
    blocks = torch.randn(1, 4 if switched else 3, config.stream.block, *config.latent_shape)

    run = Rollout(model, config)
    run.set_prompt(text[:, 0])
    run.remember(blocks[:, 0])
    run.set_prompt(text[:, 1], recache=False)
    if switched:
        run.remember(blocks[:, 1:].flatten(1, 2))
    else:
        for block in range(1, 3):
            run.remember(blocks[:, block])
    noise = [torch.randn_like(blocks[:, 0]) for _ in config.stream.steps]
    made, given = run.block(noise)
    first, last = schedule.warped(config.stream.steps, config.stream.shift) / schedule.TABLE
    clean = (given[1] - last * noise[1]) / (1 - last)
    wanted = [(given[0] - clean) / first, (given[1] - made) / last]

    entries = emoji("streams").layouts(config, 2)[switched]
    inputs: list[torch.Tensor] = []
    sigmas: list[float] = []
    for entry in entries:
        noisy = entry.kind == "noisy"
        step = len(sigmas) - sum(other.kind != "noisy" for other in entries)
        inputs.append(given[step] if noisy else blocks[:, entry.block])
        sigmas.append((first, last)[step] if noisy else 0.0)
    wide = schedule.sinusoid(schedule.TABLE * np.array(sigmas), config.transformer.freq_dim)
    with torch.no_grad():
        flow = Packed(config, entries).flow(model, torch.stack(inputs, 1), torch.from_numpy(wide)[None], text)
    for step in range(2):
        np.testing.assert_allclose(flow[:, step - 2].numpy(), wanted[step].numpy(), atol=1e-4)


def test_streams_need_the_recipe_s_window(emoji: Callable[[str], Any]) -> None:
    with pytest.raises(ValueError, match="window of 4 blocks, got 3"):
        emoji("streams").layouts(video_config(rotary="relative", window=6), 1)


def test_the_emoji_is_found_where_it_lies(emoji: Callable[[str], Any]) -> None:
    look = emoji("streams").look
    plain = np.full((2, 16, 16), 0.5, np.float32)
    for x, y in ((5, 9), (0, 15), (15, 3)):
        latents = plain.copy()
        for dx in (-1, 0, 1):
            latents[:, y, (x + dx) % 16] = 2.0
        amount, place = look(latents)
        assert amount == pytest.approx(9.0)
        np.testing.assert_allclose(np.cos((place - (x, y)) * np.pi / 8), 1, atol=1e-6)


def test_deeper_transformers_say_the_same(emoji: Callable[[str], Any]) -> None:
    player = Player(video_config())
    config = player.config.transformer
    deeper = emoji("deepen").deepen(player.model.state_dict(), [0, 1, 1])

    model = WanTransformer(replace(config, layers=5)).eval().requires_grad_(False)
    model.load_state_dict(deeper)
    torch.manual_seed(6)
    latents = torch.randn(1, 2, *player.config.latent_shape)
    flows = []
    for one in (player.model, model):
        run = Rollout(one, player.config)
        run.set_prompt(torch.from_numpy(player.padded(0))[None])
        flows.append(run.block([latents, latents])[0])
    torch.testing.assert_close(flows[1], flows[0], atol=1e-5, rtol=0)
    assert (flows[0] - latents).abs().max() > 0.1
    with pytest.raises(ValueError, match=r"layers 0\.\.1"):
        emoji("deepen").deepen(player.model.state_dict(), [2])
