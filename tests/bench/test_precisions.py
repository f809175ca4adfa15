"""Bundles that compute half precision on a processor, and the table of scores."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from realtide.bench import precisions
from realtide.bench.precisions import ROWS, host_bundle, table
from realtide.bundle import Precision, load_bundle, verify
from realtide.engines.longlive.engine import load
from realtide.engines.runtime.golden import NARROW
from realtide.golden_precisions import exceeded
from realtide.precision_scores import FILE, entry_of
from tests.engines.longlive.test_engine import OPTIONS, run

ROOT = Path(__file__).resolve().parents[2]
MODELS = ROOT / "models"


@pytest.mark.parametrize(("precision", "least", "most"), [("float16", 1e-5, 0.5), ("bfloat16", 1e-3, 4)])
def test_a_host_bundle_is_served_as_any_other(
    video_bundle: Path, tmp_path: Path, precision: Precision, least: float, most: float
) -> None:
    made = host_bundle(load_bundle(video_bundle), precision, tmp_path)
    assert verify(load_bundle(made)) == []
    frames = []
    for directory in (video_bundle, made):
        engine = load(directory, slots=1, precision="fp32")
        frames.append(np.stack(run(engine, [engine.open(OPTIONS)])[0]).astype(float))
        engine.close()
    far = np.abs(frames[0] - frames[1])[:3].mean()  # of the first block, in levels of 255
    assert least < far < most


def test_the_table_shows_what_there_is() -> None:
    scores = {"edges": 0.51944, "edges_two_conditions": 0.4983}
    entry = {
        "engine": "easycontrol", "version": "1.1.0", "scores": {"float32": scores, "int8": {"edges": 0.5}},
        "times": [{"what": "a step", "int8_by_float32": 0.701}],
    }  # fmt: skip
    lines = table({"bundles": {"small": entry}}, ("float32", "int8")).splitlines()
    assert lines[0] == "| Bundle | Score | float32 | int8 |"
    assert lines[2] == "| `small` 1.1.0 | edges met, IoU | 0.519 | 0.500 |"
    assert lines[3] == "|  | the same under two conditions | 0.498 |  |"
    assert lines[-1] == "|  | time of a step over float32's | 1 | 0.70 |"


def test_what_is_committed_is_of_the_bundles_here_and_stands_in_the_documentation() -> None:
    results = json.loads(FILE.read_text("utf-8"))
    for path in MODELS.glob("*/manifest.yaml"):
        bundle = load_bundle(path.parent)
        entry = entry_of(results, bundle)
        assert entry is not None, f"{bundle.manifest.name}: measure anew, see benchmarks/precisions.py"
        for _, place, _ in ROWS[bundle.manifest.engine]:
            for name in ("float32", "int8"):
                value = entry["scores"][name]
                for key in place:
                    value = value[key]
                assert isinstance(value, float), (name, place)
    for engine in ("easycontrol", "longlive"):
        for found in (results["golden"][engine][name] for name in ("float32", *NARROW)):
            assert exceeded(found) == []
    columns = ("float32", "int8", "float16", "bfloat16", "float8")
    text = (ROOT / "docs" / "benchmarks.md").read_text("utf-8")
    assert precisions.table(results, columns) in text
    assert precisions.golden_table(results, columns) in text
