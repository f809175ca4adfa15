"""The workflow runs what contributors run, in the Debian of the image."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
JOBS: dict[str, Any] = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())["jobs"]


def test_both_suites_are_run() -> None:
    last = {name: job["steps"][-1]["run"] for name, job in JOBS.items()}
    assert last == {"test": ".ci/run", "ops": "make ops-test"}
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111
    assert re.search(r"^ops-test:", (ROOT / "Makefile").read_text(), re.M)


def test_what_it_takes_from_elsewhere_is_pinned() -> None:
    base = re.search(r"^ARG PYTHON_BASE=(\S+)$", (ROOT / "Dockerfile").read_text(), re.M)
    assert base is not None
    for name, job in JOBS.items():
        assert job["container"]["image"] == base[1], name
        for step in job["steps"]:
            assert "uses" not in step or re.fullmatch(r"[\w./-]+@[0-9a-f]{40}", step["uses"]), name
