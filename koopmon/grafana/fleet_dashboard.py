"""Dashboard with an overview of all runs."""

from __future__ import annotations

from koopmon.grafana.layout import dashboard, datasource_variable, label_variable, link
from koopmon.grafana.panels import (
    CALM,
    GREEN,
    ORANGE,
    RED,
    RISK_STEPS,
    RUN_STATES,
    ColorSteps,
    Json,
    lines,
    override,
    query,
    stat,
    states,
    table,
    thresholds,
    value_mapping,
)
from koopmon.telemetry.alerts import ACT_RISK, HIGH_FORECAST, LIKELY, STALE_SECONDS

UID = "koopmon-fleet"
RUN = '{run=~"$run"}'
APPLIED = 'koopmon_commands_total{run=~"$run",kind!="set_cadence",outcome="applied"}'
ROW_LINK = "/d/koopmon-run?var-run=${__data.fields.run}&${datasource:queryparam}&${__url_time_range}"
LINE_LINK = "/d/koopmon-run?var-run=${__field.labels.run}&${datasource:queryparam}&${__url_time_range}"


def make() -> Json:
    """Return the dashboard's JSON."""
    return dashboard(
        UID,
        "koopmon / Fleet",
        "All runs that monitors watch: where the risk is, what was done about it, who has fallen silent.",
        {
            "Now": [(each, 4, 4) for each in _counts()],
            "Runs": [(_runs(), 24, 9)],
            "Over time": [(each, 12, 8) for each in _over_time()] + [(each, 24, 7) for each in _stretches()],
        },
        variables=[datasource_variable(), label_variable("run", "Run", "koopmon_run_state", "run")],
        links=[link("koopmon-monitor", "Monitors")],
    )


def _counts() -> list[Json]:
    bad, notable = ((None, GREEN), (1, RED)), ((None, GREEN), (1, ORANGE))
    counts: list[tuple[str, str, str, ColorSteps]] = [
        ("Running", "Runs whose ranks answer.", f"count(koopmon_run_state{RUN} == 1) or vector(0)", CALM),
        (
            "Vanished",
            "Runs that fell silent without a goodbye; they are shown for a day.",
            f"count(koopmon_run_state{RUN} == 2) or vector(0)",
            bad,
        ),
        (
            "At high risk",
            f"Runs whose risk is at least {ACT_RISK:g}, where the policy acts.",
            f"count(koopmon_risk{RUN} >= {ACT_RISK:g}) or vector(0)",
            bad,
        ),
        (
            "Backed off",
            "Runs whose learning rate is scaled down.",
            f"count(koopmon_lr_scale{RUN} < 1) or vector(0)",
            notable,
        ),
        (
            "Actions in an hour",
            "Commands that changed training, over the last hour.",
            f"sum(increase({APPLIED}[1h]))",
            notable,
        ),
        (
            "Alerts firing",
            "koopmon's alerts, as Prometheus evaluates them; those about monitors too.",
            'count(ALERTS{alertname=~"Koopmon.*",alertstate="firing"}) or vector(0)',
            bad,
        ),
    ]
    return [
        stat(title, text, [query(expr, title, instant=True)], steps=steps, decimals=0)
        for title, text, expr, steps in counts
    ]


def _runs() -> Json:
    by = "by (run, instance)"
    last_seen = f"time() - max {by} (koopmon_last_snapshot_timestamp_seconds{RUN})"
    shown = {
        "state": f"max {by} (koopmon_run_state{RUN})",
        "risk": f"max {by} (koopmon_risk{RUN})",
        "forecast": f"max {by} (koopmon_forecast{RUN})",
        "probability": f"max {by} (koopmon_divergence_probability{RUN})",
        "learning-rate scale": f"min {by} (koopmon_lr_scale{RUN})",
        "actions in an hour": f"sum {by} (increase({APPLIED}[1h]))",
        "step": f"max {by} (koopmon_step{RUN})",
        "last seen": last_seen,
    }
    cell = {"custom.cellOptions": {"type": "color-background", "mode": "basic"}}

    def graded(name: str, steps: ColorSteps, unit: str) -> Json:
        return override(name, {**cell, "decimals": 2, "unit": unit, "thresholds": thresholds(steps)})

    return table(
        "Runs",
        "One line for each run. A click on its name opens its own dashboard. Probability is empty without a"
        " calibrator; last seen is the age of the last snapshot.",
        [query(expr, instant=True, table=True) for expr in shown.values()],
        columns={
            "run": "run",
            **{f"Value #{chr(ord('A') + number)}": name for number, name in enumerate(shown)},
            "instance": "monitor",
        },
        hidden=["Time"],
        overrides=[
            override("run", {"links": [{"title": "This run", "url": ROW_LINK}]}),
            override("state", {**cell, "mappings": [value_mapping(RUN_STATES)]}),
            graded("risk", RISK_STEPS, "none"),
            graded("forecast", ((None, GREEN), (HIGH_FORECAST, ORANGE)), "none"),
            graded("probability", ((None, GREEN), (LIKELY, ORANGE)), "percentunit"),
            override("learning-rate scale", {"unit": "percentunit"}),
            override("actions in an hour", {"decimals": 0}),
            graded("last seen", ((None, GREEN), (STALE_SECONDS, ORANGE)), "s"),
        ],
    )


def _over_time() -> list[Json]:
    def share(title: str, text: str, metric: str, steps: ColorSteps = ()) -> Json:
        queries = [query(f"{metric}{RUN}", "{{run}}")]
        return lines(title, text, queries, unit="percentunit", steps=steps, minimum=0, maximum=1, link=LINE_LINK)

    return [
        share(
            "Risk",
            "Online risk of divergence. The dashed lines are where the policy acts, and where it acts at once.",
            "koopmon_risk",
            RISK_STEPS,
        ),
        share(
            "Forecast",
            "What is known beforehand, with the loss or the spectrum since; it only warns.",
            "koopmon_forecast",
            ((None, GREEN), (HIGH_FORECAST, ORANGE)),
        ),
        share(
            "Learning-rate scale",
            "The factor on each run's own schedule that is in force; 100% is the user's own.",
            "koopmon_lr_scale",
        ),
        lines(
            "Actions",
            "Commands that changed training, in each minute.",
            [query(f"sum by (run, kind) (increase({APPLIED}[1m]))", "{{run}} {{kind}}")],
            bars=True,
            minimum=0,
            link=LINE_LINK,
        ),
        share(
            "Divergence probability",
            "Calibrated probability that a run with this learning rate diverges; empty without a calibrator.",
            "koopmon_divergence_probability",
            ((None, GREEN), (LIKELY, ORANGE)),
        ),
        lines(
            "Age of the last snapshot",
            "How long nothing was seen of a run.",
            [query(f"time() - koopmon_last_snapshot_timestamp_seconds{RUN}", "{{run}}")],
            unit="s",
            steps=((None, GREEN), (STALE_SECONDS, ORANGE)),
            minimum=0,
            link=LINE_LINK,
        ),
    ]


def _stretches() -> list[Json]:
    return [
        states(
            "States",
            "Running, ended or vanished, run by run.",
            [query(f"koopmon_run_state{RUN}", "{{run}}")],
            RUN_STATES,
        ),
        states(
            "Alerts",
            "koopmon's alerts over time, pending and firing, as Prometheus evaluates them; those about monitors too.",
            [query('ALERTS{alertname=~"Koopmon.*"}', "{{alertname}} {{run}} ({{alertstate}})")],
            {"1": ("on", RED)},
        ),
    ]
