"""The shipped bundle: whole, small, and its clips are what the programs say."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from realtide.bundle import load_bundle, verify
from realtide.engines.longlive.config import (
    StreamConfig,
    TextConfig,
    TransformerConfig,
    VaeConfig,
    VideoConfig,
)

BLOCKS = 3


@pytest.fixture(scope="module")
def player(emoji: Callable[[str], Any], bundle: Path) -> Any:
    return emoji("serve").Player(bundle)


def test_the_bundle_is_whole_and_small(bundle: Path) -> None:
    found = load_bundle(bundle)
    assert verify(found) == []
    assert sum(file.size for file in found.manifest.files) <= 14_000_000


def test_its_shapes_are_the_recipe_s(emoji: Callable[[str], Any], bundle: Path) -> None:
    shapes, scene = emoji("shapes"), emoji("scene")
    parts = load_bundle(bundle).manifest.architecture
    vae = VaeConfig.from_dict(parts["vae"])
    assert vae == shapes.vae_config(vae.mean, vae.std)
    assert TextConfig.from_dict(parts["text"]) == shapes.text_config()
    video = VideoConfig(
        TransformerConfig.from_dict(parts["transformer"]), StreamConfig.from_dict(parts["stream"])
    )
    assert video == shapes.video_config()
    assert parts["video"] == {"frames_per_second": scene.FRAMES_PER_SECOND}


def test_backgrounds_are_as_told(emoji: Callable[[str], Any], player: Any) -> None:
    scene, judge = emoji("scene"), emoji("judge")
    for seed, (name, colour) in enumerate(scene.BACKGROUNDS.items()):
        frames = player.play([(0, f"a fox moves left on a {name} background")], 1, seed)
        assert frames.shape == (9, 3, scene.SIZE, scene.SIZE)
        seen = judge.look(frames[-1]).background
        np.testing.assert_allclose(seen, np.array(colour) / 255, atol=0.12)


@pytest.mark.parametrize("motion", ["left", "right", "up", "down", "clockwise", "counterclockwise", "still"])
def test_a_clip_follows_its_prompt(emoji: Callable[[str], Any], player: Any, motion: str) -> None:
    """Every block of a clip; areas are compared with each other, as the real emoji is not at hand."""
    judge, play, prompts = emoji("judge"), emoji("play"), emoji("prompts")
    frames = player.play([(0, prompts.plain(("soccer ball", motion, "green")))], BLOCKS, 1)
    seen = [judge.look(frame) for frame in frames]
    positions = np.array([one.centroid for one in seen])
    areas = np.array([one.area for one in seen])
    assert areas.min() > 100
    verdict = judge.Judge(None).verdict
    ones = np.ones(len(frames))
    found = [verdict(positions[play.span(block)], ones[play.span(block)]) for block in range(BLOCKS)]
    assert found == [motion] * BLOCKS


def test_a_new_prompt_turns_the_emoji(emoji: Callable[[str], Any], player: Any) -> None:
    judge, play, prompts = emoji("judge"), emoji("play"), emoji("prompts")
    said = [(0, prompts.plain(("fox", "right", "blue"))), (2, prompts.plain(("fox", "left", "blue")))]
    frames = player.play(said, 4, 2)
    positions = np.array([judge.look(frame).centroid for frame in frames])
    verdict = judge.Judge(None).verdict
    ones = np.ones(len(frames))
    found = [verdict(positions[play.span(block)], ones[play.span(block)]) for block in (1, 3)]
    assert found == ["right", "left"]


def test_a_long_stream_keeps_its_emoji(emoji: Callable[[str], Any], player: Any) -> None:
    """Far beyond the window, with a new prompt on the way."""
    judge, play, prompts = emoji("judge"), emoji("play"), emoji("prompts")
    said = [(0, prompts.plain(("heart", "left", "white"))), (16, prompts.plain(("heart", "down", "white")))]
    blocks = 32
    frames = player.play(said, blocks, 3)
    seen = [judge.look(frame) for frame in frames]
    positions = np.array([one.centroid for one in seen])
    areas = np.array([one.area for one in seen])
    assert 0.5 < np.median(areas[-12:]) / np.median(areas[:9]) < 2.0
    verdict = judge.Judge(None).verdict
    ones = np.ones(len(frames))
    found = [verdict(positions[play.span(block)], ones[play.span(block)]) for block in range(blocks)]
    assert found.count("left") >= 15
    assert found[16:].count("down") >= 15
