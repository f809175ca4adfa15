"""Generates and judges clips in PyTorch while the model trains (ours); evaluate.py judges the bundle."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from judge import Judge
from prompts import Triple, plain
from scene import BLOCK, BLOCK_FRAMES, Float32
from torch import Tensor

from realtide.engines.longlive.config import VideoConfig
from realtide.engines.longlive.rollout import Rollout
from realtide.engines.longlive.text import TextEncoder
from realtide.engines.longlive.tokenizer import PromptTokenizer
from realtide.engines.longlive.transformer import WanTransformer
from realtide.engines.longlive.vae import WanVae, Whole


class Writer:
    """Prompts to padded embeddings."""

    def __init__(self, tokenizer: PromptTokenizer, encoder: TextEncoder) -> None:
        self._tokenizer, self._encoder = tokenizer, encoder

    def embed(self, prompts: Sequence[Sequence[str]]) -> Tensor:
        """Prompts [B][segments] -> [B, segments, text tokens, dim], zero padded."""
        flat = [self._tokenizer.encode(prompt) for several in prompts for prompt in several]
        ids = torch.zeros(len(flat), self._tokenizer.limit, dtype=torch.int64)
        for row, tokens in zip(ids, flat, strict=True):
            row[: len(tokens)] = torch.tensor(tokens)
        mask = torch.tensor([[index < len(tokens) for index in range(ids.shape[1])] for tokens in flat])
        out: Tensor = self._encoder(ids, mask)
        return out.unflatten(0, (len(prompts), -1))


def span(block: int) -> slice:
    """The frame before a block, and its frames; the first block begins with its own first frame."""
    return slice(0, 9) if block == 0 else slice(BLOCK_FRAMES * block - 4, BLOCK_FRAMES * block + 9)


@torch.no_grad()
def generate(
    config: VideoConfig,
    model: WanTransformer,
    writer: Writer,
    vae: WanVae,
    prompts: Sequence[Sequence[str]],
    switches: Sequence[int],
    blocks: int,
    seed: int = 0,
) -> Float32:
    """Frames [B, frames, 3, height, width] of prompts [B][segments] that change before blocks `switches`."""
    generator = torch.Generator().manual_seed(seed)
    text = writer.embed(prompts)
    run = Rollout(model, config)
    run.set_prompt(text[:, 0])
    shape = (len(prompts), BLOCK, *config.latent_shape)
    for block in range(blocks):
        if block in switches:
            run.set_prompt(text[:, 1 + list(switches).index(block)])
        made, _ = run.block([torch.randn(shape, generator=generator) for _ in config.stream.steps])
        run.remember(made)
    latents = torch.cat(run.latents, 1)
    return np.stack([vae.decode(one[None], Whole())[0].float().numpy() for one in latents])


def follow_rate(
    config: VideoConfig,
    model: WanTransformer,
    writer: Writer,
    vae: WanVae,
    judge: Judge,
    triples: Sequence[Triple],
    blocks: int,
) -> str:
    """How many blocks show their motion, and how many last frames their object and background."""
    clips = generate(config, model, writer, vae, [[plain(triple)] for triple in triples], (), blocks)
    good, right, wrong = 0, np.zeros(2, int), []
    for triple, frames in zip(triples, clips, strict=True):
        name, motion, background = triple
        positions, areas = judge.positions(frames, name, background)
        verdicts = [judge.verdict(positions[span(b)], areas[span(b)]) for b in range(blocks)]
        good += sum(verdict == motion for verdict in verdicts)
        right += np.array(judge.identify(frames[-1])) == (name, background)
        if any(verdict != motion for verdict in verdicts):
            wrong.append(f"{motion}:{'/'.join(verdicts)}")
    total = len(triples) * blocks
    objects, backgrounds = (f"{count}/{len(triples)}" for count in right)
    return f"motion {good}/{total} object {objects} background {backgrounds} wrong {wrong[:4]}"
