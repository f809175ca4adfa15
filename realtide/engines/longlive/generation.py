"""Generates a video block by block: denoising, the clean pass, prompt switches, parking (LongLive).

`VideoStream` owns what a session has to remember besides its cache: how far it is, the clean latents of the
window and of the sink, and the prompts in force. From these the cache can be rebuilt, so a stream can be
parked in megabytes. It advances by single passes, so that whoever drives several streams can turn from one to
another between any two of them. It knows programs and memory by their interfaces only. Numpy only.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from realtide.engines.engine import CheckpointMismatch
from realtide.engines.longlive import noise as philox
from realtide.engines.longlive import rotary, schedule, window
from realtide.engines.longlive.config import VideoConfig, cache_shapes, cross_shapes
from realtide.engines.longlive.programs import VideoPrograms
from realtide.engines.runtime.memory import HOST, Memory, Values
from realtide.engines.runtime.program import Runs

Float32 = NDArray[np.float32]
Noise = Callable[[int, int, int], Float32]
"""(first frame, frames, step) to noise [frames, C, height, width]; see `noise.normal` for steps."""

FORMAT = 1


@dataclass(slots=True)
class _Block:
    """A block under way: latents [block, C, height, width], the passes made, and what they are fed."""

    latents: Values
    passes: int
    feeds: dict[str, Values]


class VideoStream:
    """One video. Used by one thread.

    Args:
        config: the model and the way it generates.
        programs: bound to `cache`.
        cache: see `config.cache_shapes`; its contents do not matter.
        seed: of the noise, 0 to 2**64 - 1.
        noise: another source of noise, for comparisons.
        memory: where the cache and the programs' tensors are. Each pass is waited for, so that a stream
            that takes turns with others takes no more than its own.

    Raises:
        ValueError: the seed is out of range.
    """

    def __init__(
        self,
        config: VideoConfig,
        programs: VideoPrograms,
        cache: Mapping[str, Values],
        seed: int = 0,
        noise: Noise | None = None,
        memory: Memory = HOST,
    ) -> None:
        philox.check_seed(seed)
        self._config = config
        self._programs = programs
        self._cache = cache
        self._seed = seed
        self._noise = noise or partial(_seeded, seed, config.latent_shape)
        self._timesteps = schedule.warped(config.stream.steps, config.stream.shift)
        self._memory = memory
        self._space = memory.put(rotary.space_table(config))
        self._frames = 0
        self._recent = memory.put(np.zeros((0, *config.latent_shape), np.float32))  # the last `window` frames
        self._sink = self._recent[:0]
        self._sink_first = 0  # index of the sink's first frame in the video
        self._prompt: Float32 | None = None  # embeddings [text tokens, text_dim], zero padded
        self._sink_prompt: Float32 | None = None
        self._cross: dict[str, Values] = {}  # keys and values of the prompt in force; none while parked
        self._block: _Block | None = None
        self._parked = False

    @property
    def frames(self) -> int:
        """Latent frames generated."""
        return self._frames

    @property
    def parked(self) -> bool:
        """True if the cache is not this stream's any more; `rebuild` makes it anew."""
        return self._parked

    @property
    def under_way(self) -> bool:
        """True if a block has been begun and is not finished."""
        return self._block is not None

    @property
    def passes(self) -> int:
        """Passes of a block: the denoising passes and the clean one."""
        return len(self._timesteps) + 1

    @property
    def recent(self) -> Values:
        """The latest clean latents, at most `window` of them, oldest first: [n, C, height, width]."""
        return self._recent

    def set_prompt(self, text: Float32) -> int:
        """Follow another prompt from the next block on; the cache is made to follow it too (*recache*).

        A block under way is dropped: it is begun anew under the new prompt.

        Args:
            text: embeddings [n, text_dim] of at most text_tokens tokens, without padding or zero padded.

        Returns:
            Number of latent frames that were replayed.

        Raises:
            ValueError: `text` has the wrong shape.
        """
        self._prompt = self._padded(text)
        self._block = None
        if self._parked:
            return 0
        self._cross = self._crossed(self._prompt)
        return self._recache() if self._frames else 0

    def block(self, on_flow: Callable[[Values], None] | None = None) -> Values:
        """Generate the next block and take it into the cache; see `advance`.

        Returns:
            Clean latents [block, C, height, width].
        """
        while True:
            latents = self.advance(on_flow)
            if latents is not None:
                return latents

    def advance(self, on_flow: Callable[[Values], None] | None = None) -> Values | None:
        """Make the next pass of the block under way, or the first one of the next block.

        Args:
            on_flow: is given a denoising pass's prediction, which the next pass may overwrite.

        Returns:
            After the last pass, the clean one, the block's latents [block, C, height, width]; else None.

        Raises:
            ValueError: there is no prompt, or the stream is parked.
        """
        block = self._block or self._begin()
        timestep = self._timesteps[block.passes] if block.passes < len(self._timesteps) else None
        if timestep is None:
            self._block = None
            self._remember(self._programs.clean, block.latents, block.feeds)
            self._keep(block.latents)
            return block.latents
        feeds = self._at(block.feeds, block.latents, timestep)
        flow = self._programs.denoise.run(feeds)["flow"]
        if on_flow is not None:
            on_flow(flow)
        latents = schedule.clean(block.latents, flow, timestep, self._memory)
        block.passes += 1
        if block.passes < len(self._timesteps):
            # Made while a device computes the flow.
            fresh = self._memory.put(self._noise(self._frames, len(latents), block.passes))
            latents = schedule.noised(latents, fresh, self._timesteps[block.passes], self._memory)
        self._memory.wait()
        block.latents = latents
        self._block = block
        return None

    def park(self) -> None:
        """Give up the cache: whoever owns it may use it for another stream. A block under way is dropped."""
        self._parked = True
        self._block = None
        self._cross = {}

    def rebuild(
        self, programs: VideoPrograms | None = None, cache: Mapping[str, Values] | None = None
    ) -> int:
        """Make the cache anew from the latents; afterwards the stream goes on.

        While the window has not moved, this is the recache of all frames under the prompt in force. Later
        the sink is computed alone, under the prompt that it was last computed with, and the other frames
        are recached over it.

        Args:
            programs: bound to `cache`, where the stream is to go on over another one.
            cache: see `config.cache_shapes`; its contents do not matter.

        Returns:
            Number of latent frames that were replayed.
        """
        if programs is not None and cache is not None:
            self._programs, self._cache = programs, cache
        self._parked = False
        self._block = None
        if self._prompt is not None:
            self._cross = self._crossed(self._prompt)
        stream = self._config.stream
        if not self._frames:
            return 0
        if self._frames <= stream.window:
            return self._recache()
        recache = self._programs.recache
        if stream.sink:
            assert self._sink_prompt is not None
            own, cross = np.arange(stream.sink), self._crossed(self._sink_prompt)
            self._remember(recache, self._sink, self._feeds(self._sink_first, own, stream.sink, cross))
        ring = stream.window - stream.sink
        first = self._frames - ring
        places = window.places(stream, first, ring)
        self._remember(recache, self._recent[-ring:], self._feeds(first, places, self._frames, self._cross))
        return stream.window

    def export(self, *, cache: bool = True) -> bytes:
        """Serialize the stream; it goes on unchanged.

        Args:
            cache: with the cache a resumed stream continues bit for bit; without, `resume` leaves it
                parked, to be rebuilt. A parked stream has none. A block under way is not part of the
                state: it is begun anew, with the same noise and so with the same result.
        """
        from safetensors.numpy import save

        get = self._memory.get
        tensors = {"recent": get(self._recent), "sink": get(self._sink)}
        for name, text in (("prompt", self._prompt), ("sink_prompt", self._sink_prompt)):
            if text is not None:
                tensors[name] = _unpadded(text)
        kept = cache and not self._parked
        if kept:
            tensors |= {f"cache.{name}": get(values) for name, values in self._cache.items()}
        plain = {
            "format": FORMAT,
            "seed": self._seed,
            "frames": self._frames,
            "sink_first": self._sink_first,
            "cache": kept,
        }
        return save(tensors, {"video": json.dumps(plain)})

    @classmethod
    def resume(
        cls,
        config: VideoConfig,
        programs: VideoPrograms,
        cache: Mapping[str, Values],
        checkpoint: bytes,
        noise: Noise | None = None,
        memory: Memory = HOST,
    ) -> VideoStream:
        """Continue an exported stream; parked if the checkpoint has no cache.

        Raises:
            CheckpointMismatch: the checkpoint is damaged, or of a model of another shape; nothing is written.
        """
        plain, tensors = _unpack(checkpoint)
        try:
            if plain["format"] != FORMAT:
                raise CheckpointMismatch(
                    f"checkpoint has video format {plain['format']}, this program reads {FORMAT}"
                )
            stream = cls(config, programs, cache, int(plain["seed"]), noise, memory)
            stream._frames, stream._sink_first = int(plain["frames"]), int(plain["sink_first"])
            held = min(stream._frames, config.stream.window), min(stream._frames, config.stream.sink)
            stream._recent = memory.put(_shaped(tensors, "recent", (held[0], *config.latent_shape)))
            stream._sink = memory.put(_shaped(tensors, "sink", (held[1], *config.latent_shape)))
            kept = {
                name: _shaped(tensors, f"cache.{name}", (rows, *shape))
                for name, (rows, shape) in cache_shapes(config).items()
                if plain["cache"]
            }
            stream._prompt, stream._sink_prompt = (
                stream._padded(tensors[name]) if name in tensors else None
                for name in ("prompt", "sink_prompt")
            )
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointMismatch(f"checkpoint is damaged: {error!r}") from None
        for name, array in kept.items():
            memory.fill(cache[name], array)
        stream._parked = not kept
        if kept and stream._prompt is not None:
            stream._cross = stream._crossed(stream._prompt)
        return stream

    def _padded(self, text: Float32) -> Float32:
        model = self._config.transformer
        if text.ndim != 2 or text.shape[0] > model.text_tokens or text.shape[1] != model.text_dim:
            raise ValueError(
                f"text must be at most {model.text_tokens} embeddings of {model.text_dim}, "
                f"not {list(text.shape)}"
            )
        padded = np.zeros((model.text_tokens, model.text_dim), np.float32)
        padded[: len(text)] = text
        return padded

    def _crossed(self, text: Float32) -> dict[str, Values]:
        """Keys and values of padded embeddings, by the names of `config.cross_shapes`."""
        made = self._programs.prompt.run({"text": text})
        return {name: made[name] for name in cross_shapes(self._config)}

    def _begin(self) -> _Block:
        if self._prompt is None:
            raise ValueError("set a prompt before the first block")
        if self._parked:
            raise ValueError("the stream is parked: rebuild its cache first")
        first, count = self._frames, self._config.stream.block
        places = window.places(self._config.stream, first, count)
        feeds = self._feeds(first, places, first + count, self._cross)
        return _Block(self._memory.put(self._noise(first, count, 0)), 0, feeds)

    def _recache(self) -> int:
        """Replay what `window.recache` says under the prompt in force."""
        stream = self._config.stream
        replay = window.recache(stream, self._frames)
        latents = self._recent[len(self._recent) - (self._frames - replay.first) :]
        feeds = self._feeds(replay.first, replay.places, self._frames, self._cross)
        self._remember(self._programs.recache, latents, feeds)
        if stream.sink and replay.places[0] == 0:  # the sink was computed anew
            self._sink, self._sink_first = latents[: stream.sink], replay.first
            self._sink_prompt = self._prompt
        return replay.frames

    def _remember(self, program: Runs, latents: Values, feeds: Mapping[str, Values]) -> None:
        program.run(self._at(feeds, latents, self._config.stream.context_noise))
        self._memory.wait()

    def _keep(self, latents: Values) -> None:
        stream, join = self._config.stream, self._memory.join
        missing = stream.sink - self._frames
        if missing > 0:
            self._sink = join([self._sink, latents[:missing]])
            self._sink_prompt = self._prompt
        self._recent = join([self._recent, latents])[-stream.window :]
        self._frames += len(latents)

    def _feeds(
        self, first: int, places: window.Ints, end: int, cross: Mapping[str, Values]
    ) -> dict[str, Values]:
        """What passes over frames first, first+1, ... are fed besides the latents and their timestep.

        The frames lie in `places`; `end` frames are known once they do.
        """
        config = self._config
        feeds: dict[str, Values] = {
            "space": self._space,
            "places": places,
            "seen": window.seen(config.stream, end),
            **cross,
        }
        if config.stream.rotary == "relative":
            ranks = window.ranks(config.stream, end)
            feeds["window_time"] = rotary.time_table(config, ranks)
            feeds["time"] = feeds["window_time"][places]
        else:
            feeds["time"] = rotary.time_table(config, np.arange(first, first + len(places)))
        return feeds

    def _at(self, feeds: Mapping[str, Values], latents: Values, timestep: float) -> dict[str, Values]:
        width = self._config.transformer.freq_dim
        sinusoids = schedule.sinusoid(np.full(len(latents), timestep), width)
        return {**feeds, "latents": latents, "sinusoids": sinusoids}


def _seeded(seed: int, shape: tuple[int, ...], first: int, count: int, step: int) -> Float32:
    return philox.frames(seed, first, count, step, shape)


def _unpadded(text: Float32) -> Float32:
    used = np.flatnonzero(text.any(1))
    return text[: int(used[-1]) + 1 if used.size else 0].copy()


def _unpack(checkpoint: bytes) -> tuple[dict[str, Any], dict[str, Float32]]:
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        size = int.from_bytes(checkpoint[:8], "little")
        plain = json.loads(json.loads(checkpoint[8 : 8 + size])["__metadata__"]["video"])
        return dict(plain), load(checkpoint)
    except (SafetensorError, KeyError, TypeError, ValueError, OverflowError) as error:
        raise CheckpointMismatch(f"checkpoint is damaged: {error!r}") from None


def _shaped(tensors: Mapping[str, Float32], name: str, shape: tuple[int, ...]) -> Float32:
    array = tensors[name]
    if array.shape != shape:
        raise ValueError(f"{name} is {list(array.shape)} where this model has {list(shape)}")
    return array
