"""Draws emoji once, composes them over backgrounds, and finds their edges (ours).

    pictures.py --icons DIRECTORY --out pictures.npz

DIRECTORY has the unpacked npm packages: DIRECTORY/fluent-emoji-flat/icons.json, DIRECTORY/noto/icons.json.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from names import BACKGROUNDS, STYLES, wanted
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

Float32 = NDArray[np.float32]
Bool = NDArray[np.bool_]

DRAWN = 112
"""Pixels of a stored drawing, each way."""
SIDE = 64
"""Pixels of a square picture, and of a condition."""
SIZES = ((64, 64), (80, 48), (48, 80))
"""(width, height) that are trained on."""
UNTRAINED = ((96, 64), (64, 96))
"""(width, height) that are not."""
LOW, HIGH = 0.12, 0.25
"""Gradients between which an edge is one only if it goes on from a clear one."""


class Pictures:
    """All drawings.

    Args:
        path: what `draw` wrote.
    """

    def __init__(self, path: Path) -> None:
        with np.load(path) as stored:
            self.names = [str(name) for name in stored["names"]]
            self._pixels: NDArray[np.uint8] = stored["pixels"]
        self._styles = list(STYLES)

    def sprite(self, name: str, style: str, side: int) -> Float32:
        """A drawing [side, side, RGBA] in 0 .. 1, colours times alpha."""
        drawn = self._pixels[self.names.index(name), self._styles.index(style)].astype(np.float32) / 255
        drawn[..., :3] *= drawn[..., 3:]
        planes = [Image.fromarray(drawn[..., c]).resize((side, side), Image.Resampling.BOX) for c in range(4)]
        return np.stack([np.asarray(plane) for plane in planes], -1)


@dataclass(frozen=True)
class Scene:
    """One picture: which emoji, how drawn, on what, how large and where (its corner)."""

    name: str
    style: str
    background: str
    size: tuple[int, int]
    side: int
    corner: tuple[int, int]


def random_scene(
    rng: np.random.Generator, name: str, style: str, size: tuple[int, int], background: str | None = None
) -> Scene:
    """An emoji that nearly fills the shorter side, near the middle of it and anywhere along the longer."""
    side = round(min(size) * rng.uniform(0.8, 0.9))
    corner = []
    for length in size:
        free = length - side
        slack = 0.5 if length > min(size) else 0.25
        corner.append(round(free / 2 + rng.uniform(-slack, slack) * free))
    colour = background or str(rng.choice(list(BACKGROUNDS)))
    return Scene(name, style, colour, size, side, (corner[0], corner[1]))


def centred(name: str, style: str, background: str = "white") -> Scene:
    """As a subject is shown."""
    side = round(0.86 * SIDE)
    return Scene(name, style, background, (SIDE, SIDE), side, ((SIDE - side) // 2, (SIDE - side) // 2))


def render(pictures: Pictures, scene: Scene) -> Float32:
    """Pixels [3, height, width] in -1 .. 1."""
    width, height = scene.size
    image = np.empty((height, width, 3), np.float32)
    image[:] = np.array(BACKGROUNDS[scene.background], np.float32) / 255
    sprite = pictures.sprite(scene.name, scene.style, scene.side)
    x, y = scene.corner
    under = image[y : y + scene.side, x : x + scene.side]
    under[:] = under * (1 - sprite[..., 3:]) + sprite[..., :3]
    return np.ascontiguousarray(image.transpose(2, 0, 1)) * 2 - 1


def edges(pixels: Float32) -> Bool:
    """Canny's edges [height, width] of pixels [3, height, width] in -1 .. 1.

    Each channel is smoothed; the strongest channel's gradient counts where it is largest across the edge, and
    hysteresis keeps weak edges that touch strong ones (Canny 1986).
    """
    smooth = ndimage.gaussian_filter(pixels.astype(np.float64), (0, 0.8, 0.8), mode="nearest")
    down, across = (ndimage.sobel(smooth, axis, mode="nearest") / 8 for axis in (1, 2))
    strength = np.hypot(down, across)
    channel = strength.argmax(0)[None]
    size = np.take_along_axis(strength, channel, 0)[0]
    dy, dx = (np.take_along_axis(part, channel, 0)[0] for part in (down, across))
    padded = np.pad(size, 1)
    # The two neighbours across the edge, by the nearest of four directions.
    turn = np.round(np.arctan2(dy, dx) / (np.pi / 4)).astype(int) % 4
    keep = np.zeros(size.shape, bool)
    for index, (oy, ox) in enumerate(((0, 1), (1, 1), (1, 0), (1, -1))):
        height, width = size.shape
        ahead = padded[1 + oy : 1 + oy + height, 1 + ox : 1 + ox + width]
        behind = padded[1 - oy : 1 - oy + height, 1 - ox : 1 - ox + width]
        keep |= (turn == index) & (size >= ahead) & (size > behind)
    labels, count = ndimage.label(keep & (size > LOW), np.ones((3, 3)))
    strong = np.zeros(count + 1, bool)
    strong[np.unique(labels[keep & (size > HIGH)])] = True
    strong[0] = False
    return strong[labels]


def as_condition(lines: Bool) -> Float32:
    """Edges [height, width] as a picture [3, SIDE, SIDE] in -1 .. 1: white on black, as Canny maps come."""
    image = Image.fromarray(lines.astype(np.uint8) * 255)
    if image.size != (SIDE, SIDE):
        image = image.resize((SIDE, SIDE), Image.Resampling.BILINEAR)
    plane = np.asarray(image, np.float32) / 127.5 - 1
    return np.repeat(plane[None], 3, 0)


def draw(icons: Path, out: Path) -> None:
    """Write all drawings that exist in every style: names, and pixels [names, styles, DRAWN, DRAWN, RGBA]."""
    import resvg_py

    data: list[dict[str, Any]] = [
        json.loads((icons / package / "icons.json").read_text(encoding="utf-8"))
        for package in STYLES.values()
    ]
    common = set.intersection(*(set(one["icons"]) for one in data))
    names = sorted(name for name in common if wanted(name))
    pixels = np.empty((len(names), len(data), DRAWN, DRAWN, 4), np.uint8)
    for row, name in enumerate(names):
        for column, one in enumerate(data):
            box = one.get("width", 32), one.get("height", 32)
            svg = (
                f'<svg xmlns="http://www.w3.org/2000/svg" width="{DRAWN}" height="{DRAWN}"'
                f' viewBox="0 0 {box[0]} {box[1]}">{one["icons"][name]["body"]}</svg>'
            )
            png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=DRAWN, height=DRAWN))
            pixels[row, column] = np.asarray(Image.open(BytesIO(png)).convert("RGBA"))
    np.savez_compressed(out, names=np.array(names), pixels=pixels)
    print(f"{len(names)} names, {len(data)} styles")


def main() -> None:
    """Command line."""
    parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parse.add_argument("--icons", type=Path, required=True)
    parse.add_argument("--out", type=Path, required=True)
    args = parse.parse_args()
    draw(args.icons, args.out)


if __name__ == "__main__":
    main()
