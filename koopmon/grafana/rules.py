"""Converts the table of alerts to rules of Prometheus and of Grafana."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from koopmon.grafana.dashboards import panel_id
from koopmon.telemetry.alerts import ALERTS, RECORDINGS, Alert, Group, runbook_url

GROUPS: Mapping[Group, tuple[str, int]] = {
    "risk": ("koopmon risk", 10),
    "run": ("koopmon runs", 60),
    "monitor": ("koopmon monitor", 60),
}
"""Title of each group and its evaluation interval in Grafana, in seconds: a multiple of 10. Prometheus uses its own
`evaluation_interval`."""

EXPRESSIONS = "__expr__"
"""Data source uid of Grafana's own expressions."""
LOOKBACK_SECONDS = 600


def prometheus_rules(docs_url: str | None = None) -> dict[str, Any]:
    """Return a rule file of Prometheus (2.42 or newer), to be written as YAML.

    `docs_url` is the page of `runbook_url`; None selects the page /alerts of the monitor that exports the series.
    """
    groups = []
    for title, _, alerts in _groups():
        groups.append({"name": title, "rules": [_prometheus_rule(alert, docs_url) for alert in alerts]})
    recordings = [{"record": name, "expr": expr} for name, expr in RECORDINGS.items()]
    return {"groups": [*groups, {"name": "koopmon recordings", "rules": recordings}]}


def grafana_rule_groups(datasource_uid: str, folder_uid: str, *, docs_url: str | None = None) -> list[dict[str, Any]]:
    """Return rule groups for Grafana's provisioning API (`PUT /api/v1/provisioning/folder/UID/rule-groups/TITLE`).

    The uids of the rules depend only on the names of the alerts.
    """
    groups = []
    for title, seconds, alerts in _groups():
        place = {"orgID": 1, "folderUID": folder_uid, "ruleGroup": title}
        rules = [_grafana_rule(alert, datasource_uid, docs_url) | place for alert in alerts]
        groups.append({"title": title, "folderUid": folder_uid, "interval": seconds, "rules": rules})
    return groups


def grafana_alerting_file(datasource_uid: str, folder: str, *, docs_url: str | None = None) -> dict[str, Any]:
    """Return the same rules as a file under Grafana's `provisioning/alerting`; `folder` is a title there."""
    groups = []
    for title, seconds, alerts in _groups():
        rules = [_grafana_rule(alert, datasource_uid, docs_url) for alert in alerts]
        head = {"orgId": 1, "name": title, "folder": folder, "interval": _duration(seconds)}
        groups.append({**head, "rules": rules})
    return {"apiVersion": 1, "groups": groups}


def rule_uid(alert: Alert) -> str:
    """Convert a name to a uid of at most 40 characters, Grafana's limit: `KoopmonRiskHigh` -> `koopmon-risk-high`."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "-", alert.name).lower()


def _groups() -> Iterator[tuple[str, int, list[Alert]]]:
    """Yield title, interval in seconds and alerts of each group."""
    for group, (title, seconds) in GROUPS.items():
        yield title, seconds, [alert for alert in ALERTS if alert.group == group]


def _prometheus_rule(alert: Alert, docs_url: str | None) -> dict[str, Any]:
    rule: dict[str, Any] = {"alert": alert.name, "expr": alert.expr}
    if alert.for_seconds:
        rule["for"] = _duration(alert.for_seconds)
    if alert.keep_firing_seconds:
        rule["keep_firing_for"] = _duration(alert.keep_firing_seconds)
    return rule | {"labels": {"severity": alert.severity}, "annotations": _annotations(alert, docs_url)}


def _grafana_rule(alert: Alert, datasource_uid: str, docs_url: str | None) -> dict[str, Any]:
    dashboard, title = alert.panel
    # In Grafana's templates a value belongs to a query.
    texts = {name: text.replace("$value", "$values.A.Value") for name, text in _annotations(alert, docs_url).items()}
    rule: dict[str, Any] = {
        "uid": rule_uid(alert),
        "title": alert.name,
        "condition": "B",
        "data": _queries(alert, datasource_uid),
        # The expression returns no series while the condition is false.
        "noDataState": "OK",
        "execErrState": "Error",
        "for": _duration(alert.for_seconds),
        "labels": {"severity": alert.severity},
        "annotations": texts | {"__dashboardUid__": dashboard, "__panelId__": str(panel_id(dashboard, title))},
        "isPaused": False,
    }
    if alert.keep_firing_seconds:  # Grafana 12; older versions ignore it
        rule["keep_firing_for"] = _duration(alert.keep_firing_seconds)
    return rule


def _queries(alert: Alert, datasource_uid: str) -> list[dict[str, Any]]:
    """Return the alert's query, and a condition that holds for any series: the PromQL contains the comparison."""
    prometheus = {"type": "prometheus", "uid": datasource_uid}
    model = {"editorMode": "code", "expr": alert.expr, "instant": True, "range": False}
    expressions = {"type": EXPRESSIONS, "uid": EXPRESSIONS}
    condition = {"type": "math", "expression": "is_number($A)"}
    parts = (("A", LOOKBACK_SECONDS, prometheus, model), ("B", 0, expressions, condition))
    return [
        {
            "refId": name,
            "relativeTimeRange": {"from": lookback, "to": 0},
            "datasourceUid": source["uid"],
            "model": {"refId": name, "datasource": source, **settings},
        }
        for name, lookback, source, settings in parts
    ]


def _annotations(alert: Alert, docs_url: str | None) -> dict[str, str]:
    return {"summary": alert.summary, "description": alert.description, "runbook_url": runbook_url(alert, docs_url)}


def _duration(seconds: int) -> str:
    return f"{seconds // 60}m" if seconds and seconds % 60 == 0 else f"{seconds}s"
