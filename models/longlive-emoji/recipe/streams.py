"""Endless streams that the model generates while it learns from them (ours).

A stream is continued block by block with the few-step sampler. For each block the scene is rendered as it
would go on from where the emoji is in the stream's own picture, and encoded: that is what the block should
have been. So the model learns the real continuation of its own context from its own noisy latents, however
long the stream has been going. Streams begin where the window has left the sink behind; the sink keeps the
prompt that it had then.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from clips import encode
from numpy.typing import NDArray
from prompts import Triple, held_out, paraphrase
from scene import (
    BACKGROUNDS,
    BLOCK,
    BLOCK_FRAMES,
    DRAWN,
    MOTIONS,
    SIZE,
    START,
    Float32,
    Float64,
    Sprites,
    frames_of,
    track,
    wrapped,
)
from torch import Tensor

from realtide.engines.longlive.config import VideoConfig
from realtide.engines.longlive.packed import Entry
from realtide.engines.longlive.rollout import Rollout
from realtide.engines.longlive.transformer import WanTransformer
from realtide.engines.longlive.vae import WanVae

Embed = Callable[[Sequence[Sequence[str]]], Tensor]
"""Prompts [B][segments] to embeddings [B, segments, text tokens, dim]."""
CONTEXT = 17
"""Frames before a block that are rendered for the encoder: latents are then within 0.04 of a whole clip's."""
HELD = 3
"""Blocks that are kept beside the sink: what a recache replays."""
SWITCH = 0.35
"""Share of steps whose streams get a new prompt."""
CUT = 0.03
"""Share of blocks after which a stream ends; and half of those that have lost their emoji end."""
OWN = 0.9
"""Share of generated blocks that the stream goes on from; the others give way to the real ones."""
CIRCLES = 3.0
"""How many times as often a circle is drawn as any other motion: it takes the longest to learn."""
NEAR = 1.5
"""Pixels that the emoji may be off before the scene is moved to where it is."""
SEEN = (0.6, 1.6)
"""Difference from the background, over the real one's, within which the emoji is there."""


def layouts(config: VideoConfig, copies: int) -> tuple[list[Entry], list[Entry]]:
    """Entries where a stream goes on as it was, and where its prompt changes.

    The first: sink under the first segment's prompt, two clean blocks and `copies` noisy ones under the
    second's. The other: sink, three blocks replayed together, noisy blocks that see the last two of them.
    """
    window = config.stream.window // config.stream.block
    if window != HELD + 1:
        raise ValueError(f"streams need a window of {HELD + 1} blocks, got {window}")
    going = [
        Entry("clean", 0, 0, (0,), 0),
        Entry("clean", 1, 1, (0, 1), 1),
        Entry("clean", 2, 1, (0, 1, 2), 2),
    ]
    going += [Entry("noisy", 3, 1, (0, 1, 2, 3 + copy), 3) for copy in range(copies)]
    replayed = (0, 1, 2, 3)
    turned = [Entry("clean", 0, 0, (0,), 0)]
    turned += [Entry("recache", block, 1, replayed, block) for block in range(1, HELD + 1)]
    turned += [Entry("noisy", 4, 1, (0, 2, 3, 4 + copy), 3) for copy in range(copies)]
    return going, turned


@dataclass
class Stream:
    """One of them.

    Attributes:
        triple: what it shows now.
        first: what its sink was made from, and the prompt that it has.
        blocks: latents [1 + HELD, block, C, height, width]: sink, then the last ones.
        positions: of the emoji in the last frames, [CONTEXT, 2].
        age: blocks that were generated.
    """

    triple: Triple
    first: Triple
    blocks: Float32
    positions: Float64
    age: int = 0


@dataclass(frozen=True)
class Turn:
    """What a step learns from: of B streams.

    Attributes:
        prompts: the sink's and the current one, of each stream.
        switched: whether the current one is new.
        context: blocks that are looked back at [B, n, block, C, height, width]; the sink is the first.
        real: what the block should have been [B, block, C, height, width].
        given: what the sampler's passes were given [B, steps, block, C, height, width].
    """

    prompts: list[list[str]]
    switched: bool
    context: Tensor
    real: Tensor
    given: Tensor


@dataclass(frozen=True)
class Start:
    """Videos from their first block on: of B videos.

    Attributes:
        prompts: [B][1].
        context: the blocks that were generated [B, n, block, C, height, width].
        real: what they should have been.
        given: by block, what the sampler's passes were given [B, steps, block, C, height, width].
    """

    prompts: list[list[str]]
    context: Tensor
    real: Tensor
    given: dict[int, Tensor]


class Streams:
    """A pool of streams.

    Args:
        config: of the model.
        sprites, vae: of the scene.
        firsts: latents of first blocks and their triples.
        count: streams in the pool.
        rng: for everything that is drawn.
    """

    def __init__(
        self,
        config: VideoConfig,
        sprites: Sprites,
        vae: WanVae,
        firsts: tuple[NDArray[np.float16], list[Triple]],
        count: int,
        rng: np.random.Generator,
    ) -> None:
        self._config, self._sprites, self._vae, self._rng = config, sprites, vae, rng
        self._firsts = {triple: latents for latents, triple in zip(*firsts, strict=True)}
        unseen = held_out()
        self._allowed = {
            (name, background): [m for m in MOTIONS if (name, m, background) not in unseen]
            for name in DRAWN
            for background in BACKGROUNDS
        }
        self._pool = [self._begin() for _ in range(count)]
        self.lost, self.off, self.done = 0, 0.0, 0

    def _begin(self) -> Stream:
        """A sink, and three real blocks from anywhere on the torus."""
        rng = self._rng
        pairs = [pair for pair, motions in self._allowed.items() if len(motions) > 1]
        name, background = pairs[rng.integers(len(pairs))]
        first, motion = (self._motion(name, background) for _ in range(2))
        place = rng.uniform(0, SIZE, 2)
        if rng.random() < 0.7:
            # Straight moves keep to the latents' grid, relative to where a stream begins.
            place = START + 4.0 * np.rint((place - START) / 4)
        positions = track(place, [motion] * (CONTEXT + HELD * BLOCK_FRAMES))
        triple = (name, motion, background)
        latents = encode(self._vae, self._frames(triple, positions))[-HELD * BLOCK :].astype(np.float32)
        told = (name, first, background)
        sink = self._firsts[told].astype(np.float32)
        blocks = np.concatenate([sink[None], latents.reshape(HELD, BLOCK, *latents.shape[1:])])
        return Stream(triple, told, blocks, positions[-CONTEXT:])

    def _motion(self, name: str, background: str, other: str = "") -> str:
        """One that training may show, and not the `other`."""
        motions = [motion for motion in self._allowed[name, background] if motion != other]
        weights = np.array([CIRCLES if "clockwise" in motion else 1.0 for motion in motions])
        return motions[self._rng.choice(len(motions), p=weights / weights.sum())]

    def _frames(self, triple: Triple, positions: Float64) -> Float32:
        name, _, background = triple
        frames = [self._sprites.frame(name, background, position) for position in positions]
        return np.ascontiguousarray(np.stack(frames).transpose(0, 3, 1, 2)) * 2 - 1

    def step(self, model: WanTransformer, embed: Embed, size: int) -> Turn:
        """Continue some streams by a block. Nothing is differentiated."""
        rng = self._rng
        chosen = rng.choice(len(self._pool), size, replace=False)
        switched = bool(rng.random() < SWITCH)
        streams = [self._pool[index] for index in chosen]
        if switched:
            for stream in streams:
                name, motion, background = stream.triple
                stream.triple = (name, self._motion(name, background, motion), background)
        prompts = [[paraphrase(rng, s.first), paraphrase(rng, s.triple)] for s in streams]
        real, ends = self._real(streams)
        context = torch.from_numpy(np.stack([stream.blocks for stream in streams]))
        if not switched:
            context = torch.cat([context[:, :1], context[:, 2:]], 1)
        made, given = self._generate(model, embed(prompts), context, switched)
        turn = Turn(prompts, switched, context, real, given)
        for index, stream, one, target, end in zip(chosen, streams, made, real, ends, strict=True):
            self._pool[index] = self._advance(stream, one.numpy(), target.numpy(), end)
        return turn

    def young(self, model: WanTransformer, embed: Embed, size: int, blocks: int) -> Start:
        """Begin some videos from nothing and generate their first blocks. Nothing is differentiated.

        A stream of the pool never shows the first blocks, where the window is not full and the sink is the
        model's own.
        """
        pairs = [pair for pair, motions in self._allowed.items() if motions]
        names = [pairs[index] for index in self._rng.integers(len(pairs), size=size)]
        triples = [(name, self._motion(name, background), background) for name, background in names]
        prompts = [[paraphrase(self._rng, triple)] for triple in triples]
        clips = [
            np.concatenate([np.array([START]), track(np.array(START), [motion] * (frames_of(1) - 1))])
            for _, motion, _ in triples
        ]
        run = Rollout(model, self._config)
        run.set_prompt(embed(prompts)[:, 0])
        shape = (size, BLOCK, *self._config.latent_shape)
        made, real, given = [], [], []
        for block in range(blocks):
            if block:
                clips = [
                    np.concatenate([clip, track(clip[-1], [motion] * BLOCK_FRAMES)])
                    for clip, (_, motion, _) in zip(clips, triples, strict=True)
                ]
            due = [
                encode(self._vae, self._frames(triple, clip))[-BLOCK:].astype(np.float32)
                for triple, clip in zip(triples, clips, strict=True)
            ]
            latents, passes = run.block([torch.randn(shape) for _ in self._config.stream.steps])
            run.remember(latents)
            made.append(latents.float())
            given.append(torch.stack(passes, 1))
            real.append(torch.from_numpy(np.stack(due)))
            for index, (one, target) in enumerate(zip(made[-1].numpy(), due, strict=True)):
                lost, shift = apart(one, target)
                if not lost and np.hypot(*shift) > NEAR:
                    clips[index] = (clips[index] + shift) % SIZE
        return Start(prompts, torch.stack(made, 1), torch.stack(real, 1), dict(enumerate(given)))

    def _real(self, streams: list[Stream]) -> tuple[Tensor, list[Float64]]:
        frames, ends = [], []
        for stream in streams:
            coming = track(stream.positions[-1], [stream.triple[1]] * BLOCK_FRAMES)
            positions = np.concatenate([stream.positions, coming])
            frames.append(self._frames(stream.triple, positions))
            ends.append(positions[-CONTEXT:])
        latents = [encode(self._vae, one)[-BLOCK:].astype(np.float32) for one in frames]
        return torch.from_numpy(np.stack(latents)), ends

    def _generate(
        self, model: WanTransformer, text: Tensor, context: Tensor, switched: bool
    ) -> tuple[Tensor, Tensor]:
        run = Rollout(model, self._config)
        run.set_prompt(text[:, 0])
        run.remember(context[:, 0])
        run.set_prompt(text[:, 1], recache=False)
        if switched:
            run.remember(context[:, 1:].flatten(1, 2))  # together, as a recache has them
        else:
            for block in range(1, context.shape[1]):
                run.remember(context[:, block])
        noise = [torch.randn_like(context[:, 0]) for _ in self._config.stream.steps]
        made, passes = run.block(noise)
        return made.float(), torch.stack(passes, 1)

    def _advance(self, stream: Stream, made: Float32, real: Float32, positions: Float64) -> Stream:
        """The stream with its new block, and the scene where the picture has the emoji."""
        rng = self._rng
        lost, shift = apart(made, real)
        self.done += 1
        self.lost += lost
        self.off += 0.0 if lost else float(np.hypot(*shift))
        if rng.random() < (0.5 if lost else CUT):
            return self._begin()
        own = rng.random() < OWN
        if own and not lost and np.hypot(*shift) > NEAR:
            positions = (positions + shift) % SIZE
        blocks = np.concatenate([stream.blocks[:1], stream.blocks[2:], (made if own else real)[None]])
        return Stream(stream.triple, stream.first, blocks, positions, stream.age + 1)

    def report(self) -> str:
        """How the streams have fared since the last report."""
        done, kept = max(self.done, 1), max(self.done - self.lost, 1)
        ages = np.mean([stream.age for stream in self._pool])
        text = f"lost {self.lost / done:.3f} off {self.off / kept:.2f} px age {ages:.0f}"
        self.lost, self.off, self.done = 0, 0.0, 0
        return text


def apart(made: Float32, real: Float32) -> tuple[bool, Float64]:
    """Whether a block [block, C, height, width] ends without its emoji, and how far that is off [pixels]."""
    (amount, place), (due, wanted) = look(made[-1]), look(real[-1])
    low, high = SEEN
    return not low <= amount / due <= high, wrapped((place - wanted) * SIZE / made.shape[-1])


def look(latents: Float32) -> tuple[float, Float64]:
    """How much there is in a latent frame [C, height, width] beside its background, and where (x, y)."""
    plain = np.median(latents.reshape(len(latents), -1), 1)
    weight = np.abs(latents - plain[:, None, None]).sum(0)
    weight = np.where(weight > 0.2 * weight.max(), weight, 0.0)
    place = []
    for axis in (0, 1):
        sums = weight.sum(axis)
        angles = 2 * np.pi * np.arange(len(sums)) / len(sums)
        angle = np.arctan2((sums * np.sin(angles)).sum(), (sums * np.cos(angles)).sum())
        place.append(angle * len(sums) / (2 * np.pi) % len(sums))
    return float(weight.sum()), np.array(place)
