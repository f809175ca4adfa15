"""The encoder over its static step, on whatever device that is (ours; numpy only).

Takes and gives what the other form does, packed rows of all streams, and does what that leaves to its shapes:
puts frames into lanes, fills calls up to one of a few sizes, so that a device knows all shapes in advance,
and calls again for streams that have more frames or resolved nodes than lanes.
"""

from __future__ import annotations

import bisect
from collections.abc import Mapping, Sequence

import numpy as np

from realtide.engines.ancat.config import EncoderConfig, static_lanes
from realtide.engines.runtime.memory import Memory
from realtide.engines.runtime.program import Array, Runs

MOST_SIZES = 8
"""Sizes of a program's calls: as many as TensorRT's programs keep graphs of."""


def sizes_up_to(most: int) -> list[int]:
    """What calls are filled up to: `most`, a half of it, a quarter and so on, in ascending order."""
    return sorted({-(-most >> k) for k in range(MOST_SIZES)})


class StaticEncoder:
    """See `program.Runs`. Used by one thread.

    Args:
        program: the static step, over state that has one slot more than there are sessions.
        memory: where its tensors are.
        config: the architecture.
        step_frames: of the bundle.
        max_batch: most streams of a call.
        spare: the slot that no session has.
    """

    def __init__(
        self,
        program: Runs,
        memory: Memory,
        config: EncoderConfig,
        step_frames: int,
        max_batch: int,
        spare: int,
    ) -> None:
        self._program, self._memory, self._spare = program, memory, spare
        self._lanes = static_lanes(step_frames)
        self._dial = () if config.rule == "causal" else ("least", "cap")
        self._window = config.window, config.mel_bins
        self._sizes = sizes_up_to(max_batch)
        self._windows = {size: self._zeros(size) for size in self._sizes}

    def warm_up(self) -> None:
        """Run every size once, with nobody's streams: what a backend does once for a size is done then."""
        none = np.zeros(0, np.int64)
        nobody: dict[str, Array] = {"slots": none, "least": none.astype(np.float32), "cap": none}
        for size in self._sizes:
            for _ in range(3):  # TensorRT's programs capture a graph at the third run of a size
                self._run(size, nobody, none, none, none)
        self._memory.wait()

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Advance streams; all that can be resolved is.

        Args:
            feeds: as `stream.StreamStep.forward` has them.

        Returns:
            encoded [M, J], stream_out [M] ascending, available [M], and more [B], zero.
        """
        streams = len(feeds["slots"])
        left = np.bincount(feeds["stream"], minlength=streams)  # frames that were not fed yet
        at = np.cumsum(left) - left  # their first window
        arrived = feeds["arrived"] - left
        active = np.arange(streams)
        parts: list[tuple[Array, Array, Array]] = []
        while len(active):
            fresh = np.minimum(left[active], self._lanes)
            left[active] -= fresh
            arrived[active] += fresh
            size, order = _size(len(active), self._sizes), np.arange(self._lanes)
            real = order < fresh[:, np.newaxis]
            self._windows[size][: len(active)][real] = feeds["windows"][
                (at[active, np.newaxis] + order)[real]
            ]
            at[active] += fresh
            chosen = {name: feeds[name][active] for name in ("slots", *self._dial)}
            final = feeds["final"][active] * (left[active] == 0) if self._dial else fresh * 0
            made = self._run(size, chosen, fresh, arrived[active], final)
            count, more = (self._memory.get(made[name])[: len(active)] for name in ("count", "more"))
            held = order < count[:, np.newaxis]
            encoded, available = (
                self._memory.get(made[name])[: len(active)][held] for name in ("encoded", "available")
            )
            parts.append((encoded.astype(np.float32, copy=False), available, np.repeat(active, count)))
            active = active[(more != 0) | (left[active] > 0)]
        encoded, available, owner = (np.concatenate(column) for column in zip(*parts, strict=True))
        place = np.argsort(owner, kind="stable")
        return {
            "encoded": encoded[place],
            "stream_out": owner[place],
            "available": available[place],
            "more": np.zeros(streams, np.int64),
        }

    def _run(
        self, size: int, chosen: Mapping[str, Array], fresh: Array, arrived: Array, final: Array
    ) -> dict[str, Array]:
        """One call, filled up to `size` streams."""
        feeds = {
            "windows": self._windows[size],
            "fresh": _filled(fresh, size, 0),
            "slots": _filled(chosen["slots"], size, self._spare),
            "arrived": _filled(arrived, size, 0),
        }
        for name in self._dial:
            feeds[name] = _filled(chosen[name], size, 0)
        if self._dial:
            feeds["final"] = _filled(final, size, 0)
        return self._program.run(feeds)

    def _zeros(self, size: int) -> Array:
        return np.zeros((size, self._lanes, *self._window), np.float32)


class PaddedJoiner:
    """Predictor and joiner on a device, for any number of rows.

    The search itself is control flow and stays with the processor; a row's scores are a product with the
    whole vocabulary, which grows with streams and belongs where the weights are.

    Args:
        program: see `model.JoinerProgram`.
        memory: where its tensors are.
        most: rows of one call; more are joined in several.
    """

    def __init__(self, program: Runs, memory: Memory, most: int) -> None:
        self._program, self._memory, self._most = program, memory, most
        self._sizes = sizes_up_to(most)

    def warm_up(self, width: int) -> None:
        """Run every size once, on rows of `width`."""
        for size in self._sizes:
            for _ in range(3):
                self(np.zeros((size, width), np.float32), np.zeros((size, 2), np.int64))

    def __call__(self, encoded: Array, contexts: Array) -> Array:
        """See `search.Joiner`."""
        parts = [
            self._joined(encoded[first : first + self._most], contexts[first : first + self._most])
            for first in range(0, len(encoded), self._most)
        ]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _joined(self, encoded: Array, contexts: Array) -> Array:
        size = _size(len(encoded), self._sizes)
        feeds = {"encoded": _filled(encoded, size, 0), "contexts": _filled(contexts, size, 0)}
        scores = self._memory.get(self._program.run(feeds)["log_probs"])[: len(encoded)]
        # The caller keeps it, and the memory may be the program's.
        return np.array(scores, np.float32)


def _size(count: int, sizes: Sequence[int]) -> int:
    """The least that is no less than `count`."""
    return sizes[bisect.bisect_left(sizes, count)]


def _filled(values: Array, size: int, with_: int) -> Array:
    """Rows up to `size`, in memory of their own."""
    filled = np.full((size, *values.shape[1:]), with_, values.dtype)
    filled[: len(values)] = values
    return filled


def names(config: EncoderConfig) -> Sequence[str]:
    """What the encoder takes, in either form."""
    dial = () if config.rule == "causal" else ("least", "cap", "final")
    return ("windows", "stream", "position", "slots", "arrived", *dial)
