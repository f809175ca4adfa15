"""`realtide models`: which bundles there are, whether their files are sound, and bundles of public models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from realtide.cli import convert, fetch, graphs, inspect, plans
from realtide.cli.errors import CommandError

app = typer.Typer(
    help="Model bundles: list, verify, fetch and make them, and compile their graphs.", no_args_is_help=True
)
app.add_typer(convert.app, name="convert")
app.command("fetch")(fetch.command)
app.command("export")(graphs.export)
app.command("build")(graphs.build)
app.command("inspect")(inspect.command)
app.add_typer(plans.app, name="plans")
Kind = Literal["speech", "video", "image"]
KINDS: tuple[Kind, ...] = ("speech", "video", "image")
_ENGINES: dict[str, Kind] = {"longlive": "video", "easycontrol": "image"}
AsJson = Annotated[bool, typer.Option("--json", help="One JSON list.")]


@app.command("list")
def list_bundles(
    place: Annotated[
        list[Path] | None,
        typer.Argument(help="Bundles or directories of bundles. Default: REALTIDE_MODELS, ./models."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List the model bundles that commands find, with version, engine, precisions and licence.

    Example: realtide models list --json
    """
    from realtide import bundle

    rows: list[dict[str, Any]] = []
    problems: list[str] = []
    for name, directory in _found(place).items():
        try:
            manifest = bundle.load_manifest(directory)
        except bundle.BundleError as error:
            problems.append(str(error))
            continue
        rows.append(
            {
                "name": name,
                "version": manifest.version,
                "engine": manifest.engine,
                "precisions": list(manifest.precisions),
                "licence": manifest.licence,
                "bytes": sum(file.size for file in manifest.files),
                "directory": str(directory),
                "description": manifest.description,
            }
        )
    if as_json:
        typer.echo(json.dumps(rows, indent=2, ensure_ascii=False))
    else:
        _table(rows)
    if problems:
        raise CommandError("; ".join(problems))


@app.command("verify")
def verify_bundles(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="BUNDLE...", help="Directories or names. Default: all.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Compare every file of model bundles with the size and SHA-256 in their manifests.

    Exits with 1 if anything is missing, altered or not listed.

    Example: realtide models verify ancat-commands-en
    """
    from realtide import bundle

    reports = [_verified(name) for name in names or map(str, _found(None).values())]
    if as_json:
        typer.echo(json.dumps(reports, indent=2, ensure_ascii=False))
    else:
        for report in reports:
            problems = report["problems"]
            typer.echo(f"{report['name']}: {'ok' if not problems else f'{len(problems)} problems'}")
            for problem in problems:
                typer.echo(f"  {problem}")
    if not reports:
        raise CommandError(f"there is no model bundle in {', '.join(map(str, bundle.search_path()))}")
    bad = [str(report["name"]) for report in reports if report["problems"]]
    if bad:
        raise CommandError(f"not what the manifest says: {', '.join(bad)}")


def resolve(name: str) -> Path:
    """The directory of a bundle given by path or name. Raises CommandError."""
    from realtide import bundle

    try:
        return bundle.resolve(name)
    except bundle.BundleError as error:
        raise CommandError(str(error)) from None


def default(kind: Kind = "speech") -> Path:
    """The bundle that a command serves if none is named: the first of its kind. Raises CommandError."""
    from realtide import bundle

    for directory in _found(None).values():
        if _ENGINES.get(_engine(directory), "speech") == kind:
            return directory
    places = ", ".join(map(str, bundle.search_path()))
    raise CommandError(f"there is no {kind} bundle in {places}: name one with --bundle")


def _engine(directory: Path) -> str:
    """The engine that a manifest names; empty if it cannot be read, which the server will say better."""
    import yaml

    try:
        data = yaml.safe_load((directory / "manifest.yaml").read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return ""
    return str(data.get("engine", "")) if isinstance(data, dict) else ""


def _found(places: list[Path] | None) -> dict[str, Path]:
    from realtide import bundle

    for place in places or []:
        if not place.is_dir():
            raise CommandError(f"there is no directory {place}")
    try:
        return bundle.find_bundles(places or None)
    except bundle.BundleError as error:
        raise CommandError(str(error)) from None


def _verified(name: str) -> dict[str, Any]:
    """Verify one bundle; a bar on standard error shows how far it is if that is a terminal."""
    from rich.console import Console
    from rich.progress import Progress

    from realtide import bundle

    directory = resolve(name)
    try:
        loaded = bundle.load_bundle(directory)
    except bundle.BundleError as error:
        return {"name": directory.name, "directory": str(directory), "problems": [str(error)]}
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(directory.name, total=sum(file.size for file in loaded.manifest.files))
        done = 0

        def on_file(file: bundle.BundleFile) -> None:
            nonlocal done
            progress.update(task, completed=done, description=file.path)
            done += file.size

        problems = bundle.verify(loaded, on_file)
    return {"name": directory.name, "directory": str(directory), "problems": problems}


def _table(rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for title in ("NAME", "VERSION", "ENGINE", "PRECISIONS", "LICENCE", "SIZE", "DIRECTORY"):
        table.add_column(title, justify="right" if title == "SIZE" else "left", overflow="fold")
    for row in rows:
        table.add_row(
            row["name"],
            row["version"],
            row["engine"],
            " ".join(row["precisions"]),
            row["licence"],
            f"{row['bytes'] / 1e6:.1f} MB",
            row["directory"],
        )
    Console(highlight=False).print(table)
