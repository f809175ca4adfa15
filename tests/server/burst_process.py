"""What an engine's process of the tests loads: the burst engine, or something that goes wrong."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from realtide.bundle import BundleError
from realtide.server.engine_process import Load
from tests.server.engine import BurstEngine


def load(bundle: Path, *, goes_wrong: str = "", **options: Any) -> BurstEngine:
    """As an engine's `load`."""
    if goes_wrong == "refuses":
        raise BundleError(f"{bundle}: weights: none")
    if goes_wrong == "dies":
        os._exit(7)
    engine = BurstEngine(**options)
    if goes_wrong == "imports torch":
        assert "torch" not in sys.modules
        assert "grpc" not in sys.modules
    if goes_wrong == "breaks":
        engine.max_batch = 0  # the executor divides by the size of a batch
    return engine


def loading(**options: Any) -> Load:
    """What such a process is told."""
    return Load("tests.server.burst_process", Path("bursts"), options, "info", "json")
