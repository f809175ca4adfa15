"""Where model bundles are looked for when none is named."""

from __future__ import annotations

from pathlib import Path

import realtide
from realtide.cli.errors import CommandError

MANIFEST = "manifest.yaml"


def places() -> list[Path]:
    """Directories that may hold bundles: `./models`, then the source tree's own."""
    own = Path(realtide.__file__).resolve().parent.parent / "models"
    return list(dict.fromkeys((Path.cwd() / "models", own)))


def found() -> list[Path]:
    """Every bundle in the first place that has any, by name."""
    for place in places():
        bundles = sorted(path.parent for path in place.glob(f"*/{MANIFEST}"))
        if bundles:
            return bundles
    return []


def resolve(name: str) -> Path:
    """The directory of a bundle given by path, or by name in one of `places`.

    Raises:
        CommandError: There is none.
    """
    for path in (Path(name), *(place / name for place in places())):
        if (path / MANIFEST).is_file():
            return path
    looked = ", ".join(str(place) for place in places())
    raise CommandError(f"there is no model bundle {name!r}: neither a directory nor in {looked}")
