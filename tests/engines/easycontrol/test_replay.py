"""Golden cases of the public reference implementation, replayed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from realtide.engines.easycontrol import export
from realtide.engines.easycontrol.replay import replay
from realtide.engines.runtime.golden import NARROW, CaseError, Report
from tests.engines.easycontrol.conftest import GOLDEN
from tests.engines.runtime.exports import exported_once
from tests.engines.runtime.tensorrt_package import installed

CASES = {"spatial_one": 1, "subject_one": 1, "subject_and_spatial": 2}


def check(report: Report, conditions: int, limit: float) -> None:
    keys = {f"key.{number}.{block}" for number in range(conditions) for block in range(5)}
    assert set(report.tensors) == {"img_ids", "sigmas", "velocities", "latents", *keys}
    assert report.ok
    assert max(found.rel_l2 for found in report.tensors.values()) <= limit


@pytest.mark.parametrize("case", CASES)
def test_the_modules_compute_what_the_reference_does(case: str) -> None:
    check(replay(GOLDEN / f"{case}.safetensors"), CASES[case], 1e-5)


@pytest.mark.parametrize("case", CASES)
def test_graphs_and_plans_compute_what_the_reference_does(case: str) -> None:
    """Plans through all of their path; those of a stand-in for TensorRT are computed by ONNX Runtime."""
    with exported_once(export) as graphs, installed() as builder:
        for backend in ("onnxruntime", "tensorrt"):
            check(replay(GOLDEN / f"{case}.safetensors", backend), CASES[case], 1e-4)
        assert builder.built == len(graphs) == 2
        narrow = {p: replay(GOLDEN / f"{case}.safetensors", "onnxruntime", precision=p) for p in NARROW}
    near = {}
    for precision, report in narrow.items():
        check(report, CASES[case], NARROW[precision])
        near[precision] = max(found.rel_l2 for found in report.tensors.values())
    assert 1e-4 < near["float16"] < near["bfloat16"] / 3 < near["int8"] / 3 < near["float8"] / 3


def copy(name: str, directory: Path, changes: dict[str, object]) -> Path:
    """A case whose description differs, beside its weights."""
    with safe_open(GOLDEN / f"{name}.safetensors", framework="np") as file:
        case = json.loads(file.metadata()["case"]) | changes
    path = directory / f"{name}.safetensors"
    save_file(load_file(GOLDEN / f"{name}.safetensors"), path, {"case": json.dumps(case)})
    for other in ("weights_seed3", "lora_seed3_0", "lora_seed3_1"):
        shutil.copy(GOLDEN / f"{other}.safetensors", directory)
    return path


@pytest.mark.parametrize(
    ("changes", "tensor"),
    [
        ({"loras": ["lora_seed3_1", "lora_seed3_0"]}, "velocities"),
        ({"lora_weights": [1.0, 1.0]}, "key.1.0"),
        ({"guidance": 3.4}, "velocities"),
        ({"width": 64, "height": 256}, "img_ids"),
    ],
)
def test_other_semantics_do_not_pass(changes: dict[str, object], tensor: str, tmp_path: Path) -> None:
    report = replay(copy("subject_and_spatial", tmp_path, changes))
    assert not report.ok
    assert report.tensors[tensor].rel_l2 > 1e-4


def test_what_is_no_case_is_refused(tmp_path: Path) -> None:
    other = tmp_path / "other.safetensors"
    save_file({"x": np.zeros(1)}, other, {"case": "{}"})
    with pytest.raises(CaseError, match="it has no cond_size"):
        replay(other)
    save_file({"x": np.zeros(1)}, other, {"case": '{"cond_size": 64}'})
    with pytest.raises(CaseError, match="the case has no 'prompt_embeds'"):
        replay(other)
    path = copy("spatial_one", tmp_path, {"loras": ["nothing"]})
    with pytest.raises(CaseError, match=r"nothing\.safetensors"):
        replay(path)
    save_file({"x": np.zeros(1)}, tmp_path / "nothing.safetensors")
    with pytest.raises(CaseError, match=r"lacks 'transformer_blocks\.0\.attn\.processor\.q_loras\.0"):
        replay(path)
