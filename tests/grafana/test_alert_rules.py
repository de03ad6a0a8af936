"""The rules under Prometheus' own tool: every alert fires in its firing cases and is calm in its calm cases."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from koopmon.grafana.dashboards import dashboards
from koopmon.grafana.rules import GROUPS, grafana_alerting_file, grafana_rule_groups, prometheus_rules, rule_uid
from koopmon.telemetry.alerts import ALERTS, BY_NAME, RECORDINGS, Alert
from koopmon.telemetry.metrics import BY_NAME as METRICS
from koopmon.telemetry.metrics import OBSERVABLE, PREFIX
from tests.grafana.alert_cases import CALM, FIRING, FLAPPING, INTERVAL_SECONDS, Calm, Firing, Flapping, as_text

pytestmark = pytest.mark.needs("promtool")
NAMES = [alert.name for alert in ALERTS]


@pytest.fixture
def rules(tmp_path: Path) -> Path:
    path = tmp_path / "koopmon.rules.yml"
    path.write_text(yaml.safe_dump(prometheus_rules()))
    return path


def promtool(*arguments: str | Path) -> None:
    done = subprocess.run(["promtool", *map(str, arguments)], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def run_cases(rules: Path, groups: list[dict[str, Any]]) -> None:
    interval = f"{INTERVAL_SECONDS}s"
    tests = rules.with_name("cases.yml")
    tests.write_text(
        json.dumps(
            {
                "rule_files": [str(rules)],
                "evaluation_interval": interval,
                "tests": [{"interval": interval, **group} for group in groups],
            }
        )
    )
    promtool("test", "rules", tests)


def series(values: Any) -> list[dict[str, str]]:
    return [{"series": name, "values": text} for name, text in values.items()]


def rendered(template: str, labels: dict[str, str]) -> str:
    """Render a template with labels only."""
    return re.sub(r"\{\{ \$labels\.(\w+) \}\}", lambda match: labels[match[1]], template)


def as_fired(alert: Alert, case: Firing) -> dict[str, Any]:
    labels = {**case.labels, "severity": alert.severity}
    annotations = {
        "summary": rendered(alert.summary, labels),
        "description": case.description,
        "runbook_url": f"http://monitor:9464/alerts#{alert.name}",
    }
    return {"exp_labels": labels, "exp_annotations": annotations}


def seconds(minute: float) -> str:
    return f"{round(60 * minute)}s"


@pytest.mark.process
def test_prometheus_takes_the_rules(rules: Path) -> None:
    promtool("check", "rules", "--lint=all", rules)


def test_every_alert_has_a_firing_and_a_calm_case() -> None:
    assert set(FIRING) == set(CALM) == set(NAMES)
    assert all(FIRING.values())
    assert all(CALM.values())


@pytest.mark.process
@pytest.mark.parametrize("name", NAMES)
def test_it_fires_and_says_what_it_should(rules: Path, name: str) -> None:
    alert = BY_NAME[name]

    def group(case: Firing) -> dict[str, Any]:
        fired = {"eval_time": seconds(case.minute), "alertname": name, "exp_alerts": [as_fired(alert, case)]}
        return {"input_series": series(case.series), "alert_rule_test": [fired]}

    run_cases(rules, [group(case) for case in FIRING[name]])


@pytest.mark.process
@pytest.mark.parametrize("name", NAMES)
def test_it_keeps_the_namespace_of_its_target(rules: Path, name: str) -> None:
    """Alertmanager routes by it in Kubernetes, and the InfoInhibitor of kube-prometheus compares it."""
    case, where = FIRING[name][0], {"namespace": "team-a"}
    placed = {each.replace("{", '{namespace="team-a",', 1): text for each, text in case.series.items()}
    fired = as_fired(BY_NAME[name], Firing(placed, case.minute, case.description, {**case.labels, **where}))
    group = {"eval_time": seconds(case.minute), "alertname": name, "exp_alerts": [fired]}
    run_cases(rules, [{"input_series": series(placed), "alert_rule_test": [group]}])


@pytest.mark.process
@pytest.mark.parametrize("name", NAMES)
def test_it_is_calm_when_nothing_is_wrong(rules: Path, name: str) -> None:
    def group(case: Calm) -> dict[str, Any]:
        silent = {"eval_time": seconds(case.minute), "alertname": name, "exp_alerts": []}
        return {"input_series": series(case.series), "alert_rule_test": [silent]}

    run_cases(rules, [group(case) for case in CALM[name]])


@pytest.mark.process
@pytest.mark.parametrize("name", [alert.name for alert in ALERTS if alert.group == "risk" and alert.name in FLAPPING])
def test_it_does_not_flap(rules: Path, name: str) -> None:
    case: Flapping = FLAPPING[name]
    firing = f'ALERTS{{alertname="{name}",alertstate="firing"}}'
    minutes = case.until_minute - case.from_minute
    without_a_gap = {
        "expr": f"count_over_time({firing}[{seconds(minutes)}])",
        "eval_time": seconds(case.until_minute),
        "exp_samples": [
            {
                "labels": as_text(_labels(name)),
                "value": minutes * 60 / INTERVAL_SECONDS + 1,
            }
        ],
    }
    over = {"expr": firing, "eval_time": seconds(case.calm_minute), "exp_samples": []}
    run_cases(rules, [{"input_series": series(case.series), "promql_expr_test": [without_a_gap, over]}])


def _labels(name: str) -> dict[str, str]:
    own = {"alertname": name, "alertstate": "firing", "severity": BY_NAME[name].severity}
    return {**own, **FIRING[name][0].labels}


def test_gauges_that_alarm_at_a_level_are_kept_from_flapping() -> None:
    """A level that is crossed repeatedly fires once. Alerts about risk have a case of their own."""
    levels = {alert.name for alert in ALERTS if alert.group == "risk" and alert.keep_firing_seconds}
    assert levels | {"KoopmonRiskSpike"} == set(FLAPPING)


@pytest.mark.parametrize("alert", ALERTS, ids=lambda alert: alert.name)
def test_what_it_asks_for_is_in_the_table_of_metrics(alert: Alert) -> None:
    known = {PREFIX + name + ("_total" if each.kind == "counter" else "") for name, each in METRICS.items()}
    asked = set(re.findall(r"\bkoopmon_\w+", alert.expr))
    assert {each for each in asked if OBSERVABLE not in each} <= known
    assert asked or "up{" in alert.expr
    for name, text in re.findall(r'koopmon_(\w+?)_total\{[^}]*?\b\w+=~?"([^"]+)"', alert.expr):
        values = {value for each in METRICS[name].known.values() for value in each} | {"loss"}
        assert set(text.split("|")) <= values, text


@pytest.mark.parametrize("alert", ALERTS, ids=lambda alert: alert.name)
def test_its_words_are_there(alert: Alert) -> None:
    for text in (alert.summary, alert.description, alert.means, alert.look, alert.do):
        assert text == alert.summary or text.endswith((".", "?"))
        assert text.count("`") % 2 == 0
        assert "  " not in text
    assert "run" in alert.summary or "monitor" in alert.summary.lower()


@pytest.mark.parametrize("alert", ALERTS, ids=lambda alert: alert.name)
def test_an_alert_at_once_has_a_reason(alert: Alert) -> None:
    assert bool(alert.at_once) != bool(alert.for_seconds or alert.keep_firing_seconds)
    assert not alert.at_once or alert.at_once.endswith(".")


BORN = sorted(name for name in NAMES if "offset" in BY_NAME[name].expr and name != "KoopmonRunVanished")
"""Alerts of events that a counter counts."""


def test_no_alert_of_an_event_trusts_increase_alone() -> None:
    alone = {alert.name for alert in ALERTS if "increase(" in alert.expr} - set(BORN)
    assert alone == {"KoopmonSnapshotsDropped"}, "a ratio over ten minutes"
    assert len(BORN) == 11


@pytest.mark.process
@pytest.mark.parametrize("name", BORN)
def test_it_fires_for_a_counter_that_is_born_above_zero(rules: Path, name: str) -> None:
    """Prometheus first scrapes a monitor when the event has happened."""
    case = FIRING[name][0]
    born = {
        each: text if "_total" not in each else "_x22 " + text.partition(" ")[2] for each, text in case.series.items()
    }
    assert born != case.series
    fired = {"eval_time": seconds(case.minute), "alertname": name, "exp_alerts": [as_fired(BY_NAME[name], case)]}
    run_cases(rules, [{"input_series": series(born), "alert_rule_test": [fired]}])


@pytest.mark.process
def test_the_recording_rules_record(rules: Path) -> None:
    values = {
        'koopmon_run_state{job="k",instance="m",run="a",state="running"}': "1x60",
        'koopmon_run_state{job="k",instance="m",run="b",state="running"}': "0x60",
        'koopmon_risk{job="k",instance="m",run="a"}': "0x20 0.9 0x60",
    }
    where = 'job="k",instance="m"'
    expected = {
        f'job_instance_state:koopmon_runs:count{{{where},state="running"}}': 1,
        f'job_instance_run:koopmon_risk:max1h{{{where},run="a"}}': 0.9,
    }
    cases = [
        {"expr": expr, "eval_time": "10m", "exp_samples": [{"labels": expr, "value": value}]}
        for expr, value in expected.items()
    ]
    run_cases(rules, [{"input_series": series(values), "promql_expr_test": cases}])
    assert all(name in RECORDINGS for name in (expr.partition("{")[0] for expr in expected))


def test_another_place_for_the_runbook() -> None:
    (first, *_) = prometheus_rules("https://docs.example.org/alerts/")["groups"][0]["rules"]
    assert first["annotations"]["runbook_url"] == f"https://docs.example.org/alerts/#{first['alert']}"


def test_grafana_gets_the_same_rules() -> None:
    groups = grafana_rule_groups("prom", "folder")
    assert [group["title"] for group in groups] == [title for title, _ in GROUPS.values()]
    rules = [rule for group in groups for rule in group["rules"]]
    assert [rule["title"] for rule in rules] == NAMES
    for group in groups:
        assert group["interval"] % 10 == 0
        assert group["folderUid"] == "folder"
        for rule in group["rules"]:
            alert = BY_NAME[rule["title"]]
            query, condition = rule["data"]
            assert query["model"]["expr"] == alert.expr
            assert query["datasourceUid"] == "prom"
            assert condition["refId"] == rule["condition"]
            assert f"${query['refId']}" in condition["model"]["expression"]
            # A rule must be evaluated more than once before it fires.
            assert _in_seconds(rule["for"]) % group["interval"] == 0
            assert "$value " not in "".join(rule["annotations"].values())
            panel = rule["annotations"]["__dashboardUid__"], int(rule["annotations"]["__panelId__"])
            assert panel in _panels()
    uids = [rule["uid"] for rule in rules]
    assert len(set(uids)) == len(uids)
    assert all(re.fullmatch(r"koopmon-[a-z-]{1,32}", uid) for uid in uids)
    assert rule_uid(BY_NAME["KoopmonRiskHigh"]) == "koopmon-risk-high"
    assert [rule["uid"] for group in grafana_alerting_file("prom", "f")["groups"] for rule in group["rules"]] == uids


def test_the_sdk_reads_the_rule_groups_back() -> None:
    encoder = pytest.importorskip("grafana_foundation_sdk.cog.encoder").JSONEncoder
    model = pytest.importorskip("grafana_foundation_sdk.models.alerting").RuleGroup
    pytest.importorskip("grafana_foundation_sdk.cog.plugins").register_default_plugins()
    for group in grafana_rule_groups("prom", "folder"):
        read = json.loads(json.dumps(model.from_json(json.loads(json.dumps(group))), cls=encoder))
        assert (read["title"], read["folderUid"], read["interval"]) == (group["title"], "folder", group["interval"])
        for rule, again in zip(group["rules"], read["rules"], strict=True):
            # The SDK is for an earlier version of Grafana than 12.
            known = {key: value for key, value in rule.items() if key not in ("data", "keep_firing_for")}
            assert {key: again[key] for key in known} == known
            for query, same in zip(rule["data"], again["data"], strict=True):
                assert same["refId"] == query["refId"]
                assert same["datasourceUid"] == query["datasourceUid"]
                assert same["relativeTimeRange"] == query["relativeTimeRange"]
                name = "expr" if query["refId"] == "A" else "expression"
                assert same["model"][name] == query["model"][name]


def _panels() -> set[tuple[str, int]]:
    return {(uid, panel["id"]) for uid, each in dashboards().items() for panel in each["panels"]}


def _in_seconds(duration: str) -> int:
    return int(duration[:-1]) * {"s": 1, "m": 60}[duration[-1]]
