"""`realtide models inspect`: what is in graphs and plans."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from realtide.cli.errors import CommandError
from realtide.cli.tables import AsJson, loaded_bundle, print_table, table_of

if TYPE_CHECKING:
    from realtide.engines.runtime.program import TensorSpec


def command(
    what: Annotated[
        str, typer.Argument(metavar="BUNDLE|GRAPH|PLAN", help="A bundle, an .onnx or a .plan file.")
    ],
    as_json: AsJson = False,
) -> None:
    """Show what is in graphs (inputs, outputs, state, operators, weights) or what a plan depends on.

    Nothing is loaded or run: a plan is not handed to TensorRT.

    Example: realtide models inspect longlive-emoji
    """
    path = Path(what)
    if path.suffix == ".plan":
        values = _plan(path)
        if as_json:
            typer.echo(json.dumps(values, indent=2))
        else:
            for name, value in (*values.items(),):
                if name != "key":
                    typer.echo(f"{name + ':':<12}{value}")
            for name, value in values["key"].items():
                typer.echo(f"  {name + ':':<12}{value}")
        return
    rows = [_graph(path, path.stem, "")] if path.suffix == ".onnx" else _graphs_of(loaded_bundle(what))
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        return
    table = table_of(
        "PROGRAM", "PRECISION", "OPSET", "NODES", "WEIGHTS", "INPUTS", "OUTPUTS", "STATE", numbers=("NODES",)
    )
    for row in rows:
        table.add_row(
            row["program"], row["precision"], str(row["opsets"].get("ai.onnx", "")), str(row["nodes"]),
            f"{row['weights']['bytes'] / 1e6:.1f} MB", "\n".join(_spec_line(s) for s in _some(row["inputs"])),
            "\n".join(_spec_line(s) for s in _some(row["outputs"])),
            _state_cell(row),
        )  # fmt: skip
    print_table(table)


def _graphs_of(bundle: Any) -> list[dict[str, Any]]:
    rows = []
    for program, graphs in bundle.manifest.programs.items():
        for precision, file in graphs.items():
            rows.append(_graph(bundle.directory / file, program, precision))
    return rows


def _graph(path: Path, program: str, precision: str) -> dict[str, Any]:
    from realtide.engines.runtime.onnx_file import read_graph, summarize
    from realtide.engines.runtime.program import ProgramError

    try:
        data = path.read_bytes()
        info, summary = read_graph(data), summarize(data)
    except OSError as error:
        raise CommandError(f"{path}: {error.strerror}") from None
    except ProgramError as error:
        raise CommandError(f"{path}: {error}") from None

    def specs(given: tuple[TensorSpec, ...]) -> list[dict[str, Any]]:
        return [{"name": s.name, "dtype": s.dtype.name, "shape": list(s.shape)} for s in given]

    def size(spec: TensorSpec) -> int:
        total = spec.dtype.itemsize
        for dim in spec.shape:
            total *= dim if isinstance(dim, int) else 1
        return total

    return {
        "program": program,
        "precision": precision,
        "file": str(path),
        "bytes": len(data),
        "opsets": summary.opsets,
        "nodes": sum(summary.operators.values()),
        "operators": dict(sorted(summary.operators.items(), key=lambda item: -item[1])),
        "weights": {"tensors": len(info.external), "bytes": sum(size(spec) for spec in info.external)},
        "inputs": specs(info.inputs),
        "outputs": specs(info.outputs),
        "state": specs(info.state),
        "state_bytes": sum(map(size, info.state)) if all(map(_fixed, info.state)) else None,
    }


def _plan(path: Path) -> dict[str, Any]:
    from realtide.engines.runtime.plan_file import PlanError, open_directory, read_header

    try:
        directory = open_directory(path.parent, create=False)
        try:
            header = read_header(directory, path.name, path)
        finally:
            os.close(directory)
    except FileNotFoundError:
        raise CommandError(f"there is no plan {path}") from None
    except PlanError as error:
        raise CommandError(str(error)) from None
    return {
        "subject": header.subject,
        "created": header.created,
        "seconds": header.seconds,
        "bytes": header.size,
        "digest": header.key.digest,
        "key": header.key.to_dict(),
    }


def _fixed(spec: TensorSpec) -> bool:
    return all(isinstance(dim, int) for dim in spec.shape)


def _state_cell(row: dict[str, Any]) -> str:
    if not row["state"]:
        return ""
    size = row["state_bytes"]  # None: it depends on how many slots there are
    return f"{len(row['state'])} tensors" + (f", {size / 1e6:.1f} MB" if size is not None else "")


def _some(specs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What fits into a table."""
    return specs if len(specs) <= 8 else [*specs[:7], {"name": f"... {len(specs) - 7} more"}]


def _spec_line(spec: dict[str, Any]) -> str:
    if "dtype" not in spec:
        return str(spec["name"])
    from rich.markup import escape

    return escape(f"{spec['name']} {spec['dtype']}[{', '.join(map(str, spec['shape']))}]")
