"""Exporting once for several replays of one case: it takes most of their time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from realtide.engines.runtime.export import export_program


@contextmanager
def exported_once(exporter: ModuleType) -> Iterator[dict[str, bytes]]:
    """While this lasts, a graph that an engine's exporter wrote before is written as it was; all by name."""
    kept: dict[str, bytes] = {}

    def once(module: Any, examples: Any, state: Any, outputs: Any, path: Path, **options: Any) -> None:
        if path.name in kept:
            path.write_bytes(kept[path.name])
            return
        export_program(module, examples, state, outputs, path, **options)
        kept[path.name] = path.read_bytes()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exporter, "export_program", once)
        yield kept
