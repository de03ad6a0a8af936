"""Dashboard with an overview of all runs."""

from __future__ import annotations

from typing import Any

from koopmon.telemetry.alerts import HIGH_FORECAST, STALE_SECONDS
from koopmon.telemetry.metrics import BY_NAME
from manual.dashboards import panels
from manual.dashboards.layout import dashboard, label_variable, sized
from manual.dashboards.panels import GREEN, RED, Json, warn

UID = "koopmon-fleet"
SELECTED = 'job=~"$job",run=~"$run"'
RUN = f"{{{SELECTED}}}"
APPLIED = f'koopmon_commands_settled_total{{{SELECTED},kind!="set_cadence",outcome="applied"}}'
AGE = f"time() - koopmon_last_snapshot_timestamp_seconds{RUN}"
LINK = "/d/koopmon-run?var-run=${%s}&${datasource:queryparam}&${__url_time_range}"
ALERTS = "Alerts of koopmon{}, as Prometheus evaluates them. Alerts about monitors are included."


def make() -> Json:
    """Return the dashboard's JSON."""
    return dashboard(
        UID,
        "koopmon / Fleet",
        "All runs of the monitors: risk, actions and age of the last snapshot.",
        {
            "Now": sized(4, 4, *_counts()),
            "Runs": sized(24, 9, _runs()),
            "Over time": [*sized(12, 8, *_over_time()), *sized(24, 7, *_intervals())],
        },
        variables=[label_variable("run", "Run", 'koopmon_run_state{job=~"$job"}', "run")],
        links={"koopmon-monitor": "Monitors"},
    )


def _counts() -> list[Json]:
    bad = ((None, GREEN), (1, RED))

    def count(title: str, text: str, expr: str, steps: panels.ColorSteps) -> Json:
        return panels.stat(title, text, expr, title, steps=steps, decimals=0)

    def runs(title: str, text: str, condition: str, steps: panels.ColorSteps) -> Json:
        metric, _, bound = condition.partition(" ")
        return count(title, text, f"count(koopmon_{metric % SELECTED} {bound}) or vector(0)", steps)

    at_risk = "Runs with a risk of at least the threshold at which their policy acts."
    firing = 'count(ALERTS{job=~"$job",alertname=~"Koopmon.*",alertstate="firing"}) or vector(0)'
    actions = f"sum(increase({APPLIED}[1h]))"
    return [
        runs("Running", "Runs with ranks that send heartbeats.", 'run_state{%s,state="running"} == 1', panels.CALM),
        runs(
            "Vanished",
            "Runs whose heartbeats stopped without an end. They stay for a day.",
            'run_state{%s,state="vanished"} == 1',
            bad,
        ),
        runs(
            "At high risk",
            at_risk,
            'risk{%s} >= ignoring (level) koopmon_risk_threshold{job=~"$job",run=~"$run",level="act"}',
            bad,
        ),
        runs("Backed off", "Runs with an LR scale below 1.", "lr_scale{%s} < 1", warn(1)),
        count("Actions in an hour", "Commands that changed the training in the last hour.", actions, warn(1)),
        count("Alerts firing", ALERTS.format(""), firing, bad),
    ]


def _runs() -> Json:
    by = "by (run, instance)"
    cell = {"custom.cellOptions": {"type": "color-background", "mode": "basic"}}

    def graded(name: str, steps: panels.ColorSteps, unit: str) -> Json:
        shown = {**cell, "decimals": 2, "unit": unit, "thresholds": panels.thresholds(steps)}
        return panels.override(name, shown)

    return panels.table(
        "Runs",
        "One line for each run. A click on its name opens its dashboard. Last seen is the age of the last snapshot.",
        {
            "state": f"max {by} ({panels.state_of(SELECTED)})",
            "risk": f"max {by} (koopmon_risk{RUN})",
            "forecast": f"max {by} (koopmon_forecast{RUN})",
            "loss": f"max {by} (koopmon_loss{RUN})",
            "LR scale": f"min {by} (koopmon_lr_scale{RUN})",
            "actions in an hour": f"sum {by} (increase({APPLIED}[1h]))",
            "step": f"max {by} (koopmon_step{RUN})",
            "last seen": f"time() - max {by} (koopmon_last_snapshot_timestamp_seconds{RUN})",
        },
        [
            panels.override("run", {"links": [{"title": "This run", "url": LINK % "__data.fields.run"}]}),
            panels.override("state", {**cell, "mappings": [panels.value_mapping(panels.RUN_STATES)]}),
            graded("risk", panels.RISK_STEPS, "none"),
            graded("forecast", warn(HIGH_FORECAST), "none"),
            panels.override("LR scale", {"unit": "percentunit"}),
            panels.override("actions in an hour", {"decimals": 0}),
            graded("last seen", warn(STALE_SECONDS), "s"),
        ],
    )


def _over_time() -> list[Json]:
    link = LINK % "__field.labels.run"

    def share(title: str, metric: str, steps: panels.ColorSteps = ()) -> Json:
        text, series = BY_NAME[metric].help, {"{{run}}": f"koopmon_{metric}{RUN}"}
        return panels.lines(title, text, series, unit="percentunit", steps=steps, maximum=1, link=link)

    def lines(title: str, text: str, legend: str, expr: str, **settings: Any) -> Json:
        return panels.lines(title, text, {legend: expr}, link=link, **settings)

    actions = f"sum by (run, kind) (increase({APPLIED}[$__rate_interval]))"
    age = warn(STALE_SECONDS)
    return [
        share("Risk", "risk", panels.RISK_STEPS),
        share("Forecast", "forecast", warn(HIGH_FORECAST)),
        share("LR scale", "lr_scale"),
        lines("Actions", "Commands a minute that changed the training.", "{{run}} {{kind}}", actions, bars=True),
        lines("Loss", BY_NAME["loss"].help, "{{run}}", f"koopmon_loss{RUN}", minimum=None),
        lines("Age of the last snapshot", "Time since the last snapshot.", "{{run}}", AGE, unit="s", steps=age),
    ]


def _intervals() -> list[Json]:
    state, firing = panels.state_of(SELECTED), 'ALERTS{job=~"$job",alertname=~"Koopmon.*"}'
    legend = "{{alertname}} {{run}} ({{alertstate}})"
    return [
        panels.states("States", "State of each run over time.", state, "{{run}}", panels.RUN_STATES),
        panels.states("Alerts", ALERTS.format(" over time"), firing, legend, {"1": ("on", RED)}),
    ]
