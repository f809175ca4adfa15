"""The two text encoders of FLUX: T5 for the prompt's tokens, CLIP for the pooled prompt.

Plain PyTorch modules with the names of transformers' T5EncoderModel and CLIPTextModel. Both see padding as
FLUX was trained to: T5 attends to it; CLIP is causal and read at the first end token, before it.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from realtide.engines.easycontrol.config import PooledConfig, TextConfig
from realtide.engines.easycontrol.transformer import RmsNorm


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


class T5Attention(nn.Module):
    """Self-attention without scaling or offsets; the first block's has the table of position biases."""

    def __init__(self, config: TextConfig, first: bool) -> None:
        super().__init__()
        self.heads = config.heads
        inner = config.heads * config.head_dim
        self.q, self.k, self.v = (nn.Linear(config.dim, inner, bias=False) for _ in range(3))
        self.o = nn.Linear(inner, config.dim, bias=False)
        if first:
            self.relative_attention_bias = nn.Embedding(config.buckets, config.heads)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """x [B, L, D], bias [1, H, L, L] of the scores -> [B, L, D]."""
        queries, keys, values = (
            torch.unflatten(project(x), -1, (self.heads, -1)).transpose(1, 2)
            for project in (self.q, self.k, self.v)
        )
        mixed = F.scaled_dot_product_attention(queries, keys, values, attn_mask=bias, scale=1.0)
        out: Tensor = self.o(mixed.transpose(1, 2).flatten(2))
        return out


class T5Block(nn.Module):
    """Attention and gated feed-forward, each a residual branch with its norm first."""

    def __init__(self, config: TextConfig, first: bool) -> None:
        super().__init__()
        attention = nn.ModuleDict(
            {
                "SelfAttention": T5Attention(config, first),
                "layer_norm": RmsNorm(config.dim, config.eps),
            }
        )
        dense = nn.ModuleDict(
            {
                "wi_0": nn.Linear(config.dim, config.ff_dim, bias=False),
                "wi_1": nn.Linear(config.dim, config.ff_dim, bias=False),
                "wo": nn.Linear(config.ff_dim, config.dim, bias=False),
            }
        )
        feed = nn.ModuleDict(
            {
                "DenseReluDense": dense,
                "layer_norm": RmsNorm(config.dim, config.eps),
            }
        )
        self.layer = nn.ModuleList([attention, feed])

    @property
    def attention(self) -> T5Attention:
        """The block's attention."""
        part = self.layer[0]
        assert isinstance(part, nn.ModuleDict)
        found = part["SelfAttention"]
        assert isinstance(found, T5Attention)
        return found

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """x [B, L, D], bias [1, H, L, L] -> [B, L, D]."""
        mixer, feed = self.layer
        assert isinstance(mixer, nn.ModuleDict)
        assert isinstance(feed, nn.ModuleDict)
        x = x + mixer["SelfAttention"](mixer["layer_norm"](x), bias)
        dense = feed["DenseReluDense"]
        assert isinstance(dense, nn.ModuleDict)
        normed = feed["layer_norm"](x)
        gated = F.gelu(dense["wi_0"](normed), approximate="tanh") * dense["wi_1"](normed)
        out: Tensor = x + dense["wo"](gated)
        return out


class T5Encoder(nn.Module):
    """Token ids to embeddings."""

    distances: Tensor

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.config = config
        self.shared = nn.Embedding(config.vocab, config.dim)
        self.encoder = nn.ModuleDict(
            {
                "block": nn.ModuleList(T5Block(config, first=not n) for n in range(config.layers)),
                "final_layer_norm": RmsNorm(config.dim, config.eps),
            }
        )
        table = distance_buckets(config.buckets // 2, config.max_distance)
        self.register_buffer("distances", torch.from_numpy(table), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        """Ids [B, L], padding included and attended to -> embeddings [B, L, D]."""
        index = torch.arange(ids.shape[1], device=ids.device)
        offset = index[None] - index[:, None]
        near = self.distances[offset.abs().clamp(max=self.config.max_distance)]
        # Later keys have the upper half of the buckets.
        buckets = near + (offset > 0) * (self.config.buckets // 2)
        blocks = self.encoder["block"]
        assert isinstance(blocks, nn.ModuleList)
        first = blocks[0]
        assert isinstance(first, T5Block)
        bias = first.attention.relative_attention_bias(buckets).permute(2, 0, 1)[None]
        x = self.shared(ids)
        for block in blocks:
            x = block(x, bias)
        out: Tensor = self.encoder["final_layer_norm"](x)
        return out


class ClipLayer(nn.Module):
    """Causal attention and feed-forward, each a residual branch with its norm first."""

    def __init__(self, config: PooledConfig) -> None:
        super().__init__()
        self.heads, self.quick = config.heads, config.quick
        names = ("q_proj", "k_proj", "v_proj", "out_proj")
        self.self_attn = nn.ModuleDict({name: nn.Linear(config.dim, config.dim) for name in names})
        self.layer_norm1 = nn.LayerNorm(config.dim, config.eps)
        self.mlp = nn.ModuleDict(
            {"fc1": nn.Linear(config.dim, config.ff_dim), "fc2": nn.Linear(config.ff_dim, config.dim)}
        )
        self.layer_norm2 = nn.LayerNorm(config.dim, config.eps)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """x [B, L, D], additive mask [L, L] -> [B, L, D]."""
        normed = self.layer_norm1(x)
        queries, keys, values = (
            torch.unflatten(self.self_attn[name](normed), -1, (self.heads, -1)).transpose(1, 2)
            for name in ("q_proj", "k_proj", "v_proj")
        )
        queries = queries * queries.shape[-1] ** -0.5
        mixed = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, scale=1.0)
        x = x + self.self_attn["out_proj"](mixed.transpose(1, 2).flatten(2))
        hidden = self.mlp["fc1"](self.layer_norm2(x))
        hidden = hidden * torch.sigmoid(1.702 * hidden) if self.quick else F.gelu(hidden)
        out: Tensor = x + self.mlp["fc2"](hidden)
        return out


class ClipText(nn.Module):
    """Token ids to the pooled prompt."""

    def __init__(self, config: PooledConfig) -> None:
        super().__init__()
        self.config = config
        self.text_model = nn.ModuleDict(
            {
                "embeddings": nn.ModuleDict(
                    {
                        "token_embedding": nn.Embedding(config.vocab, config.dim),
                        "position_embedding": nn.Embedding(config.tokens, config.dim),
                    }
                ),
                "encoder": nn.ModuleDict(
                    {"layers": nn.ModuleList(ClipLayer(config) for _ in range(config.layers))}
                ),
                "final_layer_norm": nn.LayerNorm(config.dim, config.eps),
            }
        )

    def forward(self, ids: Tensor) -> Tensor:
        """Ids [B, L], padded with end tokens -> the last state [B, D] at the first end token."""
        embeddings, encoder = self.text_model["embeddings"], self.text_model["encoder"]
        assert isinstance(embeddings, nn.ModuleDict)
        assert isinstance(encoder, nn.ModuleDict)
        layers = encoder["layers"]
        assert isinstance(layers, nn.ModuleList)
        index = torch.arange(ids.shape[1], device=ids.device)
        x = embeddings["token_embedding"](ids) + embeddings["position_embedding"](index)
        later = index[None] > index[:, None]
        mask = torch.where(later, torch.finfo(x.dtype).min, 0.0).to(x.dtype)
        for layer in layers:
            x = layer(x, mask)
        x = self.text_model["final_layer_norm"](x)
        # Ends after the first one count less, so that the first is the largest.
        length = ids.shape[1]
        first = ((ids == self.config.end) * (length - index)).argmax(1)
        out: Tensor = x[torch.arange(ids.shape[0], device=ids.device), first]
        return out


class EncodeText(nn.Module):
    """Program: ids [T] of one prompt -> embeddings [T, D]."""

    def __init__(self, encoder: T5Encoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, ids: Tensor) -> Tensor:
        """See `T5Encoder.forward`."""
        out: Tensor = self.encoder(ids[None])[0]
        return out


class PoolText(nn.Module):
    """Program: ids [L] of one prompt -> the pooled prompt [P]."""

    def __init__(self, encoder: ClipText) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, ids: Tensor) -> Tensor:
        """See `ClipText.forward`."""
        out: Tensor = self.encoder(ids[None])[0]
        return out
