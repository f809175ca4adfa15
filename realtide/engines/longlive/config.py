"""Shapes of a LongLive model: all come from the bundle's manifest (architecture rule 4; ours).

832x480 Wan2.1-1.3B and a small bundle are two values of the same dataclasses. Numpy and torch are not needed
here.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from math import prod
from typing import Literal

from realtide.engines.runtime.section import Section

Rotary = Literal["absolute", "relative"]


@dataclass(frozen=True, slots=True)
class TransformerConfig(Section):
    """The Wan diffusion transformer. A token is a patch of `patch` x `patch` latent pixels of one frame.

    Attributes:
        places: tokens of a frame that each have a learned embedding of their place; 0: none, as in Wan.
            Rotary embedding tells tokens apart by distance only: where everything looks alike, a small model
            does not know where in the frame it is (ours).
    """

    section = "transformer"

    layers: int = 30
    dim: int = 1536
    heads: int = 12
    ff_dim: int = 8960
    freq_dim: int = 256
    channels: int = 16
    patch: int = 2
    text_dim: int = 4096
    text_tokens: int = 512
    eps: float = 1e-6
    places: int = 0

    def __post_init__(self) -> None:
        names = [f.name for f in fields(self) if f.name not in ("eps", "places")]
        self.at_least_one(*names)
        if self.dim % self.heads:
            raise ValueError(
                f"transformer.dim ({self.dim}) must be a multiple of transformer.heads ({self.heads})"
            )
        if self.head_dim % 2 or self.head_dim < 6:
            raise ValueError(
                f"transformer.dim / transformer.heads must be even and at least 6, got {self.head_dim}"
            )
        if self.freq_dim % 2:
            raise ValueError(f"transformer.freq_dim must be even, got {self.freq_dim}")
        if not self.eps > 0:
            raise ValueError(f"transformer.eps must be positive, got {self.eps!r}")

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.dim // self.heads

    @property
    def rotary_pairs(self) -> tuple[int, int, int]:
        """Complex pairs of a head that rotate with time, height and width."""
        pairs = self.head_dim // 2
        return pairs - 2 * (pairs // 3), pairs // 3, pairs // 3


@dataclass(frozen=True, slots=True)
class StreamConfig(Section):
    """How video is generated: size, blocks, window, sampler.

    Frames are *latent frames*; `height` and `width` count latent pixels (1/8 of the video's).

    Attributes:
        block: frames that are denoised together.
        window: frames of the key/value cache.
        sink: first frames of the video that never leave the cache, counted in `window`.
        rotary: *absolute*: keys are cached rotated by their frame's index in the video; *relative*: they are
            cached as they are and rotated at use by their place in the window.
        global_sink: a recache leaves a sink alone that the window has left behind.
        steps: entries of the few-step list, before warping: noisiest first.
        shift: of the sigma table.
        context_noise: timestep of the pass that leaves a block's keys and values in the cache.
    """

    section = "stream"

    height: int = 60
    width: int = 104
    block: int = 3
    window: int = 12
    sink: int = 3
    rotary: Rotary = "absolute"
    global_sink: bool = True
    steps: tuple[int, ...] = (1000, 750, 500, 250)
    shift: float = 5.0
    context_noise: float = 0.0

    def __post_init__(self) -> None:
        self.at_least_one("height", "width", "block", "window")
        if self.sink < 0 or self.sink + self.block > self.window:
            raise ValueError(
                f"stream.sink must be in 0..{self.window - self.block} (window less block), got {self.sink}"
            )
        if self.rotary not in ("absolute", "relative"):
            raise ValueError(f"stream.rotary must be absolute or relative, got {self.rotary!r}")
        falling = all(a > b for a, b in zip(self.steps, self.steps[1:], strict=False))
        if not self.steps or not falling or not all(1 <= step <= 1000 for step in self.steps):
            raise ValueError(f"stream.steps must fall and lie in 1..1000, got {list(self.steps)}")
        if not self.shift > 0:
            raise ValueError(f"stream.shift must be positive, got {self.shift!r}")
        if not 0 <= self.context_noise < 1000:
            raise ValueError(f"stream.context_noise must be in 0..1000, got {self.context_noise!r}")


@dataclass(frozen=True, slots=True)
class VaeConfig(Section):
    """The causal video VAE of Wan2.1.

    Attributes:
        dim: channels of the widest level.
        latent: channels of the latents.
        multipliers: channels of each level over `dim`, widest level first; each level but the last halves
            height and width.
        residual_blocks: of a level of the encoder; the decoder has one more.
        temporal: which of the halvings also halve time.
        mean: of the latents, by channel.
        std: their standard deviation.
    """

    section = "vae"

    dim: int = 96
    latent: int = 16
    multipliers: tuple[int, ...] = (1, 2, 4, 4)
    residual_blocks: int = 2
    temporal: tuple[bool, ...] = (False, True, True)
    mean: tuple[float, ...] = field(default=(), repr=False)
    std: tuple[float, ...] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        self.at_least_one("dim", "latent", "residual_blocks")
        if not self.multipliers or not all(m >= 1 for m in self.multipliers):
            raise ValueError(f"vae.multipliers must be at least 1, got {list(self.multipliers)}")
        if len(self.temporal) != len(self.multipliers) - 1:
            raise ValueError(
                f"vae.temporal must have {len(self.multipliers) - 1} values, got {len(self.temporal)}"
            )
        for name in ("mean", "std"):
            values = getattr(self, name)
            if len(values) != self.latent:
                raise ValueError(f"vae.{name} must have {self.latent} values, got {len(values)}")
        if not all(value > 0 for value in self.std):
            raise ValueError("vae.std must be positive")

    @property
    def spatial_scale(self) -> int:
        """Pixels per latent pixel, each way."""
        return int(2 ** len(self.temporal))

    @property
    def temporal_scale(self) -> int:
        """Video frames per latent frame; the first latent frame is one video frame."""
        return int(2 ** sum(self.temporal))

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each level, widest level first."""
        return tuple(self.dim * m for m in self.multipliers)


@dataclass(frozen=True, slots=True)
class TextConfig(Section):
    """The UMT5 encoder."""

    section = "text"

    vocab: int = 256384
    dim: int = 4096
    attention_dim: int = 4096
    ff_dim: int = 10240
    heads: int = 64
    layers: int = 24
    buckets: int = 32
    max_distance: int = 128
    eps: float = 1e-6

    def __post_init__(self) -> None:
        self.at_least_one(*[f.name for f in fields(self) if f.name != "eps"])
        if self.attention_dim % self.heads:
            raise ValueError(
                f"text.attention_dim ({self.attention_dim}) must be a multiple of text.heads ({self.heads})"
            )
        if self.buckets % 4:
            raise ValueError(f"text.buckets must be a multiple of 4, got {self.buckets}")
        if self.max_distance <= self.buckets // 4:
            raise ValueError(f"text.max_distance must be above {self.buckets // 4}, got {self.max_distance}")


@dataclass(frozen=True, slots=True)
class VideoConfig:
    """A transformer and the way it generates, checked against each other."""

    transformer: TransformerConfig
    stream: StreamConfig

    def __post_init__(self) -> None:
        for name in ("height", "width"):
            size = getattr(self.stream, name)
            if size % self.transformer.patch:
                raise ValueError(
                    f"stream.{name} ({size}) must be a multiple of transformer.patch"
                    f" ({self.transformer.patch})"
                )
        if self.transformer.places not in (0, self.frame_tokens):
            raise ValueError(
                f"transformer.places must be 0 or a frame's {self.frame_tokens} tokens,"
                f" got {self.transformer.places!r}"
            )

    @property
    def grid(self) -> tuple[int, int]:
        """Tokens of a frame: rows, columns."""
        patch = self.transformer.patch
        return self.stream.height // patch, self.stream.width // patch

    @property
    def frame_tokens(self) -> int:
        """Tokens of a frame."""
        rows, columns = self.grid
        return rows * columns

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of a latent frame."""
        return self.transformer.channels, self.stream.height, self.stream.width


def cache_shapes(config: VideoConfig) -> dict[str, tuple[int, tuple[int, ...]]]:
    """Key/value cache of a session: name -> (rows, shape of a row).

    Row ``(h * window + p) * frame_tokens + t`` is token t of the frame in place p of the window (see
    `window`), head h: a head's keys lie together, as attention reads them.
    """
    heads, width = config.transformer.heads, config.transformer.head_dim
    rows = heads * config.stream.window * config.frame_tokens
    return {
        f"{kind}_{layer}": (rows, (width,))
        for layer in range(config.transformer.layers)
        for kind in ("key", "value")
    }


def cross_shapes(config: VideoConfig) -> dict[str, tuple[int, int, int]]:
    """Keys and values of one prompt for cross-attention: name -> [heads, text tokens, head width]."""
    model = config.transformer
    return {
        f"cross_{kind}_{layer}": (model.heads, model.text_tokens, model.head_dim)
        for layer in range(model.layers)
        for kind in ("key", "value")
    }


def decoder_shapes(config: VaeConfig, height: int, width: int) -> dict[str, tuple[int, int, int, int]]:
    """Feature caches of the VAE's decoder for latents of `height` x `width`, in the order of the layers.

    Returns:
        name -> [frames, channels, height, width]: what each causal convolution still needs of the past.
    """
    levels = len(config.multipliers)
    widths = config.widths[::-1]
    h, w = height, width
    found = [(2, config.latent, h, w), *([(2, widths[0], h, w)] * 4)]
    for level, out in enumerate(widths):
        # A spatial upsampling halves the channels.
        into = widths[0] if level == 0 else widths[level - 1] // 2
        for block in range(config.residual_blocks + 1):
            found += [(2, into if block == 0 else out, h, w), (2, out, h, w)]
        if level < levels - 1:
            if config.temporal[levels - 2 - level]:
                found.append((2, out, h, w))
            h, w = 2 * h, 2 * w
    found.append((2, widths[-1], h, w))
    return {f"decoder_{index}": shape for index, shape in enumerate(found)}


def encoder_shapes(config: VaeConfig, height: int, width: int) -> dict[str, tuple[int, int, int, int]]:
    """Feature caches of the VAE's encoder for video of `height` x `width` pixels; see `decoder_shapes`."""
    widths = config.widths
    h, w = height, width
    found: list[tuple[int, int, int, int]] = [(2, 3, h, w)]
    for level, out in enumerate(widths):
        into = config.dim if level == 0 else widths[level - 1]
        for block in range(config.residual_blocks):
            found += [(2, into if block == 0 else out, h, w), (2, out, h, w)]
        if level < len(widths) - 1:
            h, w = h // 2, w // 2
            if config.temporal[level]:
                found.append((1, out, h, w))
    found += [(2, widths[-1], h, w)] * 5
    return {f"encoder_{index}": shape for index, shape in enumerate(found)}


def session_bytes(config: VideoConfig, vae: VaeConfig, itemsize: int = 4) -> int:
    """Memory of one session while it holds a cache, in bytes.

    Key/value cache, the prompt's keys and values, the decoder's feature caches, the window's and the sink's
    latents, and the embeddings of the prompt in force and of the sink's.

    Args:
        config: transformer and stream.
        vae: the VAE.
        itemsize: bytes of a number.
    """
    stream, model = config.stream, config.transformer
    values = sum(rows * prod(shape) for rows, shape in cache_shapes(config).values())
    values += sum(prod(shape) for shape in cross_shapes(config).values())
    values += sum(prod(shape) for shape in decoder_shapes(vae, stream.height, stream.width).values())
    values += (stream.window + stream.sink) * prod(config.latent_shape)
    values += 2 * model.text_tokens * model.text_dim
    return itemsize * values
