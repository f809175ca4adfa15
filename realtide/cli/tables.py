"""What the commands on graphs and plans share: their options, and tables (ours)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from realtide.cli.errors import CommandError

if TYPE_CHECKING:
    from rich.table import Table

    from realtide.bundle import Bundle

Bundles = Annotated[str, typer.Argument(metavar="BUNDLE", help="Directory or name of a bundle.")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON document instead of a table.")]
Cache = Annotated[
    Path | None,
    typer.Option(help="Plan cache. Default: realtide/plans in the user's cache directory."),
]


def loaded_bundle(name: str) -> Bundle:
    """The bundle of a directory or name. Raises CommandError."""
    from realtide import bundle

    try:
        return bundle.load_bundle(name)
    except bundle.BundleError as error:
        raise CommandError(str(error)) from None


def table_of(*titles: str, numbers: tuple[str, ...] = ()) -> Table:
    """A plain table; the columns in `numbers` are right-aligned."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for title in titles:
        table.add_column(title, justify="right" if title in numbers else "left", overflow="fold")
    return table


def print_table(table: Table) -> None:
    """On standard output."""
    from rich.console import Console

    Console(highlight=False).print(table)
