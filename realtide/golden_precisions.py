"""Golden cases of an engine replayed in another precision than their reference's (ours; extra ``export``)."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from realtide.bundle import Precision
from realtide.engines.runtime.golden import CaseError, Report, quiet, read_case

ENGINES = {"easycontrol": ("cond_size",), "longlive": ("rope", "z_dim", "vocab")}
"""What the description of a case that an engine replays has: one of these."""


def cases(engine: str, directory: Path) -> list[Path]:
    """An engine's cases in a directory, or in its folder of the engine's name.

    Raises:
        CaseError: there are none.
    """
    place = directory / engine if (directory / engine).is_dir() else directory
    paths = [path for path in sorted(place.glob("*.safetensors")) if "weights" not in path.name]
    found = []
    for path in paths:
        try:
            described, _ = read_case(path)
        except CaseError:
            continue  # other tensors, such as a LoRA, that lie beside cases
        if any(key in described for key in ENGINES[engine]):
            found.append(path)
    if not found:
        raise CaseError(f"goldens: must be a directory with golden cases of {engine}, {place} has none")
    return found


def replayed(
    engine: str,
    precision: Precision,
    directory: Path,
    on_case: Callable[[str, int, int], None] = lambda name, done, total: None,
) -> dict[str, Any] | str:
    """Replay an engine's cases with graphs exported from their own weights and rewritten, on ONNX Runtime.

    Args:
        engine: of the cases.
        precision: of the graphs.
        directory: of the cases and their weights.
        on_case: told each case with its number and how many there are, before it is replayed.

    Returns:
        By case, its worst tensor's relative L2 difference from the reference (``worst``), what it may be
        (``bound``), and that of every tensor (``rel_l2``); or why nothing can be replayed.

    Raises:
        CaseError: there are no cases, or one cannot be replayed.
        ProgramError: a graph could not be made or run.
    """
    if engine not in ENGINES:
        return f"there are no golden cases of {engine}: its streams are held to the offline encoder"
    replay: Callable[..., Report] = importlib.import_module(f"realtide.engines.{engine}.replay").replay
    found, paths = {}, cases(engine, directory)
    for number, path in enumerate(paths):
        on_case(path.stem, number, len(paths))
        with quiet():
            report = replay(path, "onnxruntime", precision=precision)
        tensors = {name: float(f"{each.rel_l2:.3g}") for name, each in report.tensors.items()}
        found[path.stem] = {"worst": max(tensors.values()), "bound": report.tolerance, "rel_l2": tensors}
    return found


def exceeded(golden: dict[str, Any] | str | None) -> list[str]:
    """The cases that are further from their reference than they may be; NaN is."""
    if not isinstance(golden, dict):
        return []
    judged = {name: case for name, case in golden.items() if isinstance(case, dict)}
    return [name for name, case in judged.items() if not case["worst"] <= case["bound"]]
