"""The causal video VAE of Wan2.1: one definition for whole videos and for frames as they come.

A causal convolution over time needs the two frames before its input. Where they come from is the business of
a *history* that every layer is handed: `Whole` puts zeros before a video, `Start` does so for a stream's
first latent frame and leaves what follows will need in the stream's caches, `Next` takes it from there. The
caches are tensors [frames, channels, height, width] that the caller owns, in the order of the layers
(`config.decoder_shapes`, `config.encoder_shapes`); they are written in place.

The first latent frame is one video frame; each later one is `temporal_scale` of them.
Activations are [B, T, C, height, width]; names of parameters are the release's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from realtide.engines.longlive.config import VaeConfig
from realtide.engines.longlive.rows import write_rows


class History(Protocol):
    """Where layers find the frames before their input."""

    @property
    def starts(self) -> bool:
        """True if the input begins with the first frame of the video."""
        ...

    def extend(self, x: Tensor, frames: int) -> Tensor:
        """x [B, T, C, h, w] -> [B, frames + T, C, h, w], the frames before it first; keeps the last ones."""
        ...

    def skip(self, x: Tensor) -> None:
        """Leave no past, two frames of zeros, to a layer that the first frame [B, 1, C, h, w] bypasses."""
        ...


class Whole:
    """A whole video: zeros come before it, nothing after."""

    starts = True

    def extend(self, x: Tensor, frames: int) -> Tensor:
        """See `History.extend`."""
        return after_zeros(x, frames)

    def skip(self, x: Tensor) -> None:
        """See `History.skip`."""


class Start:
    """The first latent frame of a stream. What the caches held does not matter; arguments as of `Next`."""

    starts = True

    def __init__(self, caches: Sequence[Tensor], row: Tensor) -> None:
        self.caches = list(caches)
        self._next = iter(range(len(self.caches)))
        self._row = row

    def extend(self, x: Tensor, frames: int) -> Tensor:
        """See `History.extend`."""
        full = after_zeros(x, frames)
        self._write(full[0, full.shape[1] - frames :])
        return full

    def skip(self, x: Tensor) -> None:
        """See `History.skip`."""
        self._write(after_zeros(x, 2)[0, :2])

    def _write(self, frames: Tensor) -> None:
        index = next(self._next)
        self.caches[index] = write_rows(self.caches[index], all_rows(self._row, frames.shape[0]), frames)


class Next:
    """A later latent frame of a stream.

    Where a latent frame is two frames or more they replace a cache's whole content. Where it is one, it
    takes the place of the older of the two that are cached, and `row` says which that is.

    Args:
        caches: of the stream.
        row: [1]; frame n of the stream goes to row (n + 1) % 2.
    """

    starts = False

    def __init__(self, caches: Sequence[Tensor], row: Tensor) -> None:
        self.caches = list(caches)
        self._next = iter(range(len(self.caches)))
        self._row = row

    def extend(self, x: Tensor, frames: int) -> Tensor:
        """See `History.extend`."""
        index = next(self._next)
        cache, count = self.caches[index], x.shape[1]
        if count >= frames:
            full = torch.cat([cache[None], x], 1)
            rows = all_rows(self._row, frames)
        else:
            full = torch.cat([cache[torch.cat([self._row, 1 - self._row])][None], x], 1)
            rows = self._row
        # Taken from what was joined, not from x: the cache must have been read before it is written.
        self.caches[index] = write_rows(cache, rows, full[0, full.shape[1] - rows.shape[0] :])
        return full

    def skip(self, x: Tensor) -> None:
        """See `History.skip`; a later frame bypasses nothing."""
        raise AssertionError("only a first frame bypasses a layer")


def all_rows(row: Tensor, count: int) -> Tensor:
    """Rows 0 .. count-1, made from `row` (0 or 1).

    An exporter that knew that a whole cache is replaced would leave out the write, and with it the cache.
    """
    return row.clamp(max=0) + torch.arange(count, device=row.device)


def after_zeros(x: Tensor, frames: int) -> Tensor:
    """x [B, T, C, h, w] after `frames` frames of zeros (padded: zeros alone would be stored in a graph)."""
    return F.pad(x, (0, 0, 0, 0, 0, 0, frames, 0))


class CausalConv(nn.Module):
    """A convolution over time, height and width that sees no later frame.

    Weights are those of a 3-D convolution. It is computed as a 2-D one over the frames of its reach side by
    side in the channels: runtimes have fast 2-D convolutions.
    """

    def __init__(self, into: int, out: int, kernel: tuple[int, int, int], stride: int = 1) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out, into, *kernel))
        self.bias = nn.Parameter(torch.zeros(out))
        self._stride = stride  # over time
        nn.init.kaiming_uniform_(self.weight, a=5**0.5)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, T + reach - 1, C, h, w] -> [B, T, out, h, w], or every `stride`-th frame of that."""
        reach, height, width = self.weight.shape[2:]
        count = x.shape[1] - reach + 1
        taps = [x[:, tap : tap + count : self._stride] for tap in range(reach)]
        joined = torch.cat(taps, 2) if reach > 1 else taps[0]
        weight = self.weight.transpose(1, 2).flatten(1, 2)
        padding = (height // 2, width // 2)
        made = F.conv2d(joined.flatten(0, 1), weight, self.bias, padding=padding)
        return torch.unflatten(made, 0, (x.shape[0], -1))


class ChannelNorm(nn.Module):
    """RMS norm over the channels; `dims` trailing ones in its weight's shape, as in the release."""

    def __init__(self, channels: int, dims: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels, *[1] * dims))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., C, h, w] -> same; computed in float32, whose squares have room."""
        scale = x.shape[-3] ** 0.5
        normed: Tensor = F.normalize(x.float(), dim=-3).to(x.dtype) * scale
        return normed * self.gamma.reshape(-1, 1, 1)


class Residual(nn.Module):
    """Norm, SiLU, convolution, twice; a 1x1x1 convolution where the width changes."""

    def __init__(self, into: int, out: int) -> None:
        super().__init__()
        self.residual = nn.ModuleDict(
            {
                "0": ChannelNorm(into, 3),
                "2": CausalConv(into, out, (3, 3, 3)),
                "3": ChannelNorm(out, 3),
                "6": CausalConv(out, out, (3, 3, 3)),
            }
        )
        self.shortcut = CausalConv(into, out, (1, 1, 1)) if into != out else None

    def forward(self, x: Tensor, history: History) -> Tensor:
        """x [B, T, C, h, w] -> [B, T, out, h, w]."""
        h = x
        for norm, conv in (("0", "2"), ("3", "6")):
            h = self.residual[conv](history.extend(F.silu(self.residual[norm](h)), 2))
        return h + (x if self.shortcut is None else self.shortcut(x))


class FrameAttention(nn.Module):
    """Self-attention with one head among the pixels of each frame."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = ChannelNorm(channels, 2)
        self.to_qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, history: History) -> Tensor:
        """x [B, T, C, h, w] -> same; a frame sees itself only."""
        batch, _, channels, height, width = x.shape
        frames = self.norm(x).flatten(0, 1)
        split = torch.unflatten(self.to_qkv(frames).flatten(2), 1, (3, channels))
        # Each [B * T, 1, h * w, C].
        queries, keys, values = (part.transpose(1, 2)[:, None] for part in split.unbind(1))
        mixed = F.scaled_dot_product_attention(queries * channels**-0.5, keys, values, scale=1.0)
        mixed = torch.unflatten(mixed[:, 0].transpose(1, 2), 2, (height, width))
        return x + torch.unflatten(self.proj(mixed), 0, (batch, -1))


class Upsample(nn.Module):
    """Doubles height and width and halves the channels; before that, if `temporal`, doubles the frames."""

    def __init__(self, channels: int, temporal: bool) -> None:
        super().__init__()
        self.resample = nn.ModuleDict({"1": nn.Conv2d(channels, channels // 2, 3, padding=1)})
        self.time_conv = CausalConv(channels, 2 * channels, (3, 1, 1)) if temporal else None

    def forward(self, x: Tensor, history: History) -> Tensor:
        """x [B, T, C, h, w] -> [B, T or 2T, C / 2, 2h, 2w]; the first frame of a video is not doubled."""
        if self.time_conv is not None:
            if not history.starts:
                x = self._doubled(x, history)
            elif x.shape[1] == 1:
                history.skip(x)
            else:
                x = torch.cat([x[:, :1], self._doubled(x[:, 1:], history)], 1)
        frames = F.interpolate(x.flatten(0, 1), scale_factor=2.0, mode="nearest")
        return torch.unflatten(self.resample["1"](frames), 0, (x.shape[0], -1))

    def _doubled(self, x: Tensor, history: History) -> Tensor:
        assert self.time_conv is not None
        pairs = self.time_conv(history.extend(x, 2))
        return torch.unflatten(pairs, 2, (2, -1)).flatten(1, 2)


class Downsample(nn.Module):
    """Halves height and width; after that, if `temporal`, halves the frames."""

    def __init__(self, channels: int, temporal: bool) -> None:
        super().__init__()
        self.resample = nn.ModuleDict({"1": nn.Conv2d(channels, channels, 3, stride=2)})
        self.time_conv = CausalConv(channels, channels, (3, 1, 1), stride=2) if temporal else None

    def forward(self, x: Tensor, history: History) -> Tensor:
        """x [B, T, C, h, w] -> [B, T or T / 2, C, h / 2, w / 2]; the first frame of a video stays."""
        padded = F.pad(x.flatten(0, 1), (0, 1, 0, 1))
        x = torch.unflatten(self.resample["1"](padded), 0, (x.shape[0], -1))
        if self.time_conv is None:
            return x
        extended = history.extend(x, 1)
        if not history.starts:
            out: Tensor = self.time_conv(extended)
            return out
        if x.shape[1] == 1:
            return x
        return torch.cat([x[:, :1], self.time_conv(x)], 1)


Layer = Residual | FrameAttention | Upsample | Downsample


class Decoder(nn.Module):
    """Latents to frames, narrowest level first."""

    def __init__(self, config: VaeConfig) -> None:
        super().__init__()
        widths = config.widths[::-1]
        self.conv1 = CausalConv(config.latent, widths[0], (3, 3, 3))
        self.middle = _middle(widths[0])
        layers: list[Layer] = []
        into = widths[0]
        for level, out in enumerate(widths):
            for _ in range(config.residual_blocks + 1):
                layers.append(Residual(into, out))
                into = out
            if level < len(widths) - 1:
                layers.append(Upsample(out, config.temporal[::-1][level]))
                into = out // 2
        self.upsamples = nn.ModuleList(layers)
        self.head = _head(into, 3)

    def forward(self, latents: Tensor, history: History) -> Tensor:
        """Latents [B, T, latent, h, w] -> frames [B, T', 3, scale * h, scale * w], not clamped."""
        x = self.conv1(history.extend(latents, 2))
        for layer in _layers(self.middle, self.upsamples):
            x = layer(x, history)
        return _leave(self.head, x, history)


class Encoder(nn.Module):
    """Frames to the means and logarithms of variances of latents, widest level first."""

    def __init__(self, config: VaeConfig) -> None:
        super().__init__()
        self.conv1 = CausalConv(3, config.dim, (3, 3, 3))
        layers: list[Layer] = []
        into = config.dim
        for level, out in enumerate(config.widths):
            for _ in range(config.residual_blocks):
                layers.append(Residual(into, out))
                into = out
            if level < len(config.widths) - 1:
                layers.append(Downsample(out, config.temporal[level]))
        self.downsamples = nn.ModuleList(layers)
        self.middle = _middle(into)
        self.head = _head(into, 2 * config.latent)

    def forward(self, frames: Tensor, history: History) -> Tensor:
        """Frames [B, T', 3, h, w] -> [B, T, 2 * latent, h / scale, w / scale]."""
        x = self.conv1(history.extend(frames, 2))
        for layer in _layers(self.downsamples, self.middle):
            x = layer(x, history)
        return _leave(self.head, x, history)


class WanVae(nn.Module):
    """The VAE; latents are normalised by the mean and standard deviation of the configuration."""

    mean: Tensor
    std: Tensor

    def __init__(self, config: VaeConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.conv1 = CausalConv(2 * config.latent, 2 * config.latent, (1, 1, 1))
        self.conv2 = CausalConv(config.latent, config.latent, (1, 1, 1))
        self.decoder = Decoder(config)
        for name in ("mean", "std"):
            # On the processor even where the rest has no values: no checkpoint holds these.
            values = torch.tensor(getattr(config, name), dtype=torch.float32, device="cpu").reshape(-1, 1, 1)
            self.register_buffer(name, values, persistent=False)

    def decode(self, latents: Tensor, history: History) -> Tensor:
        """Latents [B, T, latent, h, w] -> frames [B, T', 3, scale * h, scale * w] around -1 .. 1."""
        out: Tensor = self.decoder(self.conv2(latents * self.std + self.mean), history)
        return out

    def encode(self, frames: Tensor, history: History) -> Tensor:
        """Frames [B, T', 3, h, w] in -1 .. 1 -> means of the latents [B, T, latent, h / scale, w / scale].

        T' must be 1 + k * temporal_scale where a video starts and k * temporal_scale where it goes on.
        """
        moments: Tensor = self.conv1(self.encoder(frames, history))
        return (moments[:, :, : self.config.latent] - self.mean) / self.std


class DecodeFirst(nn.Module):
    """Program: the first latent frame of a stream. Sets all caches."""

    def __init__(self, vae: WanVae) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, latents: Tensor, row: Tensor, *caches: Tensor) -> tuple[Tensor, ...]:
        """Latents [1, latent, h, w], row [1] (see `Next`) -> frames [1, 3, ...], then the caches."""
        history = Start(caches, row)
        frames = self.vae.decode(latents[None], history)
        return (frames[0], *history.caches)


class DecodeNext(nn.Module):
    """Program: a later latent frame of a stream."""

    def __init__(self, vae: WanVae) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, latents: Tensor, row: Tensor, *caches: Tensor) -> tuple[Tensor, ...]:
        """Latents [1, latent, h, w], row [1] (see `Next`) -> frames [temporal_scale, 3, ...], the caches."""
        history = Next(caches, row)
        frames = self.vae.decode(latents[None], history)
        return (frames[0], *history.caches)


class EncodeFirst(nn.Module):
    """Program: the first frame of a video. Sets all caches."""

    def __init__(self, vae: WanVae) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, frames: Tensor, row: Tensor, *caches: Tensor) -> tuple[Tensor, ...]:
        """Frames [1, 3, h, w], row [1] (see `Next`) -> latents [1, latent, ...], then the caches."""
        history = Start(caches, row)
        latents = self.vae.encode(frames[None], history)
        return (latents[0], *history.caches)


class EncodeNext(nn.Module):
    """Program: the next `temporal_scale` frames of a video."""

    def __init__(self, vae: WanVae) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, frames: Tensor, row: Tensor, *caches: Tensor) -> tuple[Tensor, ...]:
        """Frames [temporal_scale, 3, h, w], row [1] (see `Next`) -> latents [1, latent, ...], the caches."""
        history = Next(caches, row)
        latents = self.vae.encode(frames[None], history)
        return (latents[0], *history.caches)


def _middle(channels: int) -> nn.ModuleList:
    return nn.ModuleList(
        [Residual(channels, channels), FrameAttention(channels), Residual(channels, channels)]
    )


def _head(into: int, out: int) -> nn.ModuleDict:
    return nn.ModuleDict({"0": ChannelNorm(into, 3), "2": CausalConv(into, out, (3, 3, 3))})


def _leave(head: nn.ModuleDict, x: Tensor, history: History) -> Tensor:
    out: Tensor = head["2"](history.extend(F.silu(head["0"](x)), 2))
    return out


def _layers(*groups: nn.ModuleList) -> Iterator[Layer]:
    for group in groups:
        for layer in group:
            assert isinstance(layer, Residual | FrameAttention | Upsample | Downsample)
            yield layer
