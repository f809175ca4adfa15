"""Shapes of an EasyControl model: all come from the bundle's manifest (architecture rule 4; ours).

FLUX.1-dev and a small bundle are two values of the same dataclasses. Numpy and torch are not needed here.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Literal

from realtide.engines.runtime.section import Section

Role = Literal["spatial", "subject"]


@dataclass(frozen=True, slots=True)
class TransformerConfig(Section):
    """FLUX's diffusion transformer. A token is a patch of `patch` x `patch` latent pixels, packed.

    Attributes:
        double_blocks: blocks with weights of their own for text and image.
        single_blocks: blocks that run text and image as one sequence, after the double ones.
        heads: of the attention.
        head_dim: width of a head.
        channels: of a packed token.
        patch: latent pixels of a token, each way.
        text_dim: width of the text encoder's output.
        text_tokens: of a prompt, padding included.
        pooled_dim: width of the pooled prompt.
        freq_dim: width of the sinusoids of timestep and guidance.
        axes: widths of a head that rotate with index, row and column.
        guidance: the guidance scale is an input (a distilled model).
        eps: of all norms.
    """

    section = "transformer"

    double_blocks: int = 19
    single_blocks: int = 38
    heads: int = 24
    head_dim: int = 128
    channels: int = 64
    patch: int = 2
    text_dim: int = 4096
    text_tokens: int = 512
    pooled_dim: int = 768
    freq_dim: int = 256
    axes: tuple[int, ...] = (16, 56, 56)
    guidance: bool = True
    eps: float = 1e-6

    def __post_init__(self) -> None:
        apart = ("axes", "guidance", "eps")
        self.at_least_one(*[f.name for f in fields(self) if f.name not in apart])
        if not isinstance(self.guidance, bool):
            raise ValueError(f"transformer.guidance must be true or false, got {self.guidance!r}")
        if len(self.axes) != 3 or sum(self.axes) != self.head_dim or any(a < 2 or a % 2 for a in self.axes):
            raise ValueError(
                f"transformer.axes must be three even numbers that add up to transformer.head_dim"
                f" ({self.head_dim}), got {list(self.axes)}"
            )
        if self.channels % self.patch**2:
            raise ValueError(
                f"transformer.channels ({self.channels}) must be a multiple of the pixels of a patch"
                f" ({self.patch**2})"
            )
        if self.freq_dim % 2:
            raise ValueError(f"transformer.freq_dim must be even, got {self.freq_dim}")
        if not self.eps > 0:
            raise ValueError(f"transformer.eps must be positive, got {self.eps!r}")

    @property
    def dim(self) -> int:
        """Width of the tokens inside."""
        return self.heads * self.head_dim

    @property
    def blocks(self) -> int:
        """Blocks of both kinds: layers of a condition's cache, the double ones first."""
        return self.double_blocks + self.single_blocks

    @property
    def latent(self) -> int:
        """Channels of the latents before packing."""
        return self.channels // self.patch**2

    @property
    def scalars(self) -> int:
        """Numbers that enter as sinusoids: the timestep and, where it is an input, the guidance."""
        return 1 + self.guidance


@dataclass(frozen=True, slots=True)
class ConditionConfig(Section):
    """What images can be conditioned on.

    Attributes:
        size: pixels of a condition image, each way.
        rank: of the LoRA of each kind.
        offset: rows by which a subject's positions are shifted.
        spatial: kinds whose positions are those of the image, for example ``canny``.
        subject: kinds that say what is shown and not where.
    """

    section = "conditions"

    size: int = 512
    rank: int = 128
    offset: int = 64
    spatial: tuple[str, ...] = ()
    subject: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self.at_least_one("size", "rank")
        if isinstance(self.offset, bool) or not isinstance(self.offset, int) or self.offset < 0:
            raise ValueError(f"conditions.offset must be a whole number of at least 0, got {self.offset!r}")
        for name in self.kinds:
            if not isinstance(name, str) or not name.isidentifier():
                raise ValueError(f"conditions: {name!r} is no name of a kind")
        if len(set(self.kinds)) < len(self.kinds):
            raise ValueError(f"conditions: a kind is named twice: {list(self.kinds)}")

    @property
    def kinds(self) -> tuple[str, ...]:
        """All kinds."""
        return (*self.spatial, *self.subject)

    def role(self, kind: str) -> Role:
        """What the positions of a kind are. Raises KeyError."""
        if kind in self.spatial:
            return "spatial"
        if kind in self.subject:
            return "subject"
        raise KeyError(kind)


@dataclass(frozen=True, slots=True)
class SamplerConfig(Section):
    """How images are sampled: FLUX's shift grows with the image's tokens, linearly between two points.

    Attributes:
        steps: by default.
        guidance: by default.
        base_tokens: tokens at which the shift is `base_shift`.
        max_tokens: tokens at which it is `max_shift`.
        base_shift: exponent.
        max_shift: exponent.
    """

    section = "sampler"

    steps: int = 25
    guidance: float = 3.5
    base_tokens: int = 256
    max_tokens: int = 4096
    base_shift: float = 0.5
    max_shift: float = 1.15

    def __post_init__(self) -> None:
        self.at_least_one("steps", "base_tokens", "max_tokens")
        if self.base_tokens == self.max_tokens:
            raise ValueError("sampler.base_tokens and sampler.max_tokens must differ")
        if not self.guidance >= 0:
            raise ValueError(f"sampler.guidance must not be negative, got {self.guidance!r}")


@dataclass(frozen=True, slots=True)
class VaeConfig(Section):
    """FLUX's image VAE (diffusers' AutoencoderKL).

    Attributes:
        latent: channels of the latents.
        widths: channels of each level, finest first; each level but the last halves height and width.
        layers: residual blocks of a level of the encoder; the decoder has one more.
        groups: of the group norms.
        scaling: latents are ``(z - shift) * scaling``.
        shift: see `scaling`.
        eps: of the norms.
    """

    section = "vae"

    latent: int = 16
    widths: tuple[int, ...] = (128, 256, 512, 512)
    layers: int = 2
    groups: int = 32
    scaling: float = 0.3611
    shift: float = 0.1159
    eps: float = 1e-6

    def __post_init__(self) -> None:
        self.at_least_one("latent", "layers", "groups")
        if not self.widths or any(width < 1 or width % self.groups for width in self.widths):
            raise ValueError(f"vae.widths must be multiples of vae.groups, got {list(self.widths)}")
        if not self.scaling > 0:
            raise ValueError(f"vae.scaling must be positive, got {self.scaling!r}")
        if not self.eps > 0:
            raise ValueError(f"vae.eps must be positive, got {self.eps!r}")

    @property
    def scale(self) -> int:
        """Pixels per latent pixel, each way."""
        return int(2 ** (len(self.widths) - 1))


@dataclass(frozen=True, slots=True)
class TextConfig(Section):
    """The T5 encoder (version 1.1), whose embeddings are the prompt's tokens."""

    section = "text"

    vocab: int = 32128
    dim: int = 4096
    head_dim: int = 64
    heads: int = 64
    ff_dim: int = 10240
    layers: int = 24
    buckets: int = 32
    max_distance: int = 128
    eps: float = 1e-6

    def __post_init__(self) -> None:
        self.at_least_one(*[f.name for f in fields(self) if f.name != "eps"])
        if self.buckets % 4 or self.max_distance <= self.buckets // 4:
            raise ValueError(
                "text.buckets must be a multiple of 4, and text.max_distance above a quarter of it"
            )


@dataclass(frozen=True, slots=True)
class PooledConfig(Section):
    """The CLIP text encoder, whose last state at the end token is the pooled prompt.

    Attributes:
        vocab: pieces.
        dim: width.
        heads: of the attention.
        ff_dim: of the feed-forward.
        layers: blocks.
        tokens: of a prompt, start and end included.
        start: id that begins a prompt; -1: none does.
        end: id that ends it, and pads it.
        eps: of the norms.
        quick: GELU as ``x * sigmoid(1.702 x)``, as CLIP-L has it.
    """

    section = "pooled"

    vocab: int = 49408
    dim: int = 768
    heads: int = 12
    ff_dim: int = 3072
    layers: int = 12
    tokens: int = 77
    start: int = 49406
    end: int = 49407
    eps: float = 1e-5
    quick: bool = True

    def __post_init__(self) -> None:
        self.at_least_one("vocab", "dim", "heads", "ff_dim", "layers", "tokens")
        if self.dim % self.heads:
            raise ValueError(f"pooled.dim ({self.dim}) must be a multiple of pooled.heads ({self.heads})")
        if not -1 <= self.start < self.vocab or not 0 <= self.end < self.vocab:
            raise ValueError("pooled.start and pooled.end must be ids of the vocabulary")


@dataclass(frozen=True, slots=True)
class ImageConfig:
    """A transformer, its conditions, its VAE and the way it samples, checked against each other.

    Attributes:
        preview: pixels, each way, that the preview projection makes of a latent pixel.
    """

    transformer: TransformerConfig
    conditions: ConditionConfig
    sampler: SamplerConfig
    vae: VaeConfig
    preview: int = field(default=1)

    def __post_init__(self) -> None:
        if self.transformer.latent != self.vae.latent:
            raise ValueError(
                f"transformer.channels ({self.transformer.channels}) are {self.transformer.latent} latent"
                f" channels, vae.latent is {self.vae.latent}"
            )
        if self.conditions.size % self.token_pixels:
            raise ValueError(
                f"conditions.size ({self.conditions.size}) must be a multiple of a token's pixels"
                f" ({self.token_pixels})"
            )
        if not isinstance(self.preview, int) or not 1 <= self.preview <= self.vae.scale:
            raise ValueError(f"preview must be in 1..{self.vae.scale}, got {self.preview!r}")

    @property
    def token_pixels(self) -> int:
        """Pixels of a token, each way: sizes of images are multiples of it."""
        return self.vae.scale * self.transformer.patch

    @property
    def condition_grid(self) -> tuple[int, int]:
        """Tokens of a condition: rows, columns."""
        side = self.conditions.size // self.token_pixels
        return side, side

    @property
    def condition_tokens(self) -> int:
        """Tokens of a condition."""
        rows, columns = self.condition_grid
        return rows * columns

    def grid(self, width: int, height: int) -> tuple[int, int]:
        """Tokens of an image of `width` x `height` pixels: rows, columns. Raises ValueError."""
        side = self.token_pixels
        if width < side or height < side or width % side or height % side:
            raise ValueError(f"{width}x{height} is no multiple of {side}")
        return height // side, width // side


def cache_names(config: TransformerConfig) -> tuple[str, ...]:
    """Tensors of a condition's cache [heads, condition tokens, head width], in the order of the blocks."""
    return tuple(f"{kind}_{block}" for block in range(config.blocks) for kind in ("key", "value"))


def lora_shapes(config: TransformerConfig, rank: int) -> dict[str, tuple[int, int, int]]:
    """A kind's LoRA as the condition pass takes it: name -> shape, in the order of the blocks.

    Of each block ``down`` [projections, rank, D] and ``up`` [projections, D, rank]: of queries, keys and
    values, and in double blocks of the attention's output.
    """
    found: dict[str, tuple[int, int, int]] = {}
    for block in range(config.blocks):
        count = 4 if block < config.double_blocks else 3
        found[f"down_{block}"] = (count, rank, config.dim)
        found[f"up_{block}"] = (count, config.dim, rank)
    return found


def condition_bytes(config: ImageConfig, itemsize: int = 4) -> int:
    """Memory of one condition's keys and values, in bytes of numbers of `itemsize`."""
    model = config.transformer
    return 2 * model.blocks * config.condition_tokens * model.dim * itemsize
