"""Times EasyControl's steps: with no condition, with one, with two (ours). Weights are random."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from realtide.engines.easycontrol import rotary, schedule
from realtide.engines.easycontrol.config import TransformerConfig
from realtide.engines.easycontrol.steps import Denoise
from realtide.engines.easycontrol.transformer import FluxTransformer
from realtide.engines.runtime.device_program import DeviceProgram
from realtide.gpu.bench import Bench
from realtide.gpu.counts import image_step

_CONDITIONS = {"plain": 0, "one_condition": 1, "two_conditions": 2}
SIZES = ("flux", "fitting")


def config(size: str, small: bool) -> tuple[TransformerConfig, int, int]:
    """The model, the image's tokens each way and a condition's.

    *flux* is FLUX.1-dev with 1024x1024 pixels and conditions of 512x512, *fitting* one of its width and a
    fifth of its depth with 512x512 pixels, which a card of 12 GB holds.
    """
    if small:
        blocks = {"flux": (2, 2), "fitting": (1, 1)}[size]
        model = TransformerConfig(
            *blocks, heads=2, head_dim=16, channels=8, text_dim=16, text_tokens=4, pooled_dim=8, freq_dim=8,
            axes=(4, 6, 6),
        )  # fmt: skip
        return model, 4, 2
    if size == "flux":
        return TransformerConfig(), 64, 32
    return TransformerConfig(double_blocks=4, single_blocks=8), 32, 32


def run(bench: Bench, compiled: bool, size: str) -> dict[str, Any]:
    """All times of one size.

    Raises:
        Skipped: the device has too little memory.
    """
    shapes, side, own = config(size, bench.small)
    # 1 GB beside the weights would do for the activations; graphs keep theirs, three times over.
    bench.room(int(bench.itemsize * _parameters(shapes) + 6e9), f"EasyControl at size {size}")
    model = bench.model(lambda: FluxTransformer(shapes))
    model.fuse()
    tokens, scalars = side * side, [0.5, 3.5][: shapes.scalars]
    inputs = [
        bench.random(1, tokens, shapes.channels),
        torch.from_numpy(schedule.sinusoid(scalars, shapes.freq_dim)[None]).to(bench.device, bench.dtype),
        bench.random(1, shapes.pooled_dim),
        bench.random(1, shapes.text_tokens, shapes.text_dim),
        torch.from_numpy(np.ascontiguousarray(rotary.image_table(shapes, (side, side)))).to(bench.device),
    ]
    steps: dict[str, Any] = {}
    for name, count in _CONDITIONS.items():
        held = count * own * own
        caches = [bench.random(1, shapes.heads, held, shapes.head_dim) for _ in range(2 * shapes.blocks)]
        runs: dict[str, Callable[[], object]] = {}
        for kind in ("eager", "graph") if bench.cuda else ("eager",):
            program = DeviceProgram(Denoise(model), [], caches, record=kind == "graph", compiled=compiled)
            runs[kind] = lambda program=program: program.run(*inputs)  # type: ignore[misc]
        work = image_step(shapes, 1, tokens, held, bench.itemsize)
        timed = bench.clock.paired(runs, bench.seconds)
        steps[name] = {kind: bench.entry(timing, work) for kind, timing in timed.items()}
    return {
        "model": {
            "parameters": sum(p.numel() for p in model.parameters()),
            "image_tokens": tokens,
            "condition_tokens": own * own,
            "compiled": compiled,
        },
        "steps": steps,
    }


def _parameters(shapes: TransformerConfig) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in FluxTransformer(shapes).parameters())
