"""A bundle's own scores in each precision, as `benchmarks/precisions.py` measured them (ours)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from realtide.bundle import Bundle, Precision

FILE = Path(__file__).resolve().parents[1] / "benchmarks" / "results" / "precisions.json"
"""Those of the bundles here; an installation without the source tree has none."""


def identity(bundle: Bundle) -> dict[str, str]:
    """What scores belong to: the bundle's version and the digest of its weights."""
    return {
        "version": bundle.manifest.version,
        "weights_sha256": hashlib.sha256(bundle.weights.read_bytes()).hexdigest(),
    }


def entry_of(results: Mapping[str, Any], bundle: Bundle) -> dict[str, Any] | None:
    """The entry of a bundle in a result, if it is of this very version and these weights."""
    entry: dict[str, Any] | None = results.get("bundles", {}).get(bundle.manifest.name)
    wanted = identity(bundle)
    return entry if entry and all(entry.get(name) == value for name, value in wanted.items()) else None


def golden_of(bundle: Bundle, precision: Precision, file: Path = FILE) -> dict[str, Any] | str:
    """How far the golden cases of a bundle's engine are from their reference, or why that is not told."""
    engine = bundle.manifest.engine
    if not file.exists():
        return "not measured: `realtide replay CASE --backend onnxruntime --precision ...` does it"
    try:
        cases = json.loads(file.read_text("utf-8"))["golden"].get(engine)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file} holds no scores of precisions: {error!r}") from None
    if cases is None:
        return f"there are no golden cases of {engine}: its streams are held to the offline encoder"
    found: dict[str, Any] | None = cases.get(precision)
    return found if found is not None else f"not measured in {precision}"


def scores_of(bundle: Bundle, precision: Precision, file: Path = FILE) -> dict[str, Any] | str:
    """Scores by precision, float32's and the one wanted, or why there are none.

    Raises:
        ValueError: the file is there and is none of `benchmarks/precisions.py`.
    """
    needed = f"needs the data of {bundle.manifest.provenance.recipe}, and benchmarks/precisions.py"
    if not file.exists():
        return f"not measured: {needed}"
    try:
        entry = entry_of(json.loads(file.read_text("utf-8")), bundle)
        scores = entry["scores"] if entry else {}
        if precision in scores:
            return {name: scores[name] for name in ("float32", precision) if name in scores}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file} holds no scores of precisions: {error!r}") from None
    return f"not measured for these weights in {precision}: {needed}"
