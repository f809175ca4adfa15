"""What the clips show: an emoji that moves over a plain background, on a torus (ours).

The frame is a torus of 64 x 64 pixels: what leaves on one side comes in on the other. A motion is a velocity
field on it, so the future follows from a position and a prompt. Positions are those of the emoji's centre,
(x, y) in pixels, y downwards.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]

SIZE = 64
"""Pixels of a frame, each way."""
FRAMES_PER_SECOND = 16
SPRITE = 24
"""Pixels of the square that an emoji is drawn into."""
PHASES = 4
"""Positions within a pixel at which sprites are drawn, each way."""
START = (32.0, 16.0)
JITTER = (-4, 0, 4)
"""A clip starts this many pixels beside START, each way: whole latent pixels, as are most of its moves."""
SPEED = 2.0
"""Pixels a frame."""
RADIUS = 16.0
"""Of the circles, which are about the frame's centre."""
PULL = 0.15
"""Share of the way to the circle that is made good in a frame."""

BLOCK = 3
"""Latent frames that are generated together."""
BLOCK_FRAMES = 12
"""Video frames of a block; the first block has 9, since the first latent frame is one video frame."""

OBJECTS: dict[str, str] = {
    "red apple": "red-apple", "banana": "banana", "orange": "tangerine", "strawberry": "strawberry",
    "watermelon": "watermelon", "pineapple": "pineapple", "avocado": "avocado", "tomato": "tomato",
    "broccoli": "broccoli", "mushroom": "mushroom", "hamburger": "hamburger", "doughnut": "doughnut",
    "cookie": "cookie", "birthday cake": "birthday-cake", "soccer ball": "soccer-ball",
    "basketball": "basketball", "heart": "red-heart", "star": "star", "sun": "sun-with-face",
    "cat": "cat-face", "dog": "dog-face", "fox": "fox", "panda": "panda", "pig": "pig-face",
    "frog": "frog", "penguin": "penguin", "owl": "owl", "octopus": "octopus", "crab": "crab",
    "turtle": "turtle", "butterfly": "butterfly", "ladybug": "lady-beetle", "rocket": "rocket",
    "car": "automobile", "crown": "crown", "robot": "robot", "ghost": "ghost", "pumpkin": "jack-o-lantern",
    "snowman": "snowman-without-snow", "sunflower": "sunflower",
}  # fmt: skip
"""Name in prompts: name of the icon. The VAE and the continuations learn from all of them."""
DRAWN = (
    "red apple", "banana", "orange", "strawberry", "watermelon", "soccer ball", "heart", "star",
    "cat", "dog", "fox", "panda", "frog", "penguin", "rocket", "ghost",
)  # fmt: skip
"""Objects that first blocks learn to draw from their names: those that the bundle is for."""

BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (250, 250, 250), "black": (16, 16, 20), "gray": (128, 128, 132), "blue": (70, 120, 225),
    "green": (60, 160, 90), "yellow": (248, 226, 120), "pink": (250, 175, 205), "purple": (110, 70, 170),
}  # fmt: skip
"""Name in prompts: RGB."""


def wrapped(offset: Float64) -> Float64:
    """Offsets on the torus, brought to -SIZE/2 .. SIZE/2."""
    half = SIZE / 2
    out: Float64 = (offset + half) % SIZE - half
    return out


def _straight(x: float, y: float, position: Float64) -> Float64:
    return position + SPEED * np.array([x, y])


def _circle(turn: int, position: Float64) -> Float64:
    """One frame round the centre; off the circle the object spirals towards it."""
    centre = np.full(2, SIZE / 2)
    offset = wrapped(position - centre)
    radius = np.hypot(*offset)
    angle = np.arctan2(offset[1], offset[0]) if radius > 1e-9 else -np.pi / 2
    # Where the object is far out or near the centre it is not to be faster, or to spin on the spot.
    angle += turn * np.radians(90 / BLOCK_FRAMES) * RADIUS / max(radius, RADIUS / 2)
    radius += PULL * (RADIUS - radius)
    return centre + radius * np.array([np.cos(angle), np.sin(angle)])


MOTIONS: dict[str, Callable[[Float64], Float64]] = {
    "left": partial(_straight, -1, 0),
    "right": partial(_straight, 1, 0),
    "up": partial(_straight, 0, -1),
    "down": partial(_straight, 0, 1),
    "clockwise": partial(_circle, 1),
    "counterclockwise": partial(_circle, -1),
    "still": partial(_straight, 0, 0),
}
"""Name: a position to that of the next frame."""


def track(start: Float64, motions: Sequence[str]) -> Float64:
    """Positions [len(motions), 2] of the frames after `start`, each reached by its motion."""
    found = []
    position = np.asarray(start, np.float64)
    for motion in motions:
        position = MOTIONS[motion](position) % SIZE
        found.append(position)
    return np.array(found).reshape(-1, 2)


def block_of(frame: int) -> int:
    """The block that a video frame belongs to."""
    return (frame + BLOCK_FRAMES - 9) // BLOCK_FRAMES


def frames_of(blocks: int) -> int:
    """Video frames of a clip."""
    return BLOCK_FRAMES * blocks - 3


@dataclass(frozen=True)
class Clip:
    """One clip: what is seen, where it starts, and the motion of every block.

    `landing`: where the second block begins, if the emoji jumps there.
    """

    object: str
    background: str
    start: tuple[float, float]
    motions: tuple[str, ...]
    landing: tuple[float, float] | None = None

    def positions(self) -> Float64:
        """Of every frame, [frames, 2]."""
        first = np.asarray(self.start, np.float64)[None]
        steps = [self.motions[block_of(frame)] for frame in range(1, frames_of(len(self.motions)))]
        if self.landing is None:
            return np.concatenate([first % SIZE, track(first[0], steps)])
        landing = np.asarray(self.landing, np.float64)[None]
        before, after = steps[: frames_of(1) - 1], steps[frames_of(1) :]
        return np.concatenate(
            [first % SIZE, track(first[0], before), landing % SIZE, track(landing[0], after)]
        )


class Sprites:
    """All emoji, drawn once for each position within a pixel.

    Args:
        icons: `icons.json` of the npm package `@iconify-json/fluent-emoji-flat`.
    """

    def __init__(self, icons: Path) -> None:
        import resvg_py
        from PIL import Image

        data = json.loads(icons.read_text(encoding="utf-8"))
        self._drawn: dict[str, Float32] = {}
        fine = SPRITE * PHASES
        for name, icon in OBJECTS.items():
            svg = (
                f'<svg xmlns="http://www.w3.org/2000/svg" width="{fine}" height="{fine}" viewBox="0 0 '
                f'{data.get("width", 32)} {data.get("height", 32)}">{data["icons"][icon]["body"]}</svg>'
            )
            png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=fine, height=fine))
            pixels = np.asarray(Image.open(BytesIO(png)).convert("RGBA"), np.float32) / 255
            pixels[..., :3] *= pixels[..., 3:]
            self._drawn[name] = np.stack(
                [_shrunk(pixels, dx, dy) for dy in range(PHASES) for dx in range(PHASES)]
            )

    @property
    def names(self) -> list[str]:
        """Of all emoji."""
        return list(self._drawn)

    def frame(self, name: str, background: str, position: Float64) -> Float32:
        """A frame [SIZE, SIZE, 3] in 0 .. 1 with the emoji's centre at `position`."""
        image = np.empty((SIZE, SIZE, 3), np.float32)
        image[:] = np.array(BACKGROUNDS[background], np.float32) / 255
        corner = np.rint((np.asarray(position) - SPRITE / 2) * PHASES).astype(int)
        (x, dx), (y, dy) = divmod(int(corner[0]), PHASES), divmod(int(corner[1]), PHASES)
        sprite = self._drawn[name][dy * PHASES + dx]
        rows = (y + np.arange(SPRITE + 1))[:, None] % SIZE
        columns = (x + np.arange(SPRITE + 1))[None] % SIZE
        image[rows, columns] = image[rows, columns] * (1 - sprite[..., 3:]) + sprite[..., :3]
        return image

    def render(self, clip: Clip) -> Float32:
        """Frames [frames, 3, SIZE, SIZE] in -1 .. 1, as the VAE takes them."""
        frames = [self.frame(clip.object, clip.background, position) for position in clip.positions()]
        return np.ascontiguousarray(np.stack(frames).transpose(0, 3, 1, 2)) * 2 - 1


def random_clip(rng: np.random.Generator, triple: tuple[str, str, str], blocks: int) -> Clip:
    """A clip (object, motion, background) without a change."""
    name, motion, background = triple
    return Clip(name, background, random_start(rng), (motion,) * blocks)


def random_start(rng: np.random.Generator) -> tuple[float, float]:
    """A place near START."""
    dx, dy = rng.choice(JITTER, 2)
    return START[0] + float(dx), START[1] + float(dy)


def _shrunk(pixels: Float32, dx: int, dy: int) -> Float32:
    """The drawing, moved by `dx`, `dy` fine pixels and averaged down."""
    fine = np.zeros(((SPRITE + 1) * PHASES, (SPRITE + 1) * PHASES, 4), np.float32)
    fine[dy : dy + len(pixels), dx : dx + len(pixels)] = pixels
    return fine.reshape(SPRITE + 1, PHASES, SPRITE + 1, PHASES, 4).mean((1, 3))
