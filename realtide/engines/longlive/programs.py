"""The programs of the engine: what they are fed and what they give (ours). Numpy only."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from realtide.engines.longlive.config import VaeConfig, VideoConfig, cross_shapes
from realtide.engines.runtime.memory import Values
from realtide.engines.runtime.program import Runs, TensorSpec

FLOAT, INT, BOOL = np.dtype(np.float32), np.dtype(np.int64), np.dtype(np.bool_)
Float32 = NDArray[np.float32]
T = TypeVar("T", covariant=True)
U = TypeVar("U")


@dataclass(frozen=True)
class Passes(Generic[T]):
    """One thing for each program of the transformer; see `steps` for what they compute.

    Attributes:
        prompt: text embeddings to keys and values for cross-attention.
        denoise: a block's flow.
        clean: a finished block into the cache.
        recache: any number of clean frames into the cache.
    """

    prompt: T
    denoise: T
    clean: T
    recache: T

    def map(self, make: Callable[[T], U]) -> Passes[U]:
        """The same of what `make` makes of each."""
        return Passes(make(self.prompt), make(self.denoise), make(self.clean), make(self.recache))


@dataclass(frozen=True)
class Stages(Generic[T]):
    """One thing for each of the two programs of a half of the VAE: the first latent frame, and all others."""

    first: T
    later: T

    def map(self, make: Callable[[T], U]) -> Stages[U]:
        """The same of what `make` makes of each."""
        return Stages(make(self.first), make(self.later))


VideoPrograms = Passes[Runs]
HalfPrograms = Stages[Runs]


def pass_inputs(config: VideoConfig, frames: int | str) -> tuple[TensorSpec, ...]:
    """Inputs of a pass over `frames` latent frames, in the order of the forward's arguments."""
    time, *space = config.transformer.rotary_pairs
    stream = config.stream
    inputs = [
        TensorSpec("latents", FLOAT, (frames, *config.latent_shape)),
        TensorSpec("sinusoids", FLOAT, (frames, config.transformer.freq_dim)),
        TensorSpec("time", FLOAT, (frames, time, 2)),
        TensorSpec("space", FLOAT, (config.frame_tokens, sum(space), 2)),
        TensorSpec("places", INT, (frames,)),
        TensorSpec("seen", BOOL, (stream.window,)),
    ]
    if stream.rotary == "relative":
        inputs.append(TensorSpec("window_time", FLOAT, (stream.window, time, 2)))
    return (*inputs, *(TensorSpec(name, FLOAT, shape) for name, shape in cross_shapes(config).items()))


class FrameDecoder:
    """Decodes one stream's latent frames as they come.

    Args:
        programs: `vae.DecodeFirst` and `vae.DecodeNext`, bound to the stream's caches.
        done: latent frames that were decoded already, where a stream is resumed with its caches.
    """

    def __init__(self, programs: HalfPrograms, done: int = 0) -> None:
        self._programs = programs
        self.done = done

    def decode(self, latents: Values) -> Values:
        """The next latent frame [latent, h, w] -> its frames [n, 3, scale * h, scale * w], not clamped."""
        frames = _stage(self._programs, {"latents": latents[None]}, self.done)["frames"]
        self.done += 1
        return frames


class FrameEncoder:
    """Encodes one stream's video as it comes; see `FrameDecoder`."""

    def __init__(self, programs: HalfPrograms, done: int = 0) -> None:
        self._programs = programs
        self.done = done

    def encode(self, frames: Values) -> Values:
        """The first frame, or the next `temporal_scale` ones, [n, 3, h, w] -> a latent frame."""
        latents = _stage(self._programs, {"frames": frames}, self.done)["latents"][0]
        self.done += 1
        return latents


def _stage(programs: HalfPrograms, feeds: dict[str, Values], done: int) -> Mapping[str, Values]:
    program = programs.later if done else programs.first
    return program.run(feeds | {"row": np.array([(done + 1) % 2])})


def decode_specs(config: VaeConfig, height: int, width: int, frames: int) -> tuple[TensorSpec, TensorSpec]:
    """Latents in, `frames` frames out, of one decoding step."""
    scale = config.spatial_scale
    return (
        TensorSpec("latents", FLOAT, (1, config.latent, height, width)),
        TensorSpec("frames", FLOAT, (frames, 3, scale * height, scale * width)),
    )


ROW = TensorSpec("row", INT, (1,))
"""Which row of a two-frame cache the newest frame goes to; see `vae.Next`."""
