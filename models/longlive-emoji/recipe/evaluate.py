"""Score a bundle through the programs that serve it (ours).

    evaluate.py --icons icons.json --bundle models/longlive-emoji --out scores.json [--part follow ...]

- *real*: the judge on real clips.
- *follow*: does every block of a held-out triple's clip show its motion?
- *switch*: does the first block under another prompt show the new motion, from where the emoji was? With the
  cache recached, kept and dropped, from the same seeds. And how large is the jump at the seam?
- *long*: the same question over 240 seconds.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
from judge import Judge
from play import span
from prompts import Triple, held_out, plain, triples
from scene import (
    BLOCK_FRAMES,
    DRAWN,
    MOTIONS,
    Clip,
    Float32,
    Float64,
    Sprites,
    random_clip,
    random_start,
    wrapped,
)
from serve import Player, Switch

BLOCKS = 4
SWITCHES = 60
LONG = 320
"""Blocks: 240 seconds."""
STREAMS = 2


def unseen() -> list[Triple]:
    """Held-out triples of objects that the bundle draws."""
    return sorted(triple for triple in held_out() if triple[0] in DRAWN)


def anything() -> list[Triple]:
    """All triples of objects that the bundle draws."""
    return [triple for triple in triples() if triple[0] in DRAWN]


def verdicts(judge: Judge, frames: Float32, name: str, background: str) -> list[str]:
    """The motion of each block, or "none"."""
    positions, areas = judge.positions(frames, name, background)
    blocks = (len(frames) + 3) // BLOCK_FRAMES
    return [judge.verdict(positions[span(b)], areas[span(b)]) for b in range(blocks)]


def share(values: Sequence[bool]) -> float:
    """Of true ones."""
    return round(float(np.mean(values)), 4)


def real(judge: Judge, sprites: Sprites) -> dict[str, Any]:
    """The judge on real clips: held-out triples, and clips that change their motion at every block."""
    rng = np.random.default_rng(1)
    good = []
    for triple in unseen():
        clip = random_clip(rng, triple, BLOCKS)
        mixed = Clip(
            clip.object, clip.background, random_start(rng), tuple(rng.choice(list(MOTIONS), BLOCKS).tolist())
        )
        for one in (clip, mixed):
            found = verdicts(judge, sprites.render(one), one.object, one.background)
            good += [verdict == motion for verdict, motion in zip(found, one.motions, strict=True)]
    return {"blocks": len(good), "right": share(good)}


def follow(judge: Judge, player: Player, count: int) -> dict[str, Any]:
    """Held-out triples."""
    chosen = unseen()
    order = np.random.default_rng(3).permutation(len(chosen))[:count]
    blocks: list[bool] = []
    whole, objects, backgrounds = [], [], []
    by_motion: dict[str, list[bool]] = {motion: [] for motion in MOTIONS}
    wrong: dict[str, int] = {}
    for seed, index in enumerate(order):
        name, motion, background = triple = chosen[index]
        frames = player.play([(0, plain(triple))], BLOCKS, seed)
        found = verdicts(judge, frames, name, background)
        blocks += [verdict == motion for verdict in found]
        whole.append(all(verdict == motion for verdict in found))
        by_motion[motion].append(whole[-1])
        shown = judge.identify(frames[-1])
        objects.append(shown[0] == name)
        backgrounds.append(shown[1] == background)
        for verdict in found:
            if verdict != motion:
                key = f"{motion} seen as {verdict}"
                wrong[key] = wrong.get(key, 0) + 1
    return {
        "triples": len(whole),
        "every_block_right": share(whole),
        "blocks_right": share(blocks),
        "object_right": share(objects),
        "background_right": share(backgrounds),
        "by_motion": {motion: share(values) for motion, values in by_motion.items() if values},
        "wrong_blocks": wrong,
    }


def seam(positions: Float64, frames: Float32, first: int) -> tuple[float, float]:
    """Jumps at frame `first` of the centroid and of the pixels, over the clip's median ones."""
    steps = np.hypot(*wrapped(np.diff(positions, axis=0)).T)
    changes = np.abs(np.diff(frames, axis=0)).mean((1, 2, 3))
    jumps = []
    for values in (steps, changes):
        others = np.delete(values, first - 1)
        jumps.append(float(values[first - 1] / max(float(np.median(others)), 1e-6)))
    return jumps[0], jumps[1]


def switched(judge: Judge, player: Player, count: int) -> dict[str, Any]:
    """Prompt switches; still emoji are left out of the seam's figures, which are relative to motion."""
    rng = np.random.default_rng(4)
    everything = anything()
    cases = []
    for seed in range(count):
        name, motion, background = everything[rng.integers(len(everything))]
        other = str(rng.choice([m for m in MOTIONS if m != motion]))
        cases.append((seed, name, background, motion, other, int(rng.integers(2, 9))))
    scores: dict[str, Any] = {"switches": count}
    kinds: tuple[Switch, ...] = get_args(Switch)
    for kind in kinds:
        first, second, old, jumps = [], [], [], []
        for seed, name, background, motion, other, block in cases:
            prompts = [(0, plain((name, motion, background))), (block, plain((name, other, background)))]
            frames = player.play(prompts, block + 2, seed, kind)
            found = verdicts(judge, frames, name, background)
            first.append(found[block] == other)
            second.append(found[block + 1] == other)
            old.append(found[block] == motion)
            if "still" not in (motion, other):
                positions, _ = judge.positions(frames, name, background)
                jumps.append(seam(positions, frames, span(block).start + 1))
        middle = np.median(np.array(jumps), 0)
        worst = np.percentile(np.array(jumps), 90, 0)
        scores[kind] = {
            "new_motion_in_first_block": share(first),
            "new_motion_in_second_block": share(second),
            "old_motion_in_first_block": share(old),
            "seam_centroid_jump": round(float(middle[0]), 3),
            "seam_centroid_jump_p90": round(float(worst[0]), 3),
            "seam_pixel_jump": round(float(middle[1]), 3),
            "seam_pixel_jump_p90": round(float(worst[1]), 3),
        }
    return scores


def long(judge: Judge, player: Player, streams: int, blocks: int) -> dict[str, Any]:
    """Endless streams whose prompt changes every 20 blocks: the first and the last quarter."""
    rng = np.random.default_rng(5)
    everything = anything()
    quarters: list[list[bool]] = [[], [], [], []]
    objects, backgrounds, seconds = [], [], []
    for seed in range(streams):
        name, motion, background = everything[rng.integers(len(everything))]
        motions = [motion]
        while len(motions) < blocks // 20:
            motions.append(str(rng.choice([m for m in MOTIONS if m != motions[-1]])))
        prompts = [(20 * index, plain((name, motion, background))) for index, motion in enumerate(motions)]
        begun = time.perf_counter()
        frames = player.play(prompts, blocks, 100 + seed)
        seconds.append(time.perf_counter() - begun)
        for block, verdict in enumerate(verdicts(judge, frames, name, background)):
            quarters[4 * block // blocks].append(verdict == motions[block // 20])
        shown = judge.identify(frames[-1])
        objects.append(shown[0] == name)
        backgrounds.append(shown[1] == background)
    return {
        "streams": streams,
        "blocks": blocks,
        "blocks_right_by_quarter": [share(values) for values in quarters],
        "object_right_at_end": share(objects),
        "background_right_at_end": share(backgrounds),
        "seconds_per_block": round(float(np.sum(seconds)) / (streams * blocks), 4),
    }


def main() -> None:
    """Command line."""
    parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parse.add_argument("--icons", type=Path, required=True)
    parse.add_argument("--bundle", type=Path, required=True)
    parse.add_argument("--precision")
    parse.add_argument("--out", type=Path, help="JSON file to write; else standard output")
    parse.add_argument("--part", nargs="*", default=["real", "follow", "switch", "long"])
    parse.add_argument("--triples", type=int, default=len(unseen()))
    parse.add_argument("--switches", type=int, default=SWITCHES)
    parse.add_argument("--streams", type=int, default=STREAMS)
    parse.add_argument("--blocks", type=int, default=LONG, help="of a long stream")
    args = parse.parse_args()
    sprites = Sprites(args.icons)
    judge, player = Judge(sprites), Player(args.bundle, args.precision)
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True, cwd=Path(__file__).parent
    ).stdout.strip()
    scores: dict[str, Any] = {"commit": commit}
    parts = {
        "real": lambda: real(judge, sprites),
        "follow": lambda: follow(judge, player, args.triples),
        "switch": lambda: switched(judge, player, args.switches),
        "long": lambda: long(judge, player, args.streams, args.blocks),
    }
    for part in args.part:
        scores[part] = parts[part]()
        text = json.dumps(scores, indent=1)
        if args.out:
            args.out.write_text(text + "\n")
    if not args.out:
        print(text)


if __name__ == "__main__":
    main()
