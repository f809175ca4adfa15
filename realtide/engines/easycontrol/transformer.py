"""FLUX's diffusion transformer with a condition branch: plain PyTorch modules, nothing is kept on them.

One definition serves training, eager generation and export (architecture rule 2); parameters have the names
of diffusers. Tokens of text and image see everything, tokens of a condition see that condition only
(EasyControl's causal attention). So a condition runs alone, through `FluxTransformer.condition`: it needs
neither the noise nor the step nor other conditions, and what it leaves are its keys, after norm and rotary
embedding, and values in every block. `FluxTransformer.forward` runs text and image and attends to them.

Source: FLUX.1; EasyControl (arXiv 2503.07027), sections 3.1 and 3.3.
Shapes: B batch, N image tokens, T text tokens, M condition tokens, D width, H heads, d head width, F width of
sinusoids, r rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from realtide.engines.easycontrol.config import TransformerConfig
from realtide.engines.runtime.fuse import fused

Cache = tuple[Tensor, Tensor]
"""Keys and values [B, H, M, d] of conditions in one block."""
Lora = tuple[Tensor, Tensor]
"""A block's LoRA: down [projections, r, D] and up [projections, D, r], already times its weight."""
Qkv = tuple[Tensor, Tensor, Tensor]

QUERY, KEY, VALUE, OUT = range(4)


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Rotary embedding of x [B, H, n, d] by cosines and sines [n, d / 2, 2]; pairs lie side by side.

    The table may be wider than x (float32 for a model in bfloat16): the result has the type of x.
    """
    pairs = torch.unflatten(x, -1, (-1, 2))
    real, imaginary = pairs[..., 0], pairs[..., 1]
    cosine, sine = table[..., 0], table[..., 1]
    turned = torch.stack([real * cosine - imaginary * sine, real * sine + imaginary * cosine], -1)
    turned = turned.flatten(-2)
    return turned if turned.dtype == x.dtype else turned.to(x.dtype)


def attend(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Scaled dot-product attention: queries [B, H, n, d], keys and values [B, H, m, d] -> [B, n, H * d]."""
    # The scale goes into the queries: an exporter would scale all keys too, by its square root each.
    queries = queries * queries.shape[-1] ** -0.5
    out = F.scaled_dot_product_attention(queries, keys, values, scale=1.0)
    return out.transpose(1, 2).flatten(2)


def adapted(x: Tensor, base: Tensor, lora: Lora | None, index: int) -> Tensor:
    """A projection's result with a LoRA's share: base + up(down(x)); x and base [B, M, D]."""
    if lora is None:
        return base
    down, up = lora
    return base + F.linear(F.linear(x, down[index]), up[index])


class RmsNorm(nn.Module):
    """Root mean square norm over the last dimension, computed in float32."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., width] -> [..., width]."""
        wide = x.float()
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return normed.to(x.dtype) * self.weight


class Embedder(nn.Module):
    """Two linear layers with SiLU between them."""

    def __init__(self, into: int, dim: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(into, dim)
        self.linear_2 = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, into] -> [B, D]."""
        out: Tensor = self.linear_2(F.silu(self.linear_1(x)))
        return out


class TimeText(nn.Module):
    """Timestep, guidance and pooled prompt as one vector that modulates every block."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.timestep_embedder = Embedder(config.freq_dim, config.dim)
        self.guidance_embedder = Embedder(config.freq_dim, config.dim) if config.guidance else None
        self.text_embedder = Embedder(config.pooled_dim, config.dim)

    def forward(self, sinusoids: Tensor, pooled: Tensor) -> Tensor:
        """Sinusoids [B, 1 or 2, F] of timestep and guidance, pooled prompt [B, P] -> [B, D]."""
        time = self.timestep_embedder(sinusoids[:, 0])
        if self.guidance_embedder is not None:
            time = time + self.guidance_embedder(sinusoids[:, 1])
        out: Tensor = time + self.text_embedder(pooled)
        return out


class Modulation(nn.Module):
    """The vector to `parts` vectors that shift, scale and gate."""

    def __init__(self, dim: int, parts: int) -> None:
        super().__init__()
        self.parts = parts
        self.linear = nn.Linear(dim, parts * dim)

    def forward(self, vector: Tensor) -> list[Tensor]:
        """[B, D] -> so many [B, 1, D]."""
        return list(self.linear(F.silu(vector))[:, None].chunk(self.parts, -1))


class FeedForward(nn.Module):
    """Linear, GELU (tanh), linear; named as in diffusers."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        first = nn.ModuleDict({"proj": nn.Linear(dim, 4 * dim)})
        self.net = nn.ModuleDict({"0": first, "2": nn.Linear(4 * dim, dim)})

    def forward(self, x: Tensor) -> Tensor:
        """x [B, n, D] -> [B, n, D]."""
        first = self.net["0"]
        assert isinstance(first, nn.ModuleDict)
        out: Tensor = self.net["2"](F.gelu(first["proj"](x), approximate="tanh"))
        return out


class Attention(nn.Module):
    """Projections and norms; `added` ones for text where it has its own."""

    def __init__(self, config: TransformerConfig, double: bool) -> None:
        super().__init__()
        dim, head, eps = config.dim, config.head_dim, config.eps
        self.heads = config.heads
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, dim) for _ in range(3))
        self.norm_q, self.norm_k = RmsNorm(head, eps), RmsNorm(head, eps)
        if double:
            self.to_out = nn.ModuleDict({"0": nn.Linear(dim, dim)})
            self.add_q_proj, self.add_k_proj, self.add_v_proj = (nn.Linear(dim, dim) for _ in range(3))
            self.to_add_out = nn.Linear(dim, dim)
            self.norm_added_q, self.norm_added_k = RmsNorm(head, eps), RmsNorm(head, eps)
        self.qkv: nn.Linear | None = None
        self.added_qkv: nn.Linear | None = None

    def fuse(self) -> None:
        """Make the projections of one input one layer; they have no names of the release then."""
        self.qkv = fused((self.to_q, self.to_k, self.to_v))
        del self.to_q, self.to_k, self.to_v
        if hasattr(self, "add_q_proj"):
            self.added_qkv = fused((self.add_q_proj, self.add_k_proj, self.add_v_proj))
            del self.add_q_proj, self.add_k_proj, self.add_v_proj

    def projected(self, x: Tensor, first: int = QUERY) -> Sequence[Tensor]:
        """Queries, keys and values [B, n, D] of x [B, n, D] before everything else, from `first` on."""
        if self.qkv is None:
            return [project(x) for project in (self.to_q, self.to_k, self.to_v)[first:]]
        rows = first * self.qkv.in_features
        bias = None if self.qkv.bias is None else self.qkv.bias[rows:]
        return F.linear(x, self.qkv.weight[rows:], bias).chunk(3 - first, -1)

    def split(self, x: Tensor) -> Tensor:
        """[B, n, D] -> [B, H, n, d]."""
        return torch.unflatten(x, -1, (self.heads, -1)).transpose(1, 2)

    def image(self, x: Tensor, table: Tensor, lora: Lora | None = None) -> Qkv:
        """Queries and keys, normed and rotated, and values [B, H, n, d] of x [B, n, D]."""
        queries, keys, values = (
            self.split(adapted(x, base, lora, index)) for index, base in enumerate(self.projected(x))
        )
        return rotate(self.norm_q(queries), table), rotate(self.norm_k(keys), table), values

    def keys_values(self, x: Tensor, table: Tensor, lora: Lora | None) -> Cache:
        """Keys and values as of `image`."""
        keys, values = (
            self.split(adapted(x, base, lora, index))
            for index, base in enumerate(self.projected(x, KEY), KEY)
        )
        return rotate(self.norm_k(keys), table), values

    def text(self, x: Tensor, table: Tensor) -> Qkv:
        """As `image`, with the text's projections."""
        if self.added_qkv is None:
            parts = [project(x) for project in (self.add_q_proj, self.add_k_proj, self.add_v_proj)]
        else:
            parts = list(self.added_qkv(x).chunk(3, -1))
        queries, keys, values = map(self.split, parts)
        return rotate(self.norm_added_q(queries), table), rotate(self.norm_added_k(keys), table), values


class DoubleBlock(nn.Module):
    """Attention over text and image, each with its own weights and feed-forward."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.dim, eps=config.eps, elementwise_affine=False)
        self.norm1 = Modulation(config.dim, 6)
        self.norm1_context = Modulation(config.dim, 6)
        self.attn = Attention(config, double=True)
        self.ff = FeedForward(config.dim)
        self.ff_context = FeedForward(config.dim)

    def forward(
        self, image: Tensor, text: Tensor, vector: Tensor, table: Tensor, cache: Cache | None
    ) -> tuple[Tensor, Tensor]:
        """Image [B, N, D], text [B, T, D], vector [B, D], table [T + N, d / 2, 2] -> (image, text)."""
        count = text.shape[1]
        of_image, of_text = self.norm1(vector), self.norm1_context(vector)
        q, k, v = self.attn.image(self._normed(image, of_image), table[count:])
        added_q, added_k, added_v = self.attn.text(self._normed(text, of_text), table[:count])
        mixed = attend(
            torch.cat([added_q, q], 2),
            torch.cat([added_k, k, *(() if cache is None else cache[:1])], 2),
            torch.cat([added_v, v, *(() if cache is None else cache[1:])], 2),
        )
        image = self._rest(image, self.attn.to_out["0"](mixed[:, count:]), of_image, self.ff)
        text = self._rest(text, self.attn.to_add_out(mixed[:, :count]), of_text, self.ff_context)
        return image, text

    def condition(self, x: Tensor, vector: Tensor, table: Tensor, lora: Lora | None) -> tuple[Tensor, Cache]:
        """A condition's tokens x [B, M, D], its vector and table [M, d / 2, 2] -> (x, keys and values)."""
        parts = self.norm1(vector)
        queries, keys, values = self.attn.image(self._normed(x, parts), table, lora)
        mixed = self.attn.to_out["0"](attend(queries, keys, values))
        # As in the release, this LoRA acts on the projection's output, not on its input.
        return self._rest(x, adapted(mixed, mixed, lora, OUT), parts, self.ff), (keys, values)

    def remember(self, x: Tensor, vector: Tensor, table: Tensor, lora: Lora | None) -> Cache:
        """Keys and values only; see `condition`."""
        return self.attn.keys_values(self._normed(x, self.norm1(vector)), table, lora)

    def _normed(self, x: Tensor, parts: Sequence[Tensor]) -> Tensor:
        out: Tensor = self.norm(x) * (1 + parts[1]) + parts[0]
        return out

    def _rest(self, x: Tensor, mixed: Tensor, parts: Sequence[Tensor], feed: FeedForward) -> Tensor:
        x = x + parts[2] * mixed
        out: Tensor = x + parts[5] * feed(self.norm(x) * (1 + parts[4]) + parts[3])
        return out


class SingleBlock(nn.Module):
    """Attention and feed-forward side by side, over text and image as one sequence."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.dim, eps=config.eps, elementwise_affine=False)
        self.norm = Modulation(config.dim, 3)
        self.attn = Attention(config, double=False)
        self.proj_mlp = nn.Linear(config.dim, 4 * config.dim)
        self.proj_out = nn.Linear(5 * config.dim, config.dim)

    def forward(self, x: Tensor, vector: Tensor, table: Tensor, cache: Cache | None) -> Tensor:
        """Text and image x [B, T + N, D], vector [B, D], table [T + N, d / 2, 2] -> x."""
        parts = self.norm(vector)
        normed = self._normed(x, parts)
        queries, keys, values = self.attn.image(normed, table)
        if cache is not None:
            keys, values = torch.cat([keys, cache[0]], 2), torch.cat([values, cache[1]], 2)
        return self._rest(x, normed, attend(queries, keys, values), parts)

    def condition(self, x: Tensor, vector: Tensor, table: Tensor, lora: Lora | None) -> tuple[Tensor, Cache]:
        """See `DoubleBlock.condition`."""
        parts = self.norm(vector)
        normed = self._normed(x, parts)
        queries, keys, values = self.attn.image(normed, table, lora)
        return self._rest(x, normed, attend(queries, keys, values), parts), (keys, values)

    def remember(self, x: Tensor, vector: Tensor, table: Tensor, lora: Lora | None) -> Cache:
        """Keys and values only; see `condition`."""
        return self.attn.keys_values(self._normed(x, self.norm(vector)), table, lora)

    def _normed(self, x: Tensor, parts: Sequence[Tensor]) -> Tensor:
        out: Tensor = self.norm1(x) * (1 + parts[1]) + parts[0]
        return out

    def _rest(self, x: Tensor, normed: Tensor, mixed: Tensor, parts: Sequence[Tensor]) -> Tensor:
        hidden = F.gelu(self.proj_mlp(normed), approximate="tanh")
        out: Tensor = x + parts[2] * self.proj_out(torch.cat([mixed, hidden], -1))
        return out


class FluxTransformer(nn.Module):
    """The whole network; its state_dict has the names of diffusers' FluxTransformer2DModel."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.x_embedder = nn.Linear(config.channels, config.dim)
        self.context_embedder = nn.Linear(config.text_dim, config.dim)
        self.time_text_embed = TimeText(config)
        self.transformer_blocks = nn.ModuleList(DoubleBlock(config) for _ in range(config.double_blocks))
        self.single_transformer_blocks = nn.ModuleList(
            SingleBlock(config) for _ in range(config.single_blocks)
        )
        self.norm_last = nn.LayerNorm(config.dim, eps=config.eps, elementwise_affine=False)
        self.norm_out = Modulation(config.dim, 2)
        self.proj_out = nn.Linear(config.dim, config.channels)

    def fuse(self) -> None:
        """Fuse the projections of every attention, once the weights are loaded."""
        for block in (*self.transformer_blocks, *self.single_transformer_blocks):
            assert isinstance(block, DoubleBlock | SingleBlock)
            block.attn.fuse()

    def forward(
        self,
        latents: Tensor,
        sinusoids: Tensor,
        pooled: Tensor,
        text: Tensor,
        table: Tensor,
        caches: Sequence[Cache] | None = None,
    ) -> Tensor:
        """The velocity of noisy images.

        Args:
            latents: packed, [B, N, channels].
            sinusoids: of the timestep and, if the model takes it, the guidance, [B, 1 or 2, F].
            pooled: pooled prompt [B, P].
            text: embedded prompt [B, T, text_dim].
            table: rotary table of text and image [T + N, d / 2, 2].
            caches: for each block the keys and values of all conditions; None: no condition.

        Returns:
            [B, N, channels]
        """
        vector = self.time_text_embed(sinusoids, pooled)
        x, context = self.x_embedder(latents), self.context_embedder(text)
        none: Sequence[Cache | None] = [None] * self.config.blocks
        held: Iterator[Cache | None] = iter(caches or none)
        for double in self.transformer_blocks:
            x, context = double(x, context, vector, table, next(held))
        x = torch.cat([context, x], 1)
        for single in self.single_transformer_blocks:
            x = single(x, vector, table, next(held))
        scale, shift = self.norm_out(vector)
        out: Tensor = self.proj_out(self.norm_last(x[:, text.shape[1] :]) * (1 + scale) + shift)
        return out

    def condition(
        self,
        latents: Tensor,
        sinusoids: Tensor,
        pooled: Tensor,
        table: Tensor,
        loras: Sequence[Lora] | None = None,
    ) -> list[Cache]:
        """The keys and values that a condition leaves in every block.

        Args:
            latents: packed latents of condition images, [B, M, channels].
            sinusoids: as in `forward`, of timestep 0.
            pooled: pooled prompt [B, P].
            table: rotary table of the condition [M, d / 2, 2].
            loras: of each block; None: the base model as it is.
        """
        vector = self.time_text_embed(sinusoids, pooled)
        x = self.x_embedder(latents)
        found: list[Cache] = []
        blocks = [*self.transformer_blocks, *self.single_transformer_blocks]
        for index, block in enumerate(blocks):
            assert isinstance(block, DoubleBlock | SingleBlock)
            lora = None if loras is None else loras[index]
            if index + 1 == len(blocks):
                # Nothing comes after the last block's keys and values.
                found.append(block.remember(x, vector, table, lora))
            else:
                x, cache = block.condition(x, vector, table, lora)
                found.append(cache)
        return found
