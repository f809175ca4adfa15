"""Makes the recipe of the image bundle importable; its scripts import each other as siblings."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.models.recipes import Recipe, importable

BUNDLE = Path(__file__).parents[3] / "models" / "easycontrol-emoji"


@pytest.fixture(scope="module")
def drawn() -> Iterator[Recipe]:
    """Import a module of this recipe by name, for one file of tests."""
    with importable(BUNDLE / "recipe") as found:
        yield found


@pytest.fixture(scope="session")
def bundle() -> Path:
    """Directory of the bundle."""
    return BUNDLE
