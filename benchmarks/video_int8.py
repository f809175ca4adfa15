"""int8 against float32 graphs of a video bundle: speed of a block, and how far the video differs.

Both precisions generate the same blocks (same seed, same prompt), taking turns block by block; the ratio is
the median over blocks of the ratio within a pair. Both are decoded by the same float decoder and compared
frame by frame (PSNR; the first block, before two chaotic systems drift apart, and all blocks). Whether motion
follows the prompt is the bundle's own score: `models/longlive-emoji/recipe/evaluate.py --precision int8`.

    python benchmarks/video_int8.py --bundle models/longlive-emoji [--prompt TEXT ...] [--out FILE]
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track

from realtide.bench import report
from realtide.bundle import load_bundle
from realtide.engines.longlive.engine import LongLiveEngine, load
from realtide.engines.longlive.generation import VideoStream
from realtide.engines.longlive.programs import FrameDecoder

OUT = Path(__file__).parent / "results" / "video_int8.json"
PROMPTS = (
    "a red apple moves to the right on a blue background",
    "a red apple moves up on a blue background",
)
PRECISIONS = {"float32": "fp32", "int8": "int8"}


class Side:
    """One precision's stream."""

    def __init__(self, bundle: Path, precision: str) -> None:
        self.engine: LongLiveEngine = load(bundle, slots=1, precision=precision)
        self.cache = self.engine._parts.caches.first
        self.seconds: list[float] = []

    def begin(self, prompt: str, seed: int) -> None:
        """A new video."""
        config = self.engine._parts.config
        self.stream = VideoStream(config, self.cache.programs, self.cache.keys, seed)
        self.stream.set_prompt(self.engine._parts.embed(prompt))
        self.decoder = FrameDecoder(self.cache.decoder)

    def block(self) -> tuple[Any, Any]:
        """The next block, timed: latents and frames in 0..1."""
        begun = time.perf_counter()
        latents = self.stream.block()
        self.seconds.append(time.perf_counter() - begun)
        frames = np.concatenate([self.decoder.decode(latent) for latent in latents])
        return latents, np.clip((frames + 1) / 2, 0, 1)


def measure(bundle: Path, prompts: list[str], blocks: int) -> dict[str, Any]:
    """Times and differences."""
    sides = {name: Side(bundle, short) for name, short in PRECISIONS.items()}
    psnr: list[list[float]] = []
    first = []
    for seed, prompt in enumerate(track(prompts, "videos", console=Console(stderr=True), transient=True)):
        for side in sides.values():
            side.begin(prompt, seed)
        for number in range(blocks):
            order = list(sides) if number % 2 else list(sides)[::-1]
            made = {name: sides[name].block() for name in order}
            (a, x), (b, y) = made["float32"], made["int8"]
            if not number:
                first.append(float(np.linalg.norm(a - b) / np.linalg.norm(a)))
            errors = np.mean((x - y) ** 2, axis=(1, 2, 3))
            psnr.append([float(-10 * np.log10(max(e, 1e-12))) for e in errors])
    pairs = np.array([sides[name].seconds for name in PRECISIONS])[:, 2:]  # two blocks warm up
    graphs = load_bundle(bundle)
    return {
        "prompts": prompts,
        "blocks": blocks,
        "ms_per_block": {
            name: round(1000 * float(np.median(t)), 2) for name, t in zip(PRECISIONS, pairs, strict=True)
        },
        "int8_by_float32": round(float(np.median(pairs[1] / pairs[0])), 3),
        "first_block_rel_l2": [round(value, 5) for value in first],
        "psnr_db": {
            "first_block_median": round(float(np.median(np.concatenate(psnr[::blocks]))), 2),
            "all_median": round(float(np.median(np.concatenate(psnr))), 2),
        },
        "graphs_bytes": {name: graphs.graph("denoise", name).stat().st_size for name in ("float32", "int8")},
    }


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--prompt", action="append", default=[])
    parser.add_argument("--blocks", type=int, default=20, help="of each video")
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args()
    found = measure(arguments.bundle, arguments.prompt or list(PROMPTS), arguments.blocks)
    report.write(arguments.out, report.envelope("video_int8", found))
    print(json.dumps(found, indent=2))
    print(f"written to {arguments.out}")


if __name__ == "__main__":
    main()
