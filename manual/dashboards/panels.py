"""Functions that build Grafana's panels and queries."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from koopmon.telemetry.alerts import ACT_RISK, SEVERE_RISK

Json = dict[str, Any]
ColorSteps = Sequence[tuple[float | None, str]]
"""Thresholds with their colours; None is the lowest."""

DATASOURCE: Json = {"type": "prometheus", "uid": "${datasource}"}
GREEN, ORANGE, RED, BLUE, GREY = "green", "orange", "red", "blue", "text"
CALM: ColorSteps = ((None, GREEN),)
RISK_STEPS: ColorSteps = ((None, GREEN), (ACT_RISK, ORANGE), (SEVERE_RISK, RED))
"""The risk thresholds of the alerts and the policy."""


RUN_STATES: Mapping[str, tuple[str, str]] = {"0": ("ended", GREY), "1": ("running", GREEN), "2": ("vanished", RED)}


def warn(at: float) -> ColorSteps:
    """Return green, and orange from `at` on."""
    return ((None, GREEN), (at, ORANGE))


def query(expr: str, legend: str = "", *, instant: bool = False, table: bool = False) -> Json:
    """Return one PromQL query; `legend` is a template of label names in double braces."""
    return {
        "datasource": DATASOURCE,
        "editorMode": "code",
        "expr": expr,
        "legendFormat": legend or "__auto",
        "instant": instant,
        "range": not instant,
        "format": "table" if table else "time_series",
    }


def panel(
    kind: str,
    title: str,
    description: str,
    queries: Iterable[Json],
    *,
    options: Json,
    unit: str = "short",
    steps: ColorSteps = CALM,
    overrides: Sequence[Json] = (),
    **defaults: Any,
) -> Json:
    """Return a panel of any kind. `unit` is one of Grafana's ids; `defaults` are settings of its fields."""
    return {
        "type": kind,
        "title": title,
        "description": description,
        "datasource": DATASOURCE,
        "targets": [{"refId": chr(ord("A") + number), **each} for number, each in enumerate(queries)],
        "fieldConfig": {
            "defaults": {"unit": unit, "thresholds": thresholds(steps), **defaults},
            "overrides": list(overrides),
        },
        "options": options,
    }


def stat(
    title: str,
    description: str,
    expr: str,
    legend: str = "",
    *,
    mappings: Mapping[str, tuple[str, str]] | None = None,
    text: bool = False,
    **settings: Any,
) -> Json:
    """Return a panel with the latest value in large type; `text` shows the names of the series instead."""
    options = {
        "colorMode": "value",
        "graphMode": "none",
        "justifyMode": "auto",
        "orientation": "auto",
        "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
        "textMode": "name" if text else "auto",
    }
    mapped = [value_mapping(mappings)] if mappings else []
    queries = [query(expr, legend, instant=True)]
    return panel("stat", title, description, queries, options=options, mappings=mapped, **settings)


def lines(
    title: str,
    description: str,
    series: Mapping[str, str],
    *,
    steps: ColorSteps = (),
    minimum: float | None = 0,
    maximum: float | None = None,
    log: bool = False,
    bars: bool = False,
    right: str | None = None,
    link: str | None = None,
    unit: str = "short",
) -> Json:
    """Return a panel of lines over time, or stacked bars. `series` maps legends to queries.

    `right` is a pattern of the series on the right axis. `link` is the target of a click on a line.
    """
    custom: Json = {
        "drawStyle": "bars" if bars else "line",
        "fillOpacity": 60 if bars else 0,
        "lineWidth": 1,
        "showPoints": "never",
        "spanNulls": False,
        "stacking": {"mode": "normal" if bars else "none", "group": "A"},
        "scaleDistribution": {"type": "log", "log": 10} if log else {"type": "linear"},
        "thresholdsStyle": {"mode": "dashed" if steps else "off"},
    }
    links = None if link is None else [{"title": "This run", "url": link}]
    bounds = {"min": minimum, "max": maximum, "links": links}
    options = {
        "legend": {"calcs": ["lastNotNull", "max"], "displayMode": "table", "placement": "bottom", "showLegend": True},
        "tooltip": {"mode": "multi", "sort": "desc"},
    }
    return panel(
        "timeseries",
        title,
        description,
        [query(expr, legend) for legend, expr in series.items()],
        options=options,
        unit=unit,
        steps=steps or CALM,
        overrides=[override(right, {"custom.axisPlacement": "right"}, by="byRegexp")] if right else [],
        custom=custom,
        **{name: value for name, value in bounds.items() if value is not None},
    )


def heatmap(title: str, description: str, expr: str, *, unit: str = "short", scheme: str = "Oranges") -> Json:
    """Return a heatmap over time, one row for each layer of `expr`, in the order of the series."""
    options = {
        "calculate": False,
        "cellGap": 1,
        "cellValues": {"unit": unit},
        "color": {"mode": "scheme", "scheme": scheme, "steps": 64, "exponent": 0.5, "fill": "dark-orange"},
        "filterValues": {"le": -1e9},
        "legend": {"show": True},
        "rowsFrame": {"layout": "auto"},
        "tooltip": {"mode": "single", "showColorScale": True, "yHistogram": False},
        "yAxis": {"axisPlacement": "left", "reverse": False, "axisLabel": "layer"},
    }
    custom = {"scaleDistribution": {"type": "linear"}}
    return panel("heatmap", title, description, [query(expr, "{{layer}}")], options=options, unit=unit, custom=custom)


def states(title: str, description: str, expr: str, legend: str, mappings: Mapping[str, tuple[str, str]]) -> Json:
    """Return a state timeline: coloured intervals over time."""
    options = {
        "alignValue": "left",
        "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True},
        "mergeValues": True,
        "rowHeight": 0.8,
        "showValue": "auto",
        "tooltip": {"mode": "single", "sort": "none"},
    }
    settings: Json = {"mappings": [value_mapping(mappings)], "custom": {"fillOpacity": 70, "lineWidth": 0}}
    return panel("state-timeline", title, description, [query(expr, legend)], options=options, **settings)


def table(title: str, description: str, columns: Mapping[str, str], overrides: Sequence[Json]) -> Json:
    """Return a table of runs. `columns` maps names to instant queries by run and instance, which are joined."""
    names = {"run": "run", **{f"Value #{chr(ord('A') + number)}": name for number, name in enumerate(columns)}}
    names["instance"] = "monitor"
    organize = {
        "excludeByName": {"Time": True},
        "indexByName": {name: index for index, name in enumerate(names)},
        "renameByName": names,
    }
    made = panel(
        "table",
        title,
        description,
        [query(expr, instant=True, table=True) for expr in columns.values()],
        options={"cellHeight": "sm", "footer": {"show": False}, "showHeader": True},
        overrides=overrides,
        custom={"align": "auto", "filterable": True},
    )
    return made | {"transformations": [{"id": "merge", "options": {}}, {"id": "organize", "options": organize}]}


def override(name: str, properties: Mapping[str, Any], *, by: str = "byName") -> Json:
    """Return an override of properties for the fields called `name`."""
    return {
        "matcher": {"id": by, "options": name},
        "properties": [{"id": key, "value": value} for key, value in properties.items()],
    }


def thresholds(steps: ColorSteps) -> Json:
    return {"mode": "absolute", "steps": [{"value": value, "color": color} for value, color in steps]}


def value_mapping(texts: Mapping[str, tuple[str, str]]) -> Json:
    """Return a mapping from values to texts and colours."""
    options = {
        value: {"text": text, "color": color, "index": index}
        for index, (value, (text, color)) in enumerate(texts.items())
    }
    return {"type": "value", "options": options}


def state_of(selector: str) -> str:
    """Return the state of each run as 0 ended, 1 running, 2 vanished: a table and a timeline show one number."""
    states = (
        f'{number} * koopmon_run_state{{{selector},state="{name}"}}'
        for number, name in ((1, "running"), (2, "vanished"))
    )
    return " + ignoring (state) ".join(states)
