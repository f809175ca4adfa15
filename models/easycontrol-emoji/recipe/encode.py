"""Encode what the transformer learns from: pictures, their edges, and subjects (ours).

    encode.py --pictures pictures.npz --vae vae.pt --out LATENTS [--rounds N]

Each round has every training name in every style once, on some background, in one of the trained sizes; a
file a round and size. Subjects are encoded once a name and style.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from names import BACKGROUNDS, STYLES, held_out
from pictures import SIZES, Float32, Pictures, as_condition, centred, edges, random_scene, render
from shapes import vae_config

from realtide.engines.easycontrol.vae import Vae

BATCH = 16


def load_vae(path: Path) -> Vae:
    """The trained VAE with its own normalisation."""
    saved = torch.load(path, weights_only=True)
    model = Vae(vae_config(saved["scaling"], saved["shift"]))
    model.load_state_dict(saved["weights"])
    return model.eval().requires_grad_(False)


@torch.no_grad()
def encode(model: Vae, pictures: list[Float32]) -> np.ndarray:
    """Latents [n, latent, h, w] in half precision."""
    found = [
        model.encode(torch.from_numpy(np.stack(pictures[start : start + BATCH]))).numpy().astype(np.float16)
        for start in range(0, len(pictures), BATCH)
    ]
    return np.concatenate(found)


def main() -> None:
    """Command line."""
    parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("pictures", "vae", "out"):
        parse.add_argument(f"--{name}", type=Path, required=True)
    parse.add_argument("--rounds", type=int, default=8)
    parse.add_argument("--first", type=int, default=0, help="round to begin with")
    args = parse.parse_args()
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    pictures, model = Pictures(args.pictures), load_vae(args.vae)
    unseen = held_out(pictures.names)
    told = [(n, s) for n in range(len(pictures.names)) for s in range(len(STYLES))]
    told = [(n, s) for n, s in told if pictures.names[n] not in unseen]
    styles, colours = list(STYLES), list(BACKGROUNDS)
    subjects = args.out / "subjects.npz"
    if not subjects.exists():
        shown = [render(pictures, centred(pictures.names[n], styles[s])) for n, s in told]
        np.savez(subjects, told=np.array(told), latents=encode(model, shown))
    for number in range(args.first, args.rounds):
        rng = np.random.default_rng(1000 + number)
        # Squares are half of all.
        size = SIZES[0] if number % 2 == 0 else SIZES[1 + number // 2 % 2]
        scenes = [random_scene(rng, pictures.names[n], styles[s], size) for n, s in told]
        pixels = [render(pictures, scene) for scene in scenes]
        lines = [as_condition(edges(picture)) for picture in pixels]
        np.savez(
            args.out / f"round-{number:03d}.npz",
            told=np.array(
                [(*pair, colours.index(sc.background)) for pair, sc in zip(told, scenes, strict=True)]
            ),
            latents=encode(model, pixels),
            edges=encode(model, lines),
        )
        print(f"round {number}: {len(scenes)} pictures of {size[0]}x{size[1]}", flush=True)


if __name__ == "__main__":
    main()
