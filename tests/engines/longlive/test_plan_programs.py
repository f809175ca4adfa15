"""Video through the whole plan path: built, cached, loaded, bound and run, on a stand-in for TensorRT."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from realtide.bundle import Precision, load_bundle
from realtide.engines.longlive.engine import LongLiveEngine, load
from realtide.engines.longlive.types import SetPrompt
from realtide.engines.runtime.plan_key import Gpu
from realtide.engines.runtime.plans import PlanCache
from realtide.engines.runtime.program import ProgramError
from realtide.plan_building import BundlePlans
from tests.engines.longlive.test_engine import OPTIONS, levels_apart, run
from tests.engines.runtime.tensorrt_package import Builder, installed
from tests.engines.runtime.tensorrt_stand_in import HostDevice

GPU = Gpu("NVIDIA H100 80GB HBM3", "9.0", "570.86")
SERVED = {"prompt", "denoise", "clean", "recache", "decode_first", "decode_next", "text"}


@pytest.fixture
def devices() -> list[HostDevice]:
    return []


@pytest.fixture
def builder(devices: list[HostDevice]) -> Iterator[type[Builder]]:
    with installed(devices) as found:
        yield found


def served(
    bundle: Path, cache: Path, *, precision: Precision = "float32", build: bool = True, slots: int = 2
) -> LongLiveEngine:
    plans = BundlePlans(load_bundle(bundle), precision, PlanCache(cache), GPU, 8, build)
    return load(bundle, slots=slots, precision=precision, backend="tensorrt", plan_of=plans)


def video(engine: LongLiveEngine) -> list[list[np.ndarray]]:
    sessions = [engine.open(OPTIONS), engine.open(replace(OPTIONS, seed=12))]
    sessions[0].push(SetPrompt("c", "the sun sets", 7))
    try:
        return run(engine, sessions)
    finally:
        for session in sessions:
            session.close()
        engine.close()


def test_plans_make_the_video_that_graphs_make(
    video_bundle: Path, tmp_path: Path, builder: type[Builder], devices: list[HostDevice]
) -> None:
    engine = served(video_bundle, tmp_path)
    assert builder.built == len(SERVED)
    assert (engine.info.backend, engine.info.precision) == ("tensorrt", "fp32")
    planned, wanted = video(engine), video(load(video_bundle, slots=2))
    for have, want in zip(planned, wanted, strict=True):
        assert len(have) == 23
        assert max(np.abs(a - b).max() for a, b in zip(have, want, strict=True)) <= 1
    # Two devices: the thread that denoises and the one that decodes; both replay what they have captured.
    assert len(devices) == 2
    for device in devices:
        assert "replay" in device.calls
        assert "wait" not in device.calls
        assert not {"upload", "download", "copy back"} & set(device.calls)


def test_plans_of_the_cache_are_not_built_again(
    video_bundle: Path, tmp_path: Path, builder: type[Builder], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        served(video_bundle, tmp_path, slots=1).close()
    told = [r.getMessage() for r in caplog.records if r.getMessage().startswith("building the plan of")]
    assert {line.rpartition("/")[0].rpartition("/")[2] for line in told} == SERVED
    assert builder.built == len(SERVED)
    served(video_bundle, tmp_path, build=False, slots=1).close()
    assert builder.built == len(SERVED)


def test_without_a_plan_that_fits_one_sentence_refuses(
    video_bundle: Path, tmp_path: Path, builder: type[Builder], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ProgramError, match=r"^there is no plan of small-video/\w+/float32 in .*models build"):
        served(video_bundle, tmp_path, build=False)
    served(video_bundle, tmp_path, slots=1).close()
    monkeypatch.setattr("tests.engines.longlive.test_plan_programs.GPU", Gpu(GPU.name, "9.0", "580.95"))
    with pytest.raises(ProgramError, match=r"does not fit: driver 570.86 -> 580.95: `realtide models build`"):
        served(video_bundle, tmp_path, build=False)
    builder.refuse = True
    with pytest.raises(ProgramError, match=r"^small-video/\w+/float32: no tactic$"):
        served(video_bundle, tmp_path)


def test_half_precision_is_near_and_its_caches_are_half_as_large(
    video_bundle: Path, tmp_path: Path, builder: type[Builder]
) -> None:
    wide, narrow = (served(video_bundle, tmp_path, precision=p) for p in ("float32", "float16"))
    assert builder.built == 2 * len(SERVED)
    assert narrow.info.precision == "fp16"
    assert narrow.cache_bytes * 2 == wide.cache_bytes
    frames = [np.stack(video(engine)[0][:3]) for engine in (wide, narrow)]
    far = np.abs(frames[0] - frames[1])
    assert 0 < far.mean() < 2  # levels of 255, before two chaotic systems drift apart


def test_products_in_float8_are_served_and_their_caches_are_half_as_large(
    tmp_path: Path, builder: type[Builder]
) -> None:
    bundle = Path(__file__).resolve().parents[3] / "models" / "longlive-emoji"
    wide, narrow = load(bundle, slots=1), served(bundle, tmp_path, precision="float8", slots=1)
    assert builder.built == len(SERVED)
    assert narrow.info.precision == "fp8"
    assert 0.1 < levels_apart(wide, narrow) < 2
    # What was calibrated for the plans is calibrated to the same for those who look for them.
    served(bundle, tmp_path, precision="float8", build=False, slots=1).close()
    assert builder.built == len(SERVED)


def test_without_plans_the_backend_is_refused(video_bundle: Path) -> None:
    with pytest.raises(ProgramError, match="the backend tensorrt needs plans"):
        load(video_bundle, slots=1, backend="tensorrt")
