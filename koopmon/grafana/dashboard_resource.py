"""Converts a dashboard of the classic model to a resource of Grafana's schema V2, for Grafana 12 and newer.

Both forms have the same panels, queries and variables. The classic one is the source, because Grafana 11 reads it and
all newer versions import it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

Json = dict[str, Any]

API_VERSION = "dashboard.grafana.app/v2beta1"
CURSOR_SYNC = ("Off", "Crosshair", "Tooltip")
"""Shared cursor by number of the classic model."""
REFRESH = ("never", "onDashboardLoad", "onTimeRangeChanged")
SORT = ("disabled", "alphabeticalAsc", "alphabeticalDesc", "numericalAsc", "numericalDesc")
HIDE = ("dontHide", "hideLabel", "hideVariable")


def dashboard_resource(board: Json) -> Json:
    """Return the resource of a dashboard; its name is the dashboard's uid."""
    panels = [panel for panel in board["panels"] if panel["type"] != "row"]
    spec = {
        "title": board["title"],
        "description": board["description"],
        "tags": board["tags"],
        "editable": board["editable"],
        "cursorSync": CURSOR_SYNC[board["graphTooltip"]],
        "preload": False,
        "timeSettings": {
            "timezone": board["timezone"],
            "from": board["time"]["from"],
            "to": board["time"]["to"],
            "autoRefresh": board["refresh"],
            "autoRefreshIntervals": [],
            "hideTimepicker": False,
            "fiscalYearStartMonth": 0,
        },
        "links": board["links"],
        "variables": [_variable(each) for each in board["templating"]["list"]],
        "annotations": [_annotation(each) for each in board["annotations"]["list"]],
        "elements": {_element(panel): _panel(panel) for panel in panels},
        "layout": _kind("RowsLayout", {"rows": list(_rows(board["panels"]))}),
    }
    return {"apiVersion": API_VERSION, "kind": "Dashboard", "metadata": {"name": board["uid"]}, "spec": spec}


def _kind(kind: str, spec: Json) -> Json:
    return {"kind": kind, "spec": spec}


def _query(datasource: Json, spec: Json) -> Json:
    """Return a query of the data source that the classic model refers to."""
    source = {"group": datasource["type"], "datasource": {"name": datasource["uid"]}}
    return {"kind": "DataQuery", "version": "v0", **source, "spec": spec}


def _element(panel: Json) -> str:
    return f"panel-{panel['id']}"


def _panel(panel: Json) -> Json:
    queries = [
        _kind(
            "PanelQuery",
            {
                "refId": target["refId"],
                "hidden": False,
                "query": _query(
                    target["datasource"],
                    {name: value for name, value in target.items() if name not in ("datasource", "refId")},
                ),
            },
        )
        for target in panel["targets"]
    ]
    transformations = [
        {"kind": each["id"], "spec": {"id": each["id"], "options": each["options"]}}
        for each in panel.get("transformations", ())
    ]
    data = {"queries": queries, "transformations": transformations, "queryOptions": {}}
    settings = {"options": panel["options"], "fieldConfig": panel["fieldConfig"]}
    shown = {"id": panel["id"], "title": panel["title"], "description": panel["description"], "links": []}
    drawn = {"kind": "VizConfig", "group": panel["type"], "version": "", "spec": settings}
    return _kind("Panel", shown | {"data": _kind("QueryGroup", data), "vizConfig": drawn})


def _rows(panels: list[Json]) -> Iterator[Json]:
    """Yield the rows. The places of their panels are relative to the row."""
    heads = [index for index, panel in enumerate(panels) if panel["type"] == "row"]
    for start, end in zip(heads, [*heads[1:], len(panels)], strict=True):
        head, members = panels[start], panels[start + 1 : end]
        top = head["gridPos"]["y"] + head["gridPos"]["h"]
        items = [
            _kind(
                "GridLayoutItem",
                {
                    "x": place["x"],
                    "y": place["y"] - top,
                    "width": place["w"],
                    "height": place["h"],
                    "element": {"kind": "ElementReference", "name": _element(panel)},
                },
            )
            for panel in members
            for place in [panel["gridPos"]]
        ]
        layout = _kind("GridLayout", {"items": items})
        yield _kind("RowsLayoutRow", {"title": head["title"], "collapse": head["collapsed"], "layout": layout})


def _variable(variable: Json) -> Json:
    spec = {
        "name": variable["name"],
        "label": variable["label"],
        "hide": HIDE[variable["hide"]],
        "current": variable.get("current", {"text": "", "value": ""}),
        "options": [],
        "regex": "",
        "skipUrlSync": False,
        "allowCustomValue": True,
        "multi": variable.get("multi", False),
        "includeAll": variable.get("includeAll", False),
    }
    if variable["type"] == "datasource":
        return _kind("DatasourceVariable", {**spec, "pluginId": variable["query"], "refresh": "onDashboardLoad"})
    spec |= {"refresh": REFRESH[variable["refresh"]], "sort": SORT[variable["sort"]]}
    spec["query"] = _query(variable["datasource"], variable["query"])
    if "allValue" in variable:
        spec["allValue"] = variable["allValue"]
    return _kind("QueryVariable", spec)


def _annotation(annotation: Json) -> Json:
    query = _query(annotation["datasource"], {"refId": "A", "expr": annotation["expr"], "interval": annotation["step"]})
    spec = {name: annotation[name] for name in ("name", "enable", "hide", "iconColor")}
    # The schema has no field for settings of one data source.
    legacy = {"titleFormat": annotation["titleFormat"]}
    return _kind("AnnotationQuery", {**spec, "builtIn": False, "query": query, "legacyOptions": legacy})
