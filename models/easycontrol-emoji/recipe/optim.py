"""Muon, as the recipe of longlive-emoji has it: one file for both."""

from __future__ import annotations

import importlib.util
from pathlib import Path

_PATH = Path(__file__).resolve().parents[2] / "longlive-emoji" / "recipe" / "optim.py"
_SPEC = importlib.util.spec_from_file_location("longlive_emoji_optim", _PATH)
assert _SPEC is not None
assert _SPEC.loader is not None
_MODULE = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(_MODULE)

Muon = _MODULE.Muon
