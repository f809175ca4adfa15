"""Trains on all blocks of a clip at once, each with the very keys it would find in a session's cache (ours).

A clip's passes are laid out as *entries* of one block each: the denoising passes, the clean passes, and the
recaches at its prompt switches. All entries go through a layer together; then each one's queries look at the
keys of the entries that would lie in the cache at that moment, at the places' positions of relative mode. So
gradients reach the passes that fill the cache, which teacher forcing needs, and a switch is trained as it is
served: with the window replayed under the new prompt, and a sink that keeps what it has.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from realtide.engines.longlive import rotary
from realtide.engines.longlive.config import VideoConfig
from realtide.engines.longlive.transformer import Block, WanTransformer, rotary_table

Kind = Literal["noisy", "clean", "recache"]


@dataclass(frozen=True)
class Entry:
    """One pass of one block.

    Attributes:
        kind: *noisy*: the flow is wanted; *clean* and *recache*: the keys are.
        block: index of the block in the clip.
        segment: index of the prompt in force.
        keys: entries that it sees, in the window's order; itself among them.
    """

    kind: Kind
    block: int
    segment: int
    keys: tuple[int, ...]
    rank: int
    """Where it is itself in the window's order, in blocks."""


def layout(config: VideoConfig, blocks: int, switches: Sequence[int] = (), copies: int = 1) -> list[Entry]:
    """The entries of a clip.

    Args:
        config: relative rotary mode with `global_sink`, a sink of one block, a window of whole blocks.
        blocks: of the clip.
        switches: blocks, from 1 on, that are the first under another prompt.
        copies: denoising passes of each block.

    Raises:
        ValueError: the configuration or a switch is another.
    """
    stream = config.stream
    if stream.rotary != "relative" or not stream.global_sink:
        raise ValueError("packed training needs relative rotary mode and global_sink")
    if stream.sink != stream.block or stream.window % stream.block:
        raise ValueError("packed training needs a sink of one block and a window of whole blocks")
    if any(not 0 < switch < blocks for switch in switches) or list(switches) != sorted(set(switches)):
        raise ValueError(f"switches must rise and lie in 1..{blocks - 1}, got {list(switches)}")
    window = stream.window // stream.block
    entries: list[Entry] = []
    held: dict[int, int] = {}  # the entry whose keys stand for a block
    segment = 0
    for block in range(blocks):
        if block in switches:
            segment += 1
            _replay(entries, held, block, segment, window)
        seen = [0] * (block > 0) + list(range(max(1, block - window + 2), block))
        context = tuple(held[b] for b in seen)
        kinds: list[Kind] = ["noisy"] * copies
        if block + 1 < blocks:
            kinds.append("clean")
        for kind in kinds:
            own = len(entries)
            entries.append(Entry(kind, block, segment, (*context, own), len(context)))
        held[block] = len(entries) - 1
    return entries


def _replay(entries: list[Entry], held: dict[int, int], block: int, segment: int, window: int) -> None:
    """The recache before `block`: the whole video while the window has not moved, then all but the sink."""
    first = 0 if block <= window else block - window + 1
    new = tuple(range(len(entries), len(entries) + block - first))
    keys = new if first == 0 else (held[0], *new)
    for index, own in enumerate(new):
        rank = index if first == 0 else index + 1
        entries.append(Entry("recache", first + index, segment, keys, rank))
        held[first + index] = own


class Packed:
    """Runs a transformer over the entries of a batch of clips that share a layout."""

    def __init__(self, config: VideoConfig, entries: Sequence[Entry]) -> None:
        self._config = config
        self.entries = list(entries)
        stream = config.stream
        self._slots = stream.window // stream.block
        tokens = stream.block * config.frame_tokens
        # Only differences of positions count. So an entry's keys are rotated once, by its block's index in
        # the clip, and again only where it is a sink that the window has left behind.
        wanted = {(index, entry.block): index for index, entry in enumerate(entries)}
        picked = [
            [
                wanted.setdefault((key, entry.block - entry.rank + slot), len(wanted))
                for slot, key in enumerate(entry.keys)
            ]
            for entry in entries
        ]
        self._sources = torch.tensor([key for key, _ in wanted])
        self._keys = torch.tensor([some + [0] * (self._slots - len(some)) for some in picked])
        self._values = torch.tensor([e.keys + (0,) * (self._slots - len(e.keys)) for e in entries])
        kept = torch.tensor([[slot < len(e.keys) for slot in range(self._slots)] for e in entries])
        hidden = torch.where(kept.repeat_interleave(tokens, 1), 0.0, -1e4)
        self._hidden = hidden[:, None, None]
        self._segments = torch.tensor([entry.segment for entry in entries])
        positions = max(position for _, position in wanted) + 1
        time = torch.from_numpy(rotary.time_table(config, np.arange(positions * stream.block)))
        space = torch.from_numpy(rotary.space_table(config))
        table = torch.unflatten(rotary_table(time, space), 0, (positions, tokens))
        # [entries, tokens, d / 2, 2], and the same for all that keys are gathered from.
        self._own = table[torch.tensor([entry.block for entry in entries])]
        self._turned = table[torch.tensor([position for _, position in wanted])]

    def flow(self, model: WanTransformer, latents: Tensor, sinusoids: Tensor, text: Tensor) -> Tensor:
        """The flow of every entry; of entries that are not noisy it means nothing.

        Args:
            model: the transformer.
            latents: what each entry is given, [B, E, block, C, height, width].
            sinusoids: of the entries' timesteps, [B, E, freq_dim].
            text: embeddings of each segment's prompt, [B, segments, text tokens, text_dim], zero padded.

        Returns:
            [B, E, block, C, height, width]
        """
        batch, count, frames = latents.shape[:3]
        x = model.embed(latents.flatten(0, 1)).flatten(1, 2)[:, None]  # [B * E, 1, block * S, D]
        embedded, modulation = model.embed_time(sinusoids.flatten(0, 1)[:, None])
        for block, (cross_keys, cross_values) in zip(
            model.blocks, model.cross(text.flatten(0, 1)), strict=True
        ):
            assert isinstance(block, Block)
            spread = [
                torch.unflatten(part, 0, (batch, -1))[:, self._segments].flatten(0, 1)
                for part in (cross_keys, cross_values)
            ]
            x = block(x, modulation, self._look, *spread)
        out = torch.unflatten(model.head(x, embedded), 2, (frames, -1))[:, 0]
        return torch.unflatten(model.pixels(out, self._config.grid), 0, (batch, count))

    def _look(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Self-attention of entries [B * E, tokens, H, d]."""
        count = len(self.entries)
        # Their norms leave queries and keys in float32 where projections are in half precision.
        queries, keys = queries.to(values.dtype), keys.to(values.dtype)
        queries = _rotate(torch.unflatten(queries, 0, (-1, count)), self._own).flatten(0, 1)
        turned = _rotate(torch.unflatten(keys, 0, (-1, count))[:, self._sources], self._turned)
        # [B, E, slots, tokens, H, d] -> [B * E, window, H, d]
        # Whole entries at once: its gradient is a sum of rows, where that of an index is one of elements.
        seen = _gather(turned, self._keys)
        held = _gather(torch.unflatten(values, 0, (-1, count)), self._values)
        hidden = self._hidden.to(seen.dtype).repeat(len(queries) // count, 1, 1, 1)
        return attend_plainly(queries.transpose(1, 2), seen.transpose(1, 2), held.transpose(1, 2), hidden)


def _gather(x: Tensor, index: Tensor) -> Tensor:
    """Rows [E, slots] of x [B, R, tokens, H, d], next to each other: [B * E, slots * tokens, H, d]."""
    rows = x.index_select(1, index.flatten())
    return torch.unflatten(rows, 1, index.shape).flatten(2, 3).flatten(0, 1)


def attend_plainly(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None = None) -> Tensor:
    """What `transformer.attend` does, in single operations; `mask` is added to the scores.

    On a CPU the gradient of PyTorch's own attention takes several times as long.
    """
    queries = queries * queries.shape[-1] ** -0.5
    scores = queries @ keys.transpose(-1, -2)
    if mask is not None:
        scores = scores + mask.to(scores.dtype)
    with torch.autocast(scores.device.type, enabled=False):  # it would have the softmax in float32
        weights = scores.softmax(-1)
    out = weights @ values
    return out.transpose(1, 2)


def _rotate(x: Tensor, table: Tensor) -> Tensor:
    """Rotary embedding of x [B, E, N, H, d] by a table [E, N, d / 2, 2] for each entry."""
    table = table.to(x.dtype)
    pairs = torch.unflatten(x, -1, (-1, 2))
    real, imaginary = pairs[..., 0], pairs[..., 1]
    cosine, sine = table[:, :, None, :, 0], table[:, :, None, :, 1]
    turned = torch.stack([real * cosine - imaginary * sine, real * sine + imaginary * cosine], -1)
    return turned.flatten(-2)
