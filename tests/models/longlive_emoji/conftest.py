"""Makes the recipe of the emoji bundle importable; its scripts import each other as siblings."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.models.recipes import Recipe, importable

BUNDLE = Path(__file__).parents[3] / "models" / "longlive-emoji"


@pytest.fixture(scope="module")
def emoji() -> Iterator[Recipe]:
    """Import a module of this recipe by name, for one file of tests."""
    with importable(BUNDLE / "recipe") as found:
        yield found


@pytest.fixture(scope="session")
def bundle() -> Path:
    """Directory of the bundle."""
    return BUNDLE
