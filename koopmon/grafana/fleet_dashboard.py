"""Dashboard with an overview of all runs."""

from __future__ import annotations

from koopmon.grafana.layout import dashboard, datasource_variable, label_variable, link, sized
from koopmon.grafana.panels import (
    CALM,
    GREEN,
    RED,
    RISK_STEPS,
    RUN_STATES,
    ColorSteps,
    Json,
    lines,
    override,
    stat,
    states,
    table,
    thresholds,
    value_mapping,
    warn,
)
from koopmon.telemetry.alerts import ACT_RISK, HIGH_FORECAST, LIKELY, STALE_SECONDS

UID = "koopmon-fleet"
RUN = '{run=~"$run"}'
APPLIED = 'koopmon_commands_total{run=~"$run",kind!="set_cadence",outcome="applied"}'
SINCE = "/d/koopmon-run?var-run=${%s}&${datasource:queryparam}&${__url_time_range}"
ROW_LINK, LINE_LINK = SINCE % "__data.fields.run", SINCE % "__field.labels.run"
ALERTS = "koopmon's alerts{}, as Prometheus evaluates them; those about monitors too."


def make() -> Json:
    """Return the dashboard's JSON."""
    return dashboard(
        UID,
        "koopmon / Fleet",
        "All runs that monitors watch: where the risk is, what was done about it, who has fallen silent.",
        {
            "Now": sized(4, 4, *_counts()),
            "Runs": sized(24, 9, _runs()),
            "Over time": [*sized(12, 8, *_over_time()), *sized(24, 7, *_stretches())],
        },
        variables=[datasource_variable(), label_variable("run", "Run", "koopmon_run_state", "run")],
        links=[link("koopmon-monitor", "Monitors")],
    )


def _counts() -> list[Json]:
    bad = ((None, GREEN), (1, RED))

    def count(title: str, text: str, expr: str, steps: ColorSteps) -> Json:
        return stat(title, text, expr, title, steps=steps, decimals=0)

    def runs(title: str, text: str, condition: str, steps: ColorSteps) -> Json:
        metric, _, bound = condition.partition(" ")
        return count(title, text, f"count(koopmon_{metric}{RUN} {bound}) or vector(0)", steps)

    at_risk = f"Runs whose risk is at least {ACT_RISK:g}, where the policy acts."
    firing = 'count(ALERTS{alertname=~"Koopmon.*",alertstate="firing"}) or vector(0)'
    actions = f"sum(increase({APPLIED}[1h]))"
    return [
        runs("Running", "Runs whose ranks answer.", "run_state == 1", CALM),
        runs("Vanished", "Runs that fell silent without a goodbye; they are shown for a day.", "run_state == 2", bad),
        runs("At high risk", at_risk, f"risk >= {ACT_RISK:g}", bad),
        runs("Backed off", "Runs whose learning rate is scaled down.", "lr_scale < 1", warn(1)),
        count("Actions in an hour", "Commands that changed training, over the last hour.", actions, warn(1)),
        count("Alerts firing", ALERTS.format(""), firing, bad),
    ]


def _runs() -> Json:
    by = "by (run, instance)"
    cell = {"custom.cellOptions": {"type": "color-background", "mode": "basic"}}

    def graded(name: str, steps: ColorSteps, unit: str) -> Json:
        return override(name, {**cell, "decimals": 2, "unit": unit, "thresholds": thresholds(steps)})

    return table(
        "Runs",
        "One line for each run. A click on its name opens its own dashboard. Probability is empty without a"
        " calibrator; last seen is the age of the last snapshot.",
        {
            "state": f"max {by} (koopmon_run_state{RUN})",
            "risk": f"max {by} (koopmon_risk{RUN})",
            "forecast": f"max {by} (koopmon_forecast{RUN})",
            "probability": f"max {by} (koopmon_divergence_probability{RUN})",
            "learning-rate scale": f"min {by} (koopmon_lr_scale{RUN})",
            "actions in an hour": f"sum {by} (increase({APPLIED}[1h]))",
            "step": f"max {by} (koopmon_step{RUN})",
            "last seen": f"time() - max {by} (koopmon_last_snapshot_timestamp_seconds{RUN})",
        },
        [
            override("run", {"links": [{"title": "This run", "url": ROW_LINK}]}),
            override("state", {**cell, "mappings": [value_mapping(RUN_STATES)]}),
            graded("risk", RISK_STEPS, "none"),
            graded("forecast", warn(HIGH_FORECAST), "none"),
            graded("probability", warn(LIKELY), "percentunit"),
            override("learning-rate scale", {"unit": "percentunit"}),
            override("actions in an hour", {"decimals": 0}),
            graded("last seen", warn(STALE_SECONDS), "s"),
        ],
    )


def _over_time() -> list[Json]:
    def share(title: str, text: str, metric: str, steps: ColorSteps = ()) -> Json:
        series = {"{{run}}": f"koopmon_{metric}{RUN}"}
        return lines(title, text, series, unit="percentunit", steps=steps, maximum=1, link=LINE_LINK)

    return [
        share(
            "Risk",
            "Online risk of divergence. The dashed lines are where the policy acts, and where it acts at once.",
            "risk",
            RISK_STEPS,
        ),
        share(
            "Forecast",
            "What is known beforehand, with the loss or the spectrum since; it only warns.",
            "forecast",
            warn(HIGH_FORECAST),
        ),
        share(
            "Learning-rate scale",
            "The factor on each run's own schedule that is in force; 100% is the user's own.",
            "lr_scale",
        ),
        lines(
            "Actions",
            "Commands that changed training, in each minute.",
            {"{{run}} {{kind}}": f"sum by (run, kind) (increase({APPLIED}[1m]))"},
            bars=True,
            link=LINE_LINK,
        ),
        share(
            "Divergence probability",
            "Calibrated probability that a run with this learning rate diverges; empty without a calibrator.",
            "divergence_probability",
            warn(LIKELY),
        ),
        lines(
            "Age of the last snapshot",
            "How long nothing was seen of a run.",
            {"{{run}}": f"time() - koopmon_last_snapshot_timestamp_seconds{RUN}"},
            unit="s",
            steps=warn(STALE_SECONDS),
            link=LINE_LINK,
        ),
    ]


def _stretches() -> list[Json]:
    firing = 'ALERTS{alertname=~"Koopmon.*"}', "{{alertname}} {{run}} ({{alertstate}})"
    return [
        states("States", "Running, ended or vanished, run by run.", f"koopmon_run_state{RUN}", "{{run}}", RUN_STATES),
        states("Alerts", ALERTS.format(" over time, pending and firing"), *firing, {"1": ("on", RED)}),
    ]
