"""Firing and calm cases of each alert, as series for promtool with one sample every 15 seconds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

INTERVAL_SECONDS = 15
RUN = {"job": "koopmon", "instance": "monitor:9464", "run": "gpt"}
MONITOR = {"job": "koopmon", "instance": "monitor:9464"}


@dataclass(frozen=True, slots=True)
class Firing:
    """Case in which the alert fires once at `minute`, with `labels` beside its own and the text `description`."""

    series: Mapping[str, str]
    minute: float
    description: str
    labels: Mapping[str, str] = field(default_factory=lambda: RUN)


@dataclass(frozen=True, slots=True)
class Calm:
    """Case in which the alert does not fire at `minute`."""

    series: Mapping[str, str]
    minute: float


def run(name: str, /, **labels: str) -> str:
    """Return the selector of a series of the run."""
    return _selector(name, {**RUN, **labels})


def monitor(name: str, /, **labels: str) -> str:
    return _selector(name, {**MONITOR, **labels})


def _selector(name: str, labels: Mapping[str, str]) -> str:
    return name + as_text(labels)


def as_text(labels: Mapping[str, str]) -> str:
    """Format labels as PromQL."""
    return "{" + ",".join(f'{key}="{value}"' for key, value in labels.items()) + "}"


def logits(layer: str) -> str:
    return _selector("koopmon_observable_max_attention_logit", {**RUN, "layer": layer})


RUNNING = {run("koopmon_run_state", state="running"): "1x400"}
RUNNING_WITH_GAPS = {run("koopmon_run_state", state="running"): "1x30 stale 1x13 stale 1x400"}
"""Series with two failed scrapes."""
ENDED = {run("koopmon_run_state", state="running"): "1x20 0x400"}
VANISHED = {run("koopmon_run_state", state="vanished"): "0x20 1x380"}
ACT_AT = {run("koopmon_risk_threshold", level="act"): "0.4x400"}
COMMANDS, EFFECTS = "koopmon_commands_settled_total", "koopmon_effect_checks_total"
EXPERT = "koopmon_observable_top_expert_share"
DEPARTURES = "koopmon_band_departures_total"
DROPPED, RECEIVED = "koopmon_snapshots_dropped_total", "koopmon_snapshots_received_total"
UPDATES = "koopmon_update_rms_ratio"
BY_AGENT = "koopmon_agent_snapshots_dropped_total"
NONE_LOST = {run(DROPPED, reason="engine_failed"): "0x200"}
SNAPSHOT_TIME = "koopmon_last_snapshot_timestamp_seconds"

FIRING: Mapping[str, tuple[Firing, ...]] = {
    "KoopmonRiskSpike": (
        Firing(
            RUNNING | {run("koopmon_risk_alarms_total"): "0x20 1x20"},
            5.5,
            "In the last minute the risk reached the threshold for an action.",
        ),
    ),
    "KoopmonRiskHigh": (
        Firing(RUNNING | ACT_AT | {run("koopmon_risk"): "0x20 0.9x20"}, 8, "The mean risk of the last minute is 0.90."),
    ),
    "KoopmonForecastHigh": (
        Firing(
            RUNNING | {run("koopmon_forecast"): "0.9375x60"},
            10,
            "The mean forecast of the last five minutes is 0.94.",
        ),
    ),
    "KoopmonDivergenceLikely": (
        Firing(
            RUNNING | {run("koopmon_divergence_probability"): "0.75x60"},
            10,
            "The calibrated probability of divergence is 75%.",
        ),
    ),
    "KoopmonLossAboveBand": (
        Firing(
            RUNNING | {run(DEPARTURES, name="loss"): "0x20 1x40"},
            7,
            "The last losses of the run are above the range of the earlier ones.",
        ),
    ),
    "KoopmonScalarLeftBand": (
        Firing(
            RUNNING | {run(DEPARTURES, name="kl"): "0x20 1x40"},
            7,
            "The last values of kl are outside the range of the earlier ones.",
            {**RUN, "name": "kl"},
        ),
    ),
    "KoopmonNonFiniteStream": (
        Firing(
            RUNNING | {run(BY_AGENT, reason="not_finite"): "0x20 2x40"},
            7,
            "2 snapshots of the last five minutes were not finite.",
        ),
    ),
    "KoopmonRouterConcentrated": (
        Firing(
            RUNNING | {run(EXPERT, layer="0"): "0.2x200", run(EXPERT, layer="1"): "0.9375x200"},
            20,
            "In one layer 93.75% of the tokens choose the same expert.",
        ),
    ),
    "KoopmonWatchOnly": (
        Firing(
            RUNNING | {run("koopmon_watch_only"): "1x60"},
            10,
            "The policy would act on this run, but no command is sent.",
        ),
    ),
    "KoopmonMonitorAbsent": (
        Firing(
            {monitor("up"): "1x20 _x200"},
            20,
            "In the last hour Prometheus scraped a monitor of this job; now it has no target. Its runs are unguarded.",
            MONITOR,
        ),
    ),
    "KoopmonNotificationsFailing": (
        Firing(
            {monitor("koopmon_notifications_total", channel="webhook", outcome="failed"): "0x20 2x60"},
            15,
            "2 notifications of the last 15 minutes were not delivered.",
            {**MONITOR, "channel": "webhook"},
        ),
    ),
    "KoopmonActionTaken": (
        Firing(
            {run(COMMANDS, kind="set_lr_scale", outcome="applied"): "0x20 1x40"},
            7,
            "koopmon changed the training of this run. The monitor's log has the decision and its reason.",
            {**RUN, "kind": "set_lr_scale"},
        ),
    ),
    "KoopmonActionWithoutEffect": (
        Firing(
            RUNNING | {run(EFFECTS, outcome="no_effect"): "0x20 2x40"},
            10,
            "The last action had no effect in 2 snapshots of the last five minutes.",
        ),
    ),
    "KoopmonCommandNotApplied": (
        Firing(
            {run(COMMANDS, kind="set_lr_scale", outcome=outcome): "0x20 1x60" for outcome in ("refused", "expired")},
            15,
            "2 commands of the last ten minutes changed nothing in the run.",
        ),
    ),
    "KoopmonAttentionLogitsHigh": (
        Firing(
            RUNNING | {logits("3"): "20x20 2000 20x20", logits("2"): "1500x40"},
            5.5,
            "An attention logit reached 2000.",
        ),
    ),
    "KoopmonAttentionLogitsSevere": (
        Firing(RUNNING | {logits("3"): "20x20 70000x20"}, 8, "An attention logit reached 70000."),
    ),
    "KoopmonUpdateRmsHigh": (
        Firing(
            RUNNING | {run(UPDATES): "0.5x200 20 0.5x20"},
            52,
            "The update RMS reached 40 times its median of the last hour.",
        ),
    ),
    "KoopmonRunVanished": (
        Firing(
            VANISHED,
            10,
            "The monitor receives no messages from any rank of the run, and the run did not end normally.",
        ),
    ),
    "KoopmonTrainingStalled": (
        Firing(
            RUNNING | {run("koopmon_step"): "0+1x20 20x200"},
            25,
            "The agents send heartbeats, but the optimizer step does not advance.",
        ),
    ),
    "KoopmonSnapshotsStale": (
        Firing(
            RUNNING | {run("koopmon_step"): "0+1x200", run(SNAPSHOT_TIME): "60x200"},
            20,
            "The run takes optimizer steps, but its last snapshot is more than ten minutes old or missing.",
        ),
        Firing(
            RUNNING | {run("koopmon_step"): "0+1x200"},
            20,
            "The run takes optimizer steps, but its last snapshot is more than ten minutes old or missing.",
        ),
    ),
    "KoopmonTapsMissing": (
        Firing(
            RUNNING | {run("koopmon_taps_missing_total"): "0x20 2x60"},
            15,
            "In 2 snapshots of the last ten minutes a tap did not fire.",
        ),
        Firing(
            RUNNING | {run("koopmon_taps_missing_total"): "_x20 3x60"},
            7,
            "In 3 snapshots of the last ten minutes a tap did not fire.",
        ),
    ),
    "KoopmonSnapshotsDropped": (
        Firing(
            {
                run(BY_AGENT, reason="queue_full"): "0+3x200",
                run(DROPPED, reason="superseded"): "0+9x200",
                **NONE_LOST,
                run(RECEIVED): "0+1x200",
            },
            20,
            "75% of the snapshots of the last ten minutes were lost.",
        ),
    ),
    "KoopmonNotInformative": (
        Firing(
            RUNNING | {run("koopmon_informative"): "0x200"},
            35,
            "No profile was informative for half an hour. koopmon cannot detect a divergence of this run.",
        ),
    ),
    "KoopmonAgentOverhead": (
        Firing(
            RUNNING | {run("koopmon_agent_overhead_ratio"): "0.0625x100"},
            15,
            "A rank spends 6.25% of its step time in koopmon's hooks.",
        ),
    ),
    "KoopmonMonitorDown": (
        Firing(
            {monitor("up"): "1x10 0x20"},
            5,
            "Prometheus could not scrape the monitor for a minute. Its runs continue unguarded.",
            MONITOR,
        ),
    ),
    "KoopmonStorePaused": (
        Firing(
            {monitor("koopmon_store_recording"): "1x10 0x20"},
            5,
            "The store is paused, and decisions wait until it can write again.",
            MONITOR,
        ),
    ),
    "KoopmonDmdBacklog": (
        Firing(
            {monitor("koopmon_engine_queue_length"): "2x60"},
            10,
            "At least 2 snapshots waited for the engine for five minutes.",
            MONITOR,
        ),
    ),
    "KoopmonEngineFailing": (
        Firing(
            {monitor("koopmon_engine_failures_total"): "0x20 1x60"},
            15,
            "1 snapshots of the last ten minutes were not profiled or assessed.",
            MONITOR,
        ),
    ),
    "KoopmonInternalErrors": (
        Firing(
            {monitor("koopmon_internal_errors_total", part="command"): "0x20 1x60"},
            15,
            "1 errors in the last ten minutes.",
            {**MONITOR, "part": "command"},
        ),
    ),
    "KoopmonMessagesRejected": (
        Firing(
            {monitor("koopmon_messages_rejected_total", reason="key"): "0+15x80"},
            12,
            "The monitor rejects 1.0 messages per second as key.",
            {**MONITOR, "reason": "key"},
        ),
    ),
}

CALM: Mapping[str, tuple[Calm, ...]] = {
    "KoopmonRiskSpike": (
        Calm(RUNNING | {run("koopmon_risk_alarms_total"): "7x60"}, 10),
        Calm(ENDED | {run("koopmon_risk_alarms_total"): "0x24 1x20"}, 6.5),
    ),
    "KoopmonRiskHigh": (
        Calm(RUNNING | ACT_AT | {run("koopmon_risk"): "0.1x20 0.9 0.1x40"}, 5.5),
        Calm(RUNNING | {run("koopmon_risk_threshold", level="act"): "0.95x60", run("koopmon_risk"): "0.9x60"}, 8),
        Calm(ENDED | ACT_AT | {run("koopmon_risk"): "0.1x20 1x40"}, 14),
    ),
    "KoopmonForecastHigh": (Calm(RUNNING | {run("koopmon_forecast"): "0.5x60"}, 10),),
    "KoopmonDivergenceLikely": (
        Calm(RUNNING | {run("koopmon_divergence_probability"): "0.2x60"}, 10),
        Calm(RUNNING, 10),  # no calibrator
    ),
    "KoopmonLossAboveBand": (
        Calm(RUNNING | {run(DEPARTURES, name="loss"): "2x60", run(DEPARTURES, name="kl"): "0+1x60"}, 10),
        Calm(ENDED | {run(DEPARTURES, name="loss"): "0x24 1x20"}, 7),
    ),
    "KoopmonScalarLeftBand": (
        Calm(RUNNING | {run(DEPARTURES, name="kl"): "2x60", run(DEPARTURES, name="loss"): "0+1x60"}, 10),
    ),
    "KoopmonNonFiniteStream": (
        Calm(RUNNING | {run(BY_AGENT, reason="not_finite"): "2x60", run(BY_AGENT, reason="budget"): "0+1x60"}, 10),
    ),
    "KoopmonRouterConcentrated": (
        Calm(RUNNING | {run(EXPERT, layer="0"): "0.5x200", run("koopmon_observable_load_imbalance"): "8x200"}, 20),
        Calm(ENDED | {run(EXPERT, layer="0"): "0.95x200"}, 30),
    ),
    "KoopmonWatchOnly": (
        Calm(RUNNING | {run("koopmon_watch_only"): "0x60", run("koopmon_acting"): "0x60"}, 10),
        Calm(ENDED | {run("koopmon_watch_only"): "1x60"}, 14),
    ),
    "KoopmonMonitorAbsent": (
        Calm({monitor("up"): "1x20 0x200"}, 20),  # series of KoopmonMonitorDown
        Calm({monitor("up"): "1x20 _x200", 'up{job="koopmon",instance="other:9464"}': "1x220"}, 20),
        Calm({'up{job="koopmon",instance="job:4711",ephemeral="true"}': "1x20 _x200"}, 20),
        Calm({monitor("up"): "1x20 _x400"}, 80),
    ),
    "KoopmonNotificationsFailing": (
        Calm(
            {
                monitor("koopmon_notifications_total", channel="webhook", outcome="failed"): "4x60",
                monitor("koopmon_notifications_total", channel="webhook", outcome="sent"): "0+1x60",
                monitor("koopmon_notifications_total", channel="mail", outcome="held_back"): "0+1x60",
            },
            15,
        ),
    ),
    "KoopmonActionTaken": (
        Calm(
            {
                run(COMMANDS, kind="set_lr_scale", outcome="applied"): "3x60",
                run(COMMANDS, kind="set_lr_scale", outcome="dry_run"): "0+1x60",
                run(COMMANDS, kind="set_cadence", outcome="applied"): "0+1x60",
            },
            10,
        ),
    ),
    "KoopmonActionWithoutEffect": (
        Calm(RUNNING | {run(EFFECTS, outcome="effect"): "0+1x60", run(EFFECTS, outcome="no_effect"): "4x60"}, 10),
    ),
    "KoopmonCommandNotApplied": (
        Calm(
            {
                run(COMMANDS, kind="set_lr_scale", outcome="applied"): "0+1x60",
                run(COMMANDS, kind="set_lr_scale", outcome="refused"): "2x60",
                run(COMMANDS, kind="set_cadence", outcome="expired"): "0+1x60",
            },
            12,
        ),
    ),
    "KoopmonAttentionLogitsHigh": (
        Calm(RUNNING | {logits("3"): "999x100"}, 15),
        Calm(RUNNING | {_selector("koopmon_observable_load_imbalance", {**RUN, "layer": "3"}): "5000x100"}, 15),
        Calm(ENDED | {logits("3"): "2000x100"}, 15),
    ),
    "KoopmonAttentionLogitsSevere": (Calm(RUNNING | {logits("3"): "2000x100"}, 15),),
    "KoopmonUpdateRmsHigh": (
        Calm(RUNNING | {run(UPDATES): "0.5x200 4 0.5x20"}, 52),
        Calm(RUNNING | {run(UPDATES): "20x200"}, 40),  # high from the start
    ),
    "KoopmonRunVanished": (Calm(ENDED, 10), Calm(VANISHED, 90)),
    "KoopmonTrainingStalled": (
        Calm(RUNNING | {run("koopmon_step"): "0+1x200"}, 40),
        Calm(ENDED | {run("koopmon_step"): "20x200"}, 40),
    ),
    "KoopmonSnapshotsStale": (
        Calm(RUNNING | {run("koopmon_step"): "0+1x200", run(SNAPSHOT_TIME): "0+15x200"}, 20),
        Calm(
            RUNNING | {run("koopmon_step"): "7x200", run(SNAPSHOT_TIME): "60x200"}, 20
        ),  # series of KoopmonTrainingStalled
    ),
    "KoopmonTapsMissing": (Calm(RUNNING | {run("koopmon_taps_missing_total"): "5x200"}, 40),),
    "KoopmonSnapshotsDropped": (
        Calm(
            {
                run(BY_AGENT, reason="budget"): "0+9x200",
                run(BY_AGENT, reason="not_finite"): "0+9x200",
                run(BY_AGENT, reason="queue_full"): "0x200",
                run(DROPPED, reason="superseded"): "0+9x200",
                **NONE_LOST,
                run(RECEIVED): "0+1x200",
            },
            20,
        ),
        Calm({run(BY_AGENT, reason="queue_full"): "0x200", **NONE_LOST, run(RECEIVED): "5x200"}, 20),  # no data: 0 of 0
    ),
    "KoopmonNotInformative": (Calm(RUNNING | {run("koopmon_informative"): "0x60 1 0x100"}, 35),),
    "KoopmonAgentOverhead": (Calm(RUNNING | {run("koopmon_agent_overhead_ratio"): "0.004x100"}, 15),),
    "KoopmonMonitorDown": (
        Calm({monitor("up"): "1x20", 'up{job="node",instance="elsewhere:9100"}': "0x20"}, 5),
        Calm({monitor("up"): "1x10 0 0 1x10"}, 4),  # two failed scrapes
    ),
    "KoopmonStorePaused": (Calm({monitor("koopmon_store_recording"): "1x8 0 0 1x20"}, 4),),
    "KoopmonDmdBacklog": (Calm({monitor("koopmon_engine_queue_length"): "3 3 0 " * 20}, 10),),
    "KoopmonEngineFailing": (Calm({monitor("koopmon_engine_failures_total"): "4x60"}, 15),),
    "KoopmonInternalErrors": (
        Calm({monitor("koopmon_internal_errors_total", part="store"): "4x60"}, 15),
        Calm(
            {monitor("koopmon_internal_errors_total", part="judgement"): "0x20 1x60"}, 15
        ),  # series of KoopmonEngineFailing
    ),
    "KoopmonMessagesRejected": (Calm({monitor("koopmon_messages_rejected_total", reason="key"): "0+1x80"}, 12),),
}


@dataclass(frozen=True, slots=True)
class Flapping:
    """A condition that comes and goes until `until_minute`: one alert without a gap, then none at `calm_minute`."""

    series: Mapping[str, str]
    from_minute: float
    until_minute: float
    calm_minute: float


UNREST = "0.9 0.9 0.9 0.9 0.1 0.1 0.1 0.1 "
"""Above the threshold for one minute, below it for the next."""

FLAPPING: Mapping[str, Flapping] = {
    "KoopmonRiskSpike": Flapping(
        RUNNING_WITH_GAPS
        | {run("koopmon_risk_alarms_total"): "0x20 " + " ".join(f"{n} {n} {n}" for n in range(1, 21)) + " 20x60"},
        from_minute=6,
        until_minute=20,
        calm_minute=22,
    ),
    "KoopmonRiskHigh": Flapping(
        RUNNING_WITH_GAPS | ACT_AT | {run("koopmon_risk"): "0.1x20 " + UNREST * 8 + "0.1x60"},
        from_minute=7,
        until_minute=20,
        calm_minute=26,
    ),
    "KoopmonForecastHigh": Flapping(
        RUNNING_WITH_GAPS | {run("koopmon_forecast"): "0.95x23 " + ("0.5x7 0.95x23 ") * 3 + "0.1x100"},
        from_minute=7,
        until_minute=30,
        calm_minute=40,
    ),
    "KoopmonDivergenceLikely": Flapping(
        RUNNING_WITH_GAPS | {run("koopmon_divergence_probability"): "0.6x11 " + "0.4x7 0.6x7 " * 4 + "0.4x100"},
        from_minute=3,
        until_minute=18,
        calm_minute=28,
    ),
}
