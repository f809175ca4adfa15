"""onnxruntime reports nothing to anybody."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

# onnxruntime says that it cannot keep its identifier, if it wants to keep one.
COMPLAINT = "telemetry device ID"


def imported(module: str, tmp_path: Path, **environment: str) -> str:
    """What importing `module` says where no identifier can be kept."""
    # Little of the environment goes along: onnxruntime is silent by itself where a variable tells it of CI.
    kept = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH") if name in os.environ}
    home = tmp_path / "file"
    home.touch()  # a home that no directory can be made in, not even by root
    done = subprocess.run(
        [sys.executable, "-c", f"import {module}"],
        capture_output=True,
        text=True,
        check=True,
        env={**kept, "HOME": str(home), **environment},
    )
    return done.stdout + done.stderr


def test_telemetry_is_off_before_onnxruntime_starts(tmp_path: Path) -> None:
    assert COMPLAINT not in imported("realtide.engines.runtime.ort", tmp_path)


def test_who_wants_it_can_turn_it_on(tmp_path: Path) -> None:
    """And so the test above can fail."""
    assert COMPLAINT in imported("realtide.engines.runtime.ort", tmp_path, ORT_DISABLE_TELEMETRY="0")
