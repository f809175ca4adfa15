"""Tells a clip's motion from its pixels: the emoji's centroid against each motion's track (ours).

The background is a frame's median colour, the emoji whatever differs from it. Its centroid on the torus is a
circular mean. Over a block the centroids are compared with the tracks that each motion would have made from
the centroid of the frame before the block; the nearest one is the verdict, if it is near.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scene import BACKGROUNDS, MOTIONS, SIZE, Float32, Float64, Sprites, track, wrapped

NEAR = 5.0
"""A track this far off [pixels, mean over the block] is no verdict."""
DIFFERS = 0.12
"""A pixel whose largest difference from the background is below this is background (colours in 0 .. 1)."""
VISIBLE = (0.5, 2.0)
"""An emoji's area, over that of the real one, within which it counts as there."""

BESIDE = ((0.0, 0.0), (1.0, 1.0), (1.0, -1.0), (-1.0, 1.0), (-1.0, -1.0))
_ANGLES = 2 * np.pi * np.arange(SIZE) / SIZE


@dataclass(frozen=True)
class Seen:
    """What is in a frame: background [3], the emoji's area in pixels, and its centroid (x, y)."""

    background: Float32
    area: float
    centroid: Float64


def look(frame: Float32) -> Seen:
    """A frame [3, SIZE, SIZE] in -1 .. 1."""
    image = np.clip(frame, -1, 1) / 2 + 0.5
    background = np.median(image.reshape(3, -1), 1).astype(np.float32)
    weight = np.abs(image - background[:, None, None]).max(0)
    weight = np.where(weight > DIFFERS, np.minimum(weight, 0.5), 0.0)
    return Seen(background, float((weight > 0).sum()), centroid(weight))


def centroid(weight: Float32 | Float64) -> Float64:
    """Circular mean (x, y) in pixels of a weight [SIZE, SIZE] on the torus; of pixels' centres."""
    found = []
    for axis in (0, 1):
        sums = weight.sum(axis)
        angle = np.arctan2((sums * np.sin(_ANGLES)).sum(), (sums * np.cos(_ANGLES)).sum())
        found.append((angle * SIZE / (2 * np.pi) + 0.5) % SIZE)
    return np.array(found)


class Judge:
    """Judges clips of a known object and background."""

    def __init__(self, sprites: Sprites) -> None:
        self._sprites = sprites
        self._real: dict[tuple[str, str], tuple[float, Float64]] = {}

    def real(self, name: str, background: str) -> tuple[float, Float64]:
        """Area of the real emoji, and its centroid less its position."""
        key = name, background
        if key not in self._real:
            middle = np.full(2, SIZE / 2)
            frame = self._sprites.frame(name, background, middle).transpose(2, 0, 1) * 2 - 1
            seen = look(frame)
            self._real[key] = seen.area, seen.centroid - middle
        return self._real[key]

    def positions(self, frames: Float32, name: str, background: str) -> tuple[Float64, Float64]:
        """Positions [n, 2] of the emoji in frames [n, 3, SIZE, SIZE]; its area over the real one's [n]."""
        area, offset = self.real(name, background)
        seen = [look(frame) for frame in frames]
        return np.array([(s.centroid - offset) % SIZE for s in seen]), np.array([s.area / area for s in seen])

    def errors(self, positions: Float64) -> dict[str, float]:
        """Mean distance [pixels] of positions [1 + n, 2] from each motion's track, from the first one on.

        A circle begins another way on either side of the frame's edge, so tracks also start from a pixel
        beside the first position; the best one counts.
        """
        found = {}
        for motion in MOTIONS:
            starts = [positions[0] + move for move in BESIDE]
            tracks = np.stack([track(start, [motion] * (len(positions) - 1)) for start in starts])
            distance = np.hypot(*np.moveaxis(wrapped(positions[1:] - tracks), 2, 0)).mean(1)
            found[motion] = float(distance.min())
        return found

    def verdict(self, positions: Float64, areas: Float64) -> str:
        """The motion of a block, or "none": positions and areas of the frame before it and of its frames."""
        low, high = VISIBLE
        if not low <= float(np.median(areas)) <= high:
            return "none"
        errors = self.errors(positions)
        best = min(errors, key=errors.__getitem__)
        return best if errors[best] <= NEAR else "none"

    def identify(self, frame: Float32) -> tuple[str, str]:
        """Object and background that a frame [3, SIZE, SIZE] shows, by the nearest real picture.

        Every emoji is tried where the frame's centroid says that it is, within a pixel either way.
        """
        image = (np.clip(frame, -1, 1) / 2 + 0.5).transpose(1, 2, 0)
        seen = look(frame)
        colours = {key: np.array(value) / 255 for key, value in BACKGROUNDS.items()}
        background = min(colours, key=lambda key: float(np.abs(colours[key] - seen.background).sum()))
        errors: dict[str, float] = {}
        for candidate in self._sprites.names:
            _, offset = self.real(candidate, background)
            place = np.rint(seen.centroid - offset)
            errors[candidate] = min(
                float(np.abs(self._sprites.frame(candidate, background, place + move) - image).mean())
                for move in ((0, 0), (1, 0), (-1, 0), (0, 1), (0, -1))
            )
        return min(errors, key=errors.__getitem__), background
