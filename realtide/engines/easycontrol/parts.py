"""What the sessions of an engine share, and the work on models that they ask for (ours). Numpy only."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from realtide.engines.easycontrol import rotary, schedule
from realtide.engines.easycontrol.config import ImageConfig, cache_names, lora_shapes
from realtide.engines.easycontrol.packing import pack, unpack
from realtide.engines.easycontrol.programs import FLOAT, ImagePrograms
from realtide.engines.easycontrol.store import ConditionStore, Key
from realtide.engines.easycontrol.tokenizer import PooledTokenizer, PromptTokenizer
from realtide.engines.easycontrol.types import Pixels8
from realtide.engines.easycontrol.worker import Worker
from realtide.engines.runtime.memory import Values
from realtide.engines.runtime.program import Array

Float32 = NDArray[np.float32]
Grid = tuple[int, int]

_PROMPTS = 16
"""Prompts whose embeddings are kept."""
_TABLES = 16
"""Sizes of images whose rotary tables are kept."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """An embedded prompt.

    Attributes:
        text: [text tokens, text_dim], in the engine's memory.
        pooled: [pooled_dim].
        digest: of `pooled`.
    """

    text: Values = field(repr=False)
    pooled: Array = field(repr=False)
    digest: bytes


@dataclass(frozen=True, slots=True)
class Row:
    """One request's part of a step.

    Attributes:
        latents: noisy, packed [tokens, channels].
        sigma: noise level.
        guidance: scale.
        prompt: embedded.
        caches: of its conditions.
    """

    latents: Float32
    sigma: float
    guidance: float
    prompt: Prompt
    caches: Sequence[Mapping[str, Values]]


class Parts:
    """The model of an engine.

    Args:
        config: shapes.
        programs: all of them; `decode` and `preview` are run by the worker's thread.
        pieces: tokenizer of the text encoder.
        pooled: tokenizer of the pooled encoder.
        loras: of each kind, by `config.lora_shapes`, at weight 1.
        store: cache of conditions.
        worker: thread that decodes; its memory is where prompts and the caches of conditions are.
        dtype: of what programs are fed from the host.
    """

    def __init__(
        self,
        config: ImageConfig,
        programs: ImagePrograms,
        pieces: PromptTokenizer,
        pooled: PooledTokenizer,
        loras: Mapping[str, Mapping[str, Array]],
        store: ConditionStore,
        worker: Worker,
        dtype: np.dtype[Any] = FLOAT,
    ) -> None:
        self.config, self.store, self.worker = config, store, worker
        self._programs = programs
        self._pieces, self._pooled = pieces, pooled
        self._loras = loras
        self._memory, self._dtype = worker.memory, dtype
        self._prompts: OrderedDict[str, Prompt] = OrderedDict()
        self._tables: OrderedDict[Grid, Array] = OrderedDict()
        self._joined: tuple[tuple[int, ...], list[object], dict[str, Values]] | None = None
        for kind in config.conditions.kinds:
            wanted = lora_shapes(config.transformer, config.conditions.rank)
            have = {name: tensor.shape for name, tensor in loras[kind].items()}
            if have != wanted:
                raise ValueError(f"the LoRA of {kind} does not have the model's shapes")

    def prompt(self, text: str) -> Prompt:
        """A prompt's embeddings; those of the last ones are kept."""
        found = self._prompts.get(text)
        if found is None:
            get = self._memory.get
            embeds = get(self._programs.text.run({"ids": self._pieces.encode(text)})["embeds"])
            pooled = get(self._programs.pooled.run({"ids": self._pooled.encode(text)})["pooled"])
            kept = self._memory.put(embeds.astype(self._dtype))
            found = Prompt(kept, pooled.astype(self._dtype), digest(pooled))
            self._prompts[text] = found
            while len(self._prompts) > _PROMPTS:
                self._prompts.popitem(last=False)
        self._prompts.move_to_end(text)
        return found

    def known(self, text: str) -> bool:
        """True if the prompt's embeddings are at hand."""
        return text in self._prompts

    def encode(self, pixels: Pixels8) -> Float32:
        """A condition image [size, size, 3] to packed latents [condition tokens, channels]."""
        planes = pixels.transpose(2, 0, 1)[None].astype(np.float32) / 127.5 - 1
        latents = self._memory.get(
            self._programs.encode.run({"pixels": planes.astype(self._dtype)})["latents"]
        )
        return pack(latents[0].astype(np.float32), self.config.transformer.patch)

    def remember(self, key: Key, latents: Float32, prompt: Prompt, grid: Grid) -> None:
        """Run the condition pass for an entry that is held, and fill it.

        Args:
            key: of the entry.
            latents: packed, of the condition.
            prompt: of the request.
            grid: of the image.
        """
        config = self.config
        where = rotary.condition_positions(
            config.conditions.role(key.kind), config.condition_grid, grid, config.conditions.offset
        )
        feeds: dict[str, Array] = {
            "latents": latents,
            "sinusoids": self._sinusoids(0.0, key.guidance or 0.0),
            "pooled": prompt.pooled,
            "table": rotary.table(config.transformer, where),
        }
        for name, tensor in self._loras[key.kind].items():
            feeds[name] = tensor * np.float32(key.weight) if name.startswith("up") else tensor
        cast = {name: array.astype(self._dtype, copy=False) for name, array in feeds.items()}
        self.store.put(key, self._programs.remember.run(cast))

    def velocities(self, rows: Sequence[Row], grid: Grid) -> Float32:
        """One step of requests whose images have one size and whose conditions as many tokens.

        Returns:
            [B, tokens, channels]
        """
        feeds: dict[str, Array] = {
            "latents": np.stack([row.latents for row in rows]),
            "sinusoids": np.stack([self._sinusoids(row.sigma, row.guidance) for row in rows]),
            "pooled": np.stack([row.prompt.pooled for row in rows]),
            "table": self._table(grid),
        }
        cast = {name: array.astype(self._dtype, copy=False) for name, array in feeds.items()}
        here = {"text": self._memory.join([row.prompt.text[None] for row in rows]), **self._caches(rows)}
        made = self._memory.get(self._programs.denoise.run(cast | here)["velocity"])
        return made.astype(np.float32, copy=False)

    def decode(self, latents: Float32, grid: Grid) -> Pixels8:
        """Packed latents [tokens, channels] to pixels [height, width, 3]; in the worker's thread."""
        return self._pixels(self._programs.decode.run({"latents": self._unpacked(latents, grid)})["pixels"])

    def preview(self, latents: Float32, grid: Grid) -> Pixels8:
        """Packed latents to a small picture, cheaply; in the worker's thread."""
        return self._pixels(self._programs.preview.run({"latents": self._unpacked(latents, grid)})["pixels"])

    def forget_joined(self) -> None:
        """Let go of the last step's joined caches."""
        self._joined = None

    def _unpacked(self, latents: Float32, grid: Grid) -> Array:
        return unpack(latents, grid, self.config.transformer.patch)[None].astype(self._dtype)

    def _pixels(self, planes: Values) -> Pixels8:
        pixels: Pixels8 = self._memory.pixels(planes)[0]
        return pixels

    def _sinusoids(self, sigma: float, guidance: float) -> Float32:
        config = self.config.transformer
        return schedule.sinusoid([sigma, guidance][: config.scalars], config.freq_dim)

    def _table(self, grid: Grid) -> Array:
        found = self._tables.get(grid)
        if found is None:
            found = self._tables[grid] = rotary.image_table(self.config.transformer, grid)
            while len(self._tables) > _TABLES:
                self._tables.popitem(last=False)
        self._tables.move_to_end(grid)
        return found

    def _caches(self, rows: Sequence[Row]) -> dict[str, Values]:
        """The rows' caches as a batch. One row with one condition is not copied; others are once a batch."""
        names, config = cache_names(self.config.transformer), self.config.transformer
        if not rows[0].caches:
            empty = np.zeros((len(rows), config.heads, 0, config.head_dim), self._dtype)
            return dict.fromkeys(names, self._memory.put(empty))
        if len(rows) == 1 and len(rows[0].caches) == 1:
            return {name: rows[0].caches[0][name][None] for name in names}
        parts: list[object] = [cache for row in rows for cache in row.caches]
        which = tuple(map(id, parts))
        # The list keeps the caches alive, so that no other can get one's id.
        if self._joined is None or self._joined[0] != which:
            self._joined, join = None, self._memory.join
            joined = {
                name: join([join([c[name] for c in row.caches], 1)[None] for row in rows]) for name in names
            }
            self._joined = which, parts, joined
        return self._joined[2]


def digest(array: Array) -> bytes:
    """Of an array's bytes."""
    return hashlib.blake2b(np.ascontiguousarray(array).tobytes(), digest_size=16).digest()
