"""Every bundle below models/: its graphs in other precisions are near float32, and TensorRT compiles them."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest

from realtide import variants
from realtide.bundle import Bundle, load_bundle
from realtide.engines.runtime.plan_key import PORTABLE
from realtide.engines.runtime.plans import PlanCache
from realtide.engines.runtime.quality import Sample
from realtide.plan_building import build_plans
from realtide.recorded_work import recorded
from realtide.variants import (
    BOUNDS,
    WIDER,
    VariantError,
    engine_graphs,
    export_variant,
    report_variant,
)
from tests import graph_samples

MODELS = Path(__file__).resolve().parents[1] / "models"
BUNDLES = sorted(path.parent.name for path in MODELS.glob("*/manifest.yaml"))


@functools.cache
def work_of(directory: Path) -> Any:
    return recorded(load_bundle(directory))


@pytest.fixture(autouse=True)
def _work_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bundle's work does not depend on the precision: it is done once, and not in every test."""
    monkeypatch.setattr(variants, "recorded", lambda bundle, recordings: work_of(bundle.directory))


@pytest.fixture(scope="module", params=BUNDLES)
def half(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Bundle, dict[str, Path]]:
    """A bundle and its graphs in half precision."""
    bundle = load_bundle(MODELS / request.param)
    found = export_variant(bundle, "float16", tmp_path_factory.mktemp(request.param))
    return bundle, {name: path for name, (path, _) in found.items()}


def test_bundles_are_found() -> None:
    assert {"ancat-commands-en", "longlive-emoji"} <= set(BUNDLES)


def test_onnxruntime_runs_the_graphs_within_the_reports_bounds(half: tuple[Bundle, dict[str, Path]]) -> None:
    bundle, paths = half
    report = report_variant(bundle, "float16", {name: (path, "narrowed") for name, path in paths.items()})
    assert set(paths) == set(bundle.manifest.programs)
    never_called = {"longlive": {"encode_first", "encode_next"}}.get(bundle.manifest.engine, set())
    for row in report["programs"]:
        assert row["calls"]["random"] >= 1
        if row["program"] in never_called:
            assert (row["calls"]["recorded"], row["worst_recorded"]) == (0, None)
        else:
            assert row["calls"]["recorded"] >= 1
            assert 0 < row["worst_recorded"] <= row["worst"]
        assert row["outputs"], row["program"]
        assert row["within"], row
        assert row["worst"] <= row["bound"]
        assert row["bound"] == WIDER.get(
            (bundle.manifest.engine, row["program"], "float16"), BOUNDS["float16"]
        )
        # They are other graphs: half precision does not come out exactly.
        assert any(output["relative_l2"] > 0 for output in row["outputs"]), row["program"]
    assert report["within"]
    assert report["bound"] == BOUNDS["float16"]
    assert report["recorded_work"].split()[0] in ("8", "a", "4"), report["recorded_work"]


def test_tensorrt_compiles_every_graph(half: tuple[Bundle, dict[str, Path]], tmp_path: Path) -> None:
    bundle, paths = half
    cache = PlanCache(tmp_path / "plans")
    rows = build_plans(bundle, "float16", paths, cache, gpu=PORTABLE, max_batch=4)
    for row in rows:
        assert (row.problem, row.fresh) == ("", True), row
        assert row.size > 1000
    # The encoder's step of fixed shapes stands for the one that works on what it finds.
    left_out = {"ancat": {"encoder"}}.get(bundle.manifest.engine, set())
    assert {row.program for row in rows} == set(paths) - left_out
    again = build_plans(bundle, "float16", paths, cache, gpu=PORTABLE, max_batch=4)
    assert [row.fresh for row in again] == [False] * len(rows)
    assert {entry.header.subject for entry in cache.entries() if entry.header} == {
        row.subject for row in again
    }


@pytest.mark.parametrize("name", BUNDLES)
def test_sizes_and_samples_are_of_the_bundles_graphs(name: str) -> None:
    graph_samples.check(load_bundle(MODELS / name))


@pytest.mark.parametrize(
    "name", [name for name in BUNDLES if "int8" in load_bundle(MODELS / name).manifest.precisions]
)
def test_int8_is_within_its_bound(name: str, tmp_path: Path) -> None:
    bundle = load_bundle(MODELS / name)
    report = report_variant(bundle, "int8", export_variant(bundle, "int8", tmp_path))
    assert report["within"], report
    assert max(row["worst"] for row in report["programs"]) > 0.005  # and is no float32


@pytest.mark.parametrize("name", BUNDLES)
def test_bfloat16_is_within_its_bound_and_further_off_than_float16(name: str, tmp_path: Path) -> None:
    bundle = load_bundle(MODELS / name)
    report = report_variant(bundle, "bfloat16", export_variant(bundle, "bfloat16", tmp_path))
    assert report["within"], report
    # A mantissa of 7 bits, not 10: nothing is as near as in float16.
    assert all(row["worst"] > 0.002 for row in report["programs"]), report


def test_a_report_says_what_was_not_measured(tmp_path: Path) -> None:
    bundle = load_bundle(MODELS / "ancat-commands-en")
    found = export_variant(bundle, "bfloat16", tmp_path)
    report = report_variant(bundle, "bfloat16", found, measured=False)
    assert {row["not_measured"] for row in report["programs"]} == {"as asked"}
    assert report["within"] is None
    assert report["scores"] == "not asked for"
    assert report["recorded_work"] == "not run: as asked"
    path = variants.write_report(report, tmp_path)
    assert json.loads(path.read_text()) == report


def test_what_is_out_of_bounds_is_not_within(tmp_path: Path) -> None:
    """Another program's graph in its place: the report must not let it pass."""
    bundle = load_bundle(MODELS / "longlive-emoji")
    found = export_variant(bundle, "int8", tmp_path)
    report = report_variant(bundle, "float16", {"denoise": found["denoise"]})
    assert not report["within"]


def test_what_only_real_work_shows_is_out_of_bounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An int8 graph in a float16 one's place, without a random call."""
    bundle = load_bundle(MODELS / "easycontrol-emoji")
    found = export_variant(bundle, "int8", tmp_path)
    monkeypatch.setattr(engine_graphs(bundle), "samples", lambda manifest: {"denoise": Sample([], {})})
    (row,) = report_variant(bundle, "float16", {"denoise": found["denoise"]})["programs"]
    assert row["calls"] == {"recorded": 6, "random": 0}
    assert row["worst"] == row["worst_recorded"] > BOUNDS["float16"]
    assert not row["within"]


def test_precisions_that_cannot_be_had_are_refused(tmp_path: Path) -> None:
    bundle = load_bundle(MODELS / "ancat-commands-en")
    programs = {name: {"float32": graphs["float32"]} for name, graphs in bundle.manifest.programs.items()}
    plain = Bundle(bundle.directory, bundle.manifest.model_copy(update={"programs": programs}))
    with pytest.raises(VariantError, match="int8 must be calibrated on recordings"):
        export_variant(plain, "int8", tmp_path)
    with pytest.raises(VariantError, match="has no graphs"):
        export_variant(
            Bundle(bundle.directory, bundle.manifest.model_copy(update={"programs": {}})), "float16", tmp_path
        )
    odd = Bundle(bundle.directory, bundle.manifest.model_copy(update={"engine": "other"}))
    with pytest.raises(VariantError, match="engine must be one of ancat, easycontrol, longlive, not 'other'"):
        export_variant(odd, "float16", tmp_path)
