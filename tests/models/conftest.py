"""Makes the bundle's recipe importable: its scripts are plain modules that import each other as siblings."""

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

RECIPE = Path(__file__).parents[2] / "models" / "ancat-commands-en" / "recipe"
CLIPS = Path(__file__).parents[1] / "data" / "audio"


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """Import a module of the recipe by name; the import path is as before after the test."""
    monkeypatch.syspath_prepend(RECIPE)
    return importlib.import_module


@pytest.fixture
def clips() -> Path:
    """Folder of the short real recordings."""
    return CLIPS
