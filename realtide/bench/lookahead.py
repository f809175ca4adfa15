"""`realtide bench lookahead`: word errors against latency, for ANCAT over its dial and fixed lookahead."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from realtide.cli.errors import CommandError, UsageError

if TYPE_CHECKING:
    from realtide.bench.points import Point

_NEEDS = ("torch", "jiwer", "matplotlib", "onnxruntime")


def command(
    point: Annotated[
        list[str],
        typer.Option(
            metavar="LABEL:PATH[:bias=B,...]",
            help="A bundle or a recipe's checkpoint, and biases of its dial. Repeatable.",
        ),
    ],
    pool: Annotated[
        list[Path],
        typer.Option(exists=True, file_okay=False, help="Evaluation pool of the recipe. Repeatable."),
    ],
    out: Annotated[Path, typer.Option(help="Folder for lookahead.json, .md and .png.")],
    cmvn: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="Normalisation, for checkpoints.")
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="SentencePiece model, for checkpoints.")
    ] = None,
    repeat_gain: Annotated[
        float,
        typer.Option(min=0.0, help="Nats for a token that follows itself, for checkpoints."),
    ] = 0.0,
    reference: Annotated[
        str | None, typer.Option(help="Family to compare with the others. Default: the first adaptive one.")
    ] = None,
    node_cost: Annotated[
        float | None, typer.Option(min=0.0, help="Microseconds of a (layer, frame) node. Default: measured.")
    ] = None,
    node_bundle: Annotated[
        Path | None,
        typer.Option(
            exists=True, file_okay=False, help="Bundle to measure it with. Default: the first point's."
        ),
    ] = None,
    threads: Annotated[int, typer.Option(min=1, help="Threads of the recognition.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="The whole result as JSON.")] = False,
) -> None:
    """Sweep lookahead: word errors against algorithmic and user-perceived latency.

    Points whose labels differ only in a number at the end (chunked-4, chunked-8) make one curve.
    docs/benchmarks.md defines the latencies.

    Example: realtide bench lookahead --point ancat:models/ancat-commands-en:bias=-3,0,3 --pool POOL --out
        docs/sweep
    """
    from importlib.util import find_spec

    from realtide.bench.points import Point

    missing = [name for name in _NEEDS if find_spec(name) is None]
    if missing:
        raise CommandError(f"{', '.join(missing)} not installed: pip install 'realtide[cpu,export,train]'")
    chosen = [Point.parse(text) for text in point]
    if len({one.label for one in chosen}) < len(chosen):
        raise UsageError("two points have one label")
    families = {one.family for one in chosen}
    if reference is not None and reference not in families:
        raise UsageError(f"--reference {reference!r} must be one of {', '.join(sorted(families))}")
    node = _node(chosen, node_bundle) if node_cost is None else node_cost * 1e-6
    result = sweep(chosen, pool, out, cmvn, tokenizer, node, reference, threads, repeat_gain)
    if as_json:
        typer.echo(json.dumps(result, indent=2))
        return
    from realtide.bench.sweep import table

    typer.echo(table(result["points"]))
    for line in result["comparison"]:
        typer.echo(json.dumps(line))


def sweep(
    points: list[Point],
    folders: list[Path],
    out: Path,
    cmvn: Path | None,
    tokenizer: Path | None,
    node: float,
    reference: str | None = None,
    threads: int = 1,
    repeat_gain: float = 0.0,
) -> dict[str, Any]:
    """Evaluate all points, a node taking `node` seconds, and write lookahead.json, .md and .png into `out`.

    Raises CommandError: a model or a pool cannot be read.
    """
    import torch
    from rich.console import Console
    from rich.progress import Progress

    from realtide.bench import figure, recognize, report
    from realtide.bench.pools import load_pool
    from realtide.bench.sweep import Clock, Tally, compare, table
    from realtide.engines.ancat.frontend import FrontendConfig

    torch.set_num_threads(threads)
    pools = [load_pool(folder) for folder in folders]
    models = [(one, recognize.load_model(one.path, cmvn, tokenizer, repeat_gain)) for one in points]
    front = FrontendConfig()
    clock = Clock(
        frame=front.subsampling * front.shift_ms / 1000,
        overhang=(front.frame_ms - front.shift_ms) / 1000,
        node=node,
    )
    rows: list[dict[str, Any]] = []
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        size = sum(len(pool.utterances) for pool in pools)
        task = progress.add_task("", total=size * sum(len(one.biases) for one in points))
        for one, model in models:
            config = model.network.config
            for bias in one.biases:
                progress.update(task, description=f"{one.label} {bias:+g}")
                tally, begun = Tally(clock, config.layers), time.monotonic()
                for pool in pools:
                    found = recognize.recognize(model, pool, bias, lambda n: progress.advance(task, n))
                    tally.add(pool, found)
                rows.append(
                    {
                        "label": one.label,
                        "family": one.family,
                        "rule": config.rule,
                        "right": config.right,
                        "bias": bias,
                        **tally.figures(),
                        "seconds": round(time.monotonic() - begun, 1),
                    }
                )
    first = reference or next((row["family"] for row in rows if row["rule"] == "adaptive"), None)
    comparison = (
        [] if first is None else [line for f in ("mean_ms", "p90_ms") for line in compare(rows, first, f)]
    )
    result = report.envelope(
        "lookahead",
        {
            "pools": {pool.name: len(pool.utterances) for pool in pools},
            "frame_ms": clock.frame * 1000,
            "front_end_overhang_ms": clock.overhang * 1000,
            "node_cost_microseconds": round(node * 1e6, 3),
            "points": rows,
            "comparison": comparison,
        },
    )
    report.write(out / "lookahead.json", result)
    (out / "lookahead.md").write_text(table(rows), encoding="utf-8")
    figure.draw(rows, out / "lookahead.png")
    return result


def _node(points: list[Point], bundle: Path | None) -> float:
    """Seconds of a node: one figure for all points, so that they differ by their lookahead only."""
    from realtide.bench.audio import loop, recordings
    from realtide.bench.encoder import node_cost
    from realtide.bundle import BundleError

    bundles = [bundle] if bundle is not None else [one.path for one in points if one.path.is_dir()]
    if not bundles:
        raise UsageError("no point is a bundle: give --node-bundle, whose graph is timed, or --node-cost")
    try:
        return node_cost(bundles[0], loop(recordings(None), 16000), 16000)
    except BundleError as error:
        raise CommandError(str(error)) from None
