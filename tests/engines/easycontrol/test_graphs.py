"""An image bundle's graphs in half precision: near float32, within their sizes, and compiled by TensorRT."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest

from realtide.bundle import Bundle, load_bundle
from realtide.engines.easycontrol import graphs
from realtide.engines.runtime import int8
from realtide.engines.runtime.plan_key import PORTABLE
from realtide.engines.runtime.plans import PlanCache
from realtide.plan_building import build_plans
from realtide.variants import export_variant, report_variant
from tests import graph_samples


@pytest.fixture(scope="module")
def bundle(image_bundle: Path) -> Bundle:
    return load_bundle(image_bundle)


def test_half_precision_is_near_float32_and_compiles(bundle: Bundle, tmp_path: Path) -> None:
    found = export_variant(bundle, "float16", tmp_path / "half")
    report = report_variant(bundle, "float16", found)
    for row in report["programs"]:
        assert 0 < row["worst"] < 0.01, row  # random weights: coarser than trained ones
    files = {name: path for name, (path, _) in found.items()}
    cache = PlanCache(tmp_path / "plans")
    rows = build_plans(bundle, "float16", files, cache, gpu=PORTABLE, max_batch=4)
    assert [(row.program, row.problem) for row in rows if row.problem] == []
    assert {row.program for row in rows} == set(bundle.manifest.programs)
    (denoise,) = [row.key for row in rows if row.program == "denoise"]
    assert denoise is not None
    assert "batch=1:2:4" in denoise.profile


def test_int8_is_of_the_transformer_alone(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The small model's products are below what is worth it.
    monkeypatch.setattr(int8, "quantize_graph", functools.partial(int8.quantize_graph, min_elements=64))
    found = export_variant(bundle, "int8", tmp_path)
    assert {name for name, (_, how) in found.items() if how == "quantized"} == {"denoise", "remember"}
    assert {how for name, (_, how) in found.items() if name not in graphs.INT8} == {"float32"}
    for row in report_variant(bundle, "int8", found)["programs"]:
        assert (row["worst"] > 0) == (row["source"] == "quantized"), row
        assert row["within"], row


def test_samples_are_within_the_sizes_of_the_manifest(bundle: Bundle) -> None:
    graph_samples.check(bundle)
