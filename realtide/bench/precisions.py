"""What a precision costs in words, motion and edges: bundles to score, and the table of scores (ours).

A bundle's own scores come from its recipe, through the engine that serves it, and the engine runs graphs in
float32 or int8 on a processor. So half precision is scored by a bundle whose float32 graphs are the host form
(`runtime/host_form.py`) of its graphs in that precision.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from realtide.bundle import MANIFEST, Bundle, Precision, write_manifest
from realtide.engines.runtime.host_form import host_form
from realtide.variants import export_variant

OWN: tuple[Precision, ...] = ("float32", "int8")
"""Precisions that are scored with the bundle's own graphs."""

ROWS: dict[str, tuple[tuple[str, tuple[str, ...], bool], ...]] = {
    "ancat": (
        ("word errors, digit strings", ("strings_test", "rate"), True),
        ("word errors, coffee orders", ("coffee_test", "rate"), True),
        ("single digits, exact", ("digits_test", "exact"), True),
        ("wake phrases, exact", ("wakeword_test", "exact"), True),
    ),
    "longlive": (
        ("every block shows the prompt's motion", ("follow", "every_block_right"), True),
        ("blocks that do", ("follow", "blocks_right"), True),
        ("the right object", ("follow", "object_right"), True),
    ),
    "easycontrol": (
        ("edges met, IoU", ("edges",), False),
        ("the same under two conditions", ("edges_two_conditions",), False),
        ("the same without the condition", ("edges_without_condition",), False),
        ("colour off the subject's, 0 to 1", ("colour_subject",), False),
    ),
}
"""What the table shows of an engine's scores: title, where it is, whether as a percentage."""


def host_bundle(bundle: Bundle, precision: Precision, directory: Path) -> Path:
    """Make a bundle that computes on a processor what another one computes in half precision or float8.

    Args:
        bundle: has float32 graphs.
        precision: of the graphs that are judged.
        directory: to make it in.

    Returns:
        The new bundle; its precision is called ``float32``.

    Raises:
        VariantError, ProgramError: the bundle cannot have this precision.
    """
    target = directory / f"{bundle.manifest.name}-{precision}"
    for file in bundle.manifest.files:
        place = target / file.path
        place.parent.mkdir(parents=True, exist_ok=True)
        if place.suffix != ".onnx":
            shutil.copyfile(bundle.directory / file.path, place)
    graphs = export_variant(bundle, precision, directory / "graphs")
    programs = {}
    for name, (path, _) in graphs.items():
        programs[name] = {"float32": f"onnx/{name}.onnx"}
        host_form(path, target / programs[name]["float32"])
    values = bundle.manifest.model_dump(mode="json", exclude={"files", "unverified"})
    write_manifest(target, values | {"precisions": ["float32"], "programs": programs})
    assert (target / MANIFEST).exists()
    return target


def table(results: Mapping[str, Any], precisions: Sequence[str]) -> str:
    """A Markdown table of a result: a row for each score, a column for each precision."""
    lines = ["| Bundle | Score | " + " | ".join(precisions) + " |", "|---" * (2 + len(precisions)) + "|"]
    for name, entry in sorted(results["bundles"].items()):
        title = f"`{name}` {entry['version']}"
        for what, path, percent in ROWS[entry["engine"]]:
            cells = [_cell(entry["scores"].get(precision), path, percent) for precision in precisions]
            lines.append(f"| {title} | {what} | " + " | ".join(cells) + " |")
            title = ""
        for measured in entry.get("times", ()):
            cells = [_time(measured, precision) for precision in precisions]
            lines.append(
                f"| {title} | time of {measured['what']} over float32's | " + " | ".join(cells) + " |"
            )
            title = ""
    return "\n".join(lines) + "\n"


def golden_table(results: Mapping[str, Any], precisions: Sequence[str]) -> str:
    """A Markdown table of the worst tensor of every golden case in each precision."""
    lines = ["| Golden case | " + " | ".join(precisions) + " |", "|---" * (1 + len(precisions)) + "|"]
    for engine, found in sorted(results["golden"].items()):
        cases = (name for name, case in found[precisions[0]].items() if isinstance(case, dict))
        for case in sorted(cases):
            told = [found.get(precision, {}).get(case) for precision in precisions]
            cells = [f"{one['worst']:.1e}" if one else "" for one in told]
            lines.append(f"| {engine} `{case}` | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _cell(scores: Any, path: tuple[str, ...], percent: bool) -> str:
    for key in path:
        scores = scores.get(key) if isinstance(scores, dict) else None
    if not isinstance(scores, (int, float)):
        return ""
    return f"{100 * scores:.1f} %" if percent else f"{scores:.3f}"


def _time(measured: Mapping[str, Any], precision: str) -> str:
    if precision == "float32":
        return "1"
    ratio = measured.get(f"{precision}_by_float32")
    return "" if ratio is None else f"{ratio:.2f}"
