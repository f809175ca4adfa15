"""The transformer's programs: tensors and caches in, tensors out (ours).

`Remember` runs one condition and gives its cache; `Denoise` predicts velocities of a batch of images of one
size, attending to as many condition tokens as it is handed, none included. Caches are plain inputs: many
requests share one, and no program changes any.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from realtide.engines.easycontrol.transformer import FluxTransformer


class Denoise(nn.Module):
    """One step's prediction."""

    def __init__(self, model: FluxTransformer) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, latents: Tensor, sinusoids: Tensor, pooled: Tensor, text: Tensor, table: Tensor, *caches: Tensor
    ) -> Tensor:
        """Velocities [B, N, channels]; see `FluxTransformer.forward`.

        Args:
            latents: [B, N, channels].
            sinusoids: [B, 1 or 2, F].
            pooled: [B, P].
            text: [B, T, text_dim].
            table: [T + N, d / 2, 2].
            caches: for each block keys and values [B, H, M, d].
        """
        out: Tensor = self.model(latents, sinusoids, pooled, text, table, pairs(caches))
        return out


class Remember(nn.Module):
    """One condition's cache."""

    def __init__(self, model: FluxTransformer) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, latents: Tensor, sinusoids: Tensor, pooled: Tensor, table: Tensor, *loras: Tensor
    ) -> tuple[Tensor, ...]:
        """Keys and values [H, M, d] of each block; see `FluxTransformer.condition`.

        Args:
            latents: of one condition, [M, channels].
            sinusoids: [1 or 2, F].
            pooled: [P].
            table: [M, d / 2, 2].
            loras: for each block down [projections, r, D] and up [projections, D, r], times its weight.
        """
        found = self.model.condition(latents[None], sinusoids[None], pooled[None], table, pairs(loras))
        return tuple(part[0] for cache in found for part in cache)


def pairs(tensors: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Tensors two by two."""
    return list(zip(tensors[::2], tensors[1::2], strict=True))
