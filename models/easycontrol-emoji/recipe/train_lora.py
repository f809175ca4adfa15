"""Train one kind's LoRA on the frozen base model, one condition at a time, as the paper does (ours).

    train_lora.py --kind canny --pictures pictures.npz --tokenizer tokenizer.model --latents LATENTS
                  --model model.pt --out RUN --steps N [--begin lora.pt]

*canny*: the edges of the very picture, at one size whatever the picture's. *subject*: the same emoji in any
style on white, for a picture in either.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from learn import Teacher, build, checkpoint, load_rounds, pace, prepare, saved_names
from optim import Muon
from torch import Tensor, nn

from realtide.engines.easycontrol import loras
from realtide.engines.easycontrol.config import ImageConfig
from realtide.engines.easycontrol.tokenizer import PromptTokenizer
from realtide.engines.easycontrol.transformer import Lora

OTHER = 0.8
"""Share of subjects that are shown in another style than the picture's."""


class LoraWeights(nn.Module):
    """A LoRA by the release's names; what it adds is nothing at first."""

    def __init__(self, config: ImageConfig) -> None:
        super().__init__()
        model, rank = config.transformer, config.conditions.rank
        self._names = list(loras.names(model))
        self.weights = nn.ParameterDict()
        for _, _, name in self._names:
            self.weights[_key(f"{name}.down.weight")] = nn.Parameter(
                torch.randn(rank, model.dim) * model.dim**-0.5
            )
            self.weights[_key(f"{name}.up.weight")] = nn.Parameter(torch.zeros(model.dim, rank))

    def blocks(self) -> list[Lora]:
        """As the condition pass takes them."""
        found: dict[int, tuple[list[Tensor], list[Tensor]]] = {}
        for block, _, name in self._names:
            downs, ups = found.setdefault(block, ([], []))
            downs.append(self.weights[_key(f"{name}.down.weight")])
            ups.append(self.weights[_key(f"{name}.up.weight")])
        return [(torch.stack(downs), torch.stack(ups)) for downs, ups in found.values()]

    def named(self) -> dict[str, Tensor]:
        """Values by the release's names."""
        return {name.replace("/", "."): value.detach().clone() for name, value in self.weights.items()}

    def load(self, weights: dict[str, Tensor]) -> None:
        """Take values by the release's names."""
        self.weights.load_state_dict({_key(name): value for name, value in weights.items()})


def _key(name: str) -> str:
    """Names of parameters have no dots."""
    return name.replace(".", "/")


class Subjects:
    """Latents of all emoji as subjects."""

    def __init__(self, path: Path) -> None:
        with np.load(path) as stored:
            self._latents = stored["latents"]
            self._rows = {(int(n), int(s)): row for row, (n, s) in enumerate(stored["told"])}
            self._styles = 1 + max(int(s) for _, s in stored["told"])

    def of(self, rng: np.random.Generator, told: Sequence[Sequence[int]]) -> np.ndarray:
        """Latents [B, ...] for pictures (name, style, background)."""
        rows = []
        for name, style, _ in told:
            others = [s for s in range(self._styles) if s != style]
            shown = int(rng.choice(others)) if rng.random() < OTHER else int(style)
            rows.append(self._rows[int(name), shown])
        found: np.ndarray = self._latents[rows]
        return found


def main() -> None:
    """Command line."""
    parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("pictures", "tokenizer", "latents", "model", "out"):
        parse.add_argument(f"--{name}", type=Path, required=True)
    parse.add_argument("--kind", choices=["canny", "subject"], required=True)
    parse.add_argument("--steps", type=int, required=True)
    parse.add_argument("--begin", type=Path, help="checkpoint to go on from")
    parse.add_argument("--rate", type=float, default=1.5e-3)
    parse.add_argument("--batch", type=int, default=32)
    parse.add_argument("--nameless", type=float, default=0.4, help="share of prompts without a name")
    parse.add_argument("--seed", type=int, default=11)
    args = parse.parse_args()
    rng = prepare(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    model = build(PromptTokenizer(args.tokenizer, 1).vocabulary)
    model.load(args.model)
    for part in model.modules().values():
        part.eval().requires_grad_(False)
    teacher = Teacher(saved_names(args.pictures), args.tokenizer, model)
    subjects = Subjects(args.latents / "subjects.npz")
    lora = LoraWeights(teacher.config)
    if args.begin:
        lora.load(torch.load(args.begin, weights_only=True)["weights"])
    optimizer = Muon(lora.named_parameters(), args.rate)
    averaged = lora.named()
    losses, begun, rounds = [], time.perf_counter(), load_rounds(args.latents)
    for step in range(args.steps):
        if step % 200 == 199:
            rounds = load_rounds(args.latents)
        one = rounds[rng.integers(len(rounds))]
        chosen = rng.choice(len(one.told), args.batch, replace=False)
        told = one.told[chosen]
        shown = one.edges[chosen] if args.kind == "canny" else subjects.of(rng, told.tolist())
        condition = torch.from_numpy(shown.astype(np.float32))
        with torch.autocast("cpu", torch.bfloat16):
            prompts = teacher.say(rng, told, args.nameless)
            loss = teacher.loss(rng, one.latents[chosen], prompts, [(args.kind, condition, lora.blocks())])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(lora.parameters(), 1.0)
        optimizer.step(pace(step, args.steps))
        keep = 0.98 if args.begin else min(0.98, step / (step + 10))
        with torch.no_grad():
            for name, value in lora.named().items():
                averaged[name].lerp_(value, 1 - keep)
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            raise ValueError(f"step {step}: loss is not finite")
        if step % 25 == 24:
            seconds = time.perf_counter() - begun
            print(f"{step + 1} {seconds:.0f}s loss {np.mean(losses[-25:]):.4f}", flush=True)
        if step % 50 == 49 or step + 1 == args.steps:
            checkpoint(args.out / f"{args.kind}.pt", averaged)


if __name__ == "__main__":
    main()
