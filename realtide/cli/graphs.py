"""`realtide models export` and `build`: graphs in other precisions, and TensorRT's plans of them."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from realtide.bundle import PRECISIONS, BundleError
from realtide.cli.errors import CommandError, UsageError
from realtide.cli.tables import AsJson, Bundles, Cache, loaded_bundle, print_table, table_of

Name = Literal["fp32", "fp16", "bf16", "int8", "fp8"]


def export(
    bundle: Bundles,
    precision: Annotated[Name, typer.Option(help="Of the graphs' inputs, outputs, state and products.")],
    out: Annotated[
        Path | None,
        typer.Option(help="Directory of the graphs and report.json. Default: ./BUNDLE-PRECISION."),
    ] = None,
    measure: Annotated[
        bool, typer.Option(help="Run every graph beside the float32 one and report the difference.")
    ] = True,
    scores: Annotated[
        Path | None,
        typer.Option(help="What benchmarks/precisions.py wrote. Default: what the source tree has."),
    ] = None,
    goldens: Annotated[
        Path | None,
        typer.Option(
            help="Directory of golden cases to replay in this precision, minutes for all of tests/golden. "
            "Default: what was found when --scores was written."
        ),
    ] = None,
    recordings: Annotated[
        Path | None,
        typer.Option(
            help="Directory of FLAC, WAV or OGG files for a speech bundle to transcribe. Default: the source "
            "tree's test clips."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write a bundle's graphs in another precision, and how far their results are from float32.

    Graphs hold no weights: the new ones go with the bundle's own weight file. fp16, bf16 and fp8 are for
    GPUs (`realtide models build` compiles them), int8 is for ONNX Runtime on a CPU. fp8 has a transformer's
    products in float8, with scales that examples of the bundle's work give, and all else in fp16. Both
    graphs run on the CPU on inputs recorded from the bundle's work in float32 (recordings transcribed, a
    video, images under conditions) and on random ones at the bundle's sizes; bf16, which ONNX Runtime does
    not compute there, in a form that rounds every result to it. What the bundle scores in the
    precision (words, motion, edges), and how far golden cases of its engine are from their reference, is told
    if that was measured. Exits with 1 if an output or a golden case is further off than its bound.

    Example: realtide models export longlive-emoji --precision fp16 --out graphs
    """
    from realtide import variants
    from realtide.engines.runtime.program import ProgramError
    from realtide.golden_precisions import exceeded, replayed
    from realtide.precision_scores import FILE, golden_of, scores_of

    loaded, long = loaded_bundle(bundle), PRECISIONS[precision]
    if recordings is not None and loaded.manifest.engine != "ancat":
        raise UsageError(f"recordings: are for speech bundles, {loaded.manifest.name} is none")
    if scores is not None and not scores.exists():
        raise UsageError(f"scores: there is no file {scores}")
    directory = out or Path(f"{loaded.manifest.name}-{precision}")
    try:
        with _bars() as bar:
            found = variants.export_variant(loaded, long, directory, bar("rewriting"))
            known = scores or FILE
            if goldens is None:
                golden = golden_of(loaded, long, known)
            else:
                golden = replayed(loaded.manifest.engine, long, goldens, bar("replaying"))
            report = variants.report_variant(
                loaded,
                long,
                found,
                bar("measuring"),
                measured=measure,
                golden=golden,
                scores=scores_of(loaded, long, known),
                recordings=recordings,
            )
        path = variants.write_report(report, directory)
    except (ValueError, ProgramError) as error:
        raise CommandError(str(error)) from None
    except OSError as error:
        raise CommandError(f"{directory}: {error.strerror}") from None
    if as_json:
        typer.echo(json.dumps(report, indent=2))
    else:
        _quality_table(report)
        typer.echo(f"recorded work: {report['recorded_work']}")
        typer.echo(f"{len(found)} graphs and {path.name} in {directory}")
    if report["within"] is False:
        worst = [row["program"] for row in report["programs"] if not row.get("within", True)]
        raise CommandError(f"further from float32 than {report['bound']}: {', '.join(worst)}")
    if far := exceeded(golden):
        raise CommandError(f"golden cases further from their reference than allowed: {', '.join(far)}")


def build(
    bundle: Bundles,
    precision: Annotated[Name, typer.Option(help="fp16, bf16, fp8 or fp32.")] = "fp16",
    cache: Cache = None,
    gpu: Annotated[
        str | None,
        typer.Option(
            help="Target: CAPABILITY, NAME:CAPABILITY or NAME:CAPABILITY:DRIVER. TensorRT for RTX only; "
            "default any. TensorRT builds for the GPU that is here."
        ),
    ] = None,
    max_batch: Annotated[int, typer.Option(min=1, max=1024, help="Most sessions or images in one step.")] = 8,
    as_json: AsJson = False,
) -> None:
    """Compile a bundle's graphs with TensorRT into the plan cache.

    A plan is kept under a key of all it depends on: graph, weights, TensorRT, GPU, driver, precision, sizes.
    What is there already is not built again; whoever asks for the same plan meanwhile waits for it. A program
    that TensorRT refuses is named, the others are built, and the command exits with 1.

    Example: realtide models build longlive-emoji --precision fp16
    """
    from realtide import variants
    from realtide.engines.runtime import tensorrt
    from realtide.engines.runtime.gpu import detect
    from realtide.engines.runtime.plan_key import Gpu
    from realtide.engines.runtime.plans import PlanCache
    from realtide.engines.runtime.program import ProgramError
    from realtide.plan_building import build_plans

    loaded, long = loaded_bundle(bundle), PRECISIONS[precision]
    if long == "int8":
        raise UsageError(
            "precision: int8 graphs are for ONNX Runtime on a CPU: build fp16, bf16, fp8 or fp32"
        )
    try:
        wanted = Gpu.parse(gpu) if gpu is not None else None
    except ValueError as error:
        raise UsageError(str(error)) from None
    store = PlanCache(cache)
    try:
        chosen = tensorrt.target(wanted, detect())
        with _bars() as bar, tempfile.TemporaryDirectory() as folder:
            graphs = variants.export_variant(loaded, long, Path(folder), bar("rewriting"))
            files = {name: path for name, (path, _) in graphs.items()}
            building, inside = bar("building"), bar("TensorRT")
            rows = build_plans(
                loaded,
                long,
                files,
                store,
                gpu=chosen,
                max_batch=max_batch,
                on_program=building,
                on_progress=inside,
            )
    except (variants.VariantError, BundleError, ProgramError) as error:
        raise CommandError(str(error)) from None
    if as_json:
        listed = [
            {
                "program": row.program,
                "subject": row.subject,
                "key": row.key.to_dict() if row.key else None,
                "digest": row.key.digest if row.key else None,
                "bytes": row.size,
                "built": row.fresh,
                "problem": row.problem,
            }
            for row in rows
        ]
        typer.echo(json.dumps({"cache": str(store.directory), "plans": listed}, indent=2))
    else:
        table = table_of("PROGRAM", "PLAN", "SIZE", "KEY", numbers=("SIZE",))
        for row in rows:
            state = (row.problem and "refused") or (row.fresh and "built") or "there"
            digest = row.key.digest[:12] if row.key else ""
            table.add_row(row.program, state, f"{row.size / 1e6:.1f} MB" if row.size else "", digest)
        print_table(table)
        typer.echo(f"{sum(not row.problem for row in rows)} of {len(rows)} plans in {store.directory}")
    bad = [f"{row.program}: {row.problem}" for row in rows if row.problem]
    if bad:
        raise CommandError("; ".join(bad))


def _quality_table(report: dict[str, Any]) -> None:
    table = table_of(
        *("PROGRAM", "GRAPH", "RECORDED", "WORST OUTPUT", "REL L2", "MAX ABS", "PEAK"),
        numbers=("RECORDED", "REL L2", "MAX ABS", "PEAK"),
    )
    for row in report["programs"]:
        outputs = row.get("outputs")
        if not outputs:
            table.add_row(
                row["program"], row["source"], "", row.get("not_measured", "no outputs"), "", "", ""
            )
            continue
        worst = max(outputs, key=lambda output: float(output["relative_l2"]))
        figures = (worst["relative_l2"], worst["max_abs"], worst["peak"])
        calls = str(row["calls"]["recorded"])
        table.add_row(
            row["program"], row["source"], calls, worst["output"], *(f"{float(x):.2g}" for x in figures)
        )
    print_table(table)


@contextlib.contextmanager
def _bars() -> Iterator[Callable[[str], Callable[[str, int, int], None]]]:
    """Bars on standard error, if that is a terminal; each by its title, told (what, done, total)."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:

        def bar(title: str) -> Callable[[str, int, int], None]:
            task = progress.add_task(title, total=None)
            return lambda what, done, total: progress.update(
                task, description=f"{title} {what}", completed=done, total=total or None
            )

        yield bar
