"""`realtide models convert easycontrol`."""

from __future__ import annotations

import json
from pathlib import Path

from realtide.bundle import load_bundle
from tests.cli.conftest import Run
from tests.engines.easycontrol.test_convert import flux as flux  # the fixture


def test_a_bundle_is_converted(run: Run, flux: Path, tmp_path: Path) -> None:
    done = run(
        "models", "convert", "easycontrol", tmp_path / "small", "--licence", "Apache-2.0", "--flux", flux,
        "--lora", f"canny={flux}/canny.safetensors", "--lora", f"subject={flux}/subject.safetensors:subject",
        "--size", "32x32", "--sides", "16-64", "--condition-size", "32", "--text-tokens", "24", "--json",
    )  # fmt: skip
    assert (done.code, done.err) == (0, "")
    told = json.loads(done.out)
    assert (told["name"], told["precision"], told["kinds"]) == ("small", "bfloat16", ["canny", "subject"])
    manifest = load_bundle(tmp_path / "small").manifest
    assert manifest.limits["side"] == [16, 64]
    assert "--flux flux" in manifest.provenance.recipe


def test_what_is_wrong_is_said(run: Run, flux: Path, tmp_path: Path) -> None:
    first = ("models", "convert", "easycontrol", tmp_path / "small", "--licence", "Apache-2.0")
    assert "name the transformer with --transformer" in run(*first).err
    assert "holds no part of FLUX.1" in run(*first, "--flux", tmp_path).err
    assert "must be KIND=PATH" in run(*first, "--flux", flux, "--lora", "canny").err
    assert "must be like 1024x1024" in run(*first, "--flux", flux, "--size", "big").err
    (flux / "vae" / "model.safetensors").unlink()
    done = run(*first, "--flux", flux, "--condition-size", "32", "--text-tokens", "24")
    assert (done.code, "must hold one .safetensors file" in done.err) == (1, True)
    assert not (tmp_path / "small").exists()
