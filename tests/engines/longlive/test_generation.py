"""Streams: cached generation against whole forwards, prompt switches, export, parking."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from realtide.engines.engine import CheckpointMismatch
from realtide.engines.longlive import noise, rotary, schedule, window
from realtide.engines.longlive.generation import VideoStream
from realtide.engines.runtime.program import Array
from tests.engines.longlive.conftest import Player, video_config


def frame_mask(player: Player, frames: int) -> torch.Tensor:
    """[frames, frames]: a frame sees its block, the sink, and as many frames as the window holds."""
    stream = player.config.stream
    ends = (np.arange(frames) // stream.block + 1) * stream.block
    index = np.arange(frames)
    held = index[None] >= ends[:, None] - (stream.window - stream.sink)
    mask = (index[None] < ends[:, None]) & (held | (index[None] < stream.sink))
    return torch.from_numpy(mask)


def test_cached_generation_is_a_whole_forward_over_the_window() -> None:
    """Every pass's flow, also once the window moves; clean frames at timestep 0, the block at its own."""
    player = Player(video_config())
    config = player.config
    stream, _ = player.stream(seed=5)
    stream.set_prompt(player.text(1))
    done: list[Array] = []
    timesteps = schedule.warped(config.stream.steps, config.stream.shift)
    for first in range(0, 12, 2):
        flows: list[Array] = []
        block = stream.block(flows.append)
        noisy = noise.frames(5, first, 2, 0, config.latent_shape)
        for step, (timestep, flow) in enumerate(zip(timesteps, flows, strict=True), 1):
            latents = np.concatenate([*done, noisy])
            times = np.concatenate([np.zeros(first), np.full(2, timestep)])
            with torch.no_grad():
                whole = player.model(
                    torch.from_numpy(latents)[None],
                    torch.from_numpy(schedule.sinusoid(times, config.transformer.freq_dim))[None],
                    torch.from_numpy(player.padded(1))[None],
                    torch.from_numpy(rotary.time_table(config, np.arange(len(latents)))),
                    torch.from_numpy(rotary.space_table(config)),
                    frame_mask(player, len(latents)),
                )[0]
            np.testing.assert_allclose(flow, whole[first:].numpy(), atol=2e-5)
            clean = schedule.clean(noisy, flow, timestep)
            if step < len(timesteps):
                fresh = noise.frames(5, first, 2, step, config.latent_shape)
                noisy = schedule.noised(clean, fresh, timesteps[step])
        np.testing.assert_array_equal(clean, block)
        done.append(block)


def test_relative_positions_are_absolute_ones_until_the_window_moves() -> None:
    players = [Player(video_config(rotary=mode)) for mode in ("absolute", "relative")]
    streams = [player.stream()[0] for player in players]
    for player, stream in zip(players, streams, strict=True):
        stream.set_prompt(player.text(1))
    for _ in range(3):
        np.testing.assert_allclose(streams[0].block(), streams[1].block(), atol=2e-5)
    assert np.abs(streams[0].block() - streams[1].block()).max() > 1e-2


@pytest.mark.parametrize("mode", ["absolute", "relative"])
@pytest.mark.parametrize("blocks", [2, 5])
def test_an_exported_stream_goes_on_bit_for_bit(mode: str, blocks: int) -> None:
    player = Player(video_config(rotary=mode))
    stream, _ = player.stream(seed=2**63)
    stream.set_prompt(player.text(1))
    for _ in range(blocks):
        stream.block()
    resumed = VideoStream.resume(player.config, *player.bound(), stream.export())
    assert (resumed.frames, resumed.parked) == (2 * blocks, False)
    for number in (None, 2, None):
        if number:
            assert stream.set_prompt(player.text(number)) == resumed.set_prompt(player.text(number))
        np.testing.assert_array_equal(stream.block(), resumed.block())


def test_a_stream_is_exported_before_its_first_block_and_before_its_prompt() -> None:
    player = Player(video_config())
    stream, _ = player.stream()
    for prompt in (None, 1):
        if prompt:
            stream.set_prompt(player.text(prompt))
        resumed = VideoStream.resume(player.config, *player.bound(), stream.export())
        resumed.set_prompt(player.text(1))
        other, _ = player.stream()
        other.set_prompt(player.text(1))
        np.testing.assert_array_equal(resumed.block(), other.block())


@pytest.mark.parametrize("global_sink", [True, False])
@pytest.mark.parametrize("mode", ["absolute", "relative"])
@pytest.mark.parametrize("blocks", [1, 3, 6])
def test_a_parked_stream_comes_back_as_a_recache_leaves_it(global_sink: bool, mode: str, blocks: int) -> None:
    """Rebuilt from latents elsewhere, or recached in place under the same prompt: the same caches."""
    player = Player(video_config(global_sink=global_sink, rotary=mode))
    stream, cache = player.stream()
    stream.set_prompt(player.text(1))
    for _ in range(blocks):
        stream.block()
    # What is replayed without a global sink makes another sink, so keep it out of the comparison's way.
    checkpoint = stream.export(cache=False)
    programs, elsewhere = player.bound()
    parked = VideoStream.resume(player.config, programs, elsewhere, checkpoint)
    assert parked.parked
    with pytest.raises(ValueError, match="rebuild"):
        parked.block()
    assert parked.rebuild() == min(2 * blocks, player.config.stream.window)
    if global_sink or 2 * blocks <= player.config.stream.window:
        stream.set_prompt(player.text(1))
        for name, want in cache.items():
            have = rows(player, elsewhere[name], parked.frames)
            np.testing.assert_allclose(have, rows(player, want, parked.frames), atol=2e-5)
        np.testing.assert_allclose(parked.block(), stream.block(), atol=1e-3)
    else:
        parked.block()


def rows(player: Player, cache: Array, frames: int) -> Array:
    """A cache's places that hold frames, [heads, places, tokens, width]."""
    config = player.config
    places = window.order(config.stream, frames)
    shape = config.transformer.heads, config.stream.window, config.frame_tokens, config.transformer.head_dim
    return cache.reshape(shape)[:, places]


def test_parking_in_place_and_twice() -> None:
    player = Player(video_config())
    stream, cache = player.stream()
    stream.set_prompt(player.text(1))
    for _ in range(5):
        stream.block()
    before = {name: rows(player, array, 10) for name, array in cache.items()}
    stream.park()
    stream.park()
    for array in cache.values():
        array[...] = -3.0
    assert len(stream.export()) == len(stream.export(cache=False))  # there is none
    stream.rebuild()
    first = {name: rows(player, array, 10) for name, array in cache.items()}
    stream.rebuild()
    for name, array in first.items():
        np.testing.assert_array_equal(rows(player, cache[name], 10), array)
        # The sink's own latents under the sink's own prompt: what the first block had left.
        np.testing.assert_allclose(array[:, :2], before[name][:, :2], atol=2e-5)
    assert any(np.abs(array[:, 2:] - before[name][:, 2:]).max() > 1e-3 for name, array in first.items())


def test_a_sink_is_rebuilt_under_its_own_prompt() -> None:
    player = Player(video_config())
    stream, cache = player.stream()
    stream.set_prompt(player.text(1))
    for _ in range(4):
        stream.block()
    assert stream.set_prompt(player.text(2)) == 4  # the frames after the sink
    stream.block()
    want = {name: rows(player, array, 10)[:, :2] for name, array in cache.items()}
    resumed = VideoStream.resume(player.config, *(bound := player.bound()), stream.export(cache=False))
    resumed.rebuild()
    for name, array in want.items():
        np.testing.assert_allclose(rows(player, bound[1][name], 10)[:, :2], array, atol=2e-5)


def test_without_a_global_sink_the_oldest_replayed_frames_become_the_sink() -> None:
    player = Player(video_config(global_sink=False))
    stream, cache = player.stream()
    stream.set_prompt(player.text(1))
    for _ in range(5):
        stream.block()
    before = cache["value_0"].copy()
    assert stream.set_prompt(player.text(1)) == 6
    # The first layer's values depend on their own frame alone: frames 4 and 5 went to the sink's places.
    config = player.config.stream
    left = rows(player, before, 8)[:, list(window.order(config, 8)).index(window.places(config, 4, 1)[0])]
    assert np.abs(rows(player, cache["value_0"], 10)[:, 0] - left).max() > 1e-3
    again = VideoStream.resume(player.config, *(bound := player.bound()), stream.export(cache=False))
    again.rebuild()
    # Alone, as they are rebuilt, or among the others: the first layer's values are the same.
    have, want = (rows(player, a["value_0"], 10) for a in (bound[1], cache))
    np.testing.assert_allclose(have, want, atol=2e-5)


def test_a_prompt_changes_what_follows_and_not_what_was() -> None:
    player = Player(video_config())
    streams = [player.stream()[0] for _ in range(2)]
    for stream in streams:
        assert stream.set_prompt(player.text(1)) == 0
        stream.block()
    assert streams[1].set_prompt(player.text(2)) == 2
    assert np.abs(streams[0].block() - streams[1].block()).max() > 1e-2


def test_calls_that_cannot_work_are_refused() -> None:
    player = Player(video_config())
    stream, _ = player.stream()
    with pytest.raises(ValueError, match="set a prompt"):
        stream.block()
    with pytest.raises(ValueError, match=r"at most 5 embeddings of 10, not \[6, 10\]"):
        stream.set_prompt(np.zeros((6, 10), np.float32))
    with pytest.raises(ValueError, match="seed must be"):
        player.stream(seed=-1)


def test_damaged_and_foreign_checkpoints_are_refused() -> None:
    player = Player(video_config())
    stream, _ = player.stream()
    stream.set_prompt(player.text(1))
    stream.block()
    data = stream.export()
    for damaged in (b"", data[:20], data[:-4], data.replace(b'\\"frames\\": 2', b'\\"frames\\": 9')):
        programs, cache = player.bound()
        with pytest.raises(CheckpointMismatch):
            VideoStream.resume(player.config, programs, cache, damaged)
        assert all((array == 7.0).all() for array in cache.values())
    wider = Player(video_config(width=8))
    with pytest.raises(
        CheckpointMismatch, match=r"recent is \[2, 4, 4, 6\] where this model has \[2, 4, 4, 8\]"
    ):
        VideoStream.resume(wider.config, *wider.bound(), data)
