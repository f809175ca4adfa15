"""Makes the recipe of the image bundle importable; its scripts import each other as siblings."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

BUNDLE = Path(__file__).parents[3] / "models" / "easycontrol-emoji"
RECIPE = BUNDLE / "recipe"


@pytest.fixture(scope="session")
def drawn() -> Iterator[Callable[[str], Any]]:
    """Import a module of this recipe by name; import path and modules are as before afterwards.

    Another bundle's recipe has modules of the same names.
    """
    names = {path.stem for path in RECIPE.glob("*.py")}
    hidden = {name: sys.modules.pop(name) for name in names if name in sys.modules}
    sys.path.insert(0, str(RECIPE))
    yield importlib.import_module
    sys.path.remove(str(RECIPE))
    for name in names:
        sys.modules.pop(name, None)
    sys.modules.update(hidden)


@pytest.fixture(scope="session")
def bundle() -> Path:
    """Directory of the bundle."""
    return BUNDLE
