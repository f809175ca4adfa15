from __future__ import annotations

import datetime
import json
from pathlib import Path

import pytest

from realtide.bench import report


def test_a_result_says_where_with_what_and_when_it_was_measured() -> None:
    found = report.envelope("things", {"value": 3})
    assert list(found) == ["benchmark", "command", "date", "commit", "machine", "versions", "value"]
    assert datetime.datetime.fromisoformat(found["date"]).tzinfo is datetime.UTC
    machine = found["machine"]
    assert machine["cpu"]
    assert machine["memory_bytes"] > 1 << 28
    assert 1 <= machine["usable_cores"] <= machine["cores"]
    assert {"python", "numpy", "onnxruntime"} <= set(found["versions"])
    assert found["commit"] == "unknown" or len(found["commit"].removesuffix("-dirty")) == 40


def test_the_command_is_as_typed_without_the_programs_directory() -> None:
    assert report.command_line(["/somewhere/bin/realtide", "bench", "speech"]) == "realtide bench speech"
    assert report.command_line(["/a/realtide/cli/__main__.py", "bench"]) == "realtide bench"


def test_a_result_is_written_as_json(tmp_path: Path) -> None:
    path = tmp_path / "new" / "result.json"
    report.write(path, {"a": [1, None]})
    assert json.loads(path.read_text()) == {"a": [1, None]}
    with pytest.raises(ValueError, match="Out of range"):
        report.write(path, {"a": float("nan")})
