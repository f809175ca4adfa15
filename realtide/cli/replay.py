"""`realtide replay`: a golden case of a public reference implementation, replayed and compared."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from realtide.cli.errors import CommandError, UsageError

if TYPE_CHECKING:
    from realtide.engines.runtime.golden import Report


class Backend(StrEnum):
    """What runs the model."""

    TORCH = "torch"
    ONNXRUNTIME = "onnxruntime"
    TENSORRT = "tensorrt"


class Precision(StrEnum):
    """What its graphs compute in."""

    FP32 = "fp32"
    FP16 = "fp16"
    BF16 = "bf16"
    INT8 = "int8"
    FP8 = "fp8"


def command(
    case: Annotated[
        Path, typer.Argument(metavar="CASE.safetensors", help="The case; its weights lie beside it.")
    ],
    backend: Annotated[
        Backend,
        typer.Option(
            help="torch: the modules, eager. onnxruntime: their graphs, exported on the spot. tensorrt: "
            "plans of these graphs, built on the spot."
        ),
    ] = Backend.TORCH,
    device: Annotated[
        str | None,
        typer.Option(
            help="cpu, cuda or cuda:N; for torch and tensorrt. Default: cpu for torch, cuda for tensorrt."
        ),
    ] = None,
    precision: Annotated[
        Precision,
        typer.Option(help="Of the graphs that onnxruntime runs; half precision in a form for processors."),
    ] = Precision.FP32,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Replay a golden case and compare every tensor with the reference implementation's.

    A case holds inputs and outputs of a public reference implementation, which was run once in float32. Its
    metadata says which model it was; the weights are looked for beside it, in files named *weights*.

    For every tensor two numbers are shown: rel_l2, the L2 norm of the difference over that of the
    reference, and max_abs, the largest absolute difference. A case is ok if every rel_l2 is at most 1e-5
    (torch on the processor) or 1e-4 (otherwise); wrong semantics (window, sink,
    recache, positions of conditions, place of a LoRA) give far more. In another precision it may be more:
    0.01 in fp16, 0.07 in bf16, 0.09 in int8, 0.14 in fp8. Exits with 1 if a case is not ok.

    Needs PyTorch (extra `train`); onnxruntime also needs the extras `cpu` and `export`, and some 30
    seconds to export. tensorrt needs a GPU and the extras `gpu`, `export` and `trt`.

    Example: realtide replay static_window12_sink3.safetensors

    Example: realtide replay wan_vae_seed31.safetensors --json --backend onnxruntime

    Example: realtide replay spatial_one.safetensors --backend onnxruntime --precision bf16
    """
    try:
        from realtide.bundle import PRECISIONS
        from realtide.engines.easycontrol import replay as images
        from realtide.engines.longlive import replay as video
        from realtide.engines.runtime import golden
        from realtide.engines.runtime.program import ProgramError
    except ImportError as error:
        raise CommandError(f"replaying needs a package that is not installed: {error}") from None
    try:
        with golden.quiet():
            described, _ = golden.read_case(case)
            engine = images if images.KEY in described else video
            report = engine.replay(case, backend.value, _place(backend, device), PRECISIONS[precision.value])
    except (ValueError, ProgramError) as error:
        raise CommandError(str(error)) from None
    except ImportError as error:
        raise CommandError(
            f"backend {backend.value} needs a package that is not installed: {error}"
        ) from None
    if as_json:
        tensors = {name: asdict(found) for name, found in report.tensors.items()}
        line = {"case": report.case, "backend": report.backend, "tensors": tensors, "ok": report.ok}
        if precision is not Precision.FP32:
            line["precision"] = precision.value
        typer.echo(json.dumps(line))
    else:
        _table(report)
    if not report.ok:
        raise CommandError(f"{report.case}: not what the reference computes")


def _place(backend: Backend, device: str | None) -> str:
    """The device, as PyTorch writes it."""
    if device is not None and not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise UsageError(f"device must be cpu, cuda or cuda:N, got {device!r}")
    if backend is Backend.ONNXRUNTIME and device not in (None, "cpu"):
        raise UsageError(f"device must be cpu for onnxruntime, got {device!r}")
    if backend is Backend.TENSORRT and device == "cpu":
        raise UsageError("device must be cuda or cuda:N for tensorrt, got 'cpu'")
    return device or ("cuda" if backend is Backend.TENSORRT else "cpu")


def _table(report: Report) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for title in ("TENSOR", "REL L2", "MAX ABS"):
        table.add_column(title, justify="left" if title == "TENSOR" else "right")
    for name, found in report.tensors.items():
        table.add_row(name, f"{found.rel_l2:.2e}", f"{found.max_abs:.2e}")
    console = Console(highlight=False)
    console.print(table)
    console.print(
        f"{report.case} on {report.backend}: {'ok' if report.ok else 'NOT ok'} (at most {report.tolerance:g})"
    )
