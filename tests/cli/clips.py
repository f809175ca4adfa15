"""Loads the clip engine like the engine of a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.server.video_engine import ClipEngine


def load(bundle: Path, *, slots: int, **_: Any) -> ClipEngine:
    return ClipEngine(slots, model=bundle.name, delay=0.005, max_prompt_tokens=32)
