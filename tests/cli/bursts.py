"""Loads the burst engine like the engine of a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.server.engine import BurstEngine


def load(bundle: Path, *, slots: int, **_: Any) -> BurstEngine:
    if bundle.name == "broken":
        raise ValueError("this bundle is broken")
    return BurstEngine(slots)
