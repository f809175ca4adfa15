"""Render the Kustomize base from the Helm chart, for those who do not use Helm.

Usage: python tools/render_kustomize.py [--check]

`--check` writes nothing and exits with 1 if the base is not what the chart makes now. Needs Helm
(tools/ops_tools.py installs it).
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

from tools.ops_tools import tool  # noqa: E402

BASE = ROOT / "deploy" / "kustomize" / "base"
VERSION = "1.31.0"  # the chart looks at it for versions of APIs


def manifests() -> list[dict[str, Any]]:
    """What the chart makes, without its tests and its marks of Helm. Raises CalledProcessError."""
    done = subprocess.run(
        [
            tool("helm"),
            "template",
            "realtide",
            ROOT / "deploy/helm/realtide",
            f"--values={ROOT / 'deploy/kustomize/values.yaml'}",
            f"--kube-version={VERSION}",
            "--skip-tests",
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    found = [item for item in yaml.safe_load_all(done.stdout) if item]
    for item in found:
        for labels in (
            item["metadata"]["labels"],
            item.get("spec", {}).get("template", {}).get("metadata", {}).get("labels", {}),
        ):
            for name in ("helm.sh/chart", "app.kubernetes.io/managed-by"):
                labels.pop(name, None)
    return found


def contents() -> dict[str, str]:
    """The files of the base, by name."""
    files = {}
    for item in manifests():
        name = f"{item['kind'].lower()}-{item['metadata']['name']}.yaml"
        files[name] = yaml.safe_dump(item, sort_keys=False, width=120)
    base = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "resources": sorted(files),
    }
    files["kustomization.yaml"] = yaml.safe_dump(base, sort_keys=False)
    head = "# Rendered from deploy/helm/realtide by tools/render_kustomize.py; change the chart instead.\n"
    return {name: head + text for name, text in files.items()}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    check = parser.parse_args(arguments).check
    files = contents()
    there = {path.name: path.read_text() for path in BASE.glob("*")}
    if check:
        if there != files:
            stale = sorted(name for name in {*there, *files} if there.get(name) != files.get(name))
            sys.stderr.write(f"python tools/render_kustomize.py writes these anew: {', '.join(stale)}\n")
        return int(there != files)
    BASE.mkdir(parents=True, exist_ok=True)
    for name in {*there} - {*files}:
        (BASE / name).unlink()
    for name, text in files.items():
        (BASE / name).write_text(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
