"""Clips and their judge: on real clips it is always right. Drawn discs stand in for the emoji."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

MOTIONS = ("left", "right", "up", "down", "clockwise", "counterclockwise", "still")


@pytest.fixture(scope="module")
def scene(emoji: Callable[[str], Any]) -> Any:
    return emoji("scene")


@pytest.fixture(scope="module")
def discs(scene: Any) -> Any:
    """Sprites without the icons' package: a disc for each name, its colour by its number."""
    sprites = scene.Sprites.__new__(scene.Sprites)
    fine = scene.SPRITE * scene.PHASES
    rows, columns = np.mgrid[:fine, :fine] + 0.5 - fine / 2
    drawn = {}
    for number, name in enumerate(scene.OBJECTS):
        pixels = np.zeros((fine, fine, 4), np.float32)
        inside = np.hypot(rows + number % 7, columns) < fine * (0.25 + 0.2 * (number % 5) / 5)
        colour = np.array([number % 2, (number // 2) % 2, (number // 4) % 2, 1], np.float32)
        pixels[inside] = colour
        pixels[inside & (columns > 0), :3] = 1 - colour[:3]  # one half differs from any background
        shifts = [(dx, dy) for dy in range(scene.PHASES) for dx in range(scene.PHASES)]
        drawn[name] = np.stack([scene._shrunk(pixels, dx, dy) for dx, dy in shifts])
    sprites._drawn = drawn
    return sprites


def test_motions_are_those_that_prompts_name(scene: Any, emoji: Callable[[str], Any]) -> None:
    assert tuple(scene.MOTIONS) == MOTIONS == tuple(emoji("prompts").MOTION_PHRASES)


def test_a_frame_after_another_moves_as_told(scene: Any) -> None:
    at = np.array([32.0, 16.0])
    step = {motion: scene.track(at, [motion])[0] - at for motion in MOTIONS}
    np.testing.assert_allclose(step["left"], [-2, 0])
    np.testing.assert_allclose(step["right"], [2, 0])
    np.testing.assert_allclose(step["up"], [0, -2])
    np.testing.assert_allclose(step["down"], [0, 2])
    np.testing.assert_allclose(step["still"], [0, 0])
    # Above the centre clockwise is to the right; on the circle a block is a quarter of it.
    assert step["clockwise"][0] > 1.5 > -1.5 > step["counterclockwise"][0]
    np.testing.assert_allclose(scene.track(at, ["clockwise"] * 12)[-1], [48, 32], atol=1e-9)


def test_what_leaves_comes_in_on_the_other_side(scene: Any, discs: Any) -> None:
    frames = discs.render(scene.Clip("heart", "white", (1.0, 30.0), ("left", "left")))
    assert frames.shape == (scene.frames_of(2), 3, 64, 64)
    assert np.ptp(frames[5][:, 30]) > 0.5
    moved = np.roll(frames[0], -2 * 20, axis=2)
    np.testing.assert_allclose(frames[20], moved, atol=1e-6)


def test_frames_of_a_block(scene: Any) -> None:
    blocks = [scene.block_of(frame) for frame in range(scene.frames_of(3))]
    assert [blocks.count(block) for block in range(3)] == [9, 12, 12]


def test_a_jump_lands_where_it_is_told(scene: Any) -> None:
    clip = scene.Clip("cat", "blue", (32.0, 16.0), ("up",) * 3, landing=(8.0, 60.0))
    positions = clip.positions()
    assert len(positions) == scene.frames_of(3)
    np.testing.assert_allclose(positions[8], [32, 0])
    np.testing.assert_allclose(positions[9], [8, 60])
    np.testing.assert_allclose(positions[10], [8, 58])


@pytest.mark.parametrize("motion", MOTIONS)
def test_the_judge_is_right_on_every_real_block(
    scene: Any, discs: Any, emoji: Callable[[str], Any], motion: str
) -> None:
    judge, play = emoji("judge").Judge(discs), emoji("play")
    rng = np.random.default_rng(MOTIONS.index(motion))
    for _ in range(12):
        name, background = str(rng.choice(list(scene.OBJECTS))), str(rng.choice(list(scene.BACKGROUNDS)))
        others = tuple(str(m) for m in rng.choice(MOTIONS, 2))
        clip = scene.Clip(name, background, scene.random_start(rng), (*others, motion, motion))
        positions, areas = judge.positions(discs.render(clip), name, background)
        found = [judge.verdict(positions[play.span(b)], areas[play.span(b)]) for b in range(4)]
        assert found == list(clip.motions)


def test_the_judge_refuses_what_is_no_motion(scene: Any, discs: Any, emoji: Callable[[str], Any]) -> None:
    judge = emoji("judge").Judge(discs)
    steps = np.arange(13)[:, None]
    there = np.ones(13)
    diagonal = (np.array([10.0, 10.0]) + steps * [2.0, -2.0]) % 64
    assert judge.verdict(diagonal, there) == "none"
    left = (np.array([10.0, 10.0]) - steps * [2.0, 0.0]) % 64
    assert judge.verdict(left, there) == "left"
    assert judge.verdict(left, there * 0.2) == "none"
    assert judge.verdict(left, there * 5) == "none"
    jumped = left.copy()
    jumped[1:] = (jumped[1:] + 20) % 64
    assert judge.verdict(jumped, there) == "none"


def test_the_judge_names_what_it_sees(scene: Any, emoji: Callable[[str], Any], discs: Any) -> None:
    # Two discs of one colour and size cannot be told apart: take the colours' first ones.
    judge = emoji("judge").Judge(SimpleNamespace(frame=discs.frame, names=["red apple", "banana", "orange"]))
    for name in ("banana", "orange"):
        frame = discs.frame(name, "gray", np.array([60.0, 5.0])).transpose(2, 0, 1) * 2 - 1
        assert judge.identify(frame) == (name, "gray")
