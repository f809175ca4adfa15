"""How much work a model's programs are at least: counted from its shapes (ours). Plain Python.

*Operations* are those of matrix products, convolutions and attention, a multiplication and an addition each
counting as one. *Bytes* are what has to be read whatever the runtime does: every matrix once, and cached keys
and values. Both over a machine's measured rates give floors below which no time can lie.
"""

from __future__ import annotations

from dataclasses import dataclass

from realtide.engines.ancat.config import EncoderConfig
from realtide.engines.easycontrol.config import TransformerConfig as FluxConfig
from realtide.engines.longlive.config import VaeConfig, VideoConfig


@dataclass(frozen=True, slots=True)
class Work:
    """Operations, and bytes that must be read."""

    operations: int
    bytes: int

    def __add__(self, other: Work) -> Work:
        return Work(self.operations + other.operations, self.bytes + other.bytes)

    def times(self, count: int) -> Work:
        """So many times."""
        return Work(count * self.operations, count * self.bytes)


def _matrix(rows: int, into: int, out: int, itemsize: int, count: int = 1) -> Work:
    """`count` matrices that each are applied to `rows` rows."""
    return Work(count * 2 * rows * into * out, count * into * out * itemsize)


def _attention(queries: int, keys: int, dim: int) -> Work:
    return Work(4 * queries * keys * dim, 0)


def video_pass(config: VideoConfig, frames: int, held: int, itemsize: int, *, predict: bool = True) -> Work:
    """A pass of LongLive's transformer over `frames` latent frames that look at `held` frames.

    Args:
        config: the model.
        frames: of the pass.
        held: frames in the window once these are written.
        itemsize: bytes of a number.
        predict: a denoising pass; else a clean pass or a recache, which ends with the last keys and values.
    """
    model, tokens = config.transformer, config.frame_tokens
    rows, keys, dim = frames * tokens, held * tokens, model.dim
    pixels = model.channels * model.patch**2
    time = _matrix(frames, model.freq_dim, dim, itemsize) + _matrix(frames, dim, dim, itemsize)
    start = _matrix(rows, pixels, dim, itemsize) + time + _matrix(frames, dim, 6 * dim, itemsize)
    project = _matrix(rows, dim, dim, itemsize, 3)
    # The output's projection, and the queries and the output of cross-attention.
    block = project + _matrix(rows, dim, dim, itemsize, 3) + _matrix(rows, dim, model.ff_dim, itemsize, 2)
    block += _attention(rows, keys, dim) + _attention(rows, model.text_tokens, dim)
    block += Work(0, 2 * (keys + model.text_tokens) * dim * itemsize)
    if predict:
        return start + block.times(model.layers) + _matrix(rows, dim, pixels, itemsize)
    return start + block.times(model.layers - 1) + project


def decoded_frame(config: VaeConfig, height: int, width: int, itemsize: int) -> Work:
    """Decoding a later latent frame of `height` x `width` with the video VAE."""
    h, w, frames = height, width, 1

    def conv(into: int, out: int, taps: int) -> Work:
        return _matrix(frames * h * w, into * taps, out, itemsize)

    def residual(into: int, out: int) -> Work:
        found = conv(into, out, 27) + conv(out, out, 27)
        return found + conv(into, out, 1) if into != out else found

    widths = config.widths[::-1]
    into = widths[0]
    total = conv(config.latent, config.latent, 1) + conv(config.latent, into, 27)
    total += residual(into, into).times(2) + conv(into, 4 * into, 1) + _attention(h * w, h * w, into)
    for level, out in enumerate(widths):
        for _ in range(config.residual_blocks + 1):
            total += residual(into, out)
            into = out
        if level < len(widths) - 1:
            if config.temporal[::-1][level]:
                total += conv(out, 2 * out, 3)
                frames *= 2
            h, w, into = 2 * h, 2 * w, out // 2
            total += conv(out, into, 9)
    return total + conv(into, 3, 27)


def image_step(config: FluxConfig, batch: int, tokens: int, condition_tokens: int, itemsize: int) -> Work:
    """A denoising step of EasyControl: images of `tokens` tokens that see `condition_tokens` cached ones."""
    dim, text = config.dim, config.text_tokens
    both = tokens + text

    def matrix(rows: int, into: int, out: int, count: int = 1) -> Work:
        return _matrix(batch * rows, into, out, itemsize, count)

    start = matrix(1, config.freq_dim, dim, config.scalars) + matrix(1, config.pooled_dim, dim)
    start += matrix(1, dim, dim, config.scalars + 1)
    start += matrix(tokens, config.channels, dim) + matrix(text, config.text_dim, dim)
    look = _attention(batch * both, both + condition_tokens, dim)
    look += Work(0, 2 * batch * condition_tokens * dim * itemsize)
    double = matrix(1, dim, 6 * dim, 2) + look
    for rows in (tokens, text):
        double += matrix(rows, dim, dim, 4) + matrix(rows, dim, 4 * dim, 2)
    single = matrix(1, dim, 3 * dim) + look + matrix(both, dim, dim, 3)
    single += matrix(both, dim, 4 * dim) + matrix(both, 5 * dim, dim)
    end = matrix(1, dim, 2 * dim) + matrix(tokens, dim, config.channels)
    return start + double.times(config.double_blocks) + single.times(config.single_blocks) + end


def speech_frames(config: EncoderConfig, frames: int, itemsize: int) -> Work:
    """So many frames through ANCAT's encoder, one for each stream.

    The matrices alone, without attention: over so few keys it is a small part, and how far a frame looks is
    known only at run time.
    """

    def matrix(into: int, out: int, count: int = 1, each: int = 1) -> Work:
        return _matrix(frames * each, into, out, itemsize, count)

    dim, channels = config.dim, config.subsample_channels
    total = matrix(3 * config.mel_bins, channels, each=3) + matrix(3 * channels, dim)
    block = matrix(dim, config.ff_dim, 4) + matrix(dim, dim, 5) + matrix(dim, 2 * dim)
    if config.rule == "adaptive":
        block += matrix(dim, config.scheduler_dim) + matrix(config.scheduler_dim, config.right)
    return total + block.times(config.layers) + matrix(dim, config.joiner_dim)
