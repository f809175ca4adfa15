"""Exported graphs brought into a precision in which a processor can run them (ours; needs ``export``)."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from realtide.bundle import Precision


def rewrite(
    graphs: Iterable[Path],
    precision: Precision,
    quantized: Iterable[str] = (),
    ranges: Mapping[str, Mapping[str, float]] | None = None,
    kept: Iterable[str] = (),
) -> None:
    """Replace float32 graphs by what judges a precision.

    Args:
        graphs: files that `export_program` wrote; they are overwritten. Nothing happens in ``float32``.
        precision: half precision and float8 become their host form (`host_form`), ``int8`` what is served.
        quantized: names, without suffix, of the graphs whose products are in int8 or float8; others stay as
            they are, or are in float16.
        ranges: of float8's activations, by the names of graphs: what `products.Measured` found.
        kept: parts of the names of weights that stay in float16.

    Raises:
        ProgramError: a graph cannot be rewritten.
    """
    from realtide.engines.runtime.fp8_graph import quantize_graph_float8
    from realtide.engines.runtime.host_form import host_form
    from realtide.engines.runtime.int8 import quantize_graph
    from realtide.engines.runtime.narrow import narrow_graph

    chosen, wide = set(quantized), tuple(kept)
    with tempfile.TemporaryDirectory() as folder:
        for path in graphs:
            made = Path(folder) / path.name
            if precision == "int8":
                if path.stem in chosen:
                    quantize_graph(path, made)
                    path.write_bytes(made.read_bytes())
            elif precision != "float32":
                if precision == "float8" and path.stem in chosen:
                    found = (ranges or {}).get(path.stem, {})
                    quantize_graph_float8(
                        path, made, found, select=lambda name: not any(part in name for part in wide)
                    )
                else:
                    narrow_graph(path, made, "bfloat16" if precision == "bfloat16" else "float16")
                host_form(made, path)
