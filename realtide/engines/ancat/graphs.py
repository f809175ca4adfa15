"""What ANCAT's graphs are run on: sizes of dynamic dimensions, and samples for quality reports (ours)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from realtide.engines.ancat.config import NO_CAP, EncoderConfig, state_shapes, threshold
from realtide.engines.runtime.program import Array
from realtide.engines.runtime.quality import Sample
from realtide.engines.runtime.tensorrt import Sizes

INT8: tuple[str, ...] = ()
"""None without recordings: ranges of activations are calibrated, by the recipe."""


def sizes(manifest: Mapping[str, Any], max_batch: int) -> dict[str, dict[str, Sizes]]:
    """Sizes of the dynamic dimensions by program and name.

    Args:
        manifest: `architecture` and `limits` of the manifest.
        max_batch: most streams in one step; there are slots for four times as many.
    """
    config = EncoderConfig.from_dict(manifest["architecture"]["encoder"])
    step = int(manifest["architecture"]["step_frames"])
    slots = 4 * max_batch
    rings = [rows for rows, _, _ in state_shapes(config, step).values() if rows > 1]
    encoder = {
        "streams": Sizes(1, max_batch, max_batch),
        "frames": Sizes(0, 4 * max_batch, step * max_batch),
        "rows": Sizes(min(rings), slots * min(rings), slots * max(rings)),
        "counted": Sizes(1, slots, slots),
    }
    return {"encoder": encoder, "joiner": {"rows": Sizes(1, max_batch, step * max_batch)}}


def samples(manifest: Mapping[str, Any]) -> dict[str, Sample]:
    """A conversation of noise on three streams, and noise to the joiner, by program."""
    config = EncoderConfig.from_dict(manifest["architecture"]["encoder"])
    step = int(manifest["architecture"]["step_frames"])
    rng = np.random.default_rng(5)
    state = {
        name: np.zeros((4 * rows, *shape), dtype)
        for name, (rows, shape, dtype) in state_shapes(config, step).items()
    }
    frames, done = min(4, step), np.zeros(3, np.int64)
    calls: list[dict[str, Array]] = []
    for number in range(6):
        arrived = done + frames
        calls.append(
            {
                "windows": rng.standard_normal((3 * frames, config.window, config.mel_bins)).astype(
                    np.float32
                ),
                "stream": np.repeat(np.arange(3), frames),
                "position": np.concatenate([np.arange(d, d + frames) for d in done]),
                "slots": np.arange(1, 4),
                "arrived": arrived,
                "least": np.array([threshold(bias) for bias in (-2.0, 0.0, 3.0)], np.float32),
                "cap": np.array([6, NO_CAP, NO_CAP]),
                "final": np.full(3, int(number == 5)),
            }
        )
        done = arrived
    if config.rule == "causal":
        calls = [{k: v for k, v in call.items() if k not in ("least", "cap", "final")} for call in calls]
    joiner: dict[str, Array] = {
        "encoded": rng.standard_normal((7, config.joiner_dim)).astype(np.float32),
        "contexts": rng.integers(0, config.vocab, (7, 2)),
    }
    return {"encoder": Sample(calls, state), "joiner": Sample([joiner], {})}
