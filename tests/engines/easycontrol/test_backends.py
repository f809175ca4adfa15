"""Images on a device's memory: by PyTorch in bfloat16, and from TensorRT plans on a stand-in for TensorRT."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from realtide.bundle import BundleError, Precision, load_bundle
from realtide.engines.easycontrol.engine import EasyControlEngine, load
from realtide.engines.easycontrol.types import Finish, ImageOptions
from realtide.engines.runtime.plan_key import Gpu
from realtide.engines.runtime.plans import PlanCache
from realtide.engines.runtime.program import ProgramError
from realtide.engines.runtime.torch_memory import TorchMemory
from realtide.plan_building import BundlePlans
from tests.engines.easycontrol.small import WANTED, Small, condition, images
from tests.engines.runtime.tensorrt_package import installed
from tests.engines.runtime.tensorrt_stand_in import HostDevice

CONDITIONS = (("sketch", "canny", 1), ("who", "subject", 2))
PROGRAMS = 7


def drawn(engine: EasyControlEngine, together: Sequence[int]) -> list[np.ndarray[Any, Any]]:
    """Images under so many conditions each, drawn side by side; with previews."""
    least = engine.info.side_range[0]
    wanted = replace(WANTED, width=max(WANTED.width, least), height=max(WANTED.height, least))
    player = Small.__new__(Small)
    player.engine, player.store, player.stages = engine, engine.store, []
    sessions = []
    for seed, count in enumerate(together):
        session = engine.open(ImageOptions())
        for one in CONDITIONS[:count]:
            session.push(condition(*one, engine.info.condition_size))
        under = tuple((name, 0.7) for name, _, _ in CONDITIONS[:count])
        session.push(replace(wanted, conditions=under, seed=seed, preview_interval=2))
        session.push(Finish())
        sessions.append(session)
    made = player.play(*sessions)
    for session in sessions:
        session.close()
    return [np.asarray(images(made[session])[0].data, int) for session in sessions]


def planned(bundle: Path, cache: Path, precision: Precision, *, build: bool = True) -> EasyControlEngine:
    gpu = Gpu("NVIDIA L4", "8.9", "570.86")
    plans = BundlePlans(load_bundle(bundle), precision, PlanCache(cache), gpu, 4, build)
    return load(bundle, slots=4, max_batch=4, precision=precision, backend="tensorrt", plan_of=plans)


def test_compiled_steps_draw_the_same(image_bundle: Path, captured: list[str]) -> None:
    plain, compiled = (
        load(image_bundle, slots=4, max_batch=4, backend="torch", compiled=compiled)
        for compiled in (False, True)
    )
    assert captured == ["Denoise"]
    for have, want in zip(drawn(compiled, (0, 1, 2)), drawn(plain, (0, 1, 2)), strict=True):
        assert np.abs(have - want).max() <= 1


def test_plans_draw_what_graphs_draw(image_bundle: Path, tmp_path: Path) -> None:
    wanted = load(image_bundle, slots=4, max_batch=4)
    devices: list[HostDevice] = []
    with installed(devices) as builder:
        engine = planned(image_bundle, tmp_path, "float32")
        assert builder.built == PROGRAMS
        assert (engine.info.backend, engine.info.precision) == ("tensorrt", "fp32")
        for together in ((0,), (1,), (2, 2), (1, 0, 2)):
            pairs = zip(drawn(engine, together), drawn(wanted, together), strict=True)
            assert max(np.abs(have - want).max() for have, want in pairs) <= 1
        engine.close()
        planned(image_bundle, tmp_path, "float32", build=False).close()
        assert builder.built == PROGRAMS
        with pytest.raises(ProgramError, match=r"^there is no plan of small-image\w*/\w+/float16 in "):
            planned(image_bundle, tmp_path, "float16", build=False)
    wanted.close()
    # The first engine's, one for each of its threads: caches of conditions are read where they lie.
    for device in devices[:2]:
        assert "execute" in device.calls
        assert not {"upload", "download", "copy back", "wait"} & set(device.calls)


def test_caches_of_conditions_stay_on_the_device(image_bundle: Path) -> None:
    engine = load(image_bundle, slots=1, backend="torch", precision="bf16")
    assert (engine.info.precision, engine.info.device) == ("bf16", "cpu")
    assert isinstance(engine._parts.worker.memory, TorchMemory)
    (narrow,) = drawn(engine, (2,))
    entries = [entry.tensors for entry in engine.store._entries.values()]
    assert len(entries) == 2
    for tensors in entries:
        assert tensors is not None
        assert all(isinstance(t, torch.Tensor) and t.dtype == torch.bfloat16 for t in tensors.values())
        assert sum(tensor.nbytes for tensor in tensors.values()) == engine.info.condition_bytes
    wide = load(image_bundle, slots=1, backend="torch")
    (wanted,) = drawn(wide, (2,))
    assert 0 < np.abs(narrow - wanted).mean() < 3  # levels of 255
    for each in (engine, wide):
        each.close()


def test_half_precision_plans_are_near(image_bundle: Path, tmp_path: Path) -> None:
    wide = load(image_bundle, slots=1)
    with installed():
        narrow = planned(image_bundle, tmp_path, "float16")
        assert narrow.info.condition_bytes * 2 == wide.info.condition_bytes
        far = np.abs(drawn(narrow, (2,))[0] - drawn(wide, (2,))[0])
        assert 0 < far.mean() < 2  # levels of 255
    for each in (narrow, wide):
        each.close()


def test_products_in_float8_are_near_and_conditions_half_as_large(tmp_path: Path) -> None:
    bundle = Path(__file__).resolve().parents[3] / "models" / "easycontrol-emoji"
    wide = load(bundle, slots=1)
    with installed() as builder:
        narrow = planned(bundle, tmp_path, "float8")
        assert builder.built == PROGRAMS
        assert narrow.info.precision == "fp8"
        assert narrow.info.condition_bytes * 2 == wide.info.condition_bytes
        far = np.abs(drawn(narrow, (1,))[0] - drawn(wide, (1,))[0])
    assert 0.1 < far.mean() < 4  # levels of 255
    for each in (narrow, wide):
        each.close()


def test_what_cannot_be_served_is_said(image_bundle: Path) -> None:
    with pytest.raises(ProgramError, match="the backend tensorrt needs plans"):
        load(image_bundle, slots=1, backend="tensorrt")
    with pytest.raises(BundleError, match="must be one of float32, bfloat16 with the backend torch"):
        load(image_bundle, slots=1, backend="torch", precision="int8")
