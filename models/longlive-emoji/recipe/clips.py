"""Which clips the transformer learns from, and their latents (ours).

    clips.py --icons icons.json --vae vae.pt --out CLIPS [--rounds N]

Clips are grouped by *plan*: at which blocks the prompt changes, and whether the emoji jumps after the first
block. All clips of a plan have one layout, so they train as a batch. A jump stands for all that happened
since a stream's first block, its sink, was made: in a long stream the sink says nothing of where the emoji
is. Its landing cannot be foreseen and is not learned.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from prompts import held_out, triples
from scene import BACKGROUNDS, MOTIONS, OBJECTS, SIZE, START, Clip, Float32, Sprites, random_start
from shapes import vae_config
from torch import Tensor

from realtide.engines.longlive.vae import ChannelNorm, WanVae, Whole

BLOCKS = 7


@dataclass(frozen=True)
class Plan:
    """How a group of clips goes: switches (first blocks under another prompt), a jump, and its share."""

    switches: tuple[int, ...]
    jump: bool
    share: int

    @property
    def name(self) -> str:
        """Of its file."""
        return "-".join(["jump" if self.jump else "clip", *map(str, self.switches)])


PLANS = (
    Plan((), False, 4), Plan((1,), False, 2), Plan((2,), False, 2), Plan((3,), False, 2),
    Plan((4,), False, 2), Plan((5,), False, 2), Plan((2, 5), False, 2), Plan((1, 3, 5), False, 2),
    Plan((), True, 3), Plan((3,), True, 2), Plan((4,), True, 2), Plan((5,), True, 3), Plan((3, 5), True, 2),
)  # fmt: skip


def draw(rng: np.random.Generator, plan: Plan) -> Clip:
    """A clip whose triples are all training's."""
    unseen = held_out()
    while True:
        name, background = str(rng.choice(list(OBJECTS))), str(rng.choice(list(BACKGROUNDS)))
        allowed = [motion for motion in MOTIONS if (name, motion, background) not in unseen]
        if len(allowed) > 1:
            break
    motions: list[str] = []
    for block in range(BLOCKS):
        if block == 0:
            motions.append(str(rng.choice(allowed)))
        elif block in plan.switches:
            motions.append(str(rng.choice([motion for motion in allowed if motion != motions[-1]])))
        else:
            motions.append(motions[-1])
    clip = Clip(name, background, random_start(rng), tuple(motions))
    if plan.jump:
        # Straight moves lead from whole latent pixels to others, circles anywhere.
        fine = rng.random() < 0.4
        x, y = rng.integers(0, 4 * SIZE, 2) / 4 if fine else 4 * rng.integers(0, SIZE // 4, 2)
        clip = replace(clip, landing=(float(x), float(y)))
    return clip


def load_vae(path: Path) -> WanVae:
    """The trained VAE, with normalised latents."""
    saved = torch.load(path, weights_only=True)
    model = WanVae(vae_config(saved["mean"], saved["std"]))
    model.load_state_dict(saved["weights"])
    return model.eval().requires_grad_(False)


def normed(self: ChannelNorm, x: Tensor) -> Tensor:
    """`ChannelNorm.forward` in a form that is faster on a CPU in PyTorch; the same up to rounding."""
    scale = torch.rsqrt(x.square().mean(-3, keepdim=True) + 1e-12)
    return x * scale * self.gamma.reshape(-1, 1, 1)


@torch.no_grad()
def encode(model: WanVae, frames: Float32) -> NDArray[np.float16]:
    """Frames [n, 3, SIZE, SIZE] to latents [frames, C, height, width]."""
    with torch.autocast("cpu", torch.bfloat16):
        latents = model.encode(torch.from_numpy(frames)[None], Whole())[0]
    return latents.float().numpy().astype(np.float16)


@dataclass(frozen=True)
class Shard:
    """Clips of one plan: latents [n, frames, C, height, width] float16, objects, backgrounds, motions."""

    plan: Plan
    latents: NDArray[np.float16]
    clips: list[dict[str, Any]]

    def only(self, objects: Collection[str]) -> Shard:
        """The clips of some objects."""
        kept = [index for index, clip in enumerate(self.clips) if clip["object"] in objects]
        return Shard(self.plan, self.latents[kept], [self.clips[index] for index in kept])


def load_shards(directory: Path) -> list[Shard]:
    """All plans whose clips were encoded, with what there is of them so far."""
    shards = []
    for plan in PLANS:
        parts = sorted(directory.glob(f"{plan.name}.*.npz"))
        if parts:
            loaded = [np.load(part) for part in parts]
            clips = [clip for part in loaded for clip in json.loads(str(part["clips"]))]
            shards.append(Shard(plan, np.concatenate([part["latents"] for part in loaded]), clips))
    return shards


def main() -> None:
    """Command line."""
    parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parse.add_argument("--icons", type=Path, required=True)
    parse.add_argument("--vae", type=Path, required=True)
    parse.add_argument("--out", type=Path, required=True)
    parse.add_argument("--firsts", action="store_true", help="write first blocks instead, of all triples")
    parse.add_argument("--rounds", type=int, default=12, help="each writes 4 clips per share of every plan")
    parse.add_argument("--seed", type=int, default=11)
    args = parse.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    ChannelNorm.forward = normed  # type: ignore[method-assign]
    sprites, model = Sprites(args.icons), load_vae(args.vae)
    if args.firsts:
        chosen = [triple for triple in triples() if triple not in held_out()]
        made = [encode(model, sprites.render(Clip(t[0], t[2], START, (t[1],)))) for t in chosen]
        np.savez(args.out / "firsts.npz", latents=np.stack(made), triples=json.dumps(chosen))
        return
    for turn in range(args.rounds):
        rng = np.random.default_rng([args.seed, turn])
        for plan in PLANS:
            clips = [draw(rng, plan) for _ in range(4 * plan.share)]
            latents = [encode(model, sprites.render(clip)) for clip in clips]
            told = json.dumps([vars(clip) for clip in clips])
            part = args.out / f"{plan.name}.{turn:03d}.tmp.npz"
            np.savez(part, latents=np.stack(latents), clips=told)
            part.rename(args.out / f"{plan.name}.{turn:03d}.npz")
        print(f"round {turn}", flush=True)


if __name__ == "__main__":
    main()
