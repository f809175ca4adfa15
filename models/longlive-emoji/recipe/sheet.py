"""Contact sheet of a clip whose prompt changes half way (ours).

    sheet.py --bundle models/longlive-emoji --out docs/images/longlive_emoji.png
             [--first "a fox moves right on a blue background"] [--then "a fox moves clockwise on ..."]

One row for each prompt; every third frame of its blocks.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image
from play import span
from serve import Player

EVERY = 3
MARGIN = 4


def main() -> None:
    """Command line."""
    parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parse.add_argument("--bundle", type=Path, required=True)
    parse.add_argument("--out", type=Path, required=True)
    parse.add_argument("--first", default="a fox moves right on a blue background")
    parse.add_argument("--then", default="a fox moves clockwise on a blue background")
    parse.add_argument("--at", type=int, default=3, help="block of the change")
    parse.add_argument("--blocks", type=int, default=6)
    parse.add_argument("--seed", type=int, default=7)
    parse.add_argument("--scale", type=int, default=1)
    args = parse.parse_args()
    frames = Player(args.bundle).play([(0, args.first), (args.at, args.then)], args.blocks, args.seed)
    change = span(args.at).start + 1
    rows = [frames[:change][::-EVERY][::-1], frames[change:][EVERY - 1 :: EVERY]]
    size, count = frames.shape[-1] * args.scale, max(map(len, rows))
    sheet = np.full((2 * (size + MARGIN) + MARGIN, count * (size + MARGIN) + MARGIN, 3), 255, np.uint8)
    for row, shown in enumerate(rows):
        top = MARGIN + row * (size + MARGIN)
        for column, frame in enumerate(shown):
            left = MARGIN + (column + count - len(shown) if row == 0 else column) * (size + MARGIN)
            pixels = (np.clip(frame.transpose(1, 2, 0), -1, 1) * 127.5 + 127.5).astype(np.uint8)
            large = pixels.repeat(args.scale, 0).repeat(args.scale, 1)
            sheet[top : top + size, left : left + size] = large
    args.out.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(sheet).save(args.out, optimize=True)


if __name__ == "__main__":
    main()
