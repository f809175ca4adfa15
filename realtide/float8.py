"""A bundle's graphs with products in float8, calibrated on its own kind of work (ours; extra ``export``)."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from realtide.bundle import Bundle
from realtide.engines.runtime.fp8_graph import quantize_graph_float8
from realtide.engines.runtime.ort import OrtProgram
from realtide.engines.runtime.products import Measured
from realtide.engines.runtime.program import Array, ProgramError, Runs
from realtide.engines.runtime.weights import WeightFile

log = logging.getLogger(__name__)

Ranges = dict[str, dict[str, float]]
"""Largest magnitudes of activations, by program and name."""


def programs(bundle: Bundle) -> tuple[str, ...]:
    """The programs whose products are worth float8; none: the engine gains nothing by it."""
    found: tuple[str, ...] = _graphs(bundle).FP8
    return found


def calibrated(bundle: Bundle) -> Ranges:
    """Measure the activations of a bundle's float8 programs while they do the engine's examples.

    Raises:
        BundleError, ProgramError: the examples cannot be run, or do not need one of the programs.
    """
    log.info("%s: calibrating float8 on the processor", bundle.manifest.name)
    made: dict[str, Measured] = {}
    weights = WeightFile(bundle.weights)

    def program(name: str, state: Mapping[str, Array]) -> Runs:
        made[name] = Measured(bundle.graph(name, "float32"), weights, state)
        return made[name]

    _work(bundle, weights, program)
    for name in programs(bundle):
        if name not in made or not made[name].runs:
            raise ProgramError(
                f"{bundle.manifest.name}: {name} is not calibrated: the examples do not run it"
            )
    return {name: measured.ranges for name, measured in made.items()}


def write_graph(bundle: Bundle, program: str, ranges: Ranges, target: Path) -> list[str]:
    """Write one program's float8 graph; returns the weights that are float8. Raises ProgramError."""
    kept: tuple[str, ...] = _graphs(bundle).FP8_KEPT
    return quantize_graph_float8(
        bundle.graph(program, "float32"),
        target,
        ranges[program],
        select=lambda weight: not any(part in weight for part in kept),
    )


def _work(
    bundle: Bundle, weights: Mapping[str, Array], program: Callable[[str, Mapping[str, Array]], Runs]
) -> None:
    chosen = programs(bundle)

    def program_of(name: str, state: Mapping[str, Array]) -> Runs:
        if name in chosen:
            return program(name, state)
        return OrtProgram(bundle.graph(name, "float32"), weights, state)

    importlib.import_module(f"realtide.engines.{bundle.manifest.engine}.examples").run(bundle, program_of)


def _graphs(bundle: Bundle) -> Any:
    return importlib.import_module(f"realtide.engines.{bundle.manifest.engine}.graphs")
