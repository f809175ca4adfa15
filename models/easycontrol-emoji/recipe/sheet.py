"""The picture grid of the README: conditions, and what is made of them, of names that training never saw.

sheet.py --pictures pictures.npz --bundle models/easycontrol-emoji --out docs/images/easycontrol_emoji.png
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from draw import Artist, bytes_of
from names import BACKGROUNDS, STYLES, held_out, plain
from pictures import SIDE, Pictures, as_condition, centred, edges, random_scene, render
from PIL import Image

ZOOM, GAP = 2, 4


def main() -> None:
    """Command line."""
    parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parse.add_argument("--pictures", type=Path, required=True)
    parse.add_argument("--bundle", type=Path, required=True)
    parse.add_argument("--out", type=Path, required=True)
    parse.add_argument("--columns", type=int, default=10)
    parse.add_argument("--seed", type=int, default=3)
    args = parse.parse_args()
    pictures, artist = Pictures(args.pictures), Artist(args.bundle)
    rng = np.random.default_rng(args.seed)
    styles = list(STYLES)
    columns = []
    for number, name in enumerate(rng.permutation(sorted(held_out(pictures.names)))[: args.columns]):
        style, other = styles[number % 2], styles[(number + 1) % 2]
        background = str(rng.choice(list(BACKGROUNDS)))
        scene = random_scene(rng, str(name), style, (SIDE, SIDE), background)
        lines = as_condition(edges(render(pictures, scene)))
        shown = render(pictures, centred(str(name), other))
        prompt = plain("emoji", background, style)
        sketch, subject = ("canny", lines, 1.0), ("subject", shown, 1.0)
        rows = [lines, shown]
        for conditions in ([], [sketch], [subject], [sketch, subject]):
            rows.append(artist.draw(prompt, (SIDE, SIDE), number, conditions))
        columns.append([np.kron(bytes_of(row), np.ones((ZOOM, ZOOM, 1), np.uint8)) for row in rows])
    artist.close()
    side = SIDE * ZOOM
    height, width = (n * (side + GAP) - GAP for n in (len(columns[0]), len(columns)))
    sheet = np.full((height, width, 3), 255, np.uint8)
    for x, column in enumerate(columns):
        for y, tile in enumerate(column):
            top, left = y * (side + GAP), x * (side + GAP)
            sheet[top : top + side, left : left + side] = tile
    Image.fromarray(sheet).quantize(256).save(args.out, optimize=True)


if __name__ == "__main__":
    main()
