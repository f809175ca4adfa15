"""Times ANCAT: how many streams a device holds in real time by the network's work alone (ours).

Every stream brings one encoder frame (40 ms) a step, as a live one does. A step is the encoder's and one
call of the joiner with a row for each stream, fed from host memory and read back, as the engine runs them;
features, search and network are not part of it. Arithmetic is float32, with weights that are random.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from realtide.engines.ancat import torch_programs
from realtide.engines.ancat.config import NO_CAP, EncoderConfig, state_shapes
from realtide.engines.ancat.model import Transducer
from realtide.engines.runtime.program import Array
from realtide.engines.runtime.torch_program import on_device
from realtide.gpu.bench import Bench
from realtide.gpu.counts import speech_frames

SIZES = ("30M", "100M")
_FRAME_MS = 40.0
_WARM_FRAMES = 40  # the attention's past is full then
_STREAMS = (1, 16, 64, 128, 256, 512, 1024, 2048)


def config(size: str, small: bool) -> EncoderConfig:
    """A model of about so many parameters, or a tiny one."""
    if small:
        layers = {"30M": 1, "100M": 2}[size]
        return EncoderConfig(
            mel_bins=8, subsample_channels=8, dim=16, layers=layers, heads=2, ff_dim=32, left=8, right=2,
            scheduler_dim=4, joiner_dim=16, vocab=16,
        )  # fmt: skip
    dim, layers, heads = {"30M": (320, 12, 5), "100M": (512, 16, 8)}[size]
    return EncoderConfig(
        dim=dim, layers=layers, heads=heads, ff_dim=4 * dim, joiner_dim=512, vocab=1025, scheduler_dim=64
    )


def run(bench: Bench, size: str) -> dict[str, Any]:
    """Steps of more and more streams, until one takes longer than its frames of audio.

    Raises:
        Skipped: the device has too little memory.
    """
    shapes = config(size, bench.small)
    torch.manual_seed(0)
    weights: dict[str, Array] = {n: p.numpy() for n, p in Transducer(shapes).state_dict().items()}
    steps, held = [], 0
    for count in (1, 4) if bench.small else _STREAMS:
        step = _Step(bench, shapes, weights, count)
        timing = bench.clock.one(step.run, bench.seconds / 2)
        real = timing.median <= _FRAME_MS
        entry = bench.entry(timing, speech_frames(shapes, count, 4))
        steps.append({"streams": count, "in_real_time": real, **entry})
        if not real:
            break
        held = count
    return {
        "model": {"parameters": sum(w.size for n, w in weights.items() if not n.startswith("ctc."))},
        "streams_held": held,
        "most_tried": steps[-1]["streams"],
        "steps": steps,
    }


class _Step:
    """Streams that are under way."""

    def __init__(self, bench: Bench, config: EncoderConfig, weights: dict[str, Array], streams: int) -> None:
        shapes = state_shapes(config, 1)
        state = {
            name: np.zeros((rows * streams, *shape), dtype) for name, (rows, shape, dtype) in shapes.items()
        }
        bench.room(2 * sum(array.nbytes for array in state.values()), f"state of {streams} streams")
        self._encoder, self._joiner = torch_programs.programs(
            config, 1, weights, on_device(state, str(bench.device)), torch.get_num_threads(),
            device=str(bench.device),
        )  # fmt: skip
        self._rows = np.random.default_rng(0).standard_normal(
            (streams, config.window, config.mel_bins), np.float32
        )
        self._contexts = np.zeros((streams, 2), np.int64)
        self._streams, self._frame, self._joiner_dim = streams, 0, config.joiner_dim
        for _ in range(_WARM_FRAMES):
            self.run()

    def run(self) -> None:
        """One frame of every stream."""
        count = self._streams
        every = np.arange(count)
        made = self._encoder.run(
            {
                "windows": self._rows,
                "stream": every,
                "position": np.full(count, self._frame),
                "slots": every,
                "arrived": np.full(count, self._frame + 1),
                "least": np.zeros(count, np.float32),
                "cap": np.full(count, NO_CAP),
                "final": np.zeros(count, np.int64),
            }
        )
        self._frame += 1
        rows = made["encoded"]
        if len(rows):
            self._joiner.run({"encoded": rows, "contexts": self._contexts[: len(rows)]})
