"""Makes the bundle's recipe importable: its scripts are plain modules that import each other as siblings."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.models.recipes import Recipe, importable

RECIPE = Path(__file__).parents[2] / "models" / "ancat-commands-en" / "recipe"
CLIPS = Path(__file__).parents[1] / "data" / "audio"


@pytest.fixture
def recipe() -> Iterator[Recipe]:
    """Import a module of the recipe by name."""
    with importable(RECIPE) as found:
        yield found


@pytest.fixture
def clips() -> Path:
    """Folder of the short real recordings."""
    return CLIPS
