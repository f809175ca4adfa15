"""Products in float8 of the bundles below models/: calibrated, near float32, compiled, refused elsewhere."""

from __future__ import annotations

from pathlib import Path

import pytest

from realtide import float8
from realtide.bundle import Bundle, load_bundle
from realtide.engines.runtime.plan_key import Gpu
from realtide.engines.runtime.plans import PlanCache
from realtide.engines.runtime.program import ProgramError
from realtide.plan_building import BundlePlans, build_plans
from realtide.variants import BOUNDS, Source, VariantError, engine_graphs, export_variant, report_variant

MODELS = Path(__file__).resolve().parents[1] / "models"
ADA = Gpu("NVIDIA L4", "8.9", "570.86")

Exported = tuple[Bundle, dict[str, tuple[Path, Source]]]


@pytest.fixture(scope="module", params=["longlive-emoji", "easycontrol-emoji"])
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    bundle = load_bundle(MODELS / request.param)
    return bundle, export_variant(bundle, "float8", tmp_path_factory.mktemp(request.param))


def test_the_transformers_products_are_float8_and_near_float32(exported: Exported) -> None:
    bundle, found = exported
    chosen = set(engine_graphs(bundle).FP8)
    assert {name for name, (_, how) in found.items() if how == "quantized"} == chosen
    assert {how for name, (_, how) in found.items() if name not in chosen} == {"narrowed"}
    report = report_variant(bundle, "float8", {name: found[name] for name in chosen})
    for row in report["programs"]:
        # Scales are those of the recorded work, and random numbers may be larger.
        assert row["calls"]["recorded"] >= 1
        assert row["calls"]["random"] == 0
        assert row["within"], row
        assert row["bound"] == {"longlive": 0.16, "easycontrol": BOUNDS["float8"]}[bundle.manifest.engine]
        assert row["worst"] > 0.02  # three bits of mantissa are no more


def test_what_is_not_float8_is_held_to_float16(exported: Exported) -> None:
    bundle, found = exported
    report = report_variant(bundle, "float8", {"text": found["text"]})
    (row,) = report["programs"]
    assert row["within"]
    assert row["bound"] == {"longlive": BOUNDS["float16"], "easycontrol": 0.04}[bundle.manifest.engine]


def test_a_wrong_scale_is_out_of_bounds(exported: Exported, tmp_path: Path) -> None:
    bundle, found = exported
    ranges = float8.calibrated(bundle)
    cut = {name: peak / 128 for name, peak in ranges["denoise"].items()}
    target = tmp_path / "denoise.onnx"
    float8.write_graph(bundle, "denoise", ranges | {"denoise": cut}, target)
    assert not report_variant(bundle, "float8", {"denoise": (target, "quantized")})["within"]
    float8.write_graph(bundle, "denoise", ranges, target)
    assert target.read_bytes() == found["denoise"][0].read_bytes()  # calibrating again gives the same graph


def test_tensorrt_compiles_every_graph_for_ada(exported: Exported, tmp_path: Path) -> None:
    bundle, found = exported
    graphs = {name: found[name][0] for name in engine_graphs(bundle).FP8}
    rows = build_plans(bundle, "float8", graphs, PlanCache(tmp_path), gpu=ADA, max_batch=4)
    assert [(row.program, row.problem) for row in rows] == [(name, "") for name in graphs]
    assert all(row.key is not None and row.key.precision == "float8" for row in rows)


def test_older_gpus_and_speech_are_refused(tmp_path: Path) -> None:
    bundle, cache = load_bundle(MODELS / "longlive-emoji"), PlanCache(tmp_path)
    ampere = Gpu("NVIDIA A10", "8.6", "570.86")
    with pytest.raises(ProgramError) as error:
        build_plans(bundle, "float8", {}, cache, gpu=ampere, max_batch=4)
    told = "precision: fp8 needs a GPU of compute capability 8.9 or more, NVIDIA A10 has 8.6"
    assert str(error.value) == told
    with pytest.raises(ProgramError, match=r"compute capability 8\.9 or more"):
        BundlePlans(bundle, "float8", cache, ampere, 4, True)
    BundlePlans(bundle, "float8", cache, Gpu("NVIDIA B200", "10.0", "580.95"), 4, True)
    speech = load_bundle(MODELS / "ancat-commands-en")
    with pytest.raises(VariantError, match=r"^ancat-commands-en: fp8 is for video and images: the products"):
        export_variant(speech, "float8", tmp_path)


def test_programs_that_the_examples_do_not_run_are_not_calibrated(monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = load_bundle(MODELS / "longlive-emoji")
    monkeypatch.setattr("realtide.engines.longlive.graphs.FP8", ("denoise", "encode_next"))
    with pytest.raises(ProgramError, match=r"^longlive-emoji: encode_next is not calibrated"):
        float8.calibrated(bundle)


def test_models_without_products_that_fit_are_refused(video_bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(ProgramError, match="no matrix product can be in float8"):
        export_variant(load_bundle(video_bundle), "float8", tmp_path)
