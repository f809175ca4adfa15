"""Train the transformer and the text encoder on encoded clips (ours).

    train.py --icons icons.json --vae vae.pt --tokenizer tokenizer.model --clips CLIPS --out RUN --steps N
             [--begin model.pt] [--rollouts 0.5]

Flow matching on all blocks of a clip at once, each with the keys that it would find in a session's cache
(`realtide.engines.longlive.packed`). With --rollouts that share of the steps first generates the clip with
the few-step sampler, recaches included, and takes some of the blocks so made in place of the real ones: the
model then learns the real continuation of its own blocks, from its own samples at every step of the sampler.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from clips import BLOCKS, PLANS, Shard, load_shards, load_vae, normed
from judge import Judge
from numpy.typing import NDArray
from optim import Muon
from pairs import build, mean_gradients, save
from play import Writer, follow_rate
from prompts import Triple, held_out, paraphrase
from scene import BLOCK, DRAWN, Sprites
from shapes import video_config
from streams import Streams, layouts
from torch import Tensor

from realtide.engines.longlive import schedule, transformer
from realtide.engines.longlive.config import VideoConfig
from realtide.engines.longlive.packed import Entry, Packed, attend_plainly, layout
from realtide.engines.longlive.rollout import Rollout
from realtide.engines.longlive.tokenizer import PromptTokenizer
from realtide.engines.longlive.transformer import WanTransformer
from realtide.engines.longlive.vae import ChannelNorm

PLAIN = ("text.", "transformer.head", "text_embedding", "cross_attn.q", "cross_attn.k")
"""Not for Muon. Its even steps let cross-attention settle on the padding before words mean anything."""
FIRST = 0.5
"""Weight of first blocks."""
WINDOW = 4
"""Blocks of the cache."""
COPIES = 1
"""Denoising passes of each block in a step."""
LEVELS = (0.4, 0.2, 0.2, 0.2)
"""How often each of the sampler's noise levels is taken: at the first nothing but context and prompt help."""
OTHER = 0.1
"""Share of noise levels that are none of the sampler's."""
BLUR = 0.15
"""Context latents get noise of up to this standard deviation, in half of the clips."""


class Trainer:
    """Makes batches and their losses."""

    def __init__(self, config: VideoConfig, writer: Writer, blocks: int, firsts: Path) -> None:
        self.config, self.writer = config, writer
        stream = config.stream
        self._sigmas = schedule.warped(stream.steps, stream.shift) / schedule.TABLE
        self._packed = {plan: Packed(config, layout(config, blocks, plan.switches, COPIES)) for plan in PLANS}
        self._blocks = blocks
        self._window = Packed(config, layout(config, WINDOW, (), 1))
        self._single = Packed(config, layout(config, 1, (), 1))
        self._streams = [Packed(config, entries) for entries in layouts(config, 2)]
        stored = np.load(firsts)
        told = [tuple(triple) for triple in json.loads(str(stored["triples"]))]
        kept = [index for index, triple in enumerate(told) if triple[0] in DRAWN]
        self._firsts, self._told = stored["latents"][kept], [told[index] for index in kept]

    @property
    def firsts(self) -> tuple[NDArray[np.float16], list[Triple]]:
        """First blocks and what they show."""
        return self._firsts, self._told

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
        counted = [entry.kind == "noisy" and entry.block > shard.plan.jump for entry in packed.entries]
        # By noise level: errors of the flow are largest, and matter least, where noise is low.
        weight = torch.from_numpy(sigmas).float()
        return ((flow - targets).square().flatten(2).mean(2) * weight)[:, counted].mean()

    def first_loss(self, rng: np.random.Generator, model: WanTransformer, size: int) -> Tensor:
        """The same for first blocks that start at one place: prompt and noise are all there is."""
        chosen = rng.choice(len(self._firsts), size, replace=False)
        real = torch.from_numpy(self._firsts[chosen].astype(np.float32))[:, None]
        text = self.writer.embed([[paraphrase(rng, self._told[index])] for index in chosen])
        inputs, targets, sigmas = self._entries(rng, self._single.entries, real, real, None)
        wide = torch.from_numpy(schedule.sinusoid(schedule.TABLE * sigmas, model.config.freq_dim))
        flow = self._single.flow(model, inputs, wide, text).float()
        weight = torch.from_numpy(sigmas).float()
        return ((flow - targets).square().flatten(2).mean(2) * weight).mean()

    def window_loss(
        self, rng: np.random.Generator, model: WanTransformer, shards: Sequence[Shard], size: int
    ) -> Tensor:
        """The same for one full window of each of many clips: the sink, and three blocks of any place.

        All is under the prompt of the last block; blocks that follow another are context and no more. Many
        prompts for the price of few clips: so the first steps learn what words mean.
        """
        latents, prompts, counted = [], [], []
        for _ in range(size):
            shard, chosen = self.batch(rng, shards, 1)
            index, last = chosen[0], int(rng.integers(WINDOW - 1, self._blocks))
            blocks = [0, last - 2, last - 1, last]
            heads = [0, *shard.plan.switches]
            segments = [sum(block >= head for head in heads) - 1 for block in blocks]
            prompts.append([self.prompts(rng, shard, [index])[0][segments[-1]]])
            latents.append(
                shard.latents[index].reshape(self._blocks, BLOCK, *self.config.latent_shape)[blocks]
            )
            follows = [block - 1 in blocks[:place] for place, block in enumerate(blocks)]
            if shard.plan.jump:
                follows = [follow and block != 1 for follow, block in zip(follows, blocks, strict=True)]
            counted.append(
                [follow and own == segments[-1] for follow, own in zip(follows, segments, strict=True)]
            )
        real = torch.from_numpy(np.stack(latents).astype(np.float32))
        text = self.writer.embed(prompts)
        entries = self._window.entries
        blur = torch.from_numpy(rng.uniform(0, BLUR, size) * (rng.random(size) < 0.5)).float()
        context = real + blur[:, None, None, None, None, None] * torch.randn_like(real)
        inputs, targets, sigmas = self._entries(rng, entries, real, context, None)
        wide = torch.from_numpy(schedule.sinusoid(schedule.TABLE * sigmas, model.config.freq_dim))
        flow = self._window.flow(model, inputs, wide, text).float()
        wanted = torch.tensor(
            [[entry.kind == "noisy" and row[entry.block] for entry in entries] for row in counted]
        )
        weight = torch.from_numpy(sigmas).float()
        return ((flow - targets).square().flatten(2).mean(2) * weight)[wanted].mean()

    def stream_loss(
        self, rng: np.random.Generator, model: WanTransformer, streams: Streams, size: int
    ) -> Tensor:
        """The same for the next block of endless streams that the model makes itself."""
        turn = streams.step(model, self._told_to_text, size)
        packed = self._streams[turn.switched]
        text = self.writer.embed(turn.prompts)
        blocks = torch.cat([turn.context, turn.real[:, None]], 1)
        given = {blocks.shape[1] - 1: turn.given}
        inputs, targets, sigmas = self._entries(rng, packed.entries, blocks, blocks, given)
        wide = torch.from_numpy(schedule.sinusoid(schedule.TABLE * sigmas, model.config.freq_dim))
        flow = packed.flow(model, inputs, wide, text).float()
        counted = [entry.kind == "noisy" for entry in packed.entries]
        weight = torch.from_numpy(sigmas).float()
        return ((flow - targets).square().flatten(2).mean(2) * weight)[:, counted].mean()

    def young_loss(
        self, rng: np.random.Generator, model: WanTransformer, streams: Streams, size: int
    ) -> Tensor:
        """The same for the first blocks of videos that the model makes itself."""
        start = streams.young(model, self._told_to_text, size, WINDOW)
        packed = self._window
        text = self.writer.embed(start.prompts)
        inputs, targets, sigmas = self._entries(rng, packed.entries, start.real, start.context, start.given)
        wide = torch.from_numpy(schedule.sinusoid(schedule.TABLE * sigmas, model.config.freq_dim))
        flow = packed.flow(model, inputs, wide, text).float()
        counted = [entry.kind == "noisy" for entry in packed.entries]
        weight = torch.from_numpy(sigmas).float()
        return ((flow - targets).square().flatten(2).mean(2) * weight)[:, counted].mean()

    @torch.no_grad()
    def _told_to_text(self, prompts: Sequence[Sequence[str]]) -> Tensor:
        return self.writer.embed(prompts)

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
                count = sum(other.kind == "noisy" and other.block == block for other in entries)
                copies[block] = np.stack(
                    [rng.choice(len(self._sigmas), count, replace=False, p=LEVELS) for _ in range(size)]
                )
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


def main() -> None:
    """Command line."""
    parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("icons", "vae", "tokenizer", "clips", "out"):
        parse.add_argument(f"--{name}", type=Path, required=True)
    parse.add_argument("--steps", type=int, required=True)
    parse.add_argument("--begin", type=Path, help="checkpoint to go on from")
    parse.add_argument("--rate", type=float, default=1.5e-3)
    parse.add_argument("--batch", type=int, default=8)
    parse.add_argument("--rollouts", type=float, default=0.0, help="share of steps")
    parse.add_argument("--firsts", type=int, default=10, help="first blocks in each step")
    parse.add_argument("--windows", type=float, default=0.0, help="share of steps with windows of many clips")
    parse.add_argument("--drawn", action="store_true", help="of all clips only those of scene.DRAWN")
    parse.add_argument("--keep", type=float, default=0.98, help="of the averaged weights, a step")
    parse.add_argument("--streams", type=float, default=0.0, help="share of steps with endless own streams")
    parse.add_argument("--young", type=float, default=0.0, help="share of steps with own first blocks")
    parse.add_argument("--pool", type=int, default=12, help="streams of each process")
    parse.add_argument("--cool", type=float, default=0.4, help="share of steps, the last, that cool down")
    parse.add_argument("--judge-every", type=int, default=150, help="steps")
    parse.add_argument("--seed", type=int, default=1)
    args = parse.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    workers, worker = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    if workers > 1:
        dist.init_process_group("gloo")
    # Whether a step has a rollout is the same for all workers; what it is about is not.
    rng, kinds = np.random.default_rng(args.seed + worker), np.random.default_rng(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    ChannelNorm.forward = normed  # type: ignore[method-assign]
    transformer.attend = attend_plainly
    model, text = build()
    if args.begin:
        saved = torch.load(args.begin, weights_only=True)["weights"]
        absent, extra = model.load_state_dict(saved["transformer"], strict=False)
        if extra or set(absent) - {"place_embedding"}:  # places of nothing yet
            raise ValueError(f"{args.begin}: not the weights of this transformer: {[*absent, *extra]}")
        text.load_state_dict(saved["text"])
    torch.manual_seed(1000 * args.seed + worker)
    config = video_config()
    tokenizer = PromptTokenizer(args.tokenizer, config.transformer.text_tokens)
    trainer = Trainer(config, Writer(tokenizer, text), BLOCKS, args.clips / "firsts.npz")
    both = torch.nn.ModuleDict({"transformer": model, "text": text})
    optimizer = Muon(both.named_parameters(), args.rate, plain=PLAIN)
    parameters = list(both.parameters())
    averaged = {name: value.clone() for name, value in both.state_dict().items()}
    vae, sprites = load_vae(args.vae), Sprites(args.icons)
    judge = Judge(sprites)
    streams = Streams(config, sprites, vae, trainer.firsts, args.pool, rng) if args.streams else None
    unseen = sorted(triple for triple in held_out() if triple[0] in DRAWN)
    shards, losses, begun = load_shards(args.clips), [], time.perf_counter()
    for step in range(args.steps):
        if step % 100 == 0:
            shards = load_shards(args.clips)  # encoding may still go on
            if args.drawn:
                shards = [shard.only(DRAWN) for shard in shards]
        left = (args.steps - step) / max(1.0, args.cool * args.steps)
        scale = min(1.0, (step + 1) / 60, 0.02 + 0.98 * left)
        shard, chosen = trainer.batch(rng, shards, max(1, args.batch // 2))  # whole clips are longer
        with torch.autocast("cpu", torch.bfloat16):
            if streams and kinds.random() < args.young:
                loss = trainer.young_loss(rng, model, streams, max(1, args.batch - 1))
            elif streams and kinds.random() < args.streams:
                loss = trainer.stream_loss(rng, model, streams, max(1, args.batch - 1))
            elif kinds.random() < args.windows:
                loss = trainer.window_loss(rng, model, shards, args.batch)
            else:
                loss = trainer.loss(rng, model, shard, chosen, rollout=kinds.random() < args.rollouts)
            loss = loss + FIRST * trainer.first_loss(rng, model, args.firsts)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        if workers > 1:
            mean_gradients(parameters, workers)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step(scale)
        keep = min(args.keep, step / (step + 10))
        with torch.no_grad():
            for name, value in both.state_dict().items():
                averaged[name].lerp_(value, 1 - keep)
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            raise ValueError(f"step {step}: loss is not finite")
        if worker == 0 and step % 25 == 24:
            seconds, clips = time.perf_counter() - begun, sum(len(s.clips) for s in shards)
            fared = f"; streams {streams.report()}" if streams else ""
            print(f"{step + 1} {seconds:.0f}s loss {np.mean(losses[-25:]):.4f} of {clips}{fared}", flush=True)
        if worker == 0 and ((step + 1) % args.judge_every == 0 or step + 1 == args.steps):
            own = {name: value.clone() for name, value in both.state_dict().items()}
            both.load_state_dict(averaged)
            save(args.out / "model.pt", averaged)
            picked = [unseen[index] for index in rng.choice(len(unseen), 16, replace=False)]
            with torch.autocast("cpu", torch.bfloat16):
                found = follow_rate(config, model, trainer.writer, vae, judge, picked, blocks=3)
            print(f"{step + 1} judge {found}", flush=True)
            both.load_state_dict(own)


if __name__ == "__main__":
    main()
