"""Exported graphs brought into a precision in which a processor can run them (ours; needs ``export``)."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from realtide.bundle import Precision


def rewrite(graphs: Iterable[Path], precision: Precision, quantized: Iterable[str] = ()) -> None:
    """Replace float32 graphs by what judges a precision.

    Args:
        graphs: files that `export_program` wrote; they are overwritten. Nothing happens in ``float32``.
        precision: half precision becomes its host form (`host_form`), ``int8`` what is served.
        quantized: names, without suffix, of the graphs that have an int8 form; others stay as they are.

    Raises:
        ProgramError: a graph cannot be rewritten.
    """
    from realtide.engines.runtime.host_form import host_form
    from realtide.engines.runtime.int8 import quantize_graph
    from realtide.engines.runtime.narrow import narrow_graph

    chosen = set(quantized)
    with tempfile.TemporaryDirectory() as folder:
        for path in graphs:
            made = Path(folder) / path.name
            if precision in ("float16", "bfloat16"):
                narrow_graph(path, made, "float16" if precision == "float16" else "bfloat16")
                host_form(made, path)
            elif precision == "int8" and path.stem in chosen:
                quantize_graph(path, made)
                path.write_bytes(made.read_bytes())
