"""Alerts have a paragraph for whoever they wake, and unit tests, which promtool runs in `make ops-test`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import promql_parser
import yaml

ROOT = Path(__file__).resolve().parents[2]
PROMETHEUS = ROOT / "deploy" / "prometheus"


def load(name: str) -> Any:
    return yaml.safe_load((PROMETHEUS / name).read_text())


ALERTS = [rule for group in load("alerts.yaml")["groups"] for rule in group["rules"]]
NAMES = [rule["alert"] for rule in ALERTS]


def test_rules_are_promql() -> None:
    for name in ("objectives.yaml", "recording.yaml", "alerts.yaml"):
        for group in load(name)["groups"]:
            for rule in group["rules"]:
                promql_parser.parse(rule["expr"])


def test_the_alerts_that_operators_were_promised_are_there() -> None:
    assert len(set(NAMES)) == len(NAMES)
    assert set(NAMES) >= {
        "RealtideSlotsFull",
        "RealtideQueueWaitsLong",
        "RealtideDeliveredFpsLow",
        "RealtidePromptSwitchSlow",
        "RealtideFinalDelayLong",
        "RealtideDeadlinesMissed",
        "RealtideSlotsLeaked",
        "RealtideSessionsFail",
        "RealtideRestarts",
        "RealtideDeviceMemoryFull",
    }


def test_every_alert_says_what_is_wrong_and_where_to_read_on() -> None:
    for rule in ALERTS:
        assert rule["labels"]["severity"] in ("warning", "critical"), rule["alert"]
        notes = rule["annotations"]
        assert set(notes) == {"summary", "description", "runbook"}, rule["alert"]
        assert "{{ $value" in notes["summary"] or rule["expr"].endswith("== 0"), rule["alert"]
        assert notes["runbook"] == f"docs/operations.md#{rule['alert'].lower()}"


def test_every_alert_has_a_paragraph_and_no_other_has() -> None:
    text = (ROOT / "docs" / "operations.md").read_text()
    sections = re.findall(r"^### (Realtide\w+)\n\n(.+?)(?=^#|\Z)", text, re.M | re.S)
    assert [name for name, _ in sections] == NAMES
    for name, paragraph in sections:
        assert len(paragraph.split()) > 30, name


def test_every_alert_has_a_test_in_which_it_fires_and_one_in_which_it_waits() -> None:
    silent: set[str] = set()
    firing: set[str] = set()
    for case in load("tests/alerts_test.yaml")["tests"]:
        for check in case["alert_rule_test"]:
            (firing if check["exp_alerts"] else silent).add(check["alertname"])
        series = {item["series"] for item in case["input_series"]}
        # One bad series, and another that must not fire.
        assert len(series) >= 2 or "sessions_queued" in case["name"], case["name"]
    assert silent == firing == set(NAMES)


def test_the_chart_has_the_same_objectives() -> None:
    values = yaml.safe_load((ROOT / "deploy/helm/realtide/values.yaml").read_text())
    chart = {}
    for name, figure in values["monitoring"]["rules"]["objectives"].items():
        record = "realtide:objective:" + re.sub(r"(?<!^)([A-Z])", r"_\1", name).lower()
        figures = figure if isinstance(figure, dict) else {None: figure}
        chart.update({(record, engine): float(value) for engine, value in figures.items()})
    plain = {}
    for group in load("objectives.yaml")["groups"]:
        for rule in group["rules"]:
            match = re.fullmatch(r"vector\((.+)\)", rule["expr"])
            assert match is not None
            plain[rule["record"], rule.get("labels", {}).get("engine")] = float(match[1])
    assert chart == plain
