"""Where latent frames lie in the cache: a sink that stays, a ring after it (LongLive; the ring is ours).

The cache has `window` places of one frame. Frame f < sink lies in place f for good; later frames take turns
on the other places, so a new block overwrites the oldest frames and nothing ever moves. Whatever was
generated, the places that hold frames are a prefix: a query sees all of them. Numpy only.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from realtide.engines.longlive.config import StreamConfig

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]


def places(config: StreamConfig, first: int, count: int) -> Ints:
    """Places [count] of frames first .. first+count-1."""
    frames = np.arange(first, first + count)
    ring = config.window - config.sink
    return np.where(frames < config.sink, frames, config.sink + (frames - config.sink) % ring)


def seen(config: StreamConfig, end: int) -> Bools:
    """Which places [window] hold frames once frames 0 .. end-1 are generated."""
    return np.arange(config.window) < end


def order(config: StreamConfig, end: int) -> Ints:
    """Places in the order of the window: the sink, then the newest frames, oldest first; [n]."""
    start = max(config.sink, end - (config.window - config.sink))
    kept = np.arange(min(config.sink, end))
    return np.concatenate([kept, places(config, start, max(0, end - start))])


def ranks(config: StreamConfig, end: int) -> Ints:
    """Position in the window's order of each place [window]; 0 for places without a frame."""
    found = np.zeros(config.window, np.int64)
    ordered = order(config, end)
    found[ordered] = np.arange(len(ordered))
    return found


@dataclass(frozen=True, slots=True)
class Replay:
    """Frames that a recache runs through the model, and the places where their keys and values go."""

    first: int
    places: Ints

    @property
    def frames(self) -> int:
        """Number of frames."""
        return len(self.places)


def recache(config: StreamConfig, end: int) -> Replay:
    """What to replay at a prompt switch after `end` frames.

    While the window has not moved, all frames. Later, with `global_sink`, the frames after the sink: the
    release also replays the oldest ones, but nothing sees their keys, so nothing depends on them. Without
    `global_sink` the oldest of the replayed frames become the sink.
    """
    if end <= config.window:
        return Replay(0, places(config, 0, end))
    ring = config.window - config.sink
    newest = places(config, end - ring, ring)
    if config.global_sink:
        return Replay(end - ring, newest)
    return Replay(end - config.window, np.concatenate([np.arange(config.sink), newest]))
