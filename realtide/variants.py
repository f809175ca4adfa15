"""A bundle's graphs in another precision, and what that costs in accuracy (ours; needs ``export``).

Graphs carry no weights, so a variant is a rewritten graph that uses the bundle's own weight file. The report
says for every output how far it is from float32, on what the bundle's work feeds its programs and on random
samples at the bundle's sizes; whether words, motion or edges suffer is for the bundle's own evaluation, which
needs its recipe's data.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import math
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import realtide
from realtide.bundle import Bundle, Precision
from realtide.engines.runtime.quality import Quality, Sample, measure_each, worst
from realtide.engines.runtime.weights import WeightFile
from realtide.recorded_work import recorded

ENGINES = ("ancat", "easycontrol", "longlive")
REPORT = "report.json"

BOUNDS: dict[str, float] = {
    "float32": 0.0,
    "float16": 0.004,
    "bfloat16": 0.055,
    "int8": 0.15,
    "float8": 0.08,
}
"""Largest relative L2 error of an output (of integers: share that differs) that passes, by precision.

Times the worst output of the bundles here, on recorded work and random samples: three in float16 (0.0013,
values of an image's condition), 1.9 in bfloat16 (0.029, what speech caches in its first step), 2.4 in int8
(0.063, what speech caches) and two in float8 (0.037, values of an image's condition).
"""

WIDER = {
    ("easycontrol", "text", "float16"): 0.04,
    ("easycontrol", "text", "bfloat16"): 0.31,
    ("longlive", "denoise", "float8"): 0.16,
    ("longlive", "clean", "float8"): 0.16,
    ("longlive", "recache", "float8"): 0.16,
}
"""Other bounds, by engine, program and precision. T5 does not scale its attention, so its logits are large
and rounding moves them: random words give 0.02 in float16 and 0.155 in bfloat16, single tokens in float16 up
to 0.1. Better served in float32. What a video caches is rounded in float8 again from layer to layer: 0.081 in
the worst of six.
"""

Source = Literal["bundle", "narrowed", "quantized", "float32"]
"""Where a graph comes from; float32: this program stays as it is in this precision."""


class VariantError(ValueError):
    """A precision cannot be had; the message is one sentence."""


def engine_graphs(bundle: Bundle) -> Any:
    """The module that knows the engine's graphs: `sizes`, `samples`, `INT8`, `FP8`. Raises VariantError."""
    engine = bundle.manifest.engine
    if engine not in ENGINES:
        raise VariantError(
            f"{bundle.manifest.name}: engine must be one of {', '.join(ENGINES)}, not {engine!r}"
        )
    return importlib.import_module(f"realtide.engines.{engine}.graphs")


def manifest_values(bundle: Bundle) -> dict[str, Any]:
    """What `sizes` and `samples` read."""
    return {"architecture": bundle.manifest.architecture, "limits": bundle.manifest.limits}


def export_variant(
    bundle: Bundle,
    precision: Precision,
    directory: Path,
    on_program: Callable[[str, int, int], None] = lambda name, done, total: None,
) -> dict[str, tuple[Path, Source]]:
    """Write all graphs of a bundle in a precision.

    Args:
        bundle: its float32 graphs are what is rewritten; graphs that it has in this precision are copied.
        precision: of the graphs.
        directory: where `PROGRAM.onnx` go; made.
        on_program: told each program with its number and how many there are, before it is worked on.

    Returns:
        Path and source of each program's graph.

    Raises:
        VariantError: this bundle cannot have this precision.
        BundleError: it lacks what calibrating needs (float8).
        ProgramError: a graph cannot be rewritten, or cannot be run to calibrate it (float8).
    """
    programs = bundle.manifest.programs
    if not programs:
        raise VariantError(f"{bundle.manifest.name}: has no graphs; `realtide models convert` writes them")
    quantized = engine_graphs(bundle).INT8 if precision == "int8" else engine_graphs(bundle).FP8
    plan: dict[str, tuple[Path, Source]] = {}
    for name, graphs in programs.items():
        if precision in graphs:
            plan[name] = bundle.directory / graphs[precision], "bundle"
        elif "float32" not in graphs:
            raise VariantError(f"{bundle.manifest.name}: programs.{name} has no float32 graph to start from")
        elif precision in ("float16", "bfloat16"):
            plan[name] = bundle.directory / graphs["float32"], "narrowed"
        elif precision == "float8":
            if not quantized:
                raise VariantError(
                    f"{bundle.manifest.name}: fp8 is for video and images: the products of a step of the"
                    f" engine {bundle.manifest.engine} are too small to gain by it"
                )
            plan[name] = (
                bundle.directory / graphs["float32"],
                "quantized" if name in quantized else "narrowed",
            )
        elif not quantized:
            raise VariantError(
                f"{bundle.manifest.name}: int8 must be calibrated on recordings, as the recipe does"
            )
        else:
            plan[name] = bundle.directory / graphs["float32"], "quantized" if name in quantized else "float32"
    directory.mkdir(parents=True, exist_ok=True)
    found = {}
    ranges = None
    for number, (name, (source, how)) in enumerate(plan.items()):
        on_program(name, number, len(plan))
        target = directory / f"{name}.onnx"
        if how == "narrowed":
            from realtide.engines.runtime.narrow import narrow_graph

            narrow_graph(source, target, "bfloat16" if precision == "bfloat16" else "float16")
        elif how == "quantized" and precision == "float8":
            from realtide import float8

            ranges = ranges or float8.calibrated(bundle)
            float8.write_graph(bundle, name, ranges, target)
        elif how == "quantized":
            from realtide.engines.runtime.int8 import quantize_graph

            quantize_graph(source, target)
        else:
            shutil.copyfile(source, target)
        found[name] = target, how
    return found


def report_variant(
    bundle: Bundle,
    precision: Precision,
    graphs: dict[str, tuple[Path, Source]],
    on_program: Callable[[str, int, int], None] = lambda name, done, total: None,
    *,
    measured: bool = True,
    golden: dict[str, Any] | str | None = None,
    scores: dict[str, Any] | str | None = None,
    recordings: Path | None = None,
) -> dict[str, Any]:
    """Measure exported graphs against float32; what `export` writes as `report.json`.

    Args:
        bundle: with float32 graphs and the weights.
        precision: of `graphs`.
        graphs: what `export_variant` returned.
        on_program: as there.
        measured: False: nothing is run, and the report says so.
        golden: of the engine's golden cases, as `precision_scores.golden_of` gives them.
        scores: the bundle's own, as `precision_scores.scores_of` gives them.
        recordings: what a speech bundle transcribes; see `recorded_work.recorded`.

    Raises:
        BundleError: `recordings` is not usable.
        ProgramError: a graph cannot be run.
    """
    import onnxruntime

    random = engine_graphs(bundle).samples(manifest_values(bundle))
    work: dict[str, list[Sample]] = {}
    done = "not run: as asked"
    if measured:
        on_program("the bundle's work", 0, len(graphs))
        # What float8 was calibrated on was run before, whatever the bundle's size.
        limit = {"most_bytes": None} if precision == "float8" else {}
        work, done = recorded(bundle, recordings, **limit)
    weights = WeightFile(bundle.weights)
    bound = BOUNDS.get(precision)
    rows = []
    for number, (name, (path, how)) in enumerate(graphs.items()):
        on_program(name, number, len(graphs))
        row: dict[str, Any] = {
            "program": name,
            "file": path.name,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            "source": how,
        }
        reference = bundle.manifest.programs[name].get("float32")
        if not measured:
            row["not_measured"] = "as asked"
        elif reference is None:
            row["not_measured"] = "the bundle has no float32 graph"
        else:
            real = work.get(name, [])
            # Static scales of float8 are those of the recorded work: random numbers would be cut off.
            invented = [] if real and precision == "float8" and how == "quantized" else [random[name]]
            found = _measured(bundle.directory / reference, path, precision, weights, *real, *invented)
            row["calls"] = {"recorded": len(real), "random": sum(len(one.calls) for one in invented)}
            row["outputs"] = [_row(quality) for quality in worst(found)]
            row["worst"] = _largest(found)
            row["worst_recorded"] = _largest(found[: len(real)]) if real else None
            kind = "float16" if precision == "float8" and how == "narrowed" else precision
            row["bound"] = WIDER.get((bundle.manifest.engine, name, kind), BOUNDS.get(kind))
            row["within"] = row["bound"] is not None and row["worst"] <= row["bound"]
        rows.append(row)
    report: dict[str, Any] = _finite(
        {
            "bundle": bundle.manifest.name,
            "version": bundle.manifest.version,
            "precision": precision,
            "against": "float32",
            "bound": bound,
            "within": all(told) if (told := [row["within"] for row in rows if "within" in row]) else None,
            "measured_with": f"onnxruntime {onnxruntime.__version__} on the CPU "
            f"(realtide {realtide.__version__})",
            "recorded_work": done,
            "golden": "not asked for" if golden is None else golden,
            "scores": "not asked for" if scores is None else scores,
            "programs": rows,
        }
    )
    return report


def _measured(
    reference: Path, path: Path, precision: Precision, weights: WeightFile, *samples: Sample
) -> list[list[Quality]]:
    """Of each sample, all outputs. ONNX Runtime computes no bfloat16 on a CPU: there the host form is run."""
    if precision != "bfloat16":
        return measure_each(reference, path, weights, *samples)
    from realtide.engines.runtime.host_form import host_form

    with tempfile.TemporaryDirectory() as folder:
        form = Path(folder) / path.name
        host_form(path, form)
        return measure_each(reference, form, weights, *samples, state_of=path)


def write_report(report: dict[str, Any], directory: Path) -> Path:
    """Write `report.json`; returns its path."""
    path = directory / REPORT
    path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return path


def _largest(measured: Sequence[Sequence[Quality]]) -> float:
    return max((quality.relative for each in measured for quality in each), default=0.0)


def _row(quality: Quality) -> dict[str, Any]:
    return {
        "output": quality.output,
        "relative_l2": float(f"{quality.relative:.4g}"),
        "max_abs": float(f"{quality.largest:.4g}"),
        "peak": float(f"{quality.peak:.4g}"),
    }


def _finite(value: Any) -> Any:
    """JSON has no infinity: text says it."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_finite(inner) for inner in value]
    return "inf" if isinstance(value, float) and math.isinf(value) else value
