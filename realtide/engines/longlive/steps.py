"""The transformer's programs: tensors and one session's caches in, the same out (ours).

`Denoise` predicts a block's flow; `Remember` runs clean latents and leaves their keys and values in the
cache: the *clean pass* after a block, and the *recache* of a window. Both write the keys and values of their
own frames to the frames' places first and then look at every place that holds a frame, so a block's passes
overwrite each other's entries and no key is ever moved. `Prompt` makes keys and values for cross-attention.

The cache is one session's: slots of a larger array are bound by their views. Its layout is described by
`config.cache_shapes`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from realtide.engines.longlive.config import VideoConfig
from realtide.engines.longlive.rows import write_rows
from realtide.engines.longlive.transformer import Block, WanTransformer, attend, rotary_table, rotate


class _Cached(nn.Module):
    """Runs the blocks over a session's cache.

    Args:
        model: the transformer.
        config: its shapes.
        held: how many frames the window holds once these are written, where the caller knows: those places
            are a prefix, so it is cut to length and needs no mask. Without a mask FlashAttention may be used,
            and nothing is computed for places without a frame. `seen` is then not looked at.
    """

    def __init__(self, model: WanTransformer, config: VideoConfig, held: int | None = None) -> None:
        super().__init__()
        self._held = held
        self.model = model
        self._stream = config.stream
        self._tokens = config.frame_tokens
        self._grid = config.grid

    @property
    def relative(self) -> bool:
        """True if keys are cached before rotary embedding."""
        return self._stream.rotary == "relative"

    def _prefix(self, window_time: Tensor) -> Tensor:
        return window_time if self._held is None else window_time[: self._held]

    def _run(
        self,
        latents: Tensor,
        sinusoids: Tensor,
        time: Tensor,
        space: Tensor,
        places: Tensor,
        seen: Tensor,
        rest: tuple[Tensor, ...],
        *,
        predict: bool,
    ) -> tuple[Tensor, ...]:
        """See `Denoise.forward`; without `predict`, stop where the last layer's keys and values are known."""
        heads, layers = self.model.config.heads, self.model.config.layers
        window, tokens = self._stream.window, self._tokens
        window_time, rest = (rest[0], rest[1:]) if self.relative else (None, rest)
        cross, caches = rest[: 2 * layers], list(rest[2 * layers :])
        table = rotary_table(time, space)
        whole = None if window_time is None else rotary_table(self._prefix(window_time), space)
        within = (places[:, None] * tokens + torch.arange(tokens, device=places.device)).flatten()
        starts = torch.arange(heads, device=places.device) * (window * tokens)
        rows = (starts[:, None] + within).flatten()
        # One row of the mask serves all queries: within a block attention is not causal.
        mask = None
        if self._held is None:
            mask = seen[:, None].expand(-1, tokens).flatten()[None, None, None]

        def write(layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
            for offset, new in enumerate((keys, values)):
                index = 2 * layer + offset
                caches[index] = write_rows(caches[index], rows, new[0].transpose(0, 1).flatten(0, 1))
            both = _by_head(caches[2 * layer], heads), _by_head(caches[2 * layer + 1], heads)
            if self._held is None:
                return both
            return both[0][:, :, : self._held * tokens], both[1][:, :, : self._held * tokens]

        x = self.model.embed(latents[None])
        embedded, modulation = self.model.embed_time(sinusoids[None])
        for layer, block in enumerate(self.model.blocks):
            assert isinstance(block, Block)

            def look(queries: Tensor, keys: Tensor, values: Tensor, layer: int = layer) -> Tensor:
                if whole is None:
                    keys = rotate(keys, table)
                cached, held = write(layer, keys, values)
                if whole is not None:
                    cached = rotate(cached.transpose(1, 2), whole).transpose(1, 2)
                return attend(rotate(queries, table).transpose(1, 2), cached, held, mask)

            if layer + 1 == layers and not predict:
                _, keys, values = block.project(x, modulation)
                write(layer, keys if whole is not None else rotate(keys, table), values)
                return tuple(caches)
            x = block(x, modulation, look, cross[2 * layer][None], cross[2 * layer + 1][None])
        flow = self.model.pixels(self.model.head(x, embedded), self._grid)
        return (flow[0], *caches)


class Denoise(_Cached):
    """One denoising pass of a block."""

    def forward(
        self, latents: Tensor, sinusoids: Tensor, time: Tensor, space: Tensor, places: Tensor, seen: Tensor,
        *rest: Tensor,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        """Predict the flow of F frames.

        Args:
            latents: noisy, [F, C, height, width].
            sinusoids: of each frame's timestep, [F, freq_dim].
            time: rotary table at the frames' positions, [F, pairs, 2]; positions are those of the video in
                absolute mode, those of the window in relative mode.
            space: rotary table of a frame's tokens, [S, pairs, 2].
            places: of the frames in the cache, [F].
            seen: which places hold frames once these are written, [window].
            rest: in relative mode the rotary table of every place [window, pairs, 2]; then for each layer
                the prompt's keys and values [H, text tokens, d]; then for each layer the caches of keys and
                values, which are written in place.

        Returns:
            The flow [F, C, height, width], and the caches.
        """
        return self._run(latents, sinusoids, time, space, places, seen, rest, predict=True)


class Remember(_Cached):
    """One pass of clean latents for the sake of their keys and values."""

    def forward(
        self, latents: Tensor, sinusoids: Tensor, time: Tensor, space: Tensor, places: Tensor, seen: Tensor,
        *rest: Tensor,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        """Write the keys and values of F frames; arguments as in `Denoise.forward`. Returns the caches."""
        return self._run(latents, sinusoids, time, space, places, seen, rest, predict=False)


class Prompt(nn.Module):
    """Keys and values of a prompt, computed once for all passes under it."""

    def __init__(self, model: WanTransformer) -> None:
        super().__init__()
        self.model = model

    def forward(self, text: Tensor) -> tuple[Tensor, ...]:
        """Text [text tokens, text_dim], zero padded -> keys and values [H, text tokens, d] of each layer."""
        return tuple(part[0] for pair in self.model.cross(text[None]) for part in pair)


def _by_head(cache: Tensor, heads: int) -> Tensor:
    """A cache's rows as [1, H, window * S, d], a view."""
    return torch.unflatten(cache, 0, (heads, -1))[None]
