"""Cost of a denoising step with cached conditions over the plain step, and with the branch run every step.

One model with random weights: 3 double and 6 single blocks, dim 512, 8 heads, 1,024 image and 64 text tokens,
256 tokens a condition. A round runs every variant once, in an order that changes; a variant's ratio is the
median over rounds of its processor time over the plain step's of the same round, all in one thread. The
model and the host side of a step (the sampler) are those of the engine.

    python benchmarks/image_step.py [--rounds N] [--backend torch|onnxruntime] [--out FILE]
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track

from realtide.bench import report
from realtide.engines.easycontrol import rotary, schedule, torch_programs
from realtide.engines.easycontrol.config import (
    ConditionConfig,
    ImageConfig,
    SamplerConfig,
    TransformerConfig,
    VaeConfig,
    cache_names,
    lora_shapes,
)
from realtide.engines.easycontrol.transformer import FluxTransformer
from realtide.engines.runtime.program import Array, Runs

OUT = Path(__file__).parent / "results" / "image_step.json"
GRID = (32, 32)
CONFIG = ImageConfig(
    TransformerConfig(
        double_blocks=3, single_blocks=6, heads=8, head_dim=64, text_dim=512, text_tokens=64, axes=(8, 28, 28)
    ),
    ConditionConfig(size=256, rank=32, spatial=("canny",), subject=("subject",)),
    SamplerConfig(),
    VaeConfig(),
)
LIMITS = {"cached_1": 1.10, "cached_2": 1.20}


class Bench:
    """The programs with random inputs."""

    def __init__(self, backend: str) -> None:
        torch.set_num_threads(1)
        torch.manual_seed(0)
        model = FluxTransformer(CONFIG.transformer).eval().requires_grad_(False)
        self.denoise, self.remember = _programs(model, backend)
        rng = np.random.default_rng(0)
        shape = CONFIG.transformer

        def random(*size: int) -> Array:
            return rng.standard_normal(size).astype(np.float32)

        self.latents = random(1, GRID[0] * GRID[1], shape.channels)
        still = schedule.sinusoid([0.0, 3.5], shape.freq_dim)
        self.rest: dict[str, Array] = {
            "sinusoids": schedule.sinusoid([[0.7, 3.5]], shape.freq_dim),
            "pooled": random(1, shape.pooled_dim),
            "text": random(1, shape.text_tokens, shape.text_dim),
            "table": rotary.image_table(shape, GRID),
        }
        own = CONFIG.condition_grid
        self.conditions = []
        for role in ("spatial", "subject"):
            where = rotary.condition_positions("spatial" if role == "spatial" else "subject", own, GRID, 64)
            self.conditions.append(
                {
                    "latents": random(CONFIG.condition_tokens, shape.channels),
                    "sinusoids": still,
                    "pooled": self.rest["pooled"][0],
                    "table": rotary.table(shape, where),
                }
                | {name: 0.02 * random(*size) for name, size in lora_shapes(shape, 32).items()}
            )
        self.caches = {count: self.joined(count) for count in range(3)}

    def joined(self, count: int) -> dict[str, Array]:
        """The caches of so many conditions, computed now."""
        shape = CONFIG.transformer
        if not count:
            empty = np.zeros((1, shape.heads, 0, shape.head_dim), np.float32)
            return dict.fromkeys(cache_names(shape), empty)
        made = [self.remember.run(condition) for condition in self.conditions[:count]]
        return {name: np.concatenate([one[name] for one in made], 1)[None] for name in cache_names(shape)}

    def step(self, caches: dict[str, Array]) -> Array:
        """A denoising step."""
        velocity = self.denoise.run({"latents": self.latents, **self.rest, **caches})["velocity"]
        return schedule.step(self.latents, np.asarray(velocity), 0.7, 0.6)

    def variants(self) -> dict[str, Callable[[], Any]]:
        """What is compared."""
        return {
            "plain": lambda: self.step(self.caches[0]),
            "cached_1": lambda: self.step(self.caches[1]),
            "cached_2": lambda: self.step(self.caches[2]),
            "recomputed_1": lambda: self.step(self.joined(1)),
            "recomputed_2": lambda: self.step(self.joined(2)),
            "condition_pass": lambda: self.remember.run(self.conditions[0]),
        }


def _programs(model: FluxTransformer, backend: str) -> tuple[Runs, Runs]:
    if backend == "torch":
        return (
            torch_programs.denoise_program(model, CONFIG),
            torch_programs.remember_program(model, CONFIG),
        )
    from realtide.engines.easycontrol import export
    from realtide.engines.runtime.ort import OrtProgram

    weights = {name: value.numpy() for name, value in model.state_dict().items()}
    with tempfile.TemporaryDirectory() as directory:
        step = export.export_denoise(model, Path(directory) / "denoise.onnx")
        condition = export.export_remember(model, CONFIG, Path(directory) / "remember.onnx")
        return OrtProgram(step, weights, {}), OrtProgram(condition, weights, {})


def measure(backend: str, rounds: int) -> dict[str, Any]:
    """Median seconds and ratios of one backend."""
    bench = Bench(backend)
    variants = bench.variants()
    for run in variants.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    console = Console(stderr=True)
    for number in track(range(rounds), backend, console=console, transient=True):
        names = list(variants)
        shift = number % len(names)
        for name in (*names[shift:], *names[:shift]):
            begun = time.process_time()
            variants[name]()
            seconds[name].append(time.process_time() - begun)
    plain = np.array(seconds["plain"])
    ratios = {name: np.array(found) / plain for name, found in seconds.items() if name != "plain"}
    return {
        "seconds": {name: round(float(np.median(found)), 4) for name, found in seconds.items()},
        "over_plain": {name: round(float(np.median(found)), 3) for name, found in ratios.items()},
        "quartiles": {
            name: [round(float(q), 3) for q in np.percentile(found, (25, 75))]
            for name, found in ratios.items()
        },
    }


def main() -> None:
    """Command line."""
    parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parse.add_argument("--rounds", type=int, default=15)
    parse.add_argument("--backend", choices=["torch", "onnxruntime"], action="append")
    parse.add_argument("--out", type=Path, default=OUT)
    args = parse.parse_args()
    found = {backend: measure(backend, args.rounds) for backend in args.backend or ["torch", "onnxruntime"]}
    shape = {
        "double_blocks": 3, "single_blocks": 6, "dim": 512, "heads": 8, "image_tokens": 1024,
        "text_tokens": 64, "condition_tokens": 256, "threads": 1,
    }  # fmt: skip
    values = {"shape": shape, "rounds": args.rounds, "limits": LIMITS, "backends": found}
    report.write(args.out, report.envelope("image_step", values))
    for backend, one in found.items():
        print(backend, one["over_plain"], f"plain {one['seconds']['plain']:.3f} s")


if __name__ == "__main__":
    main()
