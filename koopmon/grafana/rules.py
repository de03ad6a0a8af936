"""Converts the table of alerts to rules of Prometheus and of Grafana."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from koopmon.grafana.dashboards import panel_id
from koopmon.telemetry.alerts import ALERTS, Alert, Group, runbook_url

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
    return {
        "groups": [
            {"name": title, "rules": [_prometheus_rule(alert, docs_url) for alert in _members(group)]}
            for group, (title, _) in GROUPS.items()
        ]
    }


def grafana_rule_groups(
    datasource_uid: str, folder_uid: str, *, docs_url: str | None = None, org_id: int = 1
) -> list[dict[str, Any]]:
    """Return rule groups for Grafana's provisioning API (`PUT /api/v1/provisioning/folder/UID/rule-groups/TITLE`).

    The uids of the rules depend only on the names of the alerts.
    """
    return [
        {
            "title": title,
            "folderUid": folder_uid,
            "interval": seconds,
            "rules": [
                {
                    **_grafana_rule(alert, datasource_uid, docs_url),
                    "orgID": org_id,
                    "folderUID": folder_uid,
                    "ruleGroup": title,
                }
                for alert in _members(group)
            ],
        }
        for group, (title, seconds) in GROUPS.items()
    ]


def grafana_alerting_file(datasource_uid: str, folder: str, *, docs_url: str | None = None) -> dict[str, Any]:
    """Return the same rules as a file under Grafana's `provisioning/alerting`; `folder` is a title there."""
    return {
        "apiVersion": 1,
        "groups": [
            {
                "orgId": 1,
                "name": title,
                "folder": folder,
                "interval": _duration(seconds),
                "rules": [_grafana_rule(alert, datasource_uid, docs_url) for alert in _members(group)],
            }
            for group, (title, seconds) in GROUPS.items()
        ],
    }


def rule_uid(alert: Alert) -> str:
    """Convert a name to a uid of at most 40 characters, Grafana's limit: `KoopmonRiskHigh` -> `koopmon-risk-high`."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "-", alert.name).lower()


def _members(group: Group) -> Iterator[Alert]:
    return (alert for alert in ALERTS if alert.group == group)


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
        "data": [_query(alert, datasource_uid), _is_there()],
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


def _query(alert: Alert, datasource_uid: str) -> dict[str, Any]:
    return {
        "refId": "A",
        "relativeTimeRange": {"from": LOOKBACK_SECONDS, "to": 0},
        "datasourceUid": datasource_uid,
        "model": {
            "refId": "A",
            "datasource": {"type": "prometheus", "uid": datasource_uid},
            "editorMode": "code",
            "expr": alert.expr,
            "instant": True,
            "range": False,
        },
    }


def _is_there() -> dict[str, Any]:
    """Return a condition that holds for any existing series, because the PromQL contains the comparison already."""
    return {
        "refId": "B",
        "relativeTimeRange": {"from": 0, "to": 0},
        "datasourceUid": EXPRESSIONS,
        "model": {
            "refId": "B",
            "datasource": {"type": EXPRESSIONS, "uid": EXPRESSIONS},
            "type": "math",
            "expression": "is_number($A)",
        },
    }


def _annotations(alert: Alert, docs_url: str | None) -> dict[str, str]:
    return {
        "summary": alert.summary,
        "description": alert.description,
        "runbook_url": runbook_url(alert, docs_url),
    }


def _duration(seconds: int) -> str:
    return f"{seconds // 60}m" if seconds and seconds % 60 == 0 else f"{seconds}s"
