"""Table of all alerts, read from alerts.yml, with the thresholds that the dashboards share.

The thresholds are defaults of the policy. The counters `risk_alarms` and `effect_checks` use the configuration of the
run.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib.resources import files
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from koopmon.config import CadenceConfig, PolicyConfig
from koopmon.risk.causes import HIGH_LOGIT, SEVERE_LOGIT, UPDATE_RATIO

Severity = Literal["critical", "warning", "info"]
Group = Literal["risk", "run", "monitor"]
Text = Annotated[str, Meta(min_length=1)]
Seconds = Annotated[int, Meta(ge=0)]

ACT_RISK, SEVERE_RISK = PolicyConfig().act_risk, PolicyConfig().severe_risk
LIKELY = 0.5
"""Divergence probability at or above which an alert fires. Chosen by hand, as are the thresholds below."""
HIGH_FORECAST = 0.8
"""Forecast at or above which an alert fires."""
STALE_SECONDS = 600
"""Age of the last snapshot above which an alert fires."""
MAX_OVERHEAD_RATIO = 4 * CadenceConfig().budget_ratio
"""Share of the step time above which an alert fires. The agent may exceed its budget for a short time."""
MAX_DROPPED_RATIO = 0.5
"""Share of lost snapshots above which an alert fires."""
MAX_REJECTED_PER_SECOND = 0.1
"""Rate of rejected messages above which an alert fires."""

THRESHOLDS: Mapping[str, float] = {
    "act_risk": ACT_RISK,
    "likely": LIKELY,
    "high_forecast": HIGH_FORECAST,
    "stale_seconds": STALE_SECONDS,
    "budget_ratio": CadenceConfig().budget_ratio,
    "max_overhead_ratio": MAX_OVERHEAD_RATIO,
    "max_dropped_ratio": MAX_DROPPED_RATIO,
    "max_rejected_per_second": MAX_REJECTED_PER_SECOND,
    "high_logit": HIGH_LOGIT,
    "severe_logit": SEVERE_LOGIT,
    "update_ratio": UPDATE_RATIO,
}
"""Placeholders of alerts.yml, besides its fragments."""
PLACEHOLDER = re.compile(r"\{(\w+)(?::([^{}]+))?\}")
"""Name and optional format. Templates (`{{ $value }}`) and selectors of PromQL (`{job="a"}`) do not match."""


class Alert(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One alert. `expr` is PromQL with one series per alert instance; times are in seconds.

    `summary` and `description` are Prometheus templates with `$labels` and `$value`. `means`, `look` and `do` are the
    runbook: Markdown of one paragraph each, with code in backticks as the only markup.
    """

    name: Text
    """It is the anchor of this alert on the page /alerts and in docs/alerts.md."""
    group: Group
    severity: Severity
    expr: Text
    for_seconds: Seconds = 0
    keep_firing_seconds: Seconds = 0
    """Time without the condition before the alert resolves; it prevents flapping."""
    summary: Text
    description: Text
    means: Text
    look: Text
    do: Text
    panel: tuple[Text, Text] = ("koopmon-run", "Risk")
    """Dashboard uid and title of the panel with the metric of this alert."""


class _Table(Struct, frozen=True, forbid_unknown_fields=True):
    fragments: dict[str, str]
    alerts: list[dict[str, Any]]


def runbook_url(alert: Alert, docs_url: str | None = None) -> str:
    """Return the alert's address on the monitor that fired, as a Prometheus template, or in `docs_url`.

    Both pages have the same anchors.
    """
    base = "http://{{ $labels.instance }}/alerts" if docs_url is None else docs_url.rstrip("#")
    return f"{base}#{alert.name}"


def read_alerts(text: str) -> tuple[Alert, ...]:
    """Read alerts from YAML and fill in the placeholders.

    Raises KeyError for an unknown placeholder, msgspec.DecodeError for other YAML, fields or values.
    """
    table = msgspec.yaml.decode(text, type=_Table)
    values: dict[str, Any] = dict(THRESHOLDS)

    def filled(value: Any) -> Any:
        if not isinstance(value, str):
            return value
        return PLACEHOLDER.sub(lambda match: format(values[match[1]], match[2] or ""), value)

    for name, fragment in table.fragments.items():
        values[name] = filled(fragment)
    alerts = [{field: filled(value) for field, value in alert.items()} for alert in table.alerts]
    return msgspec.convert(alerts, tuple[Alert, ...])


ALERTS = read_alerts(files("koopmon.telemetry").joinpath("alerts.yml").read_text("utf-8"))
BY_NAME: Mapping[str, Alert] = {alert.name: alert for alert in ALERTS}
