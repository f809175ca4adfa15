"""What lookahead costs the processor: the streaming encoder's graph with and without it, per second of audio.

The same windows of real recordings go through the graph of an adaptive bundle at several biases, and through
two references: the same graph with a cap of 0 frames (it schedules but never waits), and the graph of a
causal bundle of the same size (nothing is scheduled or queued). All variants are played once in every round,
in an order that turns by one place each round, and what is reported is the median over rounds of the ratio
within a round: what disturbs the machine for longer than a round cancels out. One thread.

With `--before`, an earlier graph of the same model takes its turns too, at bias 0.

    python benchmarks/encoder_cost.py --adaptive BUNDLE [--causal BUNDLE] [--biases=-3,0,3] [--out FILE]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track

from realtide.bench import audio, report
from realtide.bench.encoder import EncoderBench, Times, windows_of

RATE = 16000
OUT = Path(__file__).parent / "results" / "encoder_cost.json"


def cell(
    variants: list[tuple[str, EncoderBench, dict[str, Any]]], windows: Any, frames: int, rounds: int
) -> dict[str, Any]:
    """All variants at one batch and one number of frames a step."""
    times: dict[str, list[Times]] = {name: [] for name, _, _ in variants}
    for name, bench, options in variants:
        bench.play(windows, frames, **options)  # warm-up
        times[name] = []
    for number in range(rounds):
        turn = number % len(variants)
        for name, bench, options in variants[turn:] + variants[:turn]:
            times[name].append(bench.play(windows, frames, **options))
    seconds = windows.shape[0] * windows.shape[1] * 0.04
    totals = {name: np.array([one.total for one in found]) for name, found in times.items()}
    references = [name for name in ("cap 0", "causal", "before") if name in totals]
    return {
        "streams": windows.shape[0],
        "frames_per_step": frames,
        "audio_seconds": round(seconds, 2),
        "variants": {
            name: {
                "ms_per_audio_second": round(float(np.median(total)) / seconds * 1000, 3),
                "mean_lookahead_frames": round(times[name][0].latency, 2),
                "ratio_to": {
                    other: round(float(np.median(total / totals[other])), 3)
                    for other in references
                    if other != name
                },
            }
            for name, total in totals.items()
        },
    }


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--adaptive", type=Path, required=True, help="bundle with an adaptive encoder")
    parser.add_argument("--causal", type=Path, help="bundle with a causal encoder of the same size")
    parser.add_argument("--before", type=Path, help="an earlier bundle to compare with")
    parser.add_argument("--biases", default="-3,0,3", help="of the schedulers' logits (default: %(default)s)")
    parser.add_argument("--streams", default="1,4,16,32", help="batches (default: %(default)s)")
    parser.add_argument("--frames", default="1,2,4", help="frames a step (default: %(default)s)")
    parser.add_argument("--length", type=int, default=50, help="frames of each stream (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--precision", help="float32 or int8; default: the bundle's")
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args()
    batches = [int(text) for text in arguments.streams.split(",")]
    steps = [int(text) for text in arguments.frames.split(",")]
    biases = [float(text) for text in arguments.biases.split(",")]
    adaptive = EncoderBench.of_bundle(arguments.adaptive, max(batches), arguments.precision)
    variants: list[tuple[str, EncoderBench, dict[str, Any]]] = [("cap 0", adaptive, {"cap": 0})]
    if arguments.causal is not None:
        causal = EncoderBench.of_bundle(arguments.causal, max(batches), arguments.precision)
        variants.append(("causal", causal, {}))
    if arguments.before is not None:
        before = EncoderBench.of_bundle(arguments.before, max(batches), arguments.precision)
        variants.append(("before", before, {"bias": 0.0}))
    variants += [(f"bias {bias:+g}", adaptive, {"bias": bias}) for bias in biases]
    sound = audio.loop(audio.recordings(None), RATE)
    cells = []
    work = [(batch, frames) for batch in batches for frames in steps]
    for batch, frames in track(work, console=Console(stderr=True), transient=True):
        windows = windows_of(sound, RATE, arguments.adaptive, batch, arguments.length)
        cells.append(cell(variants, windows, frames, arguments.rounds))
    worst = {
        name: max(one["variants"][name]["ratio_to"][other] for one in cells)
        for other in ("causal", "cap 0")
        for name in cells[0]["variants"]
        if other in cells[0]["variants"][name]["ratio_to"] and name.startswith("bias")
    }
    result = report.envelope(
        "encoder_cost", {"rounds": arguments.rounds, "worst_ratio_to_cap_0": worst, "cells": cells}
    )
    report.write(arguments.out, result)
    for one in cells:
        print(json.dumps({k: v for k, v in one.items() if k != "variants"}))
        for name, found in one["variants"].items():
            print(f"  {name:10} {found['ms_per_audio_second']:9.3f} ms/s  {found['ratio_to']}")
    print(f"written to {arguments.out}")


if __name__ == "__main__":
    main()
