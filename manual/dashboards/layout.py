"""Assembles a dashboard from its panels: rows, variables, links and annotations."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from manual.dashboards.panels import DATASOURCE, Json

SCHEMA_VERSION = 39
WIDTH = 24
"""Number of columns of Grafana's grid."""

Rows = Mapping[str, Sequence[tuple[Json, int, int]]]
"""Panels with their width and height, in rows by title."""


def sized(width: int, height: int, *panels: Json) -> list[tuple[Json, int, int]]:
    """Return panels of one size for a row."""
    return [(each, width, height) for each in panels]


def label_variable(name: str, label: str, metric: str, of: str, *, many: bool = True) -> Json:
    """Return a variable with the values of label `of` of `metric`; `many` allows several values, or all."""
    variable: Json = {
        "name": name,
        "label": label,
        "type": "query",
        "datasource": DATASOURCE,
        "query": {"query": f"label_values({metric},{of})", "refId": "A"},
        "refresh": 2,
        "sort": 3,
        "includeAll": many,
        "multi": many,
        "hide": 0,
    }
    if many:
        variable |= {"allValue": ".*", "current": {"text": "All", "value": "$__all"}}
    return variable


def annotation(name: str, expr: str, title: str, color: str) -> Json:
    """Return an annotation that marks all time panels at the samples of `expr`."""
    return {
        "name": name,
        "datasource": DATASOURCE,
        "enable": True,
        "hide": False,
        "iconColor": color,
        "expr": expr,
        "titleFormat": title,
        "step": "15s",
    }


def _link(uid: str, title: str) -> Json:
    """Return a link to another dashboard that keeps the data source and the time range."""
    return {
        "type": "link",
        "title": title,
        "url": f"/d/{uid}?${{datasource:queryparam}}",
        "icon": "dashboard",
        "targetBlank": False,
        "keepTime": True,
        "includeVars": False,
        "asDropdown": False,
        "tags": [],
        "tooltip": "",
    }


def dashboard(
    uid: str,
    title: str,
    description: str,
    rows: Rows,
    *,
    variables: Sequence[Json],
    links: Mapping[str, str],
    annotations: Sequence[Json] = (),
) -> Json:
    """Assemble a dashboard; panels are numbered and placed from left to right, row by row.

    `links` are the titles of other dashboards by uid. Each dashboard has variables for the data source and the job.
    """
    source = {"name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus", "hide": 0}
    return {
        "uid": uid,
        "title": title,
        "description": description,
        "tags": ["koopmon"],
        "timezone": "browser",
        "editable": False,
        "graphTooltip": 1,
        "schemaVersion": SCHEMA_VERSION,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": [source, label_variable("job", "Job", "koopmon_build_info", "job"), *variables]},
        "annotations": {"list": list(annotations)},
        "links": [_link(*each) for each in links.items()],
        "panels": list(_laid_out(rows)),
    }


def _laid_out(rows: Rows) -> Iterator[Json]:
    number, top = 0, 0
    for title, members in rows.items():
        number += 1
        place = {"x": 0, "y": top, "w": WIDTH, "h": 1}
        yield {"id": number, "type": "row", "title": title, "collapsed": False, "gridPos": place, "panels": []}
        top, left, tallest = top + 1, 0, 0
        for each, width, height in members:
            if left + width > WIDTH:
                top, left, tallest = top + tallest, 0, 0
            number += 1
            yield {"id": number, **each, "gridPos": {"x": left, "y": top, "w": width, "h": height}}
            left, tallest = left + width, max(tallest, height)
        top += tallest
