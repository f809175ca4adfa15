"""Training's forward and its rollouts against the stream that serves: the same latents."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from realtide.engines.longlive import noise, schedule
from realtide.engines.longlive.packed import Packed, layout
from realtide.engines.longlive.rollout import Rollout
from realtide.engines.runtime.program import Array
from tests.engines.longlive.conftest import Player, video_config

BLOCKS = 8
SEED = 5


@pytest.fixture(scope="module", params=[0, 6], ids=["Wan", "places"])
def player(request: pytest.FixtureRequest) -> Player:
    return Player(video_config(rotary="relative", window=8, places=request.param))


def served(player: Player, switches: tuple[int, ...]) -> tuple[list[Array], list[list[Array]]]:
    """Blocks of a stream that switches prompts, and every pass's flow."""
    stream, _ = player.stream(seed=SEED)
    stream.set_prompt(player.text(0))
    blocks, flows = [], []
    for block in range(BLOCKS):
        if block in switches:
            stream.set_prompt(player.text(1 + switches.index(block)))
        passes: list[Array] = []
        blocks.append(stream.block(passes.append))
        flows.append(passes)
    return blocks, flows


def drawn(player: Player, block: int, step: int) -> torch.Tensor:
    size = player.config.stream.block
    return torch.from_numpy(noise.frames(SEED, block * size, size, step, player.config.latent_shape))


SWITCHES = [(), (1,), (3,), (4,), (5,), (6,), (2, 5), (4, 5, 7)]


@pytest.mark.parametrize("switches", SWITCHES)
def test_a_rollout_is_the_stream(player: Player, switches: tuple[int, ...]) -> None:
    """Before and after the window moves, with switches of either kind; two videos at once."""
    blocks, _ = served(player, switches)
    rollout = Rollout(player.model, player.config)
    passes = len(player.config.stream.steps)
    texts = [torch.from_numpy(player.padded(index)) for index in range(len(switches) + 1)]
    rollout.set_prompt(torch.stack([texts[0], texts[0] + 1]))
    for block in range(BLOCKS):
        if block in switches:
            text = texts[1 + switches.index(block)]
            rollout.set_prompt(torch.stack([text, text + 1]))
        draws = [drawn(player, block, step) for step in range(passes)]
        latents, given = rollout.block([torch.stack([draw, draw]) for draw in draws])
        assert len(given) == passes
        np.testing.assert_allclose(latents[0].numpy(), blocks[block], atol=1e-4)
        assert (latents[1] - latents[0]).abs().max() > 1e-2  # the other video has other prompts
        rollout.remember(latents)


@pytest.mark.parametrize("switches", SWITCHES)
def test_packed_entries_predict_what_the_stream_predicts(player: Player, switches: tuple[int, ...]) -> None:
    blocks, flows = served(player, switches)
    config = player.config
    entries = layout(config, BLOCKS, switches, copies=2)
    timesteps = schedule.warped(config.stream.steps, config.stream.shift)
    latents, times, wanted = [], [], []
    counts: dict[int, int] = {}
    for entry in entries:
        clean = torch.from_numpy(blocks[entry.block])
        if entry.kind != "noisy":
            latents.append(clean)
            times.append(0.0)
            continue
        step = counts[entry.block] = counts.get(entry.block, -1) + 1
        noisy = drawn(player, entry.block, 0)
        for done in range(step):
            made = schedule.clean(noisy.numpy(), flows[entry.block][done], timesteps[done])
            fresh = drawn(player, entry.block, done + 1).numpy()
            noisy = torch.from_numpy(schedule.noised(made, fresh, timesteps[done + 1]))
        latents.append(noisy)
        times.append(timesteps[step])
        wanted.append(flows[entry.block][step])
    text = torch.stack([torch.from_numpy(player.padded(index)) for index in range(len(switches) + 1)])
    sinusoids = torch.from_numpy(schedule.sinusoid(times, config.transformer.freq_dim))
    batch = [torch.stack([part, part.flip(0)]) for part in (torch.stack(latents), sinusoids, text)]
    with torch.no_grad():
        flow = Packed(config, entries).flow(player.model, *batch)[0]
    noisy_flow = flow[[entry.kind == "noisy" for entry in entries]]
    np.testing.assert_allclose(noisy_flow.numpy(), np.stack(wanted), atol=1e-4)


def test_without_a_recache_a_rollout_keeps_its_cache(player: Player) -> None:
    text = torch.from_numpy(np.stack([player.padded(0), player.padded(1)]))
    ends = []
    for recache in (True, False):
        rollout = Rollout(player.model, player.config)
        rollout.set_prompt(text[:1])
        for block in range(2):
            rollout.remember(rollout.block([drawn(player, block, step)[None] for step in range(2)])[0])
        rollout.set_prompt(text[1:], recache=recache)
        ends.append(rollout.block([drawn(player, 2, step)[None] for step in range(2)])[0])
    assert (ends[0] - ends[1]).abs().max() > 1e-2


def test_layouts_refuse_what_they_do_not_describe() -> None:
    relative = video_config(rotary="relative", window=8)
    for config in (
        video_config(window=8),
        video_config(rotary="relative", window=8, global_sink=False),
        video_config(rotary="relative", window=8, sink=1),
        video_config(rotary="relative", window=7),
    ):
        with pytest.raises(ValueError, match="packed training"):
            layout(config, 4)
    for switches in ((0,), (4,), (2, 2), (3, 1)):
        with pytest.raises(ValueError, match="switches"):
            layout(relative, 4, switches)
