"""From a plain description of a dashboard to Grafana's model of it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from grafana_foundation_sdk.builders import common, dashboard, prometheus, stat, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import common as common_model
from grafana_foundation_sdk.models import dashboard as model

_SOURCE = model.DataSourceRef(type_val="prometheus", uid="${datasource}")


@dataclass(frozen=True, slots=True)
class Query:
    """A PromQL expression and the legend of its series (``{{label}}`` is replaced)."""

    expr: str
    legend: str


@dataclass(frozen=True, slots=True)
class Panel:
    """One panel. `unit` is Grafana's name of it; `text` says what is seen, and what is well and what is not."""

    title: str
    unit: str
    text: str
    queries: tuple[Query, ...]
    kind: Literal["graph", "number"] = "graph"
    width: int = 8
    stacked: bool = False
    top: float | None = None
    """A fixed upper end of the axis."""
    red: float | None = None
    """Numbers from here on are red."""


@dataclass(frozen=True, slots=True)
class Row:
    """A headed row of panels."""

    title: str
    panels: tuple[Panel, ...]


@dataclass(frozen=True, slots=True)
class Board:
    """A whole dashboard.

    Attributes:
        name: file name and, behind ``realtide-``, the identifier in its address.
        engine: only models of this engine can be chosen; None: those of all.
    """

    name: str
    title: str
    text: str
    rows: tuple[Row, ...]
    engine: str | None = None
    tags: tuple[str, ...] = field(default=("realtide",))


def selector(engine: str | None = None, more: str = "") -> str:
    """Labels of series of a model, chosen by the dashboard's variables."""
    parts = [f'engine="{engine}"'] if engine else []
    return ", ".join(
        [*parts, 'job=~"$job", instance=~"$instance", model=~"$model"', *([more] if more else [])]
    )


def quantiles(
    metric: str, labels: str, by: str = "model", which: Sequence[float] = (0.5, 0.95, 0.99)
) -> tuple[Query, ...]:
    """Quantiles of a histogram, one series for each of them and each value of the labels `by`."""
    names = [name.strip() for name in by.split(",")]
    legend = " ".join(f"{{{{{name}}}}}" for name in names)
    return tuple(
        Query(
            f"histogram_quantile({q}, sum by ({by}, le) (rate({metric}_bucket{{{labels}}}[$__rate_interval])))",
            f"{legend} p{q * 100:g}",
        )
        for q in which
    )


def mean(metric: str, labels: str, by: str = "model") -> Query:
    """Mean of a histogram over the interval."""
    rate = f"sum by ({by}) (rate({metric}_%s{{{labels}}}[$__rate_interval]))"
    return Query(f"{rate % 'sum'} / {rate % 'count'}", f"{{{{{by}}}}} mean")


def render(board: Board) -> str:
    """The dashboard as JSON, the same for the same description."""
    built = (
        dashboard.Dashboard(board.title)
        .uid(f"realtide-{board.name}")
        .description(board.text)
        .tags([*board.tags])
        .refresh("10s")
        .time("now-30m", "now")
        .timezone("browser")
        .readonly()
        .tooltip(model.DashboardCursorSync.CROSSHAIR)
        .with_variable(dashboard.DatasourceVariable("datasource").label("Data source").type("prometheus"))
        .with_variable(_variable("job", "Job", "label_values(realtide_build_info, job)"))
        .with_variable(
            _variable("instance", "Server", 'label_values(realtide_build_info{job=~"$job"}, instance)')
        )
        .with_variable(
            _variable(
                "model",
                "Model",
                f"label_values(realtide_session_capacity{{{_engine(board)}job=~"
                '"$job", instance=~"$instance"}, model)',
            )
        )
        .link(
            dashboard.DashboardLink("Realtide")
            .type(model.DashboardLinkType.DASHBOARDS)
            .tags(["realtide"])
            .as_dropdown(True)
            .keep_time(True)
            .include_vars(True)
        )
    )
    number = 0
    for row in board.rows:
        number += 1
        built.with_row(dashboard.Row(row.title).id(number))
        for panel in row.panels:
            number += 1
            built.with_panel(_panel(panel, number))
    data = _without_nothing(json.loads(json.dumps(built.build(), cls=JSONEncoder)))
    return json.dumps(data, indent=1, ensure_ascii=False) + "\n"


def _engine(board: Board) -> str:
    return f'engine="{board.engine}", ' if board.engine else ""


def _variable(name: str, label: str, query: str) -> dashboard.QueryVariable:
    return (
        dashboard.QueryVariable(name)
        .label(label)
        .query(query)
        .datasource(_SOURCE)
        .refresh(model.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(model.VariableSort.ALPHABETICAL_ASC)
        .multi(True)
        .include_all(True)
        .all_value(".*")
        .current(model.VariableOption(text="All", value="$__all", selected=True))
    )


def _panel(panel: Panel, number: int) -> timeseries.Panel | stat.Panel:
    built: timeseries.Panel | stat.Panel
    if panel.kind == "number":
        steps = [model.Threshold(value=None, color="green")]
        if panel.red is not None:
            steps.append(model.Threshold(value=panel.red, color="red"))
        built = (
            stat.Panel()
            .height(4)
            .graph_mode(common_model.BigValueGraphMode.AREA)
            .reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
            .thresholds(dashboard.ThresholdsConfig().mode(model.ThresholdsMode.ABSOLUTE).steps(steps))
        )
    else:
        built = (
            timeseries.Panel()
            .height(8)
            .line_width(1)
            .fill_opacity(60 if panel.stacked else 8)
            .show_points(common_model.VisibilityMode.NEVER)
            .legend(
                common.VizLegendOptions()
                .display_mode(common_model.LegendDisplayMode.LIST)
                .placement(common_model.LegendPlacement.BOTTOM)
                .show_legend(True)
            )
            .tooltip(
                common.VizTooltipOptions()
                .mode(common_model.TooltipDisplayMode.MULTI)
                .sort(common_model.SortOrder.DESCENDING)
            )
            .min(0)
        )
        if panel.stacked:
            built.stacking(common.StackingConfig().mode(common_model.StackingMode.NORMAL))
        if panel.top is not None:
            built.max(panel.top)
    built.id(number).title(panel.title).description(panel.text).unit(panel.unit)
    built.datasource(_SOURCE).span(panel.width)
    for index, query in enumerate(panel.queries):
        built.with_target(
            prometheus.Dataquery()
            .datasource(_SOURCE)
            .expr(query.expr)
            .legend_format(query.legend)
            .ref_id(chr(ord("A") + index))
        )
    return built


def _without_nothing(value: Any) -> Any:
    """Grafana leaves out what is not set."""
    if isinstance(value, dict):
        return {name: _without_nothing(part) for name, part in value.items() if part is not None}
    if isinstance(value, list):
        return [_without_nothing(part) for part in value]
    return value
