"""What a bundle's programs are fed while it does a little of its real work, for quality reports (ours)."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from realtide.bundle import Bundle, BundleError
from realtide.engines.runtime.ort import OrtProgram
from realtide.engines.runtime.program import Array, Runs
from realtide.engines.runtime.quality import Sample
from realtide.engines.runtime.recording import Recorded
from realtide.engines.runtime.weights import WeightFile

MOST_BYTES = 256 << 20
"""Largest weight file of a bundle whose work is done for a report, so that reports stay quick."""

RECORDINGS = Path(__file__).resolve().parents[1] / "tests" / "data" / "audio"
"""What speech bundles transcribe unless told otherwise; an installation without the source tree has none."""


def recorded(
    bundle: Bundle, recordings: Path | None = None, most_bytes: int | None = MOST_BYTES
) -> tuple[dict[str, list[Sample]], str]:
    """Do a bundle's work in float32 on ONNX Runtime.

    Args:
        bundle: whose work it is: see `run` in its engine's `examples`.
        recordings: directory of what a speech bundle transcribes; None: that of the source tree, if any.
        most_bytes: of the weight file; None: any.

    Returns:
        Some calls of every program that the work needs, and a clause that says what was done, or why
        nothing was.

    Raises:
        BundleError: `recordings` was given and is not usable.
        ProgramError: a program cannot be run.
    """
    size = bundle.weights.stat().st_size
    if most_bytes is not None and size > most_bytes:
        return {}, f"not run: the weights have {size} bytes, more than {most_bytes}"
    absent = sorted(name for name, graphs in bundle.manifest.programs.items() if "float32" not in graphs)
    if absent:
        return {}, f"not run: {', '.join(absent)} has no float32 graph"
    options: dict[str, Any] = {"pictures": True}
    if bundle.manifest.engine == "ancat":
        if recordings is None and not RECORDINGS.is_dir():
            return {}, "not run: no recordings were given"
        options = {"recordings": recordings or RECORDINGS}
    made: dict[str, Recorded] = {}
    weights = WeightFile(bundle.weights)

    def program(name: str, state: Mapping[str, Array]) -> Runs:
        made[name] = Recorded(OrtProgram(bundle.graph(name, "float32"), weights, state), state)
        return made[name]

    examples = importlib.import_module(f"realtide.engines.{bundle.manifest.engine}.examples")
    try:
        told: str = examples.run(bundle, program, **options)
    except BundleError as error:
        if recordings is not None:
            raise
        return {}, f"not run: {error}"
    return {name: one.samples for name, one in made.items() if one.samples}, told
