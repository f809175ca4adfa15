"""Generate the Python stubs of `proto/` into `clients/python/realtide_client/v1`.

protoc places modules by the path of their .proto file, `realtide/v1`, which would collide with the server's
own package `realtide`. The stubs live inside the client instead, with relative imports, so that the client
installs alone. The descriptors keep their path, which is what reflection and other languages see.

Usage: python tools/generate_stubs.py [--out DIRECTORY] [--check]
"""

from __future__ import annotations

import argparse
import filecmp
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROTO = ROOT / "proto"
STUBS = ROOT / "clients" / "python" / "realtide_client" / "v1"
PATTERNS = ("*_pb2.py", "*_pb2.pyi", "*_pb2_grpc.py", "*_pb2_grpc.pyi")


def relative_imports(text: str) -> str:
    """Turn `from realtide.v1 import x_pb2` into `from . import x_pb2`."""
    return re.sub(r"^from realtide\.v1 import ", "from . import ", text, flags=re.MULTILINE)


def stub_files(directory: Path) -> dict[str, Path]:
    """Stubs in `directory` by name."""
    return {path.name: path for pattern in PATTERNS for path in sorted(directory.glob(pattern))}


def generate(out: Path) -> None:
    """Write the stubs of every .proto file to `out`.

    Raises:
        RuntimeError: protoc failed; the message is its own.
    """
    protos = sorted(PROTO.glob("realtide/v1/*.proto"))
    # The mypy plugins are executables beside the interpreter, which need not be on PATH.
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", "")))
    with tempfile.TemporaryDirectory() as temporary:
        outputs = [f"--{kind}_out={temporary}" for kind in ("python", "grpc_python", "mypy", "mypy_grpc")]
        command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{PROTO}", *outputs, *map(str, protos)]
        done = subprocess.run(command, env={**os.environ, "PATH": path}, capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"protoc failed:\n{done.stderr}")
        with_services = {p.stem for p in protos if re.search(r"^service ", p.read_text(), flags=re.MULTILINE)}
        out.mkdir(parents=True, exist_ok=True)
        for old in stub_files(out).values():
            old.unlink()
        for name, path_ in stub_files(Path(temporary) / "realtide" / "v1").items():
            stem, grpc, _ = name.partition("_pb2_grpc")
            if grpc and stem not in with_services:
                continue  # protoc writes an empty service module for files with messages only
            (out / name).write_text(relative_imports(path_.read_text()))


def differences(left: Path, right: Path) -> list[str]:
    """Names of stubs that are missing on one side or differ."""
    a, b = stub_files(left), stub_files(right)
    return sorted(
        n for n in a.keys() | b.keys() if n not in a or n not in b or not filecmp.cmp(a[n], b[n], False)
    )


def main(arguments: list[str] | None = None) -> int:
    """Generate the stubs, or with `--check` tell which ones are stale (exit status 1)."""
    parser = argparse.ArgumentParser(description="Generate the Python stubs of proto/.")
    parser.add_argument("--out", type=Path, default=STUBS, help="directory of the stubs")
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    options = parser.parse_args(arguments)
    if not options.check:
        generate(options.out)
        return 0
    with tempfile.TemporaryDirectory() as temporary:
        generate(Path(temporary))
        stale = differences(options.out, Path(temporary))
    if stale:
        sys.stderr.write(f"stubs are stale, run `make stubs`: {', '.join(stale)}\n")
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
