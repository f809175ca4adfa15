"""The Wan diffusion transformer: plain PyTorch modules with the release's names; nothing is kept on them.

One definition serves training, eager generation and export (architecture rule 2). A block does not know how
its queries find keys: it is handed a function from (queries, keys, values) to what was attended to.
`WanTransformer.forward` attends over a whole video under a mask; `steps.py` over a session's cache.

Source: Wan2.1; per-frame timesteps as in CausVid (arXiv 2412.07772) and Self-Forcing (arXiv 2506.08009).
Shapes: B batch, F latent frames, S tokens of a frame, N = F * S, D width, H heads, d head width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from realtide.engines.longlive.config import TransformerConfig
from realtide.engines.runtime.fuse import fused

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""From queries, keys and values, each [B, N, H, d], to what was attended to [B, N, H, d]."""


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Rotary embedding of x [..., N, H, d] by cosines and sines [N, d / 2, 2]; pairs lie side by side.

    The table may be wider than x (float32 for a model in bfloat16): the result has the type of x.
    """
    pairs = torch.unflatten(x, -1, (-1, 2))
    real, imaginary = pairs[..., 0], pairs[..., 1]
    cosine, sine = table[:, None, :, 0], table[:, None, :, 1]
    turned = torch.stack([real * cosine - imaginary * sine, real * sine + imaginary * cosine], -1)
    turned = turned.flatten(-2)
    return turned if turned.dtype == x.dtype else turned.to(x.dtype)


def rotary_table(time: Tensor, space: Tensor) -> Tensor:
    """Table [F * S, d / 2, 2] from those of frames [F, pairs, 2] and of a frame's tokens [S, pairs, 2]."""
    frames, tokens = time.shape[0], space.shape[0]
    joined = torch.cat(
        [
            time[:, None].expand(-1, tokens, -1, -1),
            space[None].expand(frames, -1, -1, -1),
        ],
        2,
    )
    return joined.flatten(0, 1)


def attend(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None = None) -> Tensor:
    """Scaled dot-product attention, head by head.

    Args:
        queries: [B, H, N, d].
        keys: [B, H, M, d].
        values: [B, H, M, d].
        mask: true where a query may see a key; broadcasts to [B, H, N, M].

    Returns:
        [B, N, H, d]
    """
    # The scale goes into the queries: an exporter would scale all keys too, by its square root each.
    queries = queries * queries.shape[-1] ** -0.5
    out = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, scale=1.0)
    return out.transpose(1, 2)


class RmsNorm(nn.Module):
    """Root mean square norm over the last dimension."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., width] -> [..., width]; computed in float32."""
        wide = x.float()
        scaled = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return scaled.to(x.dtype) * self.weight


class Attention(nn.Module):
    """Projections of self- or cross-attention; q and k are normed over the full width, then split."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.q = nn.Linear(config.dim, config.dim)
        self.k = nn.Linear(config.dim, config.dim)
        self.v = nn.Linear(config.dim, config.dim)
        self.o = nn.Linear(config.dim, config.dim)
        self.norm_q = RmsNorm(config.dim, config.eps)
        self.norm_k = RmsNorm(config.dim, config.eps)
        self.qkv: nn.Linear | None = None

    def fuse(self) -> None:
        """Make the projections of self-attention one layer; it has no names of the release then."""
        self.qkv = fused((self.q, self.k, self.v))
        del self.q, self.k, self.v

    def projected(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of one x [..., D], each [..., H, d], before rotary embedding."""
        if self.qkv is None:
            return self.queries(x), self.keys(x), self.values(x)
        parts = self.qkv(x).chunk(3, -1)
        normed = self.norm_q(parts[0]), self.norm_k(parts[1]), parts[2]
        queries, keys, values = (torch.unflatten(part, -1, (-1, self.head_dim)) for part in normed)
        return queries, keys, values

    def queries(self, x: Tensor) -> Tensor:
        """x [..., D] -> [..., H, d]."""
        return torch.unflatten(self.norm_q(self.q(x)), -1, (-1, self.head_dim))

    def keys(self, x: Tensor) -> Tensor:
        """x [..., D] -> [..., H, d], before rotary embedding."""
        return torch.unflatten(self.norm_k(self.k(x)), -1, (-1, self.head_dim))

    def values(self, x: Tensor) -> Tensor:
        """x [..., D] -> [..., H, d]."""
        return torch.unflatten(self.v(x), -1, (-1, self.head_dim))


class Block(nn.Module):
    """Self-attention, cross-attention, feed-forward, each a residual branch; six-way modulation by frame."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.dim, eps=config.eps, elementwise_affine=False)
        self.self_attn = Attention(config)
        self.norm3 = nn.LayerNorm(config.dim, eps=config.eps)
        self.cross_attn = Attention(config)
        self.norm2 = nn.LayerNorm(config.dim, eps=config.eps, elementwise_affine=False)
        self.ffn = nn.Sequential(
            nn.Linear(config.dim, config.ff_dim),
            nn.GELU(approximate="tanh"),
            nn.Linear(config.ff_dim, config.dim),
        )
        self.modulation = nn.Parameter(torch.randn(1, 6, config.dim) * config.dim**-0.5)

    def project(self, x: Tensor, time: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values [B, F*S, H, d] of x [B, F, S, D] under modulation time [B, F, 6, D]."""
        shift, scale = _parts(time + self.modulation, 0, 1)
        normed = (self.norm1(x) * (1 + scale) + shift).flatten(1, 2)
        return self.self_attn.projected(normed)

    def forward(
        self, x: Tensor, time: Tensor, look: Attend, cross_keys: Tensor, cross_values: Tensor
    ) -> Tensor:
        """One block.

        Args:
            x: [B, F, S, D].
            time: modulation of each frame, [B, F, 6, D].
            look: self-attention.
            cross_keys: of the prompt, [B, H, text tokens, d].
            cross_values: as the keys.

        Returns:
            [B, F, S, D]
        """
        tokens = x.shape[2]
        gate, shift, scale, gate_ff = _parts(time + self.modulation, 2, 3, 4, 5)
        mixed = self.self_attn.o(look(*self.project(x, time)).flatten(-2))
        x = x + torch.unflatten(mixed, 1, (-1, tokens)) * gate
        queries = self.cross_attn.queries(self.norm3(x).flatten(1, 2))
        read = attend(queries.transpose(1, 2), cross_keys, cross_values)
        x = x + torch.unflatten(self.cross_attn.o(read.flatten(-2)), 1, (-1, tokens))
        out: Tensor = x + self.ffn(self.norm2(x) * (1 + scale) + shift) * gate_ff
        return out


class Head(nn.Module):
    """Norm, two-way modulation by frame, and a projection to the pixels of a patch."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.dim, eps=config.eps, elementwise_affine=False)
        self.head = nn.Linear(config.dim, config.patch**2 * config.channels)
        self.modulation = nn.Parameter(torch.randn(1, 2, config.dim) * config.dim**-0.5)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """x [B, F, S, D], embedded time [B, F, D] -> [B, F, S, patch * patch * channels]."""
        shift, scale = _parts(time[:, :, None] + self.modulation, 0, 1)
        out: Tensor = self.head(self.norm(x) * (1 + scale) + shift)
        return out


class WanTransformer(nn.Module):
    """The whole network; its state_dict has the names of Wan's release."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        patch = (1, config.patch, config.patch)
        self.patch_embedding = nn.Conv3d(config.channels, config.dim, kernel_size=patch, stride=patch)
        if config.places:
            self.place_embedding = nn.Parameter(torch.zeros(config.places, config.dim))
        self.text_embedding = nn.Sequential(
            nn.Linear(config.text_dim, config.dim),
            nn.GELU(approximate="tanh"),
            nn.Linear(config.dim, config.dim),
        )
        self.time_embedding = nn.Sequential(
            nn.Linear(config.freq_dim, config.dim), nn.SiLU(), nn.Linear(config.dim, config.dim)
        )
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(config.dim, 6 * config.dim))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.head = Head(config)

    def fuse(self) -> None:
        """Fuse the projections of every self-attention, once the weights are loaded."""
        for block in self.blocks:
            _block(block).self_attn.fuse()

    def embed(self, latents: Tensor) -> Tensor:
        """Latents [B, F, C, height, width] -> tokens [B, F, S, D]."""
        batch = latents.shape[0]
        # A patch covers one frame: a 2-D convolution over all frames.
        weight = self.patch_embedding.weight[:, :, 0]
        patches = F.conv2d(latents.flatten(0, 1), weight, self.patch_embedding.bias, self.config.patch)
        tokens = torch.unflatten(patches.flatten(2).transpose(1, 2), 0, (batch, -1))
        return tokens + self.place_embedding if self.config.places else tokens

    def embed_time(self, sinusoids: Tensor) -> tuple[Tensor, Tensor]:
        """Sinusoids [B, F, freq_dim] -> (embedded time [B, F, D], modulation [B, F, 6, D])."""
        time = self.time_embedding(sinusoids)
        return time, torch.unflatten(self.time_projection(time), -1, (6, -1))

    def embed_text(self, text: Tensor) -> Tensor:
        """Text encoder's output [B, text tokens, text_dim], zero padded -> [B, text tokens, D]."""
        out: Tensor = self.text_embedding(text)
        return out

    def cross(self, text: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Keys and values [B, H, text tokens, d] of each layer for text [B, text tokens, text_dim]."""
        embedded = self.embed_text(text)
        return [
            (mixer.keys(embedded).transpose(1, 2), mixer.values(embedded).transpose(1, 2))
            for mixer in (_block(block).cross_attn for block in self.blocks)
        ]

    def pixels(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """Head's output [B, F, S, patch * patch * channels] -> [B, F, C, height, width]."""
        patch, channels = self.config.patch, self.config.channels
        split = torch.unflatten(torch.unflatten(tokens, 3, (patch, patch, channels)), 2, grid)
        # [B, F, rows, columns, patch, patch, C]
        return split.permute(0, 1, 6, 2, 4, 3, 5).flatten(5, 6).flatten(3, 4)

    def forward(
        self,
        latents: Tensor,
        sinusoids: Tensor,
        text: Tensor,
        time: Tensor,
        space: Tensor,
        mask: Tensor | None = None,
    ) -> Tensor:
        """The flow of whole videos at once: training, and what cached generation is held to.

        Args:
            latents: noisy, [B, F, C, height, width].
            sinusoids: of each frame's timestep, [B, F, freq_dim] (`schedule.sinusoid`).
            text: [B, text tokens, text_dim], zero padded.
            time: rotary table of the frames (`rotary.time_table`).
            space: rotary table of a frame's tokens (`rotary.space_table`).
            mask: [F, F], true where a frame may see another; None: all see all.

        Returns:
            Predicted flow [B, F, C, height, width].
        """
        table = rotary_table(time, space)
        tokens = space.shape[0]
        wide = None
        if mask is not None:
            wide = mask.repeat_interleave(tokens, 0).repeat_interleave(tokens, 1)

        def look(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
            queries, keys = rotate(queries, table), rotate(keys, table)
            return attend(queries.transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2), wide)

        x = self.embed(latents)
        embedded, modulation = self.embed_time(sinusoids)
        for block, (cross_keys, cross_values) in zip(self.blocks, self.cross(text), strict=True):
            x = block(x, modulation, look, cross_keys, cross_values)
        rows = latents.shape[3] // self.config.patch
        return self.pixels(self.head(x, embedded), (rows, tokens // rows))


def _parts(modulation: Tensor, *indices: int) -> Sequence[Tensor]:
    """Parts [B, F, 1, D] of a modulation [B, F, n, D], to be broadcast over a frame's tokens."""
    return [modulation[:, :, index : index + 1] for index in indices]


def _block(module: nn.Module) -> Block:
    assert isinstance(module, Block)
    return module
