"""First training of the transformer: one block after another, and first blocks, of many clips (ours).

    pairs.py --tokenizer tokenizer.model --clips CLIPS --out RUN [--steps N] [--begin model.pt]
    torchrun --nproc-per-node 2 pairs.py ...

A step sees ten pairs of neighbouring blocks, the first one clean, and 28 first blocks: 38 prompts for the
price of two whole clips. So words come to mean something early, and so does looking back: a block is the one
before it, moved. Clean latents' errors are what counts, most often at the noise level where nothing else
helps. train.py goes on from here.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from clips import load_shards
from numpy.typing import NDArray
from optim import Muon
from play import Writer
from prompts import Triple, paraphrase
from scene import BLOCK, DRAWN, Float32
from shapes import text_config, video_config
from torch import Tensor

from realtide.engines.longlive import schedule, transformer
from realtide.engines.longlive.packed import Entry, Packed, attend_plainly
from realtide.engines.longlive.text import TextEncoder
from realtide.engines.longlive.tokenizer import PromptTokenizer
from realtide.engines.longlive.transformer import WanTransformer

PAIRS, FIRSTS = 10, 28
PURE = 0.55
"""Share of noise levels that are noise alone."""
BLUR = 0.15
"""Half of the steps blur the clean block by noise of up to this standard deviation."""
SHARP = 1.6
"""Weights of self-attention's norms to begin with: looking at one place needs large scores."""


def build() -> tuple[WanTransformer, TextEncoder]:
    """Models with fresh weights; the first prediction is no flow at all."""
    model, text = WanTransformer(video_config().transformer), TextEncoder(text_config())
    torch.nn.init.zeros_(model.head.head.weight)
    for name, weight in text.named_parameters():
        if weight.ndim == 2 and "norm" not in name:
            # No scale divides this encoder's scores: small queries do.
            torch.nn.init.normal_(weight, std=0.3 if "token" in name else 0.05)
    return model, text


def save(path: Path, weights: dict[str, Tensor]) -> None:
    """Write a checkpoint: weights by part."""
    parts: dict[str, dict[str, Tensor]] = {"transformer": {}, "text": {}}
    for name, value in weights.items():
        part, _, rest = name.partition(".")
        parts[part][rest] = value
    torch.save({"weights": parts}, path)


class Pairs:
    """Blocks of all clips, and what is said of them."""

    def __init__(self, clips: Path, writer: Writer) -> None:
        self._config, self._writer = video_config(), writer
        stream = self._config.stream
        self._sigmas = schedule.warped(stream.steps, stream.shift) / schedule.TABLE
        latents, self._told = [], []
        self._starts: list[tuple[int, int]] = []
        for shard in load_shards(clips):
            blocks = shard.latents.reshape(len(shard.clips), -1, BLOCK, *shard.latents.shape[2:])
            for one, clip in zip(blocks, shard.clips, strict=True):
                first = 1 if shard.plan.jump else 0
                self._starts += [(len(latents), block) for block in range(first, len(one) - 1)]
                latents.append(one)
                self._told.append(clip)
        self._latents = np.stack(latents)
        stored = np.load(clips / "firsts.npz")
        told = [tuple(triple) for triple in json.loads(str(stored["triples"]))]
        kept = [index for index, triple in enumerate(told) if triple[0] in DRAWN]
        self._firsts, self._named = stored["latents"][kept], [told[index] for index in kept]
        self._after = Packed(self._config, [Entry("clean", 0, 0, (0,), 0), Entry("noisy", 1, 0, (0, 1), 1)])
        self._first = Packed(self._config, [Entry("noisy", 0, 0, (0,), 0)])

    def loss(self, rng: np.random.Generator, model: WanTransformer) -> Tensor:
        """Mean squared errors of clean latents."""
        chosen = [self._starts[i] for i in rng.choice(len(self._starts), PAIRS, replace=False)]
        before = np.stack([self._latents[clip, block] for clip, block in chosen]).astype(np.float32)
        if rng.random() < 0.5:
            before += rng.uniform(0, BLUR) * rng.standard_normal(before.shape).astype(np.float32)
        after = np.stack([self._latents[clip, block + 1] for clip, block in chosen])
        triples = [_triple(self._told[clip], block + 1) for clip, block in chosen]
        pairs = self._errors(rng, model, after, triples, before)
        firsts = rng.choice(len(self._firsts), FIRSTS, replace=False)
        alone = self._errors(rng, model, self._firsts[firsts], [self._named[index] for index in firsts], None)
        return (pairs.mean() + alone.mean()) / 2

    def _errors(
        self,
        rng: np.random.Generator,
        model: WanTransformer,
        latents: NDArray[np.float16],
        triples: Sequence[Triple],
        before: Float32 | None,
    ) -> Tensor:
        real = torch.from_numpy(latents.astype(np.float32))
        pure = rng.random(len(real)) < PURE
        level = np.where(pure, 1.0, self._sigmas[rng.integers(1, len(self._sigmas), len(real))])
        sigma = torch.from_numpy(level).float()[:, None, None, None, None]
        noisy = (1 - sigma) * real + sigma * torch.randn_like(real)
        said = [[paraphrase(rng, triple)] for triple in triples]
        if before is None:
            packed, inputs, levels = self._first, noisy[:, None], level[:, None]
        else:
            packed = self._after
            inputs = torch.stack([torch.from_numpy(before), noisy], 1)
            levels = np.stack([0 * level, level], 1)
        wide = torch.from_numpy(schedule.sinusoid(schedule.TABLE * levels, model.config.freq_dim))
        flow = packed.flow(model, inputs, wide, self._writer.embed(said)).float()[:, -1]
        return (noisy - sigma * flow - real).square().flatten(1).mean(1)


def _triple(clip: dict[str, Any], block: int) -> Triple:
    return clip["object"], clip["motions"][block], clip["background"]


def mean_gradients(parameters: Sequence[Tensor], workers: int) -> None:
    """Of all workers, in place."""
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    parts = (flat / workers).split([p.numel() for p in parameters])
    for parameter, part in zip(parameters, parts, strict=True):
        parameter.grad = part.view_as(parameter)


def main() -> None:
    """Command line."""
    parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("tokenizer", "clips", "out"):
        parse.add_argument(f"--{name}", type=Path, required=True)
    parse.add_argument("--begin", type=Path, help="checkpoint to go on from")
    parse.add_argument("--fresh-text", action="store_true", help="but not with its text encoder")
    parse.add_argument("--steps", type=int, default=1200)
    parse.add_argument("--rate", type=float, default=1.5e-3)
    parse.add_argument("--seed", type=int, default=3)
    args = parse.parse_args()
    workers, worker = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    if workers > 1:
        dist.init_process_group("gloo")
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed + worker)
    args.out.mkdir(parents=True, exist_ok=True)
    transformer.attend = attend_plainly
    model, text = build()
    if args.begin:
        saved = torch.load(args.begin, weights_only=True)["weights"]
        model.load_state_dict(saved["transformer"])
        if not args.fresh_text:
            text.load_state_dict(saved["text"])
    else:
        for name, weight in model.named_parameters():
            if "self_attn.norm" in name:
                torch.nn.init.constant_(weight, SHARP)
    torch.manual_seed(100 + worker)
    writer = Writer(PromptTokenizer(args.tokenizer, video_config().transformer.text_tokens), text)
    pairs = Pairs(args.clips, writer)
    both = torch.nn.ModuleDict({"transformer": model, "text": text})
    parameters = list(both.parameters())
    optimizer = Muon(both.named_parameters(), args.rate, plain=("text.token", "transformer.head"))
    averaged = {name: value.clone() for name, value in both.state_dict().items()}
    losses, begun = [], time.perf_counter()
    for step in range(args.steps):
        with torch.autocast("cpu", torch.bfloat16):
            loss = pairs.loss(rng, model)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        if workers > 1:
            mean_gradients(parameters, workers)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        left = (args.steps - step) / (0.35 * args.steps)
        optimizer.step(min(1.0, (step + 1) / 40, 0.02 + 0.98 * left))
        with torch.no_grad():
            for name, value in both.state_dict().items():
                averaged[name].lerp_(value, 1 - min(0.98, step / (step + 10)))
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            raise ValueError(f"step {step}: loss is not finite")
        if worker == 0 and step % 25 == 24:
            seconds = time.perf_counter() - begun
            print(f"{step + 1} {seconds:.0f}s loss {np.mean(losses[-25:]):.4f}", flush=True)
        if worker == 0 and (step % 150 == 149 or step + 1 == args.steps):
            save(args.out / "model.pt", averaged)


if __name__ == "__main__":
    main()
