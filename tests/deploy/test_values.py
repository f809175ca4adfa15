"""The schema of the chart's values, which Helm applies before anything is rendered."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from realtide.server.config import ServerConfig
from tools.chart_schema import DERIVED

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "deploy" / "helm" / "realtide"
SCHEMA = json.loads((CHART / "values.schema.json").read_text())
VALUES = yaml.safe_load((CHART / "values.yaml").read_text())
EXAMPLES = sorted((ROOT / "deploy" / "helm" / "examples").glob("*.yaml"))


def merged(base: Any, over: Any) -> Any:
    """As Helm merges values files."""
    if not (isinstance(base, dict) and isinstance(over, dict)):
        return over
    return {**base, **{key: merged(base.get(key), value) for key, value in over.items()}}


def problems(values: dict[str, Any]) -> list[str]:
    validator = jsonschema.Draft202012Validator(SCHEMA)
    return [error.message for error in validator.iter_errors(merged(deepcopy(VALUES), values))]


def at(path: str, value: Any) -> dict[str, Any]:
    """Nested mappings for a path with dots."""
    for key in reversed(path.split(".")):
        value = {key: value}
    result: dict[str, Any] = value
    return result


def test_the_defaults_and_the_examples_are_valid() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    assert problems({}) == []
    names = {path.stem for path in EXAMPLES}
    assert names >= {"minimal", "cpu", "gpu", "keda", "hpa", "gateway", "hardened"}
    for path in EXAMPLES:
        assert problems(yaml.safe_load(path.read_text())) == [], path.name


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("replicas", 3),
        ("image.tagg", "1"),
        ("image.digest", "sha256:12"),
        ("image.pullPolicy", "Sometimes"),
        ("engineSets", ["speech"]),
        ("engineSets.Speech", {}),
        ("engineSets.speech.replica", 2),
        ("engineSets.speech.models", [{"bundel": "words"}]),
        ("engineSets.speech.models", [{"bundle": "words", "slots": 0}]),
        ("defaults.drainSeconds", -1),
        ("defaults.drainSeconds", "60s"),
        ("defaults.config.queue_limt", 3),
        ("defaults.config.queue_limit", -1),
        ("defaults.config.drain_seconds", 3),
        ("defaults.config.port", 1),
        ("defaults.modelVolume.source", "nfs"),
        ("defaults.modelVolume.downloads", [{"url": "https://a/b.tar.gz"}]),
        ("defaults.modelVolume.downloads", [{"url": "https://a/b.tar.gz", "sha256": "12"}]),
        ("defaults.autoscaling.kind", "vpa"),
        ("defaults.autoscaling.slotsUsed", 70),
        ("defaults.resources.requests", {"cpu": "a lot"}),
        ("ports.grpc", 80),
        ("tls.secret", "x"),
        ("monitoring.kind", "Monitor"),
        ("monitoring.rules.objectives.fps", 16),
        ("monitoring.rules.objectives.deadlineMisses", 5),
    ],
)
def test_unknown_keys_and_values_out_of_range_are_refused(path: str, value: Any) -> None:
    assert problems(at(path, value))


def test_every_object_of_ours_is_closed() -> None:
    def walk(schema: Any, where: str) -> None:
        if isinstance(schema, dict):
            if "properties" in schema and "type" in schema:
                assert schema["additionalProperties"] is False, where
            for key, value in schema.items():
                walk(value, f"{where}.{key}")

    walk(SCHEMA, "")


def test_every_setting_of_the_server_is_either_given_or_derived() -> None:
    given = set(SCHEMA["$defs"]["engineSet"]["properties"]["config"]["properties"])
    assert given | (set(DERIVED) & set(ServerConfig.model_fields)) == set(ServerConfig.model_fields)
    assert not given & set(DERIVED)
