"""Dashboards: parsed by Grafana's SDK without loss, with the intended layout and filters."""

from __future__ import annotations

import itertools
import json
import re
from typing import Any

import pytest

from koopmon.grafana.dashboards import dashboards, panel_id
from koopmon.plugins import adapters
from koopmon.telemetry.alerts import ALERTS
from koopmon.telemetry.metrics import OBSERVABLE, PREFIX, TABLE, Series

DASHBOARDS = dashboards()
PANELS = [
    pytest.param(uid, panel, id=f"{uid}-{panel['title']}")
    for uid, each in DASHBOARDS.items()
    for panel in each["panels"]
    if panel["type"] != "row"
]
GRID = 24
PROMETHEUS_OWN = {"up", "scrape_duration_seconds", "scrape_samples_scraped", "ALERTS"}
METRICS = {
    PREFIX + series.name + {"counter": "_total", "info": "_info"}.get(series.kind, ""): series for series in TABLE
}
MEASURES = tuple(name for family in adapters().values() for name in family.measures)
SERIES = METRICS | {
    PREFIX + OBSERVABLE + name: Series(OBSERVABLE + name, "gauge", "", ("run", "layer")) for name in MEASURES
}
"""The metrics of the table, and those of the adapters' measurements."""
HISTOGRAMS = ("_bucket", "_count", "_sum")


def asked(expr: str) -> list[tuple[str, str]]:
    """Return the metrics of a query, each with the content of its braces."""
    names = "|".join(sorted(PROMETHEUS_OWN))
    return re.findall(rf"\b(koopmon_\w+|{names})\b(?:\{{([^}}]*)\}})?", expr)


def test_there_are_three_and_their_uids_stay() -> None:
    assert list(DASHBOARDS) == ["koopmon-fleet", "koopmon-run", "koopmon-monitor"]


@pytest.mark.parametrize("uid", DASHBOARDS)
def test_the_sdk_reads_it_back_without_loss(uid: str) -> None:
    encoder = pytest.importorskip("grafana_foundation_sdk.cog.encoder").JSONEncoder
    model = pytest.importorskip("grafana_foundation_sdk.models.dashboard").Dashboard
    pytest.importorskip("grafana_foundation_sdk.cog.plugins").register_default_plugins()
    made = DASHBOARDS[uid]
    read = json.loads(json.dumps(model.from_json(json.loads(json.dumps(made))), cls=encoder))
    assert_kept(made, read, uid)


def assert_kept(made: Any, read: Any, where: str) -> None:
    """Check that `read` has everything in `made`. It may have more, because the SDK writes defaults."""
    if isinstance(made, dict):
        assert isinstance(read, dict), where
        for key, value in made.items():
            # The SDK's model lacks the fields that only annotations of Prometheus have.
            if ".annotations.list." in where and key in ("titleFormat", "step"):
                continue
            if key == "value" and value is None:  # the lowest threshold
                continue
            assert key in read, f"{where}.{key} is lost"
            assert_kept(value, read[key], f"{where}.{key}")
    elif isinstance(made, list):
        assert len(made) == len(read), where
        for index, (one, other) in enumerate(zip(made, read, strict=True)):
            assert_kept(one, other, f"{where}.{index}")
    else:
        assert made == read, where


@pytest.mark.parametrize(("uid", "panel"), PANELS)
def test_a_panel_says_what_it_shows_and_in_what_unit(uid: str, panel: dict[str, Any]) -> None:
    assert panel["description"].endswith(".")
    assert panel["fieldConfig"]["defaults"]["unit"]
    assert panel["targets"]
    refs = [target["refId"] for target in panel["targets"]]
    assert len(set(refs)) == len(refs)
    assert all(target["datasource"] == {"type": "prometheus", "uid": "${datasource}"} for target in panel["targets"])


@pytest.mark.parametrize(("uid", "panel"), PANELS)
def test_a_query_asks_for_what_there_is_and_only_of_what_was_chosen(uid: str, panel: dict[str, Any]) -> None:
    for target in panel["targets"]:
        found = asked(target["expr"])
        assert found, target["expr"]
        for name, selector in found:
            if name not in PROMETHEUS_OWN:
                base = name if name in SERIES else re.sub("|".join(f"{end}$" for end in HISTOGRAMS), "", name)
                series = SERIES[base]
                if uid == "koopmon-monitor":
                    assert 'instance=~"$instance"' in selector, target["expr"]
                elif "run" in series.labels:
                    assert 'run=~"$run"' in selector, target["expr"]
                if uid == "koopmon-run" and "layer" in series.labels:
                    assert 'layer=~"$layer"' in selector, target["expr"]
                for label, value in re.findall(r'(\w+)(?:=|!=|=~|!~)"([^"$]+)"', selector):
                    if label not in series.known:  # names that only a run knows, such as those of logged scalars
                        continue
                    known = series.known[label]
                    assert all(any(re.fullmatch(part, each) for each in known) for part in value.split("|")), value
        if target["legendFormat"] != "__auto":
            labels = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
            assert labels <= _labels(found), target["legendFormat"]


def _labels(found: list[tuple[str, str]]) -> set[str]:
    labels = {"instance", "job", "alertname", "alertstate"}
    for name, _ in found:
        base = re.sub("|".join(f"{end}$" for end in HISTOGRAMS), "", name)
        labels |= set(SERIES[base].labels if base in SERIES else ("run",))
        labels |= {"version", "protocol", "python", "torch"} if base == "koopmon_build_info" else set()
    return labels


@pytest.mark.parametrize("uid", DASHBOARDS)
def test_panels_have_their_place_and_their_number(uid: str) -> None:
    panels = DASHBOARDS[uid]["panels"]
    numbers = [panel["id"] for panel in panels]
    assert len(set(numbers)) == len(numbers)
    titles = [panel["title"] for panel in panels if panel["type"] != "row"]
    assert len(set(titles)) == len(titles)
    for one, other in itertools.combinations([panel["gridPos"] for panel in panels], 2):
        beside = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        below = one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        assert beside or below
        assert one["x"] + one["w"] <= GRID


def test_every_metric_is_shown_somewhere() -> None:
    exprs = [
        target["expr"]
        for each in DASHBOARDS.values()
        for panel in each["panels"]
        for target in panel.get("targets", ())
    ]
    shown = {re.sub(r"_(bucket|count|sum)$", "", name) for expr in exprs for name, _ in asked(expr)}
    assert set(METRICS) - shown == set()


EXCLUDED = {
    "instance": "runs are selected by name: the monitor of a run may move to another address",
    "all": "All of a variable is .*, so that a series without the label is shown too",
}
"""Rules of grafana/dashboard-linter that the dashboards break on purpose: the variable `instance` in the dashboards of
runs, and `.+` as the value of All."""
RANGED = r"(?:rate|irate|increase|delta|changes)"


@pytest.mark.parametrize("uid", DASHBOARDS)
def test_a_dashboard_keeps_the_rules_of_the_dashboard_linter(uid: str) -> None:
    board = DASHBOARDS[uid]
    variables = {each["name"]: each for each in board["templating"]["list"]}
    assert (variables["datasource"]["label"], variables["datasource"]["query"]) == ("Data source", "prometheus")
    assert variables["job"]["label"] == "Job"
    assert variables["job"]["multi"]
    assert variables["job"]["includeAll"]
    assert uid != "koopmon-monitor" or variables["instance"]["multi"], EXCLUDED["instance"]
    for variable in variables.values():
        assert variable["type"] == "datasource" or variable["refresh"] == 2, "labels follow the time range"
        assert variable.get("allValue", ".*") == ".*", EXCLUDED["all"]
    assert not board["editable"]


@pytest.mark.parametrize(("uid", "panel"), PANELS)
def test_a_panel_keeps_the_rules_of_the_dashboard_linter(uid: str, panel: dict[str, Any]) -> None:
    assert panel["title"]
    assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
    assert panel["fieldConfig"]["defaults"]["unit"] not in ("", "none")
    for target in panel["targets"]:
        expr = target["expr"]
        for name, selector in asked(expr):
            assert 'job=~"$job"' in selector, expr
            series = METRICS.get(name)
            if series is not None and series.kind == "counter":
                assert re.search(rf"\b{RANGED}\({name}\{{[^}}]*\}}\[", expr), f"{name} is a counter: {expr}"
        windows = re.findall(r"\[([^]]+)\]", expr)
        # Of a whole hour, by the title of the panel or the column.
        assert set(windows) <= {"$__rate_interval", "1h"}, expr


def test_links_lead_to_dashboards_that_are_there() -> None:
    text = json.dumps(DASHBOARDS)
    assert set(re.findall(r"/d/([\w-]+)\?", text)) == set(DASHBOARDS)


def test_every_alert_has_its_panel() -> None:
    for alert in ALERTS:
        assert panel_id(*alert.panel)
    with pytest.raises(KeyError):
        panel_id("koopmon-run", "No such panel")


def test_thresholds_are_those_of_the_alerts() -> None:
    (risk,) = [panel for panel in DASHBOARDS["koopmon-run"]["panels"] if panel["title"] == "Risk"]
    levels = [step["value"] for step in risk["fieldConfig"]["defaults"]["thresholds"]["steps"]]
    assert levels == [None, 0.4, 0.8]
    assert any("koopmon_risk_threshold" in target["expr"] for target in risk["targets"])
