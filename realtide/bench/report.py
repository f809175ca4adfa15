"""What every result carries, so that its figures can be judged later: where, with what, when (ours)."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

_PACKAGES = ("realtide", "onnxruntime", "numpy", "grpcio", "torch", "av")


def machine() -> dict[str, Any]:
    """Processor, cores (all, and those this process may use), memory, load of the last minute, system."""
    return {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "usable_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "load_average": round(os.getloadavg()[0], 2),
        "os": platform.platform(),
    }


def versions() -> dict[str, str]:
    """Python's version and those of installed packages that matter; imports none of them."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str:
    """The commit of the source tree, "-dirty" added if tracked files differ; "unknown" outside of one."""
    here = Path(__file__).resolve().parent
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty"],
            cwd=here, capture_output=True, text=True, check=False,
        )  # fmt: skip
    except OSError:
        return "unknown"
    return done.stdout.strip() or "unknown"


def command_line(arguments: Sequence[str] | None = None) -> str:
    """The command as it was typed, without the interpreter's and the program's directories."""
    program, *rest = sys.argv if arguments is None else arguments
    name = Path(program).name
    return " ".join(["realtide" if name == "__main__.py" else name, *rest])


def envelope(benchmark: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """A result: where, with what, when and by which command it was measured, then `values`."""
    return {
        "benchmark": benchmark,
        "command": command_line(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "machine": machine(),
        "versions": versions(),
        **values,
    }


def write(path: Path, result: Mapping[str, Any]) -> None:
    """Write a result as JSON; makes the directory."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or "unknown"
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
