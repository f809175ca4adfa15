"""Generated files are up to date, and it is noticed when they are not."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools import generate_deploy


def test_generated_files_are_up_to_date() -> None:
    assert generate_deploy.main(["--check"]) == 0


def test_stale_missing_and_left_over_files_are_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate_deploy.main([], root=tmp_path) == 0
    assert generate_deploy.main(["--check"], root=tmp_path) == 0
    with (tmp_path / "deploy/grafana/speech.json").open("a") as file:
        file.write(" ")
    (tmp_path / "deploy/helm/realtide/values.schema.json").unlink()
    (tmp_path / "deploy/helm/realtide/files/rules/old.yaml").touch()
    assert generate_deploy.main(["--check"], root=tmp_path) == 1
    assert capsys.readouterr().err.partition(": ")[2].strip().split(", ") == [
        "deploy/grafana/speech.json",
        "deploy/helm/realtide/files/rules/old.yaml",
        "deploy/helm/realtide/values.schema.json",
    ]
