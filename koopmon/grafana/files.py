"""Files of `koopmon grafana export`: dashboards, rules and provisioning, by path."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from koopmon.grafana.dashboard_resource import dashboard_resource
from koopmon.grafana.dashboards import dashboards
from koopmon.grafana.rules import grafana_alerting_file, prometheus_rules

DATASOURCE_UID = "koopmon-prometheus"
FOLDER = "koopmon"
"""Title and uid of the folder in Grafana."""
DASHBOARDS_DIRECTORY = "/var/lib/grafana/dashboards/koopmon"
"""Directory of the provisioned dashboards inside Grafana's container."""
PROMETHEUS_URL = "http://prometheus:9090"
MIXIN = """\
// A monitoring mixin: `jsonnet -J vendor` or mixtool render it, and other mixins add to it.
local groups = std.parseYaml(importstr 'prometheus/koopmon.rules.yml').groups;
local only(kind, change) = [
  group { rules: [change(rule) for rule in group.rules if kind in rule && change(rule) != null] }
  for group in groups
  if std.length([rule for rule in group.rules if kind in rule && change(rule) != null]) > 0
];
{
  _config+:: {
    // Address of a page with the runbooks; null: the page /alerts of the monitor.
    docsUrl: null,
    // Alerts to leave out, by name.
    disabled: [],
    // Changes of single alerts by name, such as { KoopmonRiskHigh: { 'for': '5m' } }.
    alerts: {},
  },
  local config = self._config,
  local changed(rule) =
    if std.member(config.disabled, rule.alert) then null
    else rule
         + (if config.docsUrl == null then {} else { annotations+: { runbook_url: config.docsUrl + '#' + rule.alert } })
         + std.get(config.alerts, rule.alert, {}),
  grafanaDashboards+:: {
%s  },
  prometheusAlerts+:: { groups+: only('alert', changed) },
  prometheusRules+:: { groups+: only('record', function(rule) rule) },
}
"""
PAGES = Path(__file__).parent / "pages"
"""Directory of the generated reference of metrics and alerts."""


def files(*, docs_url: str | None = None, prometheus_url: str = PROMETHEUS_URL) -> dict[str, str]:
    """Return the text of each file by its path below the export directory.

    `docs_url`: see `prometheus_rules`. `prometheus_url` is the address of Prometheus for the provisioned Grafana.
    """
    resources = {uid: dashboard_resource(each) for uid, each in dashboards().items()}
    provider = {"name": "koopmon", "folder": FOLDER, "folderUid": FOLDER, "type": "file", "allowUiUpdates": False}
    provider["options"] = {"path": DASHBOARDS_DIRECTORY}
    return {
        **{f"dashboards/{uid}.json": json.dumps(each, indent=2) + "\n" for uid, each in dashboards().items()},
        **{f"dashboards-v2/{uid}.json": json.dumps(each, indent=2) + "\n" for uid, each in resources.items()},
        "mixin.libsonnet": MIXIN
        % "".join(f"    '{uid}.json': import 'dashboards/{uid}.json',\n" for uid in dashboards()),
        "prometheus/koopmon.rules.yml": _yaml(prometheus_rules(docs_url)),
        "provisioning/alerting/koopmon.yml": _yaml(grafana_alerting_file(DATASOURCE_UID, FOLDER, docs_url=docs_url)),
        "provisioning/dashboards/koopmon.yml": _yaml({"apiVersion": 1, "providers": [provider]}),
        "provisioning/datasources/koopmon.yml": _yaml(datasource_file(prometheus_url)),
    }


def pages() -> dict[str, str]:
    """Return the text of the pages of metrics and alerts by file name."""
    return {path.name: path.read_text(encoding="utf-8") for path in sorted(PAGES.glob("*.md"))}


def write(directory: Path, contents: Mapping[str, str]) -> None:
    """Write `contents` below `directory`, and create the directories. Raises OSError."""
    for name, text in contents.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


def datasource_file(prometheus_url: str) -> dict[str, Any]:
    """Return Grafana's `provisioning/datasources`: the Prometheus that scrapes the monitor."""
    source = {"name": "koopmon Prometheus", "uid": DATASOURCE_UID, "type": "prometheus", "access": "proxy"}
    settings = {"httpMethod": "POST", "timeInterval": "5s"}
    return {"apiVersion": 1, "datasources": [{**source, "url": prometheus_url, "jsonData": settings}]}


def _yaml(data: Mapping[str, Any]) -> str:
    return str(yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=4096))
