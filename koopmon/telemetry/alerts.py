"""Table of all alerts, read from alerts.yml, with the thresholds that the dashboards share.

Alerts of the risk use the configuration of the run: the metric `risk_threshold`, and the counters `risk_alarms` and
`effect_checks`. A monitor does not know the budgets of its agents: these thresholds are defaults.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
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
MAX_OVERHEAD_RATIO = 0.02
"""Share of the step time above which an alert fires. The credit of 5 s alone is 0.8% of ten minutes."""
MAX_DROPPED_RATIO = 0.5
"""Share of lost snapshots above which an alert fires."""
MAX_REJECTED_PER_SECOND = 0.1
"""Rate of rejected messages above which an alert fires."""
MAX_EXPERT_SHARE = 0.85
"""Share of the tokens of a layer at one expert above which an alert fires."""

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
    "max_expert_share": MAX_EXPERT_SHARE,
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
    at_once: str = ""
    """Reason of an alert that has neither of these times."""
    summary: Text
    description: Text
    means: Text
    look: Text
    do: Text
    panel: tuple[Text, Text] = ("koopmon-run", "Risk")
    """Dashboard uid and title of the panel with the metric of this alert."""


@dataclass(frozen=True, slots=True)
class _Increase:
    """The placeholder `{increase:NAME WINDOW}`: events of the counter in fragment NAME within WINDOW.

    `increase` alone misses the events before the first scrape: a counter that Prometheus first sees above zero. So a
    counter without a sample before the window counts in full. After a gap of an hour this is once too much.
    """

    values: Mapping[str, Any]

    def __format__(self, spec: str) -> str:
        name, window = spec.split()
        counter = self.values[name]
        known = f"last_over_time({counter}[1h] offset {window})"
        return f"(last_over_time({counter}[{window}]) unless {known} or increase({counter}[{window}]))"


class _Table(Struct, frozen=True, forbid_unknown_fields=True):
    fragments: dict[str, str]
    alerts: list[dict[str, Any]]
    recordings: dict[str, str] = {}


def runbook_url(alert: Alert, docs_url: str | None = None) -> str:
    """Return the alert's address on the monitor that fired, as a Prometheus template, or in `docs_url`.

    Both pages have the same anchors.
    """
    base = "http://{{ $labels.instance }}/alerts" if docs_url is None else docs_url.rstrip("#")
    return f"{base}#{alert.name}"


_LABEL = re.compile(r"\{\{ \$labels\.(\w+) \}\}")
_WORDS = {"run": "a run", "kind": "a command", "name": "a logged scalar", "channel": "one channel"}


def plain_summary(alert: Alert) -> str:
    """Return the summary without templates: "The risk of divergence spiked", "A command was applied"."""
    text = re.sub(
        rf"^{_LABEL.pattern}: | at {_LABEL.pattern}|: {_LABEL.pattern}$|(?<=job) {_LABEL.pattern}", "", alert.summary
    )
    text = _LABEL.sub(lambda match: _WORDS[match[1]], text)
    return text if text.startswith("koopmon") else text[0].upper() + text[1:]


def read_alerts(text: str) -> tuple[tuple[Alert, ...], Mapping[str, str]]:
    """Read alerts and recording rules from YAML and fill in the placeholders.

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
    values["increase"] = _Increase(values)
    alerts = [{field: filled(value) for field, value in alert.items()} for alert in table.alerts]
    recordings = {name: filled(expr) for name, expr in table.recordings.items()}
    return msgspec.convert(alerts, tuple[Alert, ...]), recordings


ALERTS, RECORDINGS = read_alerts(files("koopmon.telemetry").joinpath("alerts.yml").read_text("utf-8"))
BY_NAME: Mapping[str, Alert] = {alert.name: alert for alert in ALERTS}
