"""Placeholders and checks of alerts.yml. tests/grafana/test_alert_rules.py tests the alerts themselves."""

from __future__ import annotations

import re

import msgspec
import pytest

from koopmon.config import CadenceConfig, PolicyConfig
from koopmon.telemetry.alerts import ALERTS, BY_NAME, Alert, plain_summary, read_alerts, runbook_url

ONE = """
fragments:
  on_run: on (run)
  running: and {on_run} state == 1
alerts:
  - name: KoopmonOne
    group: risk
    severity: info
    expr: 'sum(a{kind=~"x|y"}) > {stale_seconds} {running}'
    summary: "{{ $labels.run }}: above {likely:.0%}"
    description: '{{ $value | printf "%.2f" }}'
    means: >-
      In two
      lines.
    look: Look.
    do: Act.
"""


def test_placeholders_are_filled_in_and_templates_stay() -> None:
    ((alert,), _) = read_alerts(ONE)
    assert alert == Alert(
        name="KoopmonOne",
        group="risk",
        severity="info",
        expr='sum(a{kind=~"x|y"}) > 600 and on (run) state == 1',
        summary="{{ $labels.run }}: above 50%",
        description='{{ $value | printf "%.2f" }}',
        means="In two lines.",
        look="Look.",
        do="Act.",
    )
    assert (alert.for_seconds, alert.keep_firing_seconds, alert.panel) == (0, 0, ("koopmon-run", "Risk"))
    with pytest.raises(AttributeError):
        alert.name = "other"


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("severity: info", "severity: urgent", r"Invalid enum value 'urgent' - at `\$\[0\]\.severity`"),
        ("group: risk", "group: other", "Invalid enum value 'other'"),
        ("look: Look.", "", "missing required field `look`"),
        ("look: Look.", "look: ''", r"length >= 1 - at `\$\[0\]\.look`"),
        ("do: Act.", "do: Act.\n    for_second: 5", "unknown field `for_second`"),
        ("do: Act.", "do: Act.\n    for_seconds: -1", ">= 0"),
        ("do: Act.", "do: Act.\n    panel: [koopmon-run]", "length 2"),
        ("alerts:", "alarms:", "unknown field `alarms`"),
        ("do: Act.", "do: [", "while parsing"),
    ],
)
def test_a_wrong_table_is_refused(old: str, new: str, complaint: str) -> None:
    with pytest.raises(msgspec.DecodeError, match=complaint):
        read_alerts(ONE.replace(old, new, 1))


@pytest.mark.parametrize("name", ["likly", "later"])
def test_an_unknown_placeholder_is_refused(name: str) -> None:
    later = ONE.replace("{on_run}", f"{{{name}}}").replace("alerts:", "  later: x\nalerts:")
    with pytest.raises(KeyError, match=name):
        read_alerts(later)


def test_thresholds_follow_the_configuration() -> None:
    assert 'koopmon_risk_threshold{level="act"}' in BY_NAME["KoopmonRiskHigh"].expr
    assert f"(default {PolicyConfig().act_risk:g})" in BY_NAME["KoopmonRiskSpike"].means
    assert f"a budget of {CadenceConfig().budget_ratio:.2%} in" in BY_NAME["KoopmonAgentOverhead"].means


def test_names_are_unique_and_no_text_has_a_line_end() -> None:
    assert len(BY_NAME) == len(ALERTS) > 0
    for alert in ALERTS:
        texts = [text for text in msgspec.structs.astuple(alert) if isinstance(text, str)]
        assert not re.search(r"\n|^\s|\s$", "|".join(texts))


def test_the_runbook_is_on_the_monitor_or_in_the_docs() -> None:
    alert = BY_NAME["KoopmonRunVanished"]
    assert runbook_url(alert) == "http://{{ $labels.instance }}/alerts#KoopmonRunVanished"
    assert runbook_url(alert, "https://docs.example.org/a/#") == "https://docs.example.org/a/#KoopmonRunVanished"


def test_a_summary_without_templates_is_a_sentence() -> None:
    found = {alert.name: plain_summary(alert) for alert in ALERTS}
    assert not [
        text
        for text in found.values()
        if "{" in text or "$" in text or not (text[0].isupper() or text.startswith("koopmon"))
    ]
    wanted = {
        "KoopmonRiskSpike": "The risk of divergence spiked",
        "KoopmonActionTaken": "A command was applied",
        "KoopmonRunVanished": "A run vanished",
        "KoopmonMonitorDown": "The monitor is down",
        "KoopmonMonitorAbsent": "No monitor is left in the Prometheus job",
        "KoopmonMessagesRejected": "The monitor rejects messages",
        "KoopmonScalarLeftBand": "A logged scalar left its band",
    }
    assert {name: found[name] for name in wanted} == wanted
