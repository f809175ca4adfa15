"""FLUX's image VAE: plain PyTorch modules with the names of diffusers' AutoencoderKL (source: FLUX.1).

Convolutions with group norms, and attention among the pixels of the coarsest level. Latents are normalised by
shift and scale of the configuration; encoding gives their means.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from realtide.engines.easycontrol.config import VaeConfig


class Residual(nn.Module):
    """Norm, SiLU, convolution, twice; a 1x1 convolution where the width changes."""

    def __init__(self, into: int, out: int, config: VaeConfig) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(config.groups, into, config.eps)
        self.conv1 = nn.Conv2d(into, out, 3, padding=1)
        self.norm2 = nn.GroupNorm(config.groups, out, config.eps)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(into, out, 1) if into != out else None

    def forward(self, x: Tensor) -> Tensor:
        """x [B, into, h, w] -> [B, out, h, w]."""
        hidden = self.conv1(F.silu(self.norm1(x)))
        hidden = self.conv2(F.silu(self.norm2(hidden)))
        out: Tensor = hidden + (x if self.conv_shortcut is None else self.conv_shortcut(x))
        return out


class PixelAttention(nn.Module):
    """Self-attention with one head among the pixels of an image."""

    def __init__(self, channels: int, config: VaeConfig) -> None:
        super().__init__()
        self.group_norm = nn.GroupNorm(config.groups, channels, config.eps)
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, channels) for _ in range(3))
        self.to_out = nn.ModuleDict({"0": nn.Linear(channels, channels)})

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, h, w] -> same."""
        pixels = self.group_norm(x).flatten(2).transpose(1, 2)
        queries, keys, values = (p(pixels)[:, None] for p in (self.to_q, self.to_k, self.to_v))
        mixed = F.scaled_dot_product_attention(queries * x.shape[1] ** -0.5, keys, values, scale=1.0)
        out: Tensor = x + self.to_out["0"](mixed[:, 0]).transpose(1, 2).reshape(x.shape)
        return out


class Middle(nn.Module):
    """Residual, attention, residual."""

    def __init__(self, channels: int, config: VaeConfig) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(Residual(channels, channels, config) for _ in range(2))
        self.attentions = nn.ModuleList([PixelAttention(channels, config)])

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, h, w] -> same."""
        out: Tensor = self.resnets[1](self.attentions[0](self.resnets[0](x)))
        return out


class Resample(nn.Module):
    """The convolution that halves or follows a doubling of height and width."""

    def __init__(self, channels: int, down: bool) -> None:
        super().__init__()
        self.down = down
        self.conv = nn.Conv2d(channels, channels, 3, stride=2 if down else 1, padding=0 if down else 1)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, h, w] -> [B, C, h / 2, w / 2] or [B, C, 2h, 2w]."""
        # Padded where the reference pads: below and on the right only.
        x = F.pad(x, (0, 1, 0, 1)) if self.down else F.interpolate(x, scale_factor=2.0, mode="nearest")
        out: Tensor = self.conv(x)
        return out


class Level(nn.Module):
    """Residual blocks of one width, and the change of size after them, if there is one."""

    def __init__(self, into: int, out: int, count: int, resample: str | None, config: VaeConfig) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(Residual(out if n else into, out, config) for n in range(count))
        if resample is not None:
            change = nn.ModuleList([Resample(out, down=resample == "downsamplers")])
            self.add_module(resample, change)
        self._resample = resample

    def forward(self, x: Tensor) -> Tensor:
        """x [B, into, h, w] -> [B, out, h', w']."""
        for block in self.resnets:
            x = block(x)
        if self._resample is not None:
            change = self.get_submodule(self._resample)
            assert isinstance(change, nn.ModuleList)
            x = change[0](x)
        return x


class Encoder(nn.Module):
    """Pixels to means and logarithms of variances, finest level first."""

    def __init__(self, config: VaeConfig) -> None:
        super().__init__()
        widths, last = config.widths, len(config.widths) - 1
        self.conv_in = nn.Conv2d(3, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            Level(widths[max(n - 1, 0)], out, config.layers, "downsamplers" if n < last else None, config)
            for n, out in enumerate(widths)
        )
        self.mid_block = Middle(widths[-1], config)
        self.conv_norm_out = nn.GroupNorm(config.groups, widths[-1], config.eps)
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.latent, 3, padding=1)

    def forward(self, pixels: Tensor) -> Tensor:
        """Pixels [B, 3, H, W] -> [B, 2 * latent, h, w]."""
        x = self.conv_in(pixels)
        for level in self.down_blocks:
            x = level(x)
        out: Tensor = self.conv_out(F.silu(self.conv_norm_out(self.mid_block(x))))
        return out


class Decoder(nn.Module):
    """Latents to pixels, coarsest level first."""

    def __init__(self, config: VaeConfig) -> None:
        super().__init__()
        widths, last = config.widths[::-1], len(config.widths) - 1
        self.conv_in = nn.Conv2d(config.latent, widths[0], 3, padding=1)
        self.mid_block = Middle(widths[0], config)
        self.up_blocks = nn.ModuleList(
            Level(widths[max(n - 1, 0)], out, config.layers + 1, "upsamplers" if n < last else None, config)
            for n, out in enumerate(widths)
        )
        self.conv_norm_out = nn.GroupNorm(config.groups, widths[-1], config.eps)
        self.conv_out = nn.Conv2d(widths[-1], 3, 3, padding=1)

    def forward(self, latents: Tensor) -> Tensor:
        """Latents [B, latent, h, w] -> pixels [B, 3, H, W]."""
        x = self.mid_block(self.conv_in(latents))
        for level in self.up_blocks:
            x = level(x)
        out: Tensor = self.conv_out(F.silu(self.conv_norm_out(x)))
        return out


class Vae(nn.Module):
    """Both halves; latents outside are normalised."""

    def __init__(self, config: VaeConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)

    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B, latent, h, w] -> pixels [B, 3, H, W] around -1 .. 1, not clamped."""
        out: Tensor = self.decoder(latents / self.config.scaling + self.config.shift)
        return out

    def moments(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels [B, 3, H, W] in -1 .. 1 -> means and log variances [B, latent, h, w], not normalised."""
        mean, log_variance = self.encoder(pixels).chunk(2, 1)
        return mean, log_variance

    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels [B, 3, H, W] in -1 .. 1 -> means of the latents [B, latent, h, w]."""
        return (self.moments(pixels)[0] - self.config.shift) * self.config.scaling


class Decode(nn.Module):
    """Program: latents [1, latent, h, w] -> pixels [1, 3, H, W]."""

    def __init__(self, vae: Vae) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, latents: Tensor) -> Tensor:
        """See `Vae.decode`."""
        return self.vae.decode(latents)


class Encode(nn.Module):
    """Program: pixels of a condition [1, 3, size, size] -> latents [1, latent, h, w]."""

    def __init__(self, vae: Vae) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, pixels: Tensor) -> Tensor:
        """See `Vae.encode`."""
        return self.vae.encode(pixels)


class Projection(nn.Module):
    """The cheap picture of latents: one linear map of each latent pixel.

    Args:
        latent: channels of the latents.
        pixels: that a latent pixel becomes, each way.
    """

    def __init__(self, latent: int, pixels: int) -> None:
        super().__init__()
        self.pixels = pixels
        self.weight = nn.Parameter(torch.zeros(3 * pixels**2, latent, 1, 1))
        self.bias = nn.Parameter(torch.zeros(3 * pixels**2))

    def forward(self, latents: Tensor) -> Tensor:
        """Latents [1, latent, h, w] -> pixels [1, 3, h * pixels, w * pixels] around -1 .. 1."""
        return F.pixel_shuffle(F.conv2d(latents, self.weight, self.bias), self.pixels)


class Preview(nn.Module):
    """Program: latents [1, latent, h, w] -> a small picture; see `Projection`."""

    def __init__(self, projection: Projection) -> None:
        super().__init__()
        self.projection = projection

    def forward(self, latents: Tensor) -> Tensor:
        """See `Projection.forward`."""
        out: Tensor = self.projection(latents)
        return out
