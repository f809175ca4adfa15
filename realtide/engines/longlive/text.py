"""The UMT5 text encoder: plain PyTorch modules with the names of Wan's release (source: UMT5, Wan2.1).

T5's encoder with gated GELU, root mean square norms and a table of relative position biases in every layer.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from realtide.engines.longlive.config import TextConfig
from realtide.engines.longlive.transformer import RmsNorm


def distance_buckets(buckets: int, max_distance: int) -> NDArray[np.int64]:
    """Bucket of each distance 0 .. max_distance, for one direction with `buckets` buckets.

    Half of the buckets stand for one distance each, the others for ranges that grow logarithmically.
    Computed in float32, as the weights were trained: at some edges the last digit decides.
    """
    exact = buckets // 2
    distance = np.arange(max_distance + 1)
    ratio = np.log(np.maximum(distance, 1).astype(np.float32) / np.float32(exact))
    share = ratio / np.float32(math.log(max_distance / exact)) * np.float32(buckets - exact)
    far = np.minimum(exact + share.astype(np.int64), buckets - 1)
    return np.where(distance < exact, distance, far)


class Attention(nn.Module):
    """Self-attention without scaling or offsets."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.q = nn.Linear(config.dim, config.attention_dim, bias=False)
        self.k = nn.Linear(config.dim, config.attention_dim, bias=False)
        self.v = nn.Linear(config.dim, config.attention_dim, bias=False)
        self.o = nn.Linear(config.attention_dim, config.dim, bias=False)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """x [B, L, D], bias [B or 1, H, L, L] of the scores -> [B, L, D]."""
        queries, keys, values = (
            torch.unflatten(project(x), -1, (self.heads, -1)).transpose(1, 2)
            for project in (self.q, self.k, self.v)
        )
        mixed = F.scaled_dot_product_attention(queries, keys, values, attn_mask=bias, scale=1.0)
        out: Tensor = self.o(mixed.transpose(1, 2).flatten(2))
        return out


class FeedForward(nn.Module):
    """Gated GELU."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.gate = nn.Sequential(nn.Linear(config.dim, config.ff_dim, bias=False), nn.GELU("tanh"))
        self.fc1 = nn.Linear(config.dim, config.ff_dim, bias=False)
        self.fc2 = nn.Linear(config.ff_dim, config.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] -> [..., D]."""
        out: Tensor = self.fc2(self.fc1(x) * self.gate(x))
        return out


class PositionBias(nn.Module):
    """One number per head and bucket of relative positions."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config.buckets, config.heads)

    def forward(self, buckets: Tensor) -> Tensor:
        """Buckets [L, L] -> biases [1, H, L, L]."""
        out: Tensor = self.embedding(buckets).permute(2, 0, 1)[None]
        return out


class Block(nn.Module):
    """Attention and feed-forward, each a residual branch with its norm first."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.norm1 = RmsNorm(config.dim, config.eps)
        self.attn = Attention(config)
        self.norm2 = RmsNorm(config.dim, config.eps)
        self.ffn = FeedForward(config)
        self.pos_embedding = PositionBias(config)

    def forward(self, x: Tensor, buckets: Tensor, mask: Tensor) -> Tensor:
        """x [B, L, D], buckets [L, L], additive mask [B, 1, 1, L] -> [B, L, D]."""
        x = x + self.attn(self.norm1(x), self.pos_embedding(buckets) + mask)
        out: Tensor = x + self.ffn(self.norm2(x))
        return out


class TextEncoder(nn.Module):
    """Token ids to embeddings; its state_dict has the names of Wan's release."""

    distances: Tensor

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab, config.dim)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = RmsNorm(config.dim, config.eps)
        table = distance_buckets(config.buckets // 2, config.max_distance)
        self.register_buffer("distances", torch.from_numpy(table), persistent=False)

    def buckets(self, length: int) -> Tensor:
        """Bucket [length, length] of key j for query i: later keys have the upper half of the buckets."""
        index = torch.arange(length, device=self.distances.device)
        offset = index[None] - index[:, None]
        near = self.distances[offset.abs().clamp(max=self.config.max_distance)]
        return near + (offset > 0) * (self.config.buckets // 2)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Encode a batch of prompts.

        Args:
            ids: [B, L] int64.
            mask: [B, L], true (or 1) for tokens and false for padding.

        Returns:
            Embeddings [B, L, D], zero where there is padding.
        """
        x = self.token_embedding(ids)
        kept = mask.bool()
        hidden = torch.where(kept, 0.0, torch.finfo(x.dtype).min)[:, None, None].to(x.dtype)
        buckets = self.buckets(ids.shape[1])
        for block in self.blocks:
            x = block(x, buckets, hidden)
        out: Tensor = self.norm(x) * kept[..., None]
        return out


class EncodeText(nn.Module):
    """Program: one prompt, no padding."""

    def __init__(self, encoder: TextEncoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, ids: Tensor) -> Tensor:
        """Ids [L] -> embeddings [L, D]."""
        out: Tensor = self.encoder(ids[None], torch.ones_like(ids)[None])[0]
        return out
