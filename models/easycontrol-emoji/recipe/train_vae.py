"""Train the VAE on composed emoji and on edge maps (ours).

    train_vae.py --pictures pictures.npz --out RUN [--steps N] [--start last.pt]

At the end the latents' mean and deviation, by which they are normalised, and the preview projection are
measured on training pictures.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import numpy as np
import torch
from names import STYLES, held_out
from optim import Muon
from pictures import SIZES, Float32, Pictures, as_condition, edges, random_scene, render
from shapes import LATENT, vae_config
from torch import Tensor
from torch.nn import functional as F

from realtide.engines.easycontrol.vae import Vae

BATCH = 10
CROP = 48
KL = 3e-4
SHARP = 0.5
"""Weight of the differences between neighbouring pixels."""


def picture(rng: np.random.Generator, pictures: Pictures, names: list[str]) -> Float32:
    """Pixels of a random picture, one in five times its edges."""
    size = SIZES[rng.integers(len(SIZES))]
    pixels = render(pictures, random_scene(rng, str(rng.choice(names)), str(rng.choice(list(STYLES))), size))
    return as_condition(edges(pixels)) if rng.random() < 0.2 else pixels


def batch(rng: np.random.Generator, pictures: Pictures, names: list[str]) -> Tensor:
    """Crops [BATCH, 3, CROP, CROP]."""
    found = []
    for _ in range(BATCH):
        pixels = picture(rng, pictures, names)
        y, x = (rng.integers(0, length - CROP + 1) for length in pixels.shape[1:])
        found.append(pixels[:, y : y + CROP, x : x + CROP])
    return torch.from_numpy(np.stack(found))


def reconstruction(made: Tensor, pixels: Tensor) -> Tensor:
    """L1 of pixels and of their differences to neighbours."""
    error = made - pixels
    return error.abs().mean() + SHARP * sum(error.diff(dim=axis).abs().mean() for axis in (2, 3))


@torch.no_grad()
def measured(model: Vae, pictures: Pictures, names: list[str]) -> dict[str, Tensor | float]:
    """Shift and scaling of latents, and the least-squares projection of normalised latents to pixels."""
    rng = np.random.default_rng(77)
    pairs = []
    for _ in range(160):
        pixels = torch.from_numpy(picture(rng, pictures, names))[None]
        pairs.append((model.moments(pixels)[0][0], pixels[0]))
    values = torch.cat([mean.flatten() for mean, _ in pairs])
    shift, scaling = values.mean().item(), 1 / values.std().item()
    side = model.config.scale
    rows, targets = [], []
    for mean, pixels in pairs:
        rows.append(((mean - shift) * scaling).flatten(1).T)
        blocks = F.pixel_unshuffle(pixels[None], side)[0]
        targets.append(blocks.flatten(1).T)
    x = torch.cat([torch.cat(rows), torch.ones(sum(map(len, rows)), 1)], 1).double()
    solution = torch.linalg.lstsq(x, torch.cat(targets).double()).solution.float()
    return {
        "shift": shift,
        "scaling": scaling,
        "preview.weight": solution[:LATENT].T[..., None, None].contiguous(),
        "preview.bias": solution[LATENT].contiguous(),
    }


def main() -> None:
    """Command line."""
    parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parse.add_argument("--pictures", type=Path, required=True)
    parse.add_argument("--out", type=Path, required=True)
    parse.add_argument("--steps", type=int, default=1200)
    parse.add_argument("--start", type=Path, help="checkpoint to go on from")
    parse.add_argument("--rate", type=float, default=2e-3)
    parse.add_argument("--seed", type=int, default=1)
    args = parse.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    pictures = Pictures(args.pictures)
    unseen = held_out(pictures.names)
    names = [name for name in pictures.names if name not in unseen]
    model = Vae(vae_config())
    if args.start:
        model.load_state_dict(torch.load(args.start, weights_only=True)["weights"])
    else:
        # Latents begin with little noise: what they hold is learned first, how little will do later.
        with torch.no_grad():
            model.encoder.conv_out.bias[LATENT:] = -4.0
    optimizer = Muon(model.named_parameters(), args.rate, ratio=2.0)
    averaged: dict[str, Tensor] = {}
    begun = time.perf_counter()
    for step in range(args.steps):
        share = step / args.steps
        scale = min(1.0, (step + 1) / 60) * (0.5 + 0.5 * math.cos(math.pi * share)) + 0.01
        pixels = batch(rng, pictures, names)
        with torch.autocast("cpu", torch.bfloat16):
            mean, logvar = model.moments(pixels)
            mean, logvar = mean.float(), logvar.float().clamp(-20, 5)
            made = model.decoder(mean + torch.exp(0.5 * logvar) * torch.randn_like(mean))
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        loss = reconstruction(made.float(), pixels)
        optimizer.zero_grad()
        (loss + KL * kl).backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step(scale)
        keep = min(0.99, step / (step + 20))
        with torch.no_grad():
            for name, value in model.state_dict().items():
                averaged[name] = (
                    value.clone() if name not in averaged else averaged[name].lerp(value, 1 - keep)
                )
        if step % 25 == 0:
            error = F.l1_loss(made.float(), pixels).item()
            seconds = time.perf_counter() - begun
            print(
                f"{step} {seconds:.0f}s loss {loss.item():.4f} l1 {error:.4f} kl {kl.item():.3f}", flush=True
            )
        if step % 200 == 199:
            torch.save({"weights": model.state_dict()}, args.out / "last.pt")
    model.load_state_dict(averaged)
    torch.save({"weights": averaged, **measured(model.eval(), pictures, names)}, args.out / "vae.pt")


if __name__ == "__main__":
    main()
