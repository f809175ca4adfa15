"""`realtide bench gpu`: `python -m realtide.gpu` as a command of the house (ours)."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from realtide.gpu.__main__ import main


def command(
    device: Annotated[str, typer.Option(help="cuda, cuda:N or cpu.")] = "cuda",
    small: Annotated[
        bool, typer.Option("--small", help="Tiny models: tries the program, measures nothing.")
    ] = False,
    compiled: Annotated[
        bool, typer.Option("--compiled", help="Compile the modules first (torch.compile).")
    ] = False,
    budget: Annotated[float, typer.Option(help="Seconds for everything.")] = 480.0,
    goldens: Annotated[
        list[Path] | None, typer.Option(metavar="DIR", help="More golden cases; repeatable.")
    ] = None,
    case: Annotated[str, typer.Option(metavar="PATTERN", help="Replay only cases of this name.")] = "*",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")] = False,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the result as JSON.")] = None,
) -> None:
    """Replay golden cases on a GPU, then time the models beside what it can do at best.

    Needs PyTorch. Exits with 1 if a case is not what the reference computes or a part failed, with 2 if
    nothing could be checked. docs/gpu.md says what is measured.

    Example: realtide bench gpu --json --out benchmarks/results/gpu.json
    """
    arguments = ["--device", device, "--budget", str(budget), "--case", case]
    for directory in goldens or []:
        arguments += ["--goldens", str(directory)]
    arguments += ["--small"] if small else []
    arguments += ["--compiled"] if compiled else []
    arguments += ["--json"] if as_json else []
    arguments += ["--out", str(out)] if out is not None else []
    raise typer.Exit(main(arguments))
