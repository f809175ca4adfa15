"""Golden cases of the public reference implementation, replayed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from realtide.engines.longlive import export
from realtide.engines.longlive.replay import replay
from realtide.engines.runtime.golden import NARROW, CaseError, difference
from tests.engines.longlive.conftest import GOLDEN
from tests.engines.runtime.exports import exported_once
from tests.engines.runtime.tensorrt_package import installed
from tests.engines.runtime.tensorrt_stand_in import HostDevice

CASES = {
    "relative_rope_static": {"denoising_timesteps", "first_flow", "latents"},
    "switch_global_sink": {"denoising_timesteps", "first_flow", "latents"},
    "switch_recached_sink": {"denoising_timesteps", "first_flow", "latents"},
    "wan_vae_seed31": {"decoded_unclamped"},
    "umt5_seed41": {"embeds_padding_zeroed"},
}


@pytest.mark.parametrize("case", CASES)
def test_the_modules_compute_what_the_reference_does(case: str) -> None:
    report = replay(GOLDEN / f"{case}.safetensors")
    assert set(report.tensors) == CASES[case]
    assert report.ok
    assert max(found.rel_l2 for found in report.tensors.values()) < 1e-5


@pytest.mark.parametrize("case", CASES)
def test_graphs_and_plans_compute_what_the_reference_does(case: str) -> None:
    """Plans through all of their path; those of a stand-in for TensorRT are computed by ONNX Runtime."""
    devices: list[HostDevice] = []
    with exported_once(export) as graphs, installed(devices) as builder:
        reports = [replay(GOLDEN / f"{case}.safetensors", b) for b in ("onnxruntime", "tensorrt")]
        assert builder.built == len(graphs)
        narrow = {p: replay(GOLDEN / f"{case}.safetensors", "onnxruntime", precision=p) for p in NARROW}
    for report in reports:
        assert set(report.tensors) == CASES[case]
        assert report.tolerance == 1e-4
        assert report.ok
        assert max(found.rel_l2 for found in report.tensors.values()) < 1e-4
    near = {}
    for precision, report in narrow.items():
        assert set(report.tensors) == CASES[case]
        assert (report.precision, report.tolerance, report.ok) == (precision, NARROW[precision], True)
        near[precision] = max(found.rel_l2 for found in report.tensors.values())
    # Ten bits of mantissa, seven; where products are in int8 and float8, a scale a row, and three bits.
    assert 1e-4 < near["float16"] < near["bfloat16"] / 3
    assert (near["int8"] > near["bfloat16"]) == ("latents" in CASES[case])
    assert (near["float8"] > near["int8"] > 0.02) == ("latents" in CASES[case])
    assert devices
    assert all("execute" in device.calls for device in devices)


def copy(name: str, directory: Path, changes: dict[str, object]) -> Path:
    """A case whose description differs, beside its weights."""
    with safe_open(GOLDEN / f"{name}.safetensors", framework="np") as file:
        case = json.loads(file.metadata()["case"]) | changes
    path = directory / f"{name}.safetensors"
    save_file(load_file(GOLDEN / f"{name}.safetensors"), path, {"case": json.dumps(case)})
    shutil.copy(GOLDEN / "weights_seed7.safetensors", directory)
    return path


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("switch_global_sink", {"global_sink": False}),
        ("switch_recached_sink", {"global_sink": True}),
        ("switch_global_sink", {"switch_frames": [6, 18]}),
        ("switch_global_sink", {"sink_size": 0}),
        ("relative_rope_static", {"rope": "absolute"}),
        ("relative_rope_static", {"timestep_shift": 4.0}),
    ],
)
def test_other_semantics_do_not_pass(name: str, changes: dict[str, object], tmp_path: Path) -> None:
    report = replay(copy(name, tmp_path, changes))
    assert not report.ok
    assert report.tensors["latents"].rel_l2 > 0.01


def test_what_is_no_case_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CaseError, match="its metadata has no 'case'"):
        replay(GOLDEN / "weights_seed7.safetensors")
    with pytest.raises(CaseError, match="No such file"):
        replay(tmp_path / "nothing.safetensors")
    (tmp_path / "text.safetensors").write_text("text")
    with pytest.raises(CaseError, match=r"text\.safetensors"):
        replay(tmp_path / "text.safetensors")
    other = tmp_path / "other.safetensors"
    save_file({"x": np.zeros(1)}, other, {"case": "{}"})
    with pytest.raises(CaseError, match="neither rope nor z_dim nor vocab"):
        replay(other)
    save_file({"x": np.zeros(1)}, other, {"case": '{"rope": "absolute"}'})
    with pytest.raises(CaseError, match="the case has no 'model'"):
        replay(other)
    shutil.copy(GOLDEN / "umt5_seed41.safetensors", tmp_path)
    with pytest.raises(CaseError, match=r"no \*weights\*\.safetensors beside it has the 32 tensors"):
        replay(tmp_path / "umt5_seed41.safetensors")


def test_differences_are_relative_to_the_reference() -> None:
    found = difference(np.array([3.0, 4.0]), np.array([3.0, 5.0]))
    assert (found.rel_l2, found.max_abs) == (1 / 34**0.5, 1.0)
    assert difference(np.ones(2), np.zeros(2)).rel_l2 == 2**0.5
    with pytest.raises(CaseError, match=r"\[2\] where the case has \[3\]"):
        difference(np.ones(2), np.ones(3))
