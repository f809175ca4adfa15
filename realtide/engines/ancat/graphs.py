"""What ANCAT's graphs are run on: sizes of dynamic dimensions, and samples for quality reports (ours)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from realtide.engines.ancat.config import (
    NO_CAP,
    EncoderConfig,
    state_shapes,
    static_lanes,
    static_shapes,
    threshold,
)
from realtide.engines.runtime.program import Array
from realtide.engines.runtime.quality import Sample
from realtide.engines.runtime.tensorrt import Sizes

INT8: tuple[str, ...] = ()
"""None without recordings: ranges of activations are calibrated, by the recipe."""

PLAN_SLOTS = 4
"""Slots that plans have room for, for each stream of the largest step."""

FP8: tuple[str, ...] = ()
"""None: a step's products are so small that they wait for memory and launches, not for arithmetic."""

HOST_ONLY = ("encoder",)
"""Programs without TensorRT plans: its shapes depend on values. `encoder_static` computes the same there."""


def sizes(manifest: Mapping[str, Any], max_batch: int) -> dict[str, dict[str, Sizes]]:
    """Sizes of the dynamic dimensions by program and name.

    Args:
        manifest: `architecture` and `limits` of the manifest.
        max_batch: most streams in one step; there are slots for four times as many, and one to spare.
    """
    config = EncoderConfig.from_dict(manifest["architecture"]["encoder"])
    step = int(manifest["architecture"]["step_frames"])
    slots = PLAN_SLOTS * max_batch
    rings = [rows for rows, _, _ in state_shapes(config, step).values() if rows > 1]
    encoder = {
        "streams": Sizes(1, max_batch, max_batch),
        "frames": Sizes(0, 4 * max_batch, step * max_batch),
        "rows": Sizes(min(rings), slots * min(rings), slots * max(rings)),
        "counted": Sizes(1, slots, slots),
    }
    static = {
        "streams": Sizes(1, max_batch, max_batch),
        "long": _slots(config.heads * config.long_ring(step), slots + 1),
        "short": _slots(config.short_ring(step), slots + 1),
        "slots": _slots(1, slots + 1),
    }
    joiner = {"rows": Sizes(1, max_batch, step * max_batch)}
    return {"encoder": encoder, "encoder_static": static, "joiner": joiner}


def _slots(rows: int, slots: int) -> Sizes:
    """Of an array with so many rows a slot."""
    return Sizes(2 * rows, slots * rows, slots * rows)


def samples(manifest: Mapping[str, Any]) -> dict[str, Sample]:
    """A conversation of noise on three streams, and noise to the joiner, by program."""
    config = EncoderConfig.from_dict(manifest["architecture"]["encoder"])
    step = int(manifest["architecture"]["step_frames"])
    rng = np.random.default_rng(5)
    state = {
        name: np.zeros((4 * rows, *shape), dtype)
        for name, (rows, shape, dtype) in state_shapes(config, step).items()
    }
    frames, done = static_lanes(step), np.zeros(3, np.int64)
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
    return {
        "encoder": Sample(calls, state),
        "encoder_static": _static_sample(config, step, calls),
        "joiner": Sample([joiner], {}),
    }


def _static_sample(config: EncoderConfig, step: int, calls: Sequence[Mapping[str, Array]]) -> Sample:
    """The same conversation for the static step: as many frames a stream and call as it has lanes."""
    lanes = static_lanes(step)
    state = {
        name: np.zeros((4 * rows, *shape), dtype)
        for name, (rows, shape, dtype) in static_shapes(config, step).items()
    }
    found: list[dict[str, Array]] = []
    for call in calls:
        rest = {name: call[name] for name in ("slots", "arrived", "least", "cap", "final") if name in call}
        windows = call["windows"].reshape(len(call["slots"]), lanes, config.window, config.mel_bins)
        found.append({"windows": windows, "fresh": np.full(len(windows), lanes), **rest})
    return Sample(found, state)
