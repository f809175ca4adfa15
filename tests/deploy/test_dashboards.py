"""The dashboards are complete, can be read by Grafana, and ask for what the server exposes."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import yaml
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models import dashboard

from tests.deploy.kept import assert_kept
from tools import generate_deploy

ROOT = Path(__file__).resolve().parents[2]
RULES = [yaml.safe_load((ROOT / "deploy/prometheus" / name).read_text()) for name in generate_deploy.RULES]
OBJECTIVES = yaml.safe_load((ROOT / "deploy/prometheus/objectives.yaml").read_text())
BOARDS = {
    path.stem: json.loads(path.read_text()) for path in sorted((ROOT / "deploy/grafana").glob("*.json"))
}
NAME = re.compile(r"\b(?:realtide|grpc_server|process|up|ALERTS)(?:[_:][\w:]+)?\b(?!\()")
# Of Prometheus itself.
FOREIGN = {"up", "ALERTS"}

boards = pytest.mark.parametrize("name", BOARDS)


def panels(board: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Panels with data."""
    for panel in board["panels"]:
        if panel["type"] != "row":
            yield panel
        yield from (inner for inner in panel.get("panels", []))


def queries(board: dict[str, Any]) -> list[str]:
    return [target["expr"] for panel in panels(board) for target in panel["targets"]]


def names(expression: str) -> set[str]:
    """Metrics that a PromQL expression reads."""
    without_strings = re.sub(r'"[^"]*"', '""', expression)
    return set(NAME.findall(re.sub(r"\{[^}]*\}", "", without_strings)))


def documented() -> set[str]:
    table = (ROOT / "docs" / "metrics.md").read_text()
    return set(re.findall(r"^\| `(\w+)` \| \w+ \|", table, re.M))


def bare(name: str) -> str:
    return re.sub(r"_(bucket|sum|count)$", "", name)


def rules() -> list[dict[str, Any]]:
    return [rule for file in (*RULES, OBJECTIVES) for group in file["groups"] for rule in group["rules"]]


def recorded() -> set[str]:
    return {rule["record"] for rule in rules() if "record" in rule}


def test_there_is_an_overview_and_one_for_each_engine() -> None:
    from realtide.server.loading import ENGINES

    engines = {board.engine for board in generate_deploy.BOARDS}
    assert engines == {None, *ENGINES}
    assert set(BOARDS) == {board.name for board in generate_deploy.BOARDS}


@boards
def test_every_panel_says_what_it_shows_and_in_which_unit(name: str) -> None:
    found = list(panels(BOARDS[name]))
    assert len(found) >= 9
    for panel in found:
        assert panel["title"]
        assert len(panel["description"]) > 10, panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        assert panel["targets"], panel["title"]
        legends = [target["legendFormat"] for target in panel["targets"]]
        assert len(set(legends)) == len(legends), panel["title"]
    titles = [panel["title"] for panel in found]
    ids = [panel["id"] for panel in BOARDS[name]["panels"]]
    assert len(set(ids)) == len(ids)
    assert len(titles) == len({(panel["title"], panel["type"]) for panel in found})


@boards
def test_panels_do_not_lie_on_each_other(name: str) -> None:
    taken: set[tuple[int, int]] = set()
    for panel in BOARDS[name]["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not cells & taken, panel["title"]
        taken |= cells


@boards
def test_queries_are_promql_and_choose_by_the_dashboards_variables(name: str) -> None:
    board = BOARDS[name]
    known = {variable["name"] for variable in board["templating"]["list"]}
    for query in queries(board):
        used = set(re.findall(r"\$(\w+)", query))
        assert used <= known | {"__rate_interval"}, query
        promql_parser.parse(
            re.sub(r"\$__rate_interval", "1m", re.sub(r"\$(job|instance|model)", ".*", query))
        )
        if "realtide:objective" not in query and "ALERTS" not in query:
            assert "$job" in query, query
            assert "$instance" in query, query
    source = {panel["datasource"]["uid"] for panel in panels(board)}
    assert source == {"${datasource}"}


@boards
def test_grafana_knows_every_field(name: str) -> None:
    """A field that its models do not have would be lost on the way through them."""
    register_default_plugins()
    model = dashboard.Dashboard.from_json(BOARDS[name])
    again = json.loads(json.dumps(model, cls=JSONEncoder))
    assert_kept(BOARDS[name], again, name)


def test_what_dashboards_and_rules_read_is_documented_and_what_is_documented_is_read() -> None:
    expressions = [query for board in BOARDS.values() for query in queries(board)]
    expressions += [rule["expr"] for rule in rules()]
    read = {name for expression in expressions for name in names(expression)} - FOREIGN
    known = documented()
    assert len(known) > 30
    assert {bare(name) for name in read if ":" not in name} - known == set()
    assert {name for name in read if ":" in name} - recorded() == set()
    assert known - {bare(name) for name in read} == set()


def test_what_is_recorded_is_used() -> None:
    expressions = [query for board in BOARDS.values() for query in queries(board)]
    expressions += [rule["expr"] for rule in rules()]
    expressions += [
        (ROOT / "deploy/prometheus/adapter/values.yaml").read_text(),
    ]
    used = {name for expression in expressions for name in re.findall(r"\brealtide:[\w:]+", expression)}
    # For people: how many sessions fit in now.
    assert recorded() - used == {"realtide:slots_free:sum"}


def test_wrong_names_are_seen() -> None:
    assert names('sum(rate(realtide_x_bucket{a="realtide_y"}[5m])) / realtide:z:ratio') == {
        "realtide_x_bucket",
        "realtide:z:ratio",
    }
