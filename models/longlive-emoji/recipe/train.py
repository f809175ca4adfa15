"""Train the transformer and the text encoder on encoded clips (ours).

    train.py --icons icons.json --vae vae.pt --tokenizer tokenizer.model --clips CLIPS --out RUN --steps N
             [--start model.pt] [--rollouts 0.5]

Flow matching on all blocks of a clip at once, each with the keys that it would find in a session's cache
(`realtide.engines.longlive.packed`). With --rollouts that share of the steps first generates the clip with
the few-step sampler, recaches included, and takes some of the blocks so made in place of the real ones: the
model then learns the real continuation of its own blocks, from its own samples at every step of the sampler.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from clips import PLANS, Shard, load_shards, load_vae, normed
from judge import Judge
from optim import Muon
from play import Writer, follow_rate
from prompts import Triple, held_out, paraphrase
from scene import BLOCK, Sprites
from shapes import text_config, video_config
from torch import Tensor

from realtide.engines.longlive import schedule, transformer
from realtide.engines.longlive.config import VideoConfig
from realtide.engines.longlive.packed import Entry, Packed, attend_plainly, layout
from realtide.engines.longlive.rollout import Rollout
from realtide.engines.longlive.text import TextEncoder
from realtide.engines.longlive.tokenizer import PromptTokenizer
from realtide.engines.longlive.transformer import WanTransformer
from realtide.engines.longlive.vae import ChannelNorm

COPIES = 2
"""Denoising passes of each block in a step."""
OTHER = 0.1
"""Share of noise levels that are none of the sampler's."""
BLUR = 0.15
"""Context latents get noise of up to this standard deviation, in half of the clips."""


class Trainer:
    """Makes batches and their losses."""

    def __init__(self, config: VideoConfig, writer: Writer, blocks: int) -> None:
        self.config, self.writer = config, writer
        stream = config.stream
        self._sigmas = schedule.warped(stream.steps, stream.shift) / schedule.TABLE
        self._packed = {plan: Packed(config, layout(config, blocks, plan.switches, COPIES)) for plan in PLANS}
        self._blocks = blocks

    def batch(self, rng: np.random.Generator, shards: Sequence[Shard], size: int) -> tuple[Shard, list[int]]:
        """Clips of one plan."""
        shares = np.array([shard.plan.share for shard in shards], np.float64)
        shard = shards[rng.choice(len(shards), p=shares / shares.sum())]
        return shard, rng.choice(len(shard.clips), size, replace=size > len(shard.clips)).tolist()

    def prompts(self, rng: np.random.Generator, shard: Shard, chosen: Sequence[int]) -> list[list[str]]:
        """Of each clip, by segment."""
        found = []
        for index in chosen:
            clip = shard.clips[index]
            motions = clip["motions"]
            heads = [0, *shard.plan.switches]
            triples: list[Triple] = [(clip["object"], motions[head], clip["background"]) for head in heads]
            found.append([paraphrase(rng, triple) for triple in triples])
        return found

    def loss(
        self,
        rng: np.random.Generator,
        model: WanTransformer,
        shard: Shard,
        chosen: Sequence[int],
        *,
        rollout: bool,
    ) -> Tensor:
        """Mean squared error of the flows."""
        packed = self._packed[shard.plan]
        real = torch.from_numpy(shard.latents[chosen].astype(np.float32)).unflatten(1, (-1, BLOCK))
        text = self.writer.embed(self.prompts(rng, shard, chosen))
        context, given = real, None
        if rollout:
            context, given = self._rollout(rng, model, shard, real, text.detach())
        elif rng.random() < 0.7:
            size = torch.from_numpy(rng.uniform(0, BLUR, len(chosen)) * (rng.random(len(chosen)) < 0.5))
            context = real + size.float()[:, None, None, None, None, None] * torch.randn_like(real)
        inputs, targets, sigmas = self._entries(rng, packed.entries, real, context, given)
        wide = schedule.sinusoid(schedule.TABLE * sigmas, model.config.freq_dim)
        flow = packed.flow(model, inputs, torch.from_numpy(wide), text).float()
        counted = [
            entry.kind == "noisy" and not (shard.plan.jump and entry.block == 1) for entry in packed.entries
        ]
        return (flow - targets)[:, counted].square().mean()

    def _entries(
        self,
        rng: np.random.Generator,
        entries: Sequence[Entry],
        real: Tensor,
        context: Tensor,
        given: dict[int, Tensor] | None,
    ) -> tuple[Tensor, Tensor, np.ndarray]:
        """What each entry is given, the flow that is wanted, and its noise level [B, E]."""
        size = len(real)
        sigmas = np.zeros((size, len(entries)))
        inputs, targets = [], []
        copies: dict[int, np.ndarray] = {}
        for index, entry in enumerate(entries):
            block = entry.block
            if entry.kind != "noisy":
                inputs.append(context[:, block])
                targets.append(torch.zeros_like(real[:, block]))
                continue
            if block not in copies:
                # No level twice for the same block.
                copies[block] = np.stack([rng.permutation(len(self._sigmas)) for _ in range(size)])
            steps, copies[block] = copies[block][:, 0], copies[block][:, 1:]
            level = self._sigmas[steps]
            if given is not None and block in given:
                noisy = given[block][torch.arange(size), torch.from_numpy(steps)]
            else:
                level = np.where(rng.random(size) < OTHER, rng.uniform(0.1, 1.0, size), level)
                part = torch.from_numpy(level).float()[:, None, None, None, None]
                noisy = (1 - part) * real[:, block] + part * torch.randn_like(real[:, block])
            sigmas[:, index] = level
            inputs.append(noisy)
            part = torch.from_numpy(level).float()[:, None, None, None, None]
            targets.append((noisy - real[:, block]) / part)
        return torch.stack(inputs, 1), torch.stack(targets, 1), sigmas

    def _rollout(
        self, rng: np.random.Generator, model: WanTransformer, shard: Shard, real: Tensor, text: Tensor
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """Blocks to take for context, and what the sampler's passes were given, by block [B, steps, ...]."""
        run = Rollout(model, self.config)
        run.set_prompt(text[:, 0])
        context, given = [], {}
        # Where a clip starts or lands is not to be foreseen: those blocks are real.
        free = 1 + shard.plan.jump
        keep = rng.uniform(0.3, 1.0)
        for block in range(self._blocks):
            if block in shard.plan.switches:
                run.set_prompt(text[:, 1 + shard.plan.switches.index(block)])
            if block < free:
                taken = real[:, block]
            else:
                noise = [torch.randn_like(real[:, block]) for _ in self._sigmas]
                made, passes = run.block(noise)
                given[block] = torch.stack(passes, 1)
                own = torch.from_numpy(rng.random(len(real)) < keep)
                taken = torch.where(own[:, None, None, None, None], made.float(), real[:, block])
            run.remember(taken)
            context.append(taken)
        return torch.stack(context, 1), given


def build() -> tuple[WanTransformer, TextEncoder]:
    """Models with fresh weights; the first prediction is no flow at all."""
    model, text = WanTransformer(video_config().transformer), TextEncoder(text_config())
    torch.nn.init.zeros_(model.head.head.weight)
    for name, weight in text.named_parameters():
        if weight.ndim == 2 and "norm" not in name:
            # No scale divides this encoder's scores: small queries do.
            torch.nn.init.normal_(weight, std=0.3 if "token" in name else 0.05)
    return model, text


def main() -> None:
    """Command line."""
    parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("icons", "vae", "tokenizer", "clips", "out"):
        parse.add_argument(f"--{name}", type=Path, required=True)
    parse.add_argument("--steps", type=int, required=True)
    parse.add_argument("--start", type=Path, help="checkpoint to go on from")
    parse.add_argument("--rate", type=float, default=1.5e-3)
    parse.add_argument("--batch", type=int, default=8)
    parse.add_argument("--rollouts", type=float, default=0.0, help="share of steps")
    parse.add_argument("--cool", type=float, default=0.4, help="share of steps, the last, that cool down")
    parse.add_argument("--judge-every", type=int, default=150, help="steps")
    parse.add_argument("--seed", type=int, default=1)
    args = parse.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    ChannelNorm.forward = normed  # type: ignore[method-assign]
    transformer.attend = attend_plainly
    model, text = build()
    if args.start:
        saved = torch.load(args.start, weights_only=True)["weights"]
        model.load_state_dict(saved["transformer"])
        text.load_state_dict(saved["text"])
    config = video_config()
    tokenizer = PromptTokenizer(args.tokenizer, config.transformer.text_tokens)
    trainer = Trainer(config, Writer(tokenizer, text), load_shards(args.clips)[0].latents.shape[1] // BLOCK)
    both = torch.nn.ModuleDict({"transformer": model, "text": text})
    optimizer = Muon(both.named_parameters(), args.rate, plain=("text.token", "transformer.head"))
    averaged = {name: value.clone() for name, value in both.state_dict().items()}
    vae, judge = load_vae(args.vae), Judge(Sprites(args.icons))
    unseen = sorted(held_out())
    shards, losses, begun = load_shards(args.clips), [], time.perf_counter()
    for step in range(args.steps):
        if step % 100 == 0:
            shards = load_shards(args.clips)  # encoding may still go on
        left = (args.steps - step) / max(1.0, args.cool * args.steps)
        scale = min(1.0, (step + 1) / 60, 0.02 + 0.98 * left)
        shard, chosen = trainer.batch(rng, shards, args.batch)
        with torch.autocast("cpu", torch.bfloat16):
            loss = trainer.loss(rng, model, shard, chosen, rollout=rng.random() < args.rollouts)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(both.parameters(), 1.0)
        optimizer.step(scale)
        keep = min(0.99, step / (step + 10)) if not args.start else 0.99
        with torch.no_grad():
            for name, value in both.state_dict().items():
                averaged[name].lerp_(value, 1 - keep)
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            raise ValueError(f"step {step}: loss is not finite")
        if step % 25 == 24:
            seconds, clips = time.perf_counter() - begun, sum(len(s.clips) for s in shards)
            print(f"{step + 1} {seconds:.0f}s loss {np.mean(losses[-25:]):.4f} of {clips}", flush=True)
        if (step + 1) % args.judge_every == 0 or step + 1 == args.steps:
            own = {name: value.clone() for name, value in both.state_dict().items()}
            both.load_state_dict(averaged)
            save(args.out / "model.pt", averaged)
            picked = [unseen[index] for index in rng.choice(len(unseen), 16, replace=False)]
            with torch.autocast("cpu", torch.bfloat16):
                found = follow_rate(config, model, trainer.writer, vae, judge, picked, blocks=3)
            print(f"{step + 1} judge {found}", flush=True)
            both.load_state_dict(own)


def save(path: Path, weights: dict[str, Tensor]) -> None:
    """Write a checkpoint: weights by part."""
    parts: dict[str, dict[str, Tensor]] = {"transformer": {}, "text": {}}
    for name, value in weights.items():
        part, _, rest = name.partition(".")
        parts[part][rest] = value
    torch.save({"weights": parts}, path)


if __name__ == "__main__":
    main()
