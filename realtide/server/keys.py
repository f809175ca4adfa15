"""Make, list and revoke API keys: ``python -m realtide.server.keys``.

Not one of the `realtide` commands, because it is for whoever runs servers, works on a file and needs none
running. A key is printed once, when it is made; the file holds its hash (keyfile.py).
"""

from __future__ import annotations

import os
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated

import typer

from realtide.server import keyfile
from realtide.server.config import ENV_PREFIX, ConfigError

app = typer.Typer(
    name="python -m realtide.server.keys",
    help="API keys of a server (setting api_key_file). A running server reads a changed file by itself.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
File = Annotated[Path, typer.Argument(help="File of hashed keys.", dir_okay=False)]


@app.command()
def new(
    file: File,
    note: Annotated[str, typer.Option(help="Whose key it is.")] = "",
    services: Annotated[str, typer.Option(help="What it may use, with commas between.")] = ",".join(
        keyfile.SERVICES
    ),
    sessions: Annotated[
        int | None, typer.Option(min=0, help="Sessions at once; 0: no limit. Default: the server's.")
    ] = None,
    opens_per_minute: Annotated[
        float | None, typer.Option(min=0, help="Sessions begun a minute; 0: no limit. Default: the server's.")
    ] = None,
    days: Annotated[float | None, typer.Option(min=0, help="Days until it expires. Default: never.")] = None,
) -> None:
    """Make a key, add its hash to FILE and print it. It cannot be printed again.

    With REALTIDE_API_KEY_PEPPER in the environment its hash is keyed; the server needs the same setting.
    """
    key = keyfile.Key.new()
    entry = {
        "id": key.id,
        "hash": key.hash(os.environ.get(ENV_PREFIX + "API_KEY_PEPPER") or None),
        "note": note,
        "services": [name.strip() for name in services.split(",") if name.strip()],
        "sessions": sessions,
        "opens_per_minute": opens_per_minute,
        "expires": None if days is None else datetime.now(UTC).replace(microsecond=0) + timedelta(days=days),
    }
    entries = keyfile.entries_of(file) if file.exists() else ()
    keyfile.write(file, (*entries, keyfile.parse_entry(entry)))
    typer.echo(key.text)


@app.command("list")
def list_(file: File) -> None:
    """One line a key: id, until when it holds, services, quotas and note. No secrets."""
    now = datetime.now(UTC)
    for entry in keyfile.entries_of(file):
        until = "never expires" if entry.expires is None else f"until {entry.expires:%Y-%m-%d %H:%M %Z}"
        typer.echo(
            "  ".join(
                [
                    entry.id,
                    "expired" if entry.expired(now) else until,
                    ",".join(entry.services),
                    f"sessions {_limit(entry.sessions)}, a minute {_limit(entry.opens_per_minute)}",
                    entry.note,
                ]
            ).rstrip()
        )


@app.command()
def revoke(
    file: File, key: Annotated[str, typer.Argument(metavar="ID", help="Of `list`, or the key itself.")]
) -> None:
    """Remove a key. Servers that read FILE end its sessions within seconds."""
    parsed = keyfile.Key.parse(key)
    name = key if parsed is None else parsed.id
    entries = keyfile.entries_of(file)
    left = [entry for entry in entries if entry.id != name]
    if len(left) == len(entries):
        raise ConfigError(f"{file} has no key with the id {name}")
    keyfile.write(file, left)


def _limit(value: float | None) -> str:
    return "as the server" if value is None else "unlimited" if value == 0 else f"{value:g}"


def main() -> None:
    """Entry point: exits with 0 (done), 1 (failed) or 2 (called wrongly)."""
    try:
        app()
    except (ConfigError, OSError) as error:
        typer.echo(f"realtide: {'; '.join(str(error).splitlines())}", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
