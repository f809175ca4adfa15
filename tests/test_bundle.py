"""Manifests: what is accepted, what is refused and how, and what verification notices."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from realtide.bundle import (
    MANIFEST,
    Bundle,
    BundleError,
    find_bundles,
    load_bundle,
    load_manifest,
    resolve,
    search_path,
    verify,
    write_manifest,
)

VALUES: dict[str, Any] = {
    "engine": "ancat",
    "name": "tiny",
    "version": "1.2.3",
    "description": "A model for tests.",
    "licence": "Apache-2.0",
    "architecture": {"layers": 2, "rule": "adaptive"},
    "limits": {"sample_rate": [8000, 48000]},
    "precisions": ["float32", "int8"],
    "weights": "weights.safetensors",
    "programs": {"encoder": {"float32": "onnx/encoder.onnx", "int8": "onnx/encoder.int8.onnx"}},
    "assets": {"tokenizer": "tokenizer.model"},
    "provenance": {
        "recipe": "recipe/train.py",
        "created": "2026-11-23",
        "data": [{"name": "clips", "licence": "CC-BY-4.0"}],
    },
    "unverified": ["README.md", "recipe"],
}


def fill(directory: Path) -> Path:
    """Put the files of a bundle there, without the manifest."""
    for name in ("weights.safetensors", "tokenizer.model", "onnx/encoder.onnx", "onnx/encoder.int8.onnx"):
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode() * 100)
    (directory / "recipe").mkdir()
    (directory / "recipe" / "train.py").write_text("pass\n")
    (directory / "README.md").write_text("# Tiny\n")
    return directory


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    directory = fill(tmp_path / "tiny")
    return Bundle(directory, write_manifest(directory, VALUES))


def change(bundle: Bundle, edit: Callable[[dict[str, Any]], object]) -> None:
    """Edit the manifest as a person would."""
    path = bundle.directory / MANIFEST
    values = yaml.safe_load(path.read_text())
    edit(values)
    path.write_text(yaml.safe_dump(values))


def test_what_was_written_is_read_back_and_verifies(bundle: Bundle) -> None:
    loaded = load_bundle(bundle.directory)
    assert loaded == bundle
    assert [file.path for file in loaded.manifest.files] == [
        "onnx/encoder.int8.onnx",
        "onnx/encoder.onnx",
        "tokenizer.model",
        "weights.safetensors",
    ]
    assert loaded.manifest.files[1].size == 1700
    read: list[str] = []
    assert verify(loaded, lambda file: read.append(file.path)) == []
    assert read == [file.path for file in loaded.manifest.files]
    assert list(yaml.safe_load((bundle.directory / MANIFEST).read_text()))[:3] == ["format", "engine", "name"]


def test_files_are_given_by_role(bundle: Bundle) -> None:
    assert bundle.weights == bundle.directory / "weights.safetensors"
    assert bundle.asset("tokenizer") == bundle.directory / "tokenizer.model"
    assert bundle.precision(None) == "float32"
    assert bundle.graph("encoder", bundle.precision("int8")).name == "encoder.int8.onnx"
    with pytest.raises(BundleError, match="tiny: precision must be one of float32, int8, not 'float16'"):
        bundle.precision("float16")
    with pytest.raises(BundleError, match=r"tiny: programs\.joiner\.int8 is missing"):
        bundle.graph("joiner", "int8")
    with pytest.raises(BundleError, match=r"tiny: assets\.words is missing"):
        bundle.asset("words")


def test_verification_names_every_damaged_file(bundle: Bundle) -> None:
    root = bundle.directory
    (root / "onnx/encoder.onnx").unlink()
    data = bytearray((root / "weights.safetensors").read_bytes())
    data[50] ^= 1
    (root / "weights.safetensors").write_bytes(data)
    with (root / "tokenizer.model").open("ab") as file:
        file.write(b"x")
    (root / "onnx/extra.bin").write_bytes(b"?")
    (root / "recipe/notes.txt").write_text("not looked at")
    (root / ".hidden").write_text("not looked at")
    problems = verify(bundle)
    assert problems[0] == "onnx/encoder.onnx: is missing"
    assert problems[1] == "tokenizer.model: has 1501 bytes, the manifest says 1500"
    assert problems[2].startswith("weights.safetensors: SHA-256 is ")
    assert problems[3:] == ["onnx/extra.bin: is not listed in the manifest"]


def test_a_link_out_of_the_bundle_is_a_problem(bundle: Bundle, tmp_path: Path) -> None:
    inside = bundle.directory / "tokenizer.model"
    outside = tmp_path / "elsewhere"
    inside.rename(outside)
    inside.symlink_to(outside)
    assert verify(bundle) == ["tokenizer.model: is a link that leads out of the bundle"]


@pytest.mark.parametrize(
    "name",
    ["../x", "/etc/passwd", "a/../../x", "a//b", "", ".", "a\\b", "C:/x", "./x", "a/", "x\0y", "a\nb"],
)
def test_paths_that_could_leave_the_bundle_are_refused(bundle: Bundle, name: str) -> None:
    file = {"path": name, "size": 1, "sha256": "0" * 64}
    change(bundle, lambda values: values["files"].append(file))
    with pytest.raises(BundleError, match=r"files\.4\.path: .* must be a relative path inside the bundle"):
        load_manifest(bundle.directory)


def drop(key: str) -> Callable[[dict[str, Any]], object]:
    return lambda values: values.pop(key)


def put(**items: Any) -> Callable[[dict[str, Any]], object]:
    return lambda values: values.update(items)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (drop("engine"), "engine: Field required"),
        (put(engine="An Cat"), "engine: String should match pattern"),
        (put(colour="red"), "colour: Extra inputs are not permitted"),
        (put(format=2), "format: Input should be 1"),
        (put(version="1.2"), "version: String should match pattern"),
        (put(precisions=[]), "precisions: Tuple should have at least 1 item"),
        (put(precisions=["float32", "fp8"]), r"precisions\.1: Input should be 'float32', "),
        (put(precisions=["int8", "int8"]), "precisions: one is listed twice"),
        (
            put(precisions=["float32", "int8", "float16"]),
            r"programs\.encoder: .* no graph for precision 'float16'",
        ),
        (put(precisions=["float32"]), r"programs\.encoder\.int8: not one of precisions"),
        (put(weights="w.safetensors"), "weights: 'w.safetensors' is not listed in files"),
        (put(assets={"tokenizer": "t"}), r"assets\.tokenizer: 't' is not listed in files"),
        (
            put(programs={"encoder": {"float32": "a", "int8": "b"}}),
            r"programs\.encoder\.float32: 'a' is not listed",
        ),
        (lambda v: v["files"].append(v["files"][0]), r"files: 'onnx/encoder\.int8\.onnx' is listed twice"),
        (lambda v: v["files"][0].update(sha256="00"), r"files\.0\.sha256: String should match pattern"),
        (
            lambda v: v["files"][0].update(size=-1),
            r"files\.0\.size: Input should be greater than or equal to 0",
        ),
        (lambda v: v["provenance"].update(created="soon"), r"provenance\.created: String should match"),
        (lambda v: [v.pop("engine"), v.pop("name")], r"engine: Field required \(and 1 more\)"),
    ],
)
def test_a_wrong_manifest_is_refused_in_one_sentence(
    bundle: Bundle, edit: Callable[[dict[str, Any]], object], message: str
) -> None:
    change(bundle, edit)
    with pytest.raises(BundleError, match=rf"{MANIFEST}: {message}") as caught:
        load_bundle(bundle.directory)
    assert "\n" not in str(caught.value)


def test_a_bare_yaml_date_is_a_date(bundle: Bundle) -> None:
    path = bundle.directory / MANIFEST
    path.write_text(path.read_text().replace("'2026-11-23'", "2026-11-24"))
    assert load_manifest(bundle.directory).provenance.created == "2026-11-24"


@pytest.mark.parametrize(
    ("text", "message"), [("a: [", "not valid YAML"), ("- 1", "must hold a mapping"), ("", "map")]
)
def test_files_that_are_no_manifest(bundle: Bundle, text: str, message: str) -> None:
    (bundle.directory / MANIFEST).write_text(text)
    with pytest.raises(BundleError, match=message) as caught:
        load_manifest(bundle.directory)
    assert "\n" not in str(caught.value)
    (bundle.directory / MANIFEST).unlink()
    with pytest.raises(BundleError, match="No such file"):
        load_manifest(bundle.directory)


def test_writing_refuses_what_loading_would(tmp_path: Path) -> None:
    directory = fill(tmp_path / "tiny")
    with pytest.raises(BundleError, match="weights: 'absent' is not listed in files"):
        write_manifest(directory, {**VALUES, "weights": "absent"})
    with pytest.raises(BundleError, match="files: is computed"):
        write_manifest(directory, {**VALUES, "files": []})
    assert not (directory / MANIFEST).exists()


def test_writing_again_follows_the_files(bundle: Bundle) -> None:
    (bundle.directory / "weights.safetensors").write_bytes(b"better")
    assert len(verify(bundle)) == 1
    again = write_manifest(bundle.directory, VALUES)
    assert verify(Bundle(bundle.directory, again)) == []


def test_bundles_are_found_by_name_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    for place in ("first", "second", "work/models"):
        write_manifest(fill(tmp_path / place / "tiny"), VALUES)
    write_manifest(fill(tmp_path / "second" / "other"), VALUES)
    (tmp_path / "first" / "no-bundle").mkdir()

    monkeypatch.setenv(
        "REALTIDE_MODELS", f"{tmp_path / 'first'}, {tmp_path / 'second'},{tmp_path / 'absent'}"
    )
    assert search_path()[:4] == [tmp_path / "first", tmp_path / "second", tmp_path / "absent", Path("models")]
    assert resolve("tiny") == tmp_path / "first" / "tiny"
    assert resolve("other") == tmp_path / "second" / "other"
    assert load_bundle("other").manifest.name == "tiny"

    # One bundle itself, the way the server's setting names it.
    monkeypatch.setenv("REALTIDE_MODELS", f'[{{"bundle": "{tmp_path / "second" / "tiny"}", "slots": 4}}]')
    assert resolve("tiny") == tmp_path / "second" / "tiny"

    monkeypatch.delenv("REALTIDE_MODELS")
    assert resolve("tiny") == Path("models/tiny")
    assert resolve(tmp_path / "second" / "tiny") == tmp_path / "second" / "tiny"
    assert "no-bundle" not in find_bundles([tmp_path / "first"])
    assert list(find_bundles([tmp_path / "second"])) == ["other", "tiny"]


def test_a_bundle_in_the_current_directory_is_named_by_a_dot(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(bundle.directory)
    assert load_bundle(".").manifest.name == "tiny"
    assert list(find_bundles(["."])) == ["tiny"]


def test_the_source_trees_models_are_searched() -> None:
    root = Path(__file__).resolve().parent.parent
    assert root / "models" in [place.resolve() for place in search_path()]


@pytest.mark.parametrize("value", ['["a", 1]', '[{"slots": 3}]', '["a"', '[""]'])
def test_a_wrong_search_path_is_refused(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("REALTIDE_MODELS", value)
    with pytest.raises(BundleError, match="REALTIDE_MODELS: "):
        search_path()


def test_an_unknown_bundle_says_where_it_was_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        BundleError, match=rf"there is no bundle 'nothing': .* nor in models, .*{os.sep}models"
    ):
        load_bundle("nothing")
    with pytest.raises(
        BundleError, match=r"there is no bundle 'some/where': it is no directory with a manifest"
    ):
        load_bundle("some/where")
