"""Times ANCAT: how many streams a device holds in real time by the network's work alone (ours).

Every stream brings one encoder frame (40 ms) a step, as a live one does. A step is the encoder's, in calls as
the engine makes them, and one call of the joiner with a row for each stream, fed from host memory and read
back; features, search and network are not part of it. Arithmetic is float32, with weights that are random.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from realtide.engines.ancat.config import NO_CAP, EncoderConfig, static_lanes, static_shapes
from realtide.engines.ancat.model import Transducer
from realtide.engines.ancat.static_encoder import PaddedJoiner, StaticEncoder
from realtide.engines.ancat.torch_programs import device_programs
from realtide.engines.runtime.torch_memory import TorchMemory
from realtide.gpu.bench import Bench
from realtide.gpu.counts import speech_frames

SIZES = ("30M", "100M")
_FRAME_MS = 40.0
_STEP_FRAMES = 16  # as the bundles have it: what the rings are made for
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
    model = Transducer(shapes).eval().requires_grad_(False).to(bench.device)
    steps, held = [], 0
    for count in (1, 4) if bench.small else _STREAMS:
        # The last is how the engine runs it.
        kinds = ("eager", "graph") if bench.cuda else ("eager",)
        runs = {kind: _Step(bench, model, count, record=kind == "graph").run for kind in kinds}
        timed = bench.clock.paired(runs, bench.seconds)
        real = timed[kinds[-1]].median <= _FRAME_MS
        work = speech_frames(shapes, count, 4)
        entries = {kind: bench.entry(timing, work) for kind, timing in timed.items()}
        steps.append({"streams": count, "in_real_time": real, **entries})
        if not real:
            break
        held = count
    return {
        "model": {
            "parameters": sum(p.numel() for n, p in model.named_parameters() if not n.startswith("ctc.")),
            "lanes": static_lanes(_STEP_FRAMES),
        },
        "streams_held": held,
        "most_tried": steps[-1]["streams"],
        "steps": steps,
    }


class _Step:
    """Streams that are under way."""

    def __init__(self, bench: Bench, model: Transducer, streams: int, *, record: bool) -> None:
        config = model.config
        shapes = static_shapes(config, _STEP_FRAMES)
        sizes = {name: ((streams + 1) * rows, *shape) for name, (rows, shape, _) in shapes.items()}
        types = {name: getattr(torch, dtype) for name, (_, _, dtype) in shapes.items()}
        wanted = sum(int(np.prod(size)) * types[name].itemsize for name, size in sizes.items())
        bench.room(2 * wanted, f"state of {streams} streams")
        memory = TorchMemory(str(bench.device))
        state = {name: memory.zeros(size, types[name]) for name, size in sizes.items()}
        encoder, joiner = device_programs(model, _STEP_FRAMES, state, record=record)
        self._encoder = StaticEncoder(encoder, memory, config, _STEP_FRAMES, streams, spare=streams)
        self._joiner = PaddedJoiner(joiner, memory, streams)
        self._rows = np.random.default_rng(0).standard_normal(
            (streams, config.window, config.mel_bins), np.float32
        )
        self._contexts = np.zeros((streams, 2), np.int64)
        self._streams, self._frame = streams, 0
        for _ in range(_WARM_FRAMES):
            self.run()

    def run(self) -> None:
        """One frame of every stream."""
        count = self._streams
        every = np.arange(count)
        rows = self._encoder.run(
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
        )["encoded"]
        self._frame += 1
        if len(rows):
            contexts = np.resize(self._contexts, (len(rows), 2))
            self._joiner(rows, contexts)
