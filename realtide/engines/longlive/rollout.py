"""Generates a batch of videos at once for training: what `VideoStream` does, on tensors (ours).

Keys and values are kept by block as they were computed, before rotary embedding; places and rings are left to
the cache that serves. A test holds both to the same latents.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from realtide.engines.longlive import rotary, schedule
from realtide.engines.longlive.config import VideoConfig
from realtide.engines.longlive.transformer import Block, WanTransformer, attend, rotary_table, rotate

Cross = list[tuple[Tensor, Tensor]]
Layers = list[tuple[Tensor, Tensor]]
"""Keys and values [B, tokens, H, d] of one block, by layer."""


class Rollout:
    """A batch of videos that switch prompts at the same blocks.

    Args:
        model: the transformer; nothing is differentiated.
        config: as of `packed.layout`.
    """

    def __init__(self, model: WanTransformer, config: VideoConfig) -> None:
        self._model = model
        self._config = config
        stream = config.stream
        self._window = stream.window // stream.block
        self._timesteps = schedule.warped(stream.steps, stream.shift)
        time = torch.from_numpy(rotary.time_table(config, np.arange(stream.window)))
        self._table = rotary_table(time, torch.from_numpy(rotary.space_table(config)))
        self._held: list[Layers] = []
        self.latents: list[Tensor] = []
        self._cross: Cross = []

    @torch.no_grad()
    def set_prompt(self, text: Tensor, *, recache: bool = True) -> None:
        """Follow prompts with these embeddings [B, text tokens, text_dim] from the next block on."""
        self._cross = self._model.cross(text)
        count = len(self.latents)
        if not count or not recache:
            return
        first = 0 if count <= self._window else count - self._window + 1
        context = [] if first == 0 else [self._held[0]]
        _, made = self._pass(torch.cat(self.latents[first:], 1), self._config.stream.context_noise, context)
        for index, layers in enumerate(made):
            self._held[first + index] = layers

    @torch.no_grad()
    def block(self, noise: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Generate the next block; `remember` takes it, or another one in its place, into the cache.

        Args:
            noise: [B, block, C, height, width] for each pass, as `noise.normal` numbers them.

        Returns:
            The clean latents [B, block, C, height, width], and what each pass was given.
        """
        given: list[Tensor] = []
        latents = noise[0]
        for step, timestep in enumerate(self._timesteps, 1):
            given.append(latents)
            flow, _ = self._pass(latents, timestep, self._context())
            latents = latents - timestep / schedule.TABLE * flow
            if step < len(self._timesteps):
                sigma = self._timesteps[step] / schedule.TABLE
                latents = (1 - sigma) * latents + sigma * noise[step]
        return latents, given

    @torch.no_grad()
    def remember(self, latents: Tensor) -> None:
        """Take clean latents [B, n * block, C, height, width] into the cache; blocks see each other."""
        _, made = self._pass(latents, self._config.stream.context_noise, self._context())
        self._held += made
        self.latents += torch.unflatten(latents, 1, (-1, self._config.stream.block)).unbind(1)

    def _context(self) -> list[Layers]:
        count = len(self._held)
        return self._held[:1] + self._held[max(1, count - self._window + 2) :]

    def _pass(
        self, latents: Tensor, timestep: float, context: Sequence[Layers]
    ) -> tuple[Tensor, list[Layers]]:
        """Flow of blocks that see each other and the context, and their keys and values by block."""
        model, stream = self._model, self._config.stream
        tokens = stream.block * self._config.frame_tokens
        start = len(context) * tokens
        end = start + latents.shape[1] * self._config.frame_tokens
        sinusoid = torch.from_numpy(schedule.sinusoid([timestep], model.config.freq_dim))
        x = model.embed(latents)
        embedded, modulation = model.embed_time(sinusoid.expand(len(latents), latents.shape[1], -1))
        blocks = (end - start) // tokens
        made: list[Layers] = [[] for _ in range(blocks)]
        table = self._table.to(torch.float32)

        for layer, (block, cross) in enumerate(zip(model.blocks, self._cross, strict=True)):
            assert isinstance(block, Block)

            def look(queries: Tensor, keys: Tensor, values: Tensor, layer: int = layer) -> Tensor:
                for index in range(blocks):
                    part = slice(index * tokens, (index + 1) * tokens)
                    made[index].append((keys[:, part], values[:, part]))
                seen = torch.cat([*(held[layer][0] for held in context), keys], 1)
                read = torch.cat([*(held[layer][1] for held in context), values], 1)
                queries = rotate(queries, table[start:end].to(queries.dtype))
                seen = rotate(seen, table[:end].to(seen.dtype))
                return attend(queries.transpose(1, 2), seen.transpose(1, 2), read.transpose(1, 2))

            x = block(x, modulation, look, *cross)
        flow = model.pixels(model.head(x, embedded), self._config.grid)
        return flow.float(), made
