"""Train the causal VAE on rendered clips (ours).

    train_vae.py --icons icons.json --out RUN [--steps N]

Most steps see crops of 32 x 32 pixels around the emoji: the rest of a frame is plain and teaches little. The
last part of the training alternates with whole frames. At the end the latents' mean and standard deviation
are measured by channel.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import numpy as np
import torch
from clips import normed
from optim import Muon
from scene import BACKGROUNDS, MOTIONS, OBJECTS, SIZE, Clip, Float32, Sprites, track
from shapes import LATENT, vae_config
from torch import Tensor
from torch.nn import functional as F

from realtide.engines.longlive.vae import ChannelNorm, WanVae, Whole

FRAMES = {"short": (9, 13), "long": (25, 25)}
"""Of a crop's and of a whole frame's clip. Short ones teach pictures; long ones, at the end, to keep them."""
BATCH = {"short": (8, 2), "long": (3, 1)}
CROP = 32
KL = 5e-4
SHARP = 0.5
"""Weight of the differences between neighbouring pixels."""
OBJECT = 3.0
"""Additional weight of pixels that differ from the background."""


def moments(model: WanVae, frames: Tensor) -> tuple[Tensor, Tensor]:
    """Means and logarithms of variances of latents, not normalised."""
    both = model.conv1(model.encoder(frames, Whole()))
    mean, logvar = both.split(model.config.latent, 2)
    return mean, logvar.clamp(-20, 5)


def example(rng: np.random.Generator, sprites: Sprites, crop: int, count: int) -> tuple[Float32, Float32]:
    """Frames [n, 3, crop, crop] in -1 .. 1 and the background's colour [3]."""
    name = str(rng.choice(list(OBJECTS)))
    background = str(rng.choice(list(BACKGROUNDS)))
    motions = [str(m) for m in rng.choice(list(MOTIONS), 2)]
    change = int(rng.integers(1, 2 * count))
    start = rng.integers(0, SIZE * 4, 2) / 4 if rng.random() < 0.5 else rng.integers(0, SIZE, 2)
    steps = [motions[frame >= change] for frame in range(1, count)]
    positions = np.concatenate([start[None] % SIZE, track(start, steps)])
    frames = np.stack([sprites.frame(name, background, p) for p in positions]) * 2 - 1
    if crop < SIZE:
        # Around where the object is at some time, so that it is in the crop, or partly, most of the time.
        middle = positions[rng.integers(count)] + rng.integers(-16, 17, 2)
        x, y = ((middle - crop / 2).astype(int)[:, None] + np.arange(crop)) % SIZE
        frames = frames[:, y][:, :, x]
    colour = np.array(BACKGROUNDS[background], np.float32) / 127.5 - 1
    return np.ascontiguousarray(frames.transpose(0, 3, 1, 2), np.float32), colour


def batch(
    rng: np.random.Generator, sprites: Sprites, crop: int, count: int, frames: int
) -> tuple[Tensor, Tensor]:
    """Frames [count, frames, 3, crop, crop] and backgrounds [count, 1, 3, 1, 1]."""
    pictures, colours = zip(*(example(rng, sprites, crop, frames) for _ in range(count)), strict=True)
    return torch.from_numpy(np.stack(pictures)), torch.from_numpy(np.stack(colours))[:, None, :, None, None]


def reconstruction(made: Tensor, frames: Tensor, background: Tensor) -> Tensor:
    """L1 of pixels and of their differences to neighbours, the object's counted more."""
    weight = 1 + OBJECT * ((frames - background).abs().amax(2, keepdim=True) > 0.08).float()
    error = made - frames
    value = (error.abs() * weight).mean()
    for axis in (3, 4):
        # Neither of the two pixels' weights is right for both; the larger one is taken.
        step = error.diff(dim=axis)
        size = step.shape[axis]
        larger = torch.maximum(weight.narrow(axis, 0, size), weight.narrow(axis, 1, size))
        value = value + SHARP * (step.abs() * larger).mean()
    return value


def statistics(model: WanVae, sprites: Sprites) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of latents by channel, over whole random clips."""
    rng = np.random.default_rng(77)
    found = []
    with torch.no_grad():
        for _ in range(24):
            name, background = str(rng.choice(list(OBJECTS))), str(rng.choice(list(BACKGROUNDS)))
            motions = tuple(str(m) for m in rng.choice(list(MOTIONS), 2))
            start = tuple(float(v) for v in rng.integers(0, SIZE, 2))
            clip = Clip(name, background, (start[0], start[1]), motions)
            mean, _ = moments(model, torch.from_numpy(sprites.render(clip))[None])
            found.append(mean[0].transpose(0, 1).flatten(1))
    values = torch.cat(found, 1)
    return values.mean(1).tolist(), values.std(1).tolist()


def main() -> None:
    """Command line."""
    parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parse.add_argument("--icons", type=Path, required=True)
    parse.add_argument("--out", type=Path, required=True)
    parse.add_argument("--steps", type=int, default=1000)
    parse.add_argument("--start", type=Path, help="checkpoint to go on from")
    parse.add_argument("--clips", choices=list(FRAMES), default="short")
    parse.add_argument("--decoder-only", action="store_true", help="latents stay as they are")
    parse.add_argument("--lr", type=float, default=2e-3)
    parse.add_argument("--ratio", type=float, default=2.0, help="of the steps of matrices")
    parse.add_argument("--seed", type=int, default=1)
    args = parse.parse_args()
    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    sprites = Sprites(args.icons)
    model = WanVae(vae_config())
    if args.start:
        model.load_state_dict(torch.load(args.start, weights_only=True)["weights"])
    else:
        # Latents begin with little noise: what they hold is learned first, how little will do later.
        with torch.no_grad():
            model.conv1.bias[LATENT:] = -4.0
    optimizer = Muon(model.named_parameters(), args.lr, ratio=args.ratio)
    ChannelNorm.forward = normed  # type: ignore[method-assign]
    averaged: dict[str, Tensor] = {}
    begun = time.perf_counter()
    for step in range(args.steps):
        share = step / args.steps
        rate = min(1.0, (step + 1) / (0.1 * args.steps)) * (0.5 + 0.5 * math.cos(math.pi * share)) + 0.01
        whole = (share > 0.6 or args.clips == "long") and step % 2 == 1
        frames, background = batch(
            rng, sprites, SIZE if whole else CROP, BATCH[args.clips][whole], FRAMES[args.clips][whole]
        )
        with torch.autocast("cpu", torch.bfloat16):
            mean, logvar = moments(model, frames)
            mean, logvar = mean.float(), logvar.float()
            if args.decoder_only:
                mean, logvar = mean.detach(), logvar.detach()
            latents = mean + torch.exp(0.5 * logvar) * torch.randn_like(mean)
            made = model.decoder(model.conv2(latents), Whole())
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        pixels = reconstruction(made.float(), frames, background)
        optimizer.zero_grad()
        (pixels + KL * kl).backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step(rate)
        averages(averaged, model, min(0.99, step / (step + 20)))
        if step % 25 == 0:
            error = F.l1_loss(made.float(), frames).item()
            seconds = time.perf_counter() - begun
            print(
                f"{step} {seconds:.0f}s loss {pixels.item():.4f} l1 {error:.4f} kl {kl.item():.3f}",
                flush=True,
            )
        if step % 200 == 199 or step + 1 == args.steps:
            torch.save({"weights": model.state_dict()}, args.out / "last.pt")
            torch.save({"weights": averaged}, args.out / "averaged.pt")
    model.load_state_dict(averaged)
    if args.decoder_only:
        kept = torch.load(args.start, weights_only=True)
        mean_values, std_values = kept["mean"], kept["std"]
    else:
        mean_values, std_values = statistics(model.eval(), sprites)
    torch.save({"weights": averaged, "mean": mean_values, "std": std_values}, args.out / "vae.pt")
    print("mean", [round(v, 3) for v in mean_values], "std", [round(v, 3) for v in std_values])


def averages(averaged: dict[str, Tensor], model: torch.nn.Module, keep: float) -> None:
    """Move the averaged weights towards the model's."""
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if name in averaged:
                averaged[name].lerp_(value, 1 - keep)
            else:
                averaged[name] = value.clone()


if __name__ == "__main__":
    main()
