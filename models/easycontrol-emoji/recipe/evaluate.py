"""Scores of a bundle on names that training never saw, in no style (ours).

    evaluate.py --pictures pictures.npz --bundle models/easycontrol-emoji --out scores.json
                [--count N] [--steps N] [--precision int8]

*Edge agreement*: the intersection over union of two edge maps, the condition's and the result's, where an
edge counts as met if the other map has one at most a pixel away. It is taken with the condition, without one
(same prompt and seed) and against the edges of another name's picture (*shuffled*: what any emoji-like
picture scores by chance); also under two conditions at once, which training never had together, and in sizes
that training never had. *Colours*: how far the mean colour of the emoji is from the subject's, in 0..1.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from draw import Artist
from names import BACKGROUNDS, STYLES, held_out, plain
from pictures import (
    SIDE,
    UNTRAINED,
    Bool,
    Float32,
    Pictures,
    as_condition,
    centred,
    edges,
    random_scene,
    render,
)
from scipy import ndimage

from realtide.bench import report

REACH = np.ones((3, 3), bool)
"""Edges that are at most a pixel apart agree."""


def agreement(first: Bool, second: Bool) -> float:
    """Intersection over union of two edge maps, with a pixel of tolerance."""
    met = (first & ndimage.binary_dilation(second, REACH)).sum()
    met_too = (second & ndimage.binary_dilation(first, REACH)).sum()
    total = first.sum() + second.sum()
    # Each edge pixel is met or not; pixels that are met in both maps count once in the union.
    both = (met + met_too) / 2
    return float(both / (total - both)) if total else 1.0


def colour(pixels: Float32, background: str) -> Float32:
    """Mean colour in 0..1 of what differs from the background; the background's if nothing does."""
    ground = np.array(BACKGROUNDS[background], np.float32)[:, None, None] / 255
    image = (pixels + 1) / 2
    apart = np.abs(image - ground).max(0) > 0.12
    found: Float32 = image[:, apart].mean(1) if apart.any() else ground[:, 0, 0]
    return found


def mean(values: list[float]) -> float:
    """Rounded."""
    return round(float(np.mean(values)), 4)


def measure(pictures: Pictures, artist: Artist, count: int) -> dict[str, Any]:
    """All scores."""
    rng = np.random.default_rng(7)
    unseen = sorted(held_out(pictures.names))
    names = [str(name) for name in rng.permutation(unseen)[:count]]
    styles, colours = list(STYLES), list(BACKGROUNDS)
    found: dict[str, list[float]] = {}

    def note(name: str, value: float) -> None:
        found.setdefault(name, []).append(value)

    previous: Bool | None = None
    for number, name in enumerate(names):
        style, background = styles[number % len(styles)], str(rng.choice(colours))
        other = styles[(number + 1) % len(styles)]
        prompt = plain("emoji", background, style)
        wanted = render(pictures, random_scene(rng, name, style, (SIDE, SIDE), background))
        lines = edges(wanted)
        sketch = ("canny", as_condition(lines), 1.0)
        drawn = artist.draw(prompt, (SIDE, SIDE), number, [sketch])
        free = artist.draw(prompt, (SIDE, SIDE), number)
        note("edges", agreement(lines, edges(drawn)))
        note("edges_without_condition", agreement(lines, edges(free)))
        if previous is not None:
            note("edges_shuffled", agreement(previous, edges(drawn)))
        previous = lines
        note("edges_of_the_same_picture", agreement(lines, edges(wanted)))
        shown = render(pictures, centred(name, other))
        subject = ("subject", shown, 1.0)
        alike = artist.draw(prompt, (SIDE, SIDE), number, [subject])
        both = artist.draw(prompt, (SIDE, SIDE), number, [sketch, subject])
        note("edges_two_conditions", agreement(lines, edges(both)))
        want = colour(shown, "white")
        for what, picture in (
            ("free", free),
            ("subject", alike),
            ("two_conditions", both),
            ("edges_only", drawn),
        ):
            note(f"colour_{what}", float(np.abs(colour(picture, background) - want).mean()))
        size = UNTRAINED[number % len(UNTRAINED)]
        wide = render(pictures, random_scene(rng, name, style, size, background))
        wide_lines = edges(wide)
        stretched = ("canny", as_condition(wide_lines), 1.0)
        made = artist.draw(prompt, size, number, [stretched])
        note("edges_untrained_size", agreement(wide_lines, edges(made)))
        alone = artist.draw(prompt, size, number)
        note("edges_untrained_size_without_condition", agreement(wide_lines, edges(alone)))
    return {name: mean(values) for name, values in sorted(found.items())}


def main() -> None:
    """Command line."""
    parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parse.add_argument("--pictures", type=Path, required=True)
    parse.add_argument("--bundle", type=Path, required=True)
    parse.add_argument("--count", type=int, default=95, help="names")
    parse.add_argument("--steps", type=int)
    parse.add_argument("--precision")
    parse.add_argument("--out", type=Path, required=True)
    args = parse.parse_args()
    artist = Artist(args.bundle, args.steps, args.precision)
    scores = measure(Pictures(args.pictures), artist, args.count)
    artist.close()
    scores |= {"commit": report.commit(), "names": args.count, "steps": artist.steps}
    scores["seconds_an_image"] = round(float(np.median(artist.seconds)), 3)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(scores, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(scores, indent=2))


if __name__ == "__main__":
    main()
