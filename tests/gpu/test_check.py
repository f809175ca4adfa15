"""`python -m realtide.gpu` end to end on the processor, with no package but those of a bare GPU machine."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from realtide.gpu import images, replays, speech, video
from realtide.gpu.__main__ import main
from realtide.gpu.check import CheckError, Options, check
from tests.engines.runtime.tensorrt_package import installed

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "golden"

# Everything but the standard library, PyTorch with what it imports itself, and NumPy is refused.
BARE = """
import importlib.abc, json, runpy, sys

ALLOWED = {"torch", "torchgen", "functorch", "numpy", "realtide", "sympy", "mpmath", "typing_extensions",
           "networkx", "jinja2", "markupsafe", "filelock", "fsspec", "triton", "nvidia", "_sysconfigdata"}

class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if top in sys.stdlib_module_names or top in ALLOWED or top.startswith("_"):
            return None
        raise ModuleNotFoundError(f"{name} is refused", name=name)

sys.meta_path.insert(0, Refuse())
sys.argv = ["gpu", *sys.argv[1:]]
runpy.run_module("realtide.gpu", run_name="__main__")
"""


def test_the_whole_check_with_pytorch_and_numpy_alone(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    arguments = ["--device", "cpu", "--small", "--case", "umt5_seed41", "--json", "--out", str(out)]
    done = subprocess.run(
        [sys.executable, "-c", BARE, *arguments], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert json.loads(out.read_text()) == found
    assert found["benchmark"] == "gpu"
    assert found["failed"] == []
    backends = found["replays"]["backends"]
    (case,) = backends["torch"]["cases"]
    assert case["ok"]
    assert 0 < case["rel_l2"] <= case["tolerance"] == 1e-5
    assert backends["onnxruntime"]["skipped"].startswith("not installed: onnxruntime, onnx, onnxscript")
    assert backends["tensorrt"] == {"skipped": "not installed: tensorrt or tensorrt_rtx"}
    assert set(found["longlive"]["passes"]) == {"denoise", "clean", "recache", "decode"}
    for name, entry in found["longlive"]["passes"].items():
        timed = entry["eager"]
        assert timed["ms"] > 0, name
        assert timed["over_floor"] > 0, name
        assert timed["floor_operations_ms"] == pytest.approx(
            1e3 * timed["operations"] / found["rates"]["operations_per_second"], abs=1e-4
        )
    narrow = found["longlive"]["fp8"]
    assert narrow["layers"] == 2 * 8
    assert narrow["denoise"]["eager"]["ms"] > 0
    blocks = found["longlive"]["blocks"]
    assert set(blocks) == {"denoised", "decoded", "delivered"}
    assert all(
        each["fps"] == pytest.approx(12e3 / each["ms"], rel=1e-3, abs=0.01) for each in blocks.values()
    )
    for size in ("fitting", "flux"):
        assert set(found[f"easycontrol_{size}"]["steps"]) == {"plain", "one_condition", "two_conditions"}
    for size in ("30M", "100M"):
        steps = found[f"ancat_{size}"]["steps"]
        # It ends with the first that is too slow.
        assert [step["streams"] for step in steps] == [1, 4][: len(steps)]
        assert found[f"ancat_{size}"]["streams_held"] == sum(step["in_real_time"] for step in steps) ** 2
        assert all(step["in_real_time"] == (step["eager"]["ms"] <= 40) for step in steps)
    assert "longlive passes denoise eager:" in done.stderr


def test_what_the_budget_leaves_no_time_for_is_skipped_with_a_reason() -> None:
    lines: list[str] = []
    options = Options("cpu", small=True, budget=1e-3, goldens=(GOLDEN,), case="umt5_seed41")
    found = check(options, lines.append)
    for part in ("replays", "longlive", "easycontrol_flux", "ancat_30M"):
        assert "of the budget are left" in found[part]["skipped"]
        assert any(line.startswith(f"{part}: skipped: ") for line in lines)
    assert found["failed"] == []


def test_a_part_that_fails_is_told_and_does_not_stop_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> dict[str, object]:
        raise RuntimeError("out of memory\nin detail")

    monkeypatch.setattr(video, "run", broken)
    monkeypatch.setattr(images, "run", lambda *_: {"steps": {}})
    monkeypatch.setattr(speech, "run", lambda *_: {"steps": []})
    monkeypatch.setattr(replays, "run", lambda *_: {})
    found = check(Options("cpu", small=True, goldens=(GOLDEN,)), lambda _: None)
    assert found["failed"] == ["longlive: out of memory"]
    assert found["longlive"] == {"error": "out of memory\nin detail"}
    assert "seconds" in found["easycontrol_flux"]


def test_a_case_that_is_not_what_the_reference_computes_fails_the_check() -> None:
    found = {
        "torch": {
            "cases": [{"case": "a", "ok": True}, {"case": "b", "ok": False}, {"case": "c", "skipped": ""}]
        }
    }
    assert replays.failures(found) == ["torch: b"]


def test_cases_of_text_encoders_are_skipped_with_a_reason() -> None:
    found = replays.run(replays.find([GOLDEN], "t5_seed52"), "cpu", 60)
    assert "only tests replay those" in found["torch"]["cases"][0]["skipped"]


def test_cases_are_replayed_through_plans_where_there_is_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    cases = replays.find([GOLDEN], "umt5_seed41")
    monkeypatch.setattr(replays, "missing", lambda backend, _: "no" if backend == "onnxruntime" else None)
    with installed() as builder:
        found = replays.run(cases, "cpu", 60)
        assert builder.built == 1
    (case,) = found["tensorrt"]["cases"]
    assert case["ok"]
    assert 0 < case["rel_l2"] <= case["tolerance"] == 1e-4
    assert found["tensorrt"]["package"] == "tensorrt 11.4.0"
    assert found["onnxruntime"] == {"skipped": "no"}


def test_why_plans_are_not_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert replays.missing("tensorrt", "cpu") == "plans run on a GPU only"
    assert replays.missing("tensorrt", "cuda:0") is None
    monkeypatch.setattr(replays, "_present", lambda name: name in ("tensorrt", "onnx", "safetensors"))
    reason = replays.missing("tensorrt", "cuda:0")
    assert reason == "not installed: onnxscript (graphs are exported on the spot)"
    monkeypatch.setattr(replays, "_present", lambda name: False)
    assert replays.missing("tensorrt", "cuda:0") == "not installed: tensorrt or tensorrt_rtx"
    assert replays.missing("torch", "cuda:0") is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "tpu"], "device must be cpu, cuda or cuda:N, got 'tpu'"),
        (["--device", "cpu", "--case", "nothing"], "no golden case 'nothing' below"),
    ],
)
def test_what_cannot_be_checked(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without a GPU does")
def test_without_a_gpu_there_is_one_sentence() -> None:
    with pytest.raises(CheckError, match="no CUDA device: PyTorch is built"):
        check(Options(goldens=(GOLDEN,)), lambda _: None)


@pytest.mark.parametrize("text", ["0", "-1", "inf", "nan", "soon"])
def test_the_budget_is_a_positive_number(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--budget", text])
    assert "--budget" in capsys.readouterr().err
