"""`realtide models plans`: the plan cache."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from realtide.cli.errors import CommandError, UsageError
from realtide.cli.tables import AsJson, Cache, print_table, table_of

if TYPE_CHECKING:
    from realtide.engines.runtime.plans import Entry

app = typer.Typer(help="Plans in the cache: list and remove them.", no_args_is_help=True)


@app.command("list")
def list_plans(cache: Cache = None, as_json: AsJson = False) -> None:
    """List the plans in the cache, with what each depends on.

    Example: realtide models plans list --json
    """
    store, entries = _entries(cache)
    if as_json:
        rows = [
            {
                "file": str(entry.path),
                "bytes": entry.size,
                "problem": entry.problem,
                "subject": entry.header.subject if entry.header else None,
                "created": entry.header.created if entry.header else None,
                "key": entry.header.key.to_dict() if entry.header else None,
            }
            for entry in entries
        ]
        typer.echo(json.dumps(rows, indent=2))
        return
    table = table_of("PLAN", "TENSORRT", "GPU", "SIZES", "SIZE", "FILE", numbers=("SIZE",))
    for entry in entries:
        head = entry.header
        columns = [entry.problem, "", "", ""]
        if head is not None:
            key = head.key
            columns = [
                head.subject,
                f"{key.flavour} {key.version}",
                f"{key.gpu} {key.capability}",
                key.profile,
            ]
        table.add_row(*columns, f"{entry.size / 1e6:.1f} MB", entry.path.name)
    print_table(table)
    typer.echo(f"{len(entries)} plans in {store}")


@app.command("remove")
def remove_plans(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="FILE...", help="Names as `list` shows them.")
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="Remove every plan.")] = False,
    cache: Cache = None,
) -> None:
    """Remove plans from the cache; whoever runs one keeps it until it ends.

    Example: realtide models plans remove --all
    """
    from realtide.engines.runtime.plan_file import PlanError
    from realtide.engines.runtime.plans import PlanCache

    if bool(names) == everything:
        raise UsageError("name the plans to remove, or say --all")
    store, entries = _entries(cache)
    for name in names or [entry.path.name for entry in entries]:
        try:
            PlanCache(store).remove(Path(name).name if Path(name).parent == store else name)
        except PlanError as error:
            raise CommandError(str(error)) from None
        typer.echo(f"removed {name}")


def _entries(cache: Path | None) -> tuple[Path, list[Entry]]:
    from realtide.engines.runtime.plan_file import PlanError
    from realtide.engines.runtime.plans import PlanCache

    store = PlanCache(cache)
    try:
        return store.directory, store.entries()
    except PlanError as error:
        raise CommandError(str(error)) from None
