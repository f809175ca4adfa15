"""`realtide models`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from realtide.bundle import write_manifest
from tests.cli.conftest import Run


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A bundle of two files."""
    directory = tmp_path / "models" / "tiny"
    directory.mkdir(parents=True)
    (directory / "weights.safetensors").write_bytes(b"weights")
    (directory / "README.md").write_text("card")
    values = {
        "engine": "ancat",
        "name": "tiny",
        "version": "0.1.0",
        "description": "A bundle for tests.",
        "licence": "Apache-2.0",
        "architecture": {},
        "precisions": ["float32"],
        "weights": "weights.safetensors",
        "provenance": {"recipe": "this test", "created": "2026-11-23"},
    }
    write_manifest(directory, values)
    return directory


def test_bundles_are_listed_for_people_and_for_programs(run: Run, tiny: Path) -> None:
    done = run("models", "list")
    assert done.code == 0
    header, row = done.out.splitlines()
    assert header.split() == ["NAME", "VERSION", "ENGINE", "PRECISIONS", "LICENCE", "SIZE", "DIRECTORY"]
    assert row.split() == ["tiny", "0.1.0", "ancat", "float32", "Apache-2.0", "0.0", "MB", "models/tiny"]
    (listed,) = json.loads(run("models", "list", "--json").out)
    assert (listed["name"], listed["bytes"], listed["directory"]) == ("tiny", 11, "models/tiny")


def test_an_unreadable_manifest_is_an_error_beside_the_others(run: Run, tiny: Path) -> None:
    broken = tiny.parent / "broken"
    broken.mkdir()
    (broken / "manifest.yaml").write_text("[")
    done = run("models", "list", "--json")
    assert done.code == 1
    assert [row["name"] for row in json.loads(done.out)] == ["tiny"]
    assert "broken/manifest.yaml: not valid YAML" in done.err


def test_a_bundle_is_verified_by_name_and_by_path(run: Run, tiny: Path) -> None:
    for arguments in (["tiny"], [str(tiny)], []):
        done = run("models", "verify", *arguments)
        assert (done.code, done.out, done.err) == (0, "tiny: ok\n", "")


def test_altered_missing_and_added_files_are_found(run: Run, tiny: Path) -> None:
    (tiny / "weights.safetensors").write_bytes(b"Weights")
    (tiny / "README.md").unlink()
    (tiny / "extra").write_text("?")
    done = run("models", "verify", "--json")
    assert done.code == 1
    (report,) = json.loads(done.out)
    assert [problem.split(":")[0] for problem in report["problems"]] == [
        "README.md",
        "weights.safetensors",
        "extra",
    ]
    assert done.err == "realtide: not what the manifest says: tiny\n"


def test_there_must_be_something_to_verify(run: Run) -> None:
    done = run("models", "verify")
    assert (done.code, done.err) == (1, "realtide: there is no model bundle in models\n")
    assert run("models", "verify", "nothing").code == 1
    assert run("models", "list").code == 0
    assert run("models", "list", "nowhere").code == 1
