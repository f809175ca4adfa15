"""Train the base model: transformer and both text encoders, without conditions (ours).

    train.py --pictures pictures.npz --tokenizer tokenizer.model --latents LATENTS --out RUN --steps N
             [--begin model.pt]

Pictures of a step have one size. Errors of clean latents count, half of the time at pure noise.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import numpy as np
import torch
from learn import Teacher, build, checkpoint, load_rounds, pace, prepare, saved_names
from optim import Muon

from realtide.engines.easycontrol.tokenizer import PromptTokenizer

PLAIN = ("text.shared", "pooled.text_model.embeddings", "relative_attention_bias", "transformer.proj_out")
"""Not for Muon: tables, and what predicts."""


def main() -> None:
    """Command line."""
    parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("pictures", "tokenizer", "latents", "out"):
        parse.add_argument(f"--{name}", type=Path, required=True)
    parse.add_argument("--steps", type=int, required=True)
    parse.add_argument("--begin", type=Path, help="checkpoint to go on from")
    parse.add_argument("--rate", type=float, default=1.5e-3)
    parse.add_argument("--batch", type=int, default=40)
    parse.add_argument("--seed", type=int, default=1)
    args = parse.parse_args()
    rng = prepare(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    model = build(PromptTokenizer(args.tokenizer, 1).vocabulary)
    if args.begin:
        model.load(args.begin)
    teacher = Teacher(saved_names(args.pictures), args.tokenizer, model)
    both = model.modules()
    optimizer = Muon(both.named_parameters(), args.rate, plain=PLAIN)
    averaged = {name: value.clone() for name, value in both.state_dict().items()}
    losses, begun, rounds = [], time.perf_counter(), load_rounds(args.latents)
    for step in range(args.steps):
        if step % 200 == 199:
            rounds = load_rounds(args.latents)  # encoding may still go on
        one = rounds[rng.integers(len(rounds))]
        chosen = rng.choice(len(one.told), args.batch, replace=False)
        with torch.autocast("cpu", torch.bfloat16):
            loss = teacher.loss(rng, one.latents[chosen], teacher.say(rng, one.told[chosen]))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(both.parameters(), 1.0)
        optimizer.step(pace(step, args.steps))
        keep = 0.98 if args.begin else min(0.98, step / (step + 10))
        with torch.no_grad():
            for name, value in both.state_dict().items():
                averaged[name].lerp_(value, 1 - keep)
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            raise ValueError(f"step {step}: loss is not finite")
        if step % 25 == 24:
            seconds = time.perf_counter() - begun
            print(f"{step + 1} {seconds:.0f}s loss {np.mean(losses[-25:]):.4f}", flush=True)
        if step % 100 == 99 or step + 1 == args.steps:
            checkpoint(args.out / "model.pt", averaged)


if __name__ == "__main__":
    main()
