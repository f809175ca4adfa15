"""`realtide replay`."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from tests.cli.conftest import Run

GOLDEN = Path(__file__).parents[1] / "golden" / "longlive"


def test_a_case_is_replayed_for_programs(run: Run) -> None:
    done = run("replay", GOLDEN / "umt5_seed41.safetensors", "--json")
    assert (done.code, done.err) == (0, "")
    result = json.loads(done.out)
    assert set(result) == {"case", "backend", "tensors", "ok"}
    assert (result["case"], result["backend"], result["ok"]) == ("umt5_seed41", "torch", True)
    found = result["tensors"]["embeds_padding_zeroed"]
    assert 0 < found["rel_l2"] < 1e-5
    assert 0 < found["max_abs"] < 1e-4
    assert logging.root.manager.disable == logging.NOTSET  # the exporter is silenced for the time it runs


def test_a_case_is_replayed_over_its_graphs(run: Run) -> None:
    done = run("replay", GOLDEN / "umt5_seed41.safetensors", "--json", "--backend", "onnxruntime")
    assert (done.code, done.err) == (0, "")
    result = json.loads(done.out)
    assert (result["backend"], result["ok"]) == ("onnxruntime", True)
    assert 0 < result["tensors"]["embeds_padding_zeroed"]["rel_l2"] < 1e-4


def test_a_case_is_replayed_in_half_precision(run: Run) -> None:
    call = ("replay", GOLDEN / "umt5_seed41.safetensors", "--json", "--precision", "bf16")
    done = run(*call, "--backend", "onnxruntime")
    assert (done.code, done.err) == (0, "")
    result = json.loads(done.out)
    assert (result["precision"], result["ok"]) == ("bf16", True)
    assert 1e-3 < result["tensors"]["embeds_padding_zeroed"]["rel_l2"] < 0.07
    done = run(*call)
    assert (done.code, done.err.count("\n")) == (1, 1)
    assert done.err.startswith(
        "realtide: precision must be float32 with the backend torch, or one of float32, "
    )


@pytest.mark.parametrize(
    ("backend", "device", "wanted"),
    [
        ("tensorrt", "cpu", "cuda or cuda:N for tensorrt"),
        ("onnxruntime", "cuda", "cpu for onnxruntime"),
        ("torch", "tpu", "cpu, cuda or cuda:N"),
    ],
)
def test_devices_that_a_backend_cannot_use(run: Run, backend: str, device: str, wanted: str) -> None:
    case = GOLDEN / "umt5_seed41.safetensors"
    done = run("replay", case, "--backend", backend, "--device", device)
    assert (done.code, done.err) == (2, f"realtide: device must be {wanted}, got '{device}'\n")


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without a GPU does")
def test_plans_without_a_gpu_are_refused_in_one_sentence(run: Run) -> None:
    done = run("replay", GOLDEN / "umt5_seed41.safetensors", "--backend", "tensorrt")
    assert done.code == 1
    assert done.err.endswith("sees no CUDA device 0\n")
    assert done.err.count("\n") == 1


def test_a_case_is_replayed_for_people(run: Run) -> None:
    done = run("replay", GOLDEN / "relative_rope_static.safetensors")
    assert done.code == 0
    lines = [line.split() for line in done.out.splitlines()]
    assert lines[0] == ["TENSOR", "REL", "L2", "MAX", "ABS"]
    assert [line[0] for line in lines[1:-1]] == ["denoising_timesteps", "first_flow", "latents"]
    assert " ".join(lines[-1]) == "relative_rope_static on torch: ok (at most 1e-05)"


def test_a_difference_fails_the_command(run: Run, tmp_path: Path) -> None:
    tensors = load_file(GOLDEN / "umt5_seed41.safetensors")
    tensors["embeds_padding_zeroed"] *= 1.001
    with safe_open(GOLDEN / "umt5_seed41.safetensors", framework="np") as file:
        metadata = file.metadata()
    save_file(tensors, tmp_path / "altered.safetensors", metadata)
    shutil.copy(GOLDEN / "umt5_weights_seed41.safetensors", tmp_path)
    done = run("replay", tmp_path / "altered.safetensors", "--json")
    assert (done.code, done.err) == (1, "realtide: altered: not what the reference computes\n")
    result = json.loads(done.out)
    assert result["ok"] is False
    assert result["tensors"]["embeds_padding_zeroed"]["rel_l2"] == pytest.approx(0.001, rel=0.01)


def test_what_cannot_be_replayed_is_said(run: Run, tmp_path: Path) -> None:
    done = run("replay", tmp_path / "nothing.safetensors")
    assert done.code == 1
    assert done.err.startswith("realtide: ")
    assert done.err.count("\n") == 1
    assert run("replay", GOLDEN / "weights_seed7.safetensors").err.endswith("its metadata has no 'case'\n")
    assert run("replay").code == 2
    assert run("replay", GOLDEN / "umt5_seed41.safetensors", "--backend", "abacus").code == 2
