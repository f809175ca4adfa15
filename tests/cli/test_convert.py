"""`realtide models convert`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from realtide.bundle import Precision, load_bundle
from realtide.engines.longlive import convert, layout
from tests.cli.conftest import Run
from tests.engines.longlive import checkpoints
from tests.engines.longlive.test_convert import whole_vae

SIZE = ("--licence", "Apache-2.0", "--size", "96x64", "--text-tokens", "16")


@pytest.fixture
def wan(tmp_path: Path) -> Path:
    """The golden weights as Wan2.1 is released, with its own transformer."""
    directory = tmp_path / "Wan2.1"
    directory.mkdir()
    name = "diffusion_pytorch_model"
    weights = checkpoints.golden("weights_seed7")
    checkpoints.save_directory(weights, directory / "plain", name, {}, 1)
    (directory / "plain" / f"{name}.safetensors").rename(directory / f"{name}.safetensors")
    torch.save(whole_vae(), directory / "Wan2.1_VAE.pth")
    torch.save(checkpoints.golden("umt5_weights_seed41"), directory / "models_t5_umt5-xxl-enc-bf16.pth")
    checkpoints.tokenizer(directory / "google" / "umt5-xxl")
    return directory


def test_a_release_becomes_a_bundle(run: Run, wan: Path) -> None:
    torch.save(checkpoints.lora(checkpoints.golden("weights_seed7"), 2), wan / "lora.pt")
    options = ("--wan", wan, "--lora", wan / "lora.pt", "--heads", "4", *SIZE)
    done = run("models", "convert", "longlive", "models/small", *options, "--json")
    assert (done.code, done.err) == (0, "")
    result = json.loads(done.out)
    assert (result["name"], result["precision"], result["graphs"]) == ("small", "bfloat16", [])
    counted = sum(value.numel() for value in checkpoints.golden("weights_seed7").values())
    assert result["parameters"]["transformer"] == counted
    assert run("models", "verify", "small").out == "small: ok\n"
    (listed,) = json.loads(run("models", "list", "--json").out)
    assert (listed["engine"], listed["licence"], listed["bytes"]) == (
        "longlive", "Apache-2.0", result["bytes"]
    )  # fmt: skip
    manifest = Path("models/small/manifest.yaml").read_text()
    assert "recipe: realtide models convert longlive small --wan Wan2.1 --lora lora.pt" in manifest
    assert str(wan) not in manifest

    again = run("models", "convert", "longlive", "models/small", *options)
    assert (again.code, again.err) == (1, "realtide: models/small: exists already\n")
    other = run("models", "convert", "longlive", "models/other", *options, "--precision", "float32")
    assert other.code == 0
    assert other.out.startswith("models/other: ")


def test_graphs_are_exported_as_wanted(run: Run, wan: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the graphs hold is tested where they are made."""
    asked: list[tuple[str, bool]] = []

    def export(model: object, video: object, directory: Path, precision: Precision, check: bool) -> None:
        asked.append((precision, check))
        for program in layout.PROGRAMS:
            path = directory / layout.graph_file(program, precision)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(program)

    monkeypatch.setattr(convert, "_export", export)
    options = ("--wan", wan, *SIZE, "--export", "float32", "--export", "float16", "--no-check", "--json")
    done = run("models", "convert", "longlive", "models/small", *options)
    assert (done.code, asked) == (0, [("float32", False), ("float16", False)])
    result = json.loads(done.out)
    assert (result["graphs"], result["checked"]) == (["float32", "float16"], False)
    bundle = load_bundle("models/small")
    assert bundle.manifest.precisions == ("float32", "float16")
    assert bundle.graph("recache", "float16").relative_to(bundle.directory) == Path(
        "onnx/float16/recache.onnx"
    )
    assert run("models", "verify", "small").out == "small: ok\n"


def test_what_is_wrong_is_said_in_one_line(run: Run, wan: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    weights = checkpoints.golden("weights_seed7")
    del weights["head.head.bias"]
    torch.save(weights, tmp_path / "base.pt")
    for arguments, code, message in (
        (
            ["--wan", wan, "--size", "90x64"],
            2,
            "--size must be two multiples of 16 such as 832x480, got '90x64'",
        ),
        (["--wan", empty], 1, f"{empty}: holds no part of Wan2.1 that is known by its name"),
        (["--transformer", tmp_path / "base.pt"], 2, "name the vae with --vae"),
        (
            ["--wan", wan, "--transformer", tmp_path / "base.pt"],
            1,
            "transformer (base.pt): 'head.head.bias' is missing",
        ),
        (
            ["--wan", wan, "--heads", "7"],
            1,
            "transformer.dim (128) must be a multiple of transformer.heads (7)",
        ),
        (["--wan", wan, "--window", "2"], 1, "stream.sink must be in 0..-1 (window less block), got 3"),
        (
            ["--wan", wan, "--lora-alpha", "0", "--lora", tmp_path / "base.pt"],
            2,
            "--lora-alpha must be positive",
        ),
    ):
        done = run("models", "convert", "longlive", "models/no", *SIZE, *arguments)
        assert (done.code, done.err) == (code, f"realtide: {message}\n")
        assert not Path("models/no").exists()
    assert run("models", "convert", "longlive", "models/no", "--wan", wan).code == 2  # no licence


def test_help_teaches(run: Run) -> None:
    done = run("models", "convert", "longlive", "--help")
    assert done.code == 0
    for word in ("longlive_base.pt", "lora.pt", "Wan2.1_VAE.pth", "spiece.model", "Example:"):
        assert word in done.out
