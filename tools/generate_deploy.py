"""Write what is generated below `deploy/`: dashboards, the chart's copies of them and of rules, its schema.

Usage: python tools/generate_deploy.py [--check]

A Helm chart can only read files inside itself, so it has copies of the rules and the dashboards. The schema
of its values takes the server's settings from `ServerConfig`, so that a setting with a wrong name or out of
its range is refused before it reaches the cluster. `--check` writes nothing and exits with 1 if a file is not
up to date.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(ROOT / "clients" / "python")]

from tools import chart_schema  # noqa: E402
from tools.dashboards import image, overview, panels, speech, video  # noqa: E402

BOARDS = (overview.BOARD, speech.BOARD, video.BOARD, image.BOARD)
RULES = ("recording.yaml", "alerts.yaml")
CHART = Path("deploy/helm/realtide")


def contents() -> dict[Path, str]:
    """Every generated file, by its path below the repository."""
    files = {CHART / "values.schema.json": chart_schema.render()}
    for board in BOARDS:
        text = panels.render(board)
        files[Path("deploy/grafana") / f"{board.name}.json"] = text
        files[CHART / "files" / "dashboards" / f"{board.name}.json"] = text
    for name in RULES:
        files[CHART / "files" / "rules" / name] = (ROOT / "deploy/prometheus" / name).read_text()
    return files


def stale(root: Path, files: dict[Path, str]) -> list[str]:
    """Files below `root` that are missing, differ, or are left over in a folder of generated ones."""
    found = [
        str(path)
        for path, text in files.items()
        if not (root / path).is_file() or (root / path).read_text() != text
    ]
    for folder in {path.parent for path in files if path.name != "values.schema.json"}:
        found += [
            str(path.relative_to(root))
            for path in (root / folder).glob("*.*")
            if path.relative_to(root) not in files
        ]
    return sorted(found)


def main(arguments: Sequence[str] | None = None, root: Path = ROOT) -> int:
    """Run the command; the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    check = parser.parse_args(arguments).check
    files = contents()
    if check:
        old = stale(root, files)
        if old:
            sys.stderr.write(f"run `make deploy`, these are not up to date: {', '.join(old)}\n")
        return 1 if old else 0
    for path, text in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
