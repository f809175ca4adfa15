"""Imports modules of one bundle's recipe, though another's has modules of the same names."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

Recipe = Callable[[str], Any]


@contextmanager
def importable(directory: Path) -> Iterator[Recipe]:
    """Import a recipe's modules by name, as siblings do; import path and modules are as before afterwards."""
    names = {path.stem for path in directory.glob("*.py")}
    hidden = {name: sys.modules.pop(name) for name in names if name in sys.modules}
    sys.path.insert(0, str(directory))
    importlib.invalidate_caches()
    try:
        yield importlib.import_module
    finally:
        sys.path.remove(str(directory))
        for name in names:
            sys.modules.pop(name, None)
        sys.modules.update(hidden)
