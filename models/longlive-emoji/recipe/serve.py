"""The bundle's streams over ONNX Runtime, as a server runs them: for scores and pictures (ours)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from scene import Float32

from realtide.bundle import Bundle, load_bundle
from realtide.engines.longlive import noise, onnx_programs
from realtide.engines.longlive.config import (
    StreamConfig,
    TransformerConfig,
    VaeConfig,
    VideoConfig,
    cache_shapes,
    decoder_shapes,
)
from realtide.engines.longlive.generation import Float32 as Latents
from realtide.engines.longlive.generation import VideoStream
from realtide.engines.longlive.programs import FrameDecoder, Passes, Stages
from realtide.engines.longlive.tokenizer import PromptTokenizer
from realtide.engines.runtime.program import Array
from realtide.engines.runtime.weights import WeightFile

Switch = Literal["recache", "kept", "dropped"]
"""What becomes of the cache at a prompt switch."""


class KeptStream(VideoStream):
    """A stream whose cache does not follow a new prompt: only cross-attention does."""

    def _recache(self) -> int:
        return 0


class Player:
    """Plays one stream after the other.

    Args:
        bundle: directory or name.
        precision: of the graphs; None: the bundle's first.
    """

    def __init__(self, bundle: Path | str, precision: str | None = None) -> None:
        found: Bundle = load_bundle(bundle)
        kind = found.precision(precision)
        parts = found.manifest.architecture
        self.config = VideoConfig(
            TransformerConfig.from_dict(parts["transformer"]), StreamConfig.from_dict(parts["stream"])
        )
        vae = VaeConfig.from_dict(parts["vae"])
        weights = WeightFile(found.weights)
        stream = self.config.stream
        self._cache = {
            name: np.zeros((rows, *shape), np.float32)
            for name, (rows, shape) in cache_shapes(self.config).items()
        }
        names = ("prompt", "denoise", "clean", "recache")
        self._programs = onnx_programs.video_programs(
            Passes(*(found.graph(name, kind) for name in names)), weights, self._cache
        )
        features: Mapping[str, Array] = {
            name: np.zeros(shape, np.float32)
            for name, shape in decoder_shapes(vae, stream.height, stream.width).items()
        }
        self._decoder = onnx_programs.half_programs(
            Stages(found.graph("decode_first", kind), found.graph("decode_next", kind)), weights, features
        )
        self._text = onnx_programs.text_program(found.graph("text", kind), weights)
        self._tokenizer = PromptTokenizer(found.asset("tokenizer"), self.config.transformer.text_tokens)

    def embed(self, prompt: str) -> Latents:
        """A prompt's embeddings [tokens, dim]."""
        made: Latents = self._text.run({"ids": np.array(self._tokenizer.encode(prompt))})["embeds"]
        return made

    def play(
        self, prompts: Sequence[tuple[int, str]], blocks: int, seed: int, switch: Switch = "recache"
    ) -> Float32:
        """Frames [frames, 3, height, width] in about -1 .. 1.

        Args:
            prompts: with the block that each is in force from, rising; the first one from block 0.
            blocks: to generate.
            seed: of the noise.
            switch: what becomes of the cache where a prompt begins.
        """
        begins = dict(prompts)
        kind = KeptStream if switch == "kept" else VideoStream
        stream = kind(self.config, self._programs, self._cache, seed)
        decoder = FrameDecoder(self._decoder)
        frames = []
        for block in range(blocks):
            if block in begins:
                if block and switch == "dropped":
                    stream = self._empty(seed, block * self.config.stream.block)
                stream.set_prompt(self.embed(begins[block]))
            frames += [decoder.decode(latents) for latents in stream.block()]
        return np.concatenate(frames)

    def _empty(self, seed: int, done: int) -> VideoStream:
        """A stream with nothing in its cache that goes on with the noise of frame `done`."""
        shape = self.config.latent_shape

        def drawn(first: int, count: int, step: int) -> Latents:
            return noise.frames(seed, done + first, count, step, shape)

        return VideoStream(self.config, self._programs, self._cache, seed, drawn)
