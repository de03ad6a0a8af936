"""Table of all alerts: the source of the rules for Prometheus and Grafana, of the page /alerts and of docs/alerts.md.

The thresholds are defaults of the policy. The counters `risk_alarms` and `effect_checks` use the configuration of the
run. Queries of counters span at least one minute, so a scrape interval of 15 s misses no event. `keep_firing_seconds`
prevents flapping where the window of the query does not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from koopmon.config import CadenceConfig, PolicyConfig

Severity = Literal["critical", "warning", "info"]
Group = Literal["risk", "run", "monitor"]

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

ON_RUN = "on (job, instance, run)"
STATE = "last_over_time(koopmon_run_state[2m])"
"""State of a run. Gauges are queried over a window: a failed scrape must not end an alert or restart its `for`."""
RUNNING = f"and {ON_RUN} {STATE} == 1"
BY_RUN = "sum by (job, instance, run)"
SNAPSHOT_TIME = "last_over_time(koopmon_last_snapshot_timestamp_seconds[2m])"
LOST = 'koopmon_snapshots_dropped_total{reason!~"budget|not_finite|superseded"}'
"""Lost snapshots. Snapshots that were skipped on purpose do not count."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Alert:
    """One alert. `expr` is PromQL with one series per alert instance; times are in seconds.

    `summary` and `description` are Prometheus templates with `$labels` and `$value`. `means`, `look` and `do` are the
    runbook: Markdown of one paragraph each, with code in backticks as the only markup.
    """

    name: str
    group: Group
    severity: Severity
    expr: str
    for_seconds: int = 0
    keep_firing_seconds: int = 0
    """Time without the condition before the alert resolves; it prevents flapping."""
    summary: str
    description: str
    means: str
    look: str
    do: str
    panel: tuple[str, str] = ("koopmon-run", "Risk")
    """Dashboard uid and title of the panel with the metric of this alert."""

    @property
    def anchor(self) -> str:
        """Anchor of this alert on the page /alerts and in docs/alerts.md."""
        return self.name


def runbook_url(alert: Alert, docs_url: str | None = None) -> str:
    """Return the alert's address on the monitor that fired, as a Prometheus template, or in `docs_url`.

    Both pages have the same anchors.
    """
    base = "http://{{ $labels.instance }}/alerts" if docs_url is None else docs_url.rstrip("#")
    return f"{base}#{alert.anchor}"


ALERTS: tuple[Alert, ...] = (
    Alert(
        name="KoopmonRiskSpike",
        group="risk",
        severity="warning",
        expr=f"increase(koopmon_risk_alarms_total[1m]) > 0 {RUNNING}",
        summary="{{ $labels.run }}: the risk of divergence spiked",
        description="In the last minute the risk reached the threshold for an action.",
        means="A layer's update ratio jumped between two snapshots, and the risk reached `[policy] act_risk` (default"
        f" {ACT_RISK:g}). Most runs that diverged had such a jump before their loss rose. The alert resolves one"
        " minute after the last such snapshot.",
        look="The panels of the risk and of the update ratio by layer show whether one layer or all layers jumped."
        " Check whether the learning rate was raised or the data changed.",
        do="Under a policy that acts: wait until the alert resolves. Under `observe` or `--dry-run`: lower the"
        " learning rate, or restart from the last checkpoint at a lower rate.",
    ),
    Alert(
        name="KoopmonRiskHigh",
        group="risk",
        severity="critical",
        expr=f"avg_over_time(koopmon_risk[1m]) >= {ACT_RISK:g} {RUNNING}",
        for_seconds=30,
        keep_firing_seconds=120,
        summary="{{ $labels.run }}: the risk of divergence stays high",
        description='The mean risk of the last minute is {{ $value | printf "%.2f" }}.',
        means=f"The mean risk was at least {ACT_RISK:g} (the default of `[policy] act_risk`) for over a minute. Either"
        " no policy acts, or its actions are too weak. A run with states that are not finite has risk 1.",
        look="Check the commands of the run, their outcomes and the learning-rate scale. Check whether the run is"
        " watch-only (docs/support.md), and whether KoopmonActionWithoutEffect or KoopmonCommandNotApplied fires too.",
        do="Save a checkpoint if the loss is still good. Lower the learning rate, or let koopmon lower it (`--policy"
        " lr`). If the loss has already exploded, restart from the checkpoint before the risk rose.",
    ),
    Alert(
        name="KoopmonForecastHigh",
        group="risk",
        severity="info",
        expr=f"avg_over_time(koopmon_forecast[5m]) >= {HIGH_FORECAST:g} {RUNNING}",
        for_seconds=60,
        keep_firing_seconds=300,
        summary="{{ $labels.run }}: the forecast of divergence is high",
        description='The mean forecast of the last five minutes is {{ $value | printf "%.2f" }}.',
        means="Runs with this learning rate, width, depth, normalisation and loss or spectrum often diverge. The alert"
        " can fire before any layer jumps. The forecast only warns; no policy acts on it.",
        look="Compare the forecast with the risk. A forecast that is high from the first step comes from the"
        " configuration of the run. A rising forecast comes from its loss or its spectrum.",
        do="No immediate action is needed. Consider a lower learning rate or a longer warm-up for the next launch."
        " Check that checkpoints are frequent enough.",
    ),
    Alert(
        name="KoopmonDivergenceLikely",
        group="risk",
        severity="warning",
        expr=f"last_over_time(koopmon_divergence_probability[2m]) >= {LIKELY:g} {RUNNING}",
        for_seconds=60,
        keep_firing_seconds=300,
        summary="{{ $labels.run }}: divergence is likely at this learning rate",
        description="The calibrated probability of divergence is {{ $value | humanizePercentage }}.",
        means="The calibrator was fitted on recorded runs. Of the runs with a similar start, learning rate, width and"
        f" depth, at least {LIKELY:.0%} diverged. The alert needs a calibrator (`[monitor] calibrator`).",
        look="`koopmon profile FACTORY --calibrator FILE --max-lr` prints the highest learning rate that a run"
        " probably survives.",
        do="Lower the peak learning rate, or guard the run (`--policy lr`).",
    ),
    Alert(
        name="KoopmonActionTaken",
        group="risk",
        severity="info",
        expr=(
            "sum by (job, instance, run, kind) (increase("
            'koopmon_commands_total{kind=~"set_lr_scale|set_kss|rewind|stop",outcome="applied"}[5m])) > 0'
        ),
        summary="{{ $labels.run }}: {{ $labels.kind }} was applied",
        description="koopmon changed the training of this run. The monitor's log has the decision and its reason.",
        means="All ranks applied a command at one optimizer step. It changed the learning-rate scale or the weight of"
        " Koopman Spectral Shaping. Commands that raise the scale again after a calm period count as well.",
        look="Check the learning-rate scale and the KSS weight of the run, and its risk since the command. The"
        " monitor's log has every decision with its reason.",
        do="No action is needed. The alert resolves five minutes after the last command.",
        panel=("koopmon-run", "Settings in force"),
    ),
    Alert(
        name="KoopmonActionWithoutEffect",
        group="risk",
        severity="critical",
        expr=f'{BY_RUN} (increase(koopmon_effect_checks_total{{outcome="no_effect"}}[5m])) > 0 {RUNNING}',
        summary="{{ $labels.run }}: the risk is still high after an action",
        description='The last action had no effect in {{ $value | printf "%.0f" }} snapshots of the last five minutes.',
        means="A command was applied, `[policy] cooldown_steps` steps have passed, and the risk is still high. koopmon"
        " lowers the learning rate further, down to the scale `[policy] min_lr_scale`.",
        look="Check whether the risk falls after the next back-off, and whether the scale has reached its lower bound."
        " Check whether the gradient norm or the data changed, and not the learning rate.",
        do="If the scale is at its lower bound and the risk stays high: stop the run and restart from the checkpoint"
        " before the risk rose. A lower learning rate does not repair other causes (data, loss, hardware).",
        panel=("koopmon-run", "Alarms and effect"),
    ),
    Alert(
        name="KoopmonCommandNotApplied",
        group="risk",
        severity="critical",
        expr=(
            f"{BY_RUN} (increase(koopmon_commands_total"
            '{kind=~"set_lr_scale|set_kss|rewind|stop",outcome=~"refused|failed|expired|unanswered"}[10m])) > 0'
        ),
        summary="{{ $labels.run }}: a command was not applied",
        description='{{ $value | printf "%.0f" }} commands of the last ten minutes changed nothing in the run.',
        means="The agent refused a command, the ranks did not agree on a step, or no acknowledgement arrived before"
        " the command expired. Training continues unchanged and unguarded.",
        look="The agent's log has the reason: a limit in `[limits]`, a watch-only layout, or a rank that hangs. The"
        " panel shows the outcomes by kind of command.",
        do="Repair the cause in the agent's log. Until then, treat the run as unguarded.",
        panel=("koopmon-run", "Commands"),
    ),
    Alert(
        name="KoopmonRunVanished",
        group="run",
        severity="critical",
        expr=f"{STATE} == 2 unless {ON_RUN} last_over_time(koopmon_run_state[2m] offset 1h) == 2",
        summary="{{ $labels.run }} vanished",
        description="The monitor receives no messages from any rank of the run, and the run did not end normally.",
        means="The job was killed, its node failed, or the network between job and monitor failed. The alert lasts one"
        " hour. The state of the run stays in the metrics for a day.",
        look="Check the state of the job in the scheduler. Check whether other runs on the same hosts vanished too.",
        do="If the job is gone, restart it: koopmon restores the settings that were in force. If the job is alive,"
        " repair the network: the agent reconnects by itself.",
        panel=("koopmon-fleet", "Runs"),
    ),
    Alert(
        name="KoopmonTrainingStalled",
        group="run",
        severity="warning",
        expr=f"changes(koopmon_step[5m]) == 0 {RUNNING}",
        for_seconds=600,
        summary="{{ $labels.run }}: no optimizer step for a quarter of an hour",
        description="The agents send heartbeats, but the optimizer step does not advance.",
        means="The ranks are alive, but none has taken an optimizer step for a quarter of an hour. Common causes are a"
        " hung collective, a stuck data loader, or a long evaluation or checkpoint.",
        look="Check the log of the job and the stacks of its ranks (`py-spy dump --pid PID`).",
        do="During an evaluation: no action is needed; silence the alert if it repeats. Otherwise restart the job.",
        panel=("koopmon-run", "Steps per second"),
    ),
    Alert(
        name="KoopmonSnapshotsStale",
        group="run",
        severity="warning",
        expr=(
            f"(time() - {SNAPSHOT_TIME} > {STALE_SECONDS} or {STATE} == 1 unless {ON_RUN} {SNAPSHOT_TIME})"
            f" and {ON_RUN} changes(koopmon_step[10m]) > 0 {RUNNING}"
        ),
        for_seconds=300,
        summary="{{ $labels.run }}: training continues without snapshots",
        description="The run takes optimizer steps, but its last snapshot is more than ten minutes old or missing.",
        means="Heartbeats arrive and snapshots do not. The spectra, the risk and the decisions are out of date.",
        look="Check the dropped snapshots by reason, and the missing taps. `budget` means that the steps are too short"
        " for the time that koopmon may take. `monitor_away` means that the agent cannot reach the data endpoint.",
        do="Open the port of the data endpoint, or raise `[cadence] budget_ratio`, according to the reason. For"
        " missing taps see KoopmonTapsMissing.",
        panel=("koopmon-run", "Snapshots"),
    ),
    Alert(
        name="KoopmonTapsMissing",
        group="run",
        severity="warning",
        expr=(
            "(delta(koopmon_taps_missing[10m]) > 0 or last_over_time(koopmon_taps_missing[2m]) > 0"
            f" unless {ON_RUN} last_over_time(koopmon_taps_missing[2m] offset 10m)) {RUNNING}"
        ),
        summary="{{ $labels.run }}: layers are missing from the snapshots",
        description='In {{ $value | printf "%.0f" }} snapshots of the last ten minutes a tap did not fire.',
        means="A forward pass skipped a tapped block, or the model was compiled or wrapped after `attach`, which"
        " disables the hooks. The spectra lack these layers.",
        look="Check the agent's log line at the first missing tap. Check for changes of the model since the start:"
        " compile, activation checkpointing, layer drop.",
        do="Call `attach` after wrapping and before the first forward pass. For blocks that the model skips on"
        " purpose, no action is needed.",
        panel=("koopmon-run", "Taps missing"),
    ),
    Alert(
        name="KoopmonSnapshotsDropped",
        group="run",
        severity="warning",
        expr=(
            f"{BY_RUN} (increase({LOST}[10m])) / ({BY_RUN} (increase({LOST}[10m]))"
            f" + {BY_RUN} (increase(koopmon_snapshots_received_total[10m]))) > {MAX_DROPPED_RATIO:g}"
        ),
        for_seconds=300,
        keep_firing_seconds=300,
        summary="{{ $labels.run }}: most snapshots are lost",
        description="{{ $value | humanizePercentage }} of the snapshots of the last ten minutes were lost.",
        means="Snapshots are lost on the way to the monitor, or the monitor does not profile them. koopmon therefore"
        " has fewer snapshots than it requests. Snapshots that the agent skips within its budget and snapshots that"
        " are not finite do not count.",
        look="Check the reasons. `monitor_away`, `queue_full` and `no_buffer` point to the connection to the monitor."
        " `incomplete` points to a rank that does not send. `engine_queue_full`, `engine_failed` and `assembler_full`"
        " point to the monitor.",
        do="For the connection: move the monitor closer to the job, or make snapshots smaller (`[sampling]"
        " num_samples`). For the monitor: see KoopmonDmdBacklog.",
        panel=("koopmon-run", "Snapshots"),
    ),
    Alert(
        name="KoopmonNotInformative",
        group="run",
        severity="info",
        expr=f"max_over_time(koopmon_informative[2m]) == 0 {RUNNING}",
        for_seconds=1800,
        summary="{{ $labels.run }}: the spectra are not informative",
        description="No profile was informative for half an hour. koopmon cannot detect a divergence of this run.",
        means="The blocks hardly change the residual stream (as at an initialisation with zero-initialised branches),"
        " there are too few tokens, or the states are not finite.",
        look="Check the update ratio by layer: near 0, the spectrum has no meaning. `koopmon profile FACTORY` prints"
        " the reason.",
        do="Zero-initialised blocks become informative as they train. For too few tokens, raise `[sampling]"
        " num_samples`.",
        panel=("koopmon-run", "Informative"),
    ),
    Alert(
        name="KoopmonAgentOverhead",
        group="run",
        severity="warning",
        expr=f"avg_over_time(koopmon_agent_overhead_ratio[5m]) > {MAX_OVERHEAD_RATIO:g} {RUNNING}",
        for_seconds=600,
        keep_firing_seconds=300,
        summary="{{ $labels.run }}: koopmon exceeds its time budget",
        description="A rank spends {{ $value | humanizePercentage }} of its step time in koopmon's hooks.",
        means=f"The budget is {CadenceConfig().budget_ratio:.1%} of the step time in the long run. The share was above"
        f" {MAX_OVERHEAD_RATIO:.0%} for ten minutes. Common causes are very short steps and a host without a free"
        " core.",
        look="Check the steps per second of the run and the load of its hosts.",
        do="Raise `[cadence] calm_every`, or lower `[sampling] num_samples`. The training is slower by this share and"
        " otherwise unchanged.",
        panel=("koopmon-run", "Agent overhead"),
    ),
    Alert(
        name="KoopmonMonitorDown",
        group="monitor",
        severity="critical",
        expr='up{job=~".*koopmon.*"} == 0',
        for_seconds=60,
        summary="The monitor at {{ $labels.instance }} is down",
        description="Prometheus could not scrape the monitor for a minute. Its runs continue unguarded.",
        means="The process of the monitor ended or hangs, or Prometheus cannot reach it. Jobs continue, and settings"
        " in force stay in force (`[control] on_monitor_lost`). The name of the Prometheus job must contain `koopmon`.",
        look="Check `systemctl status koopmon-monitor`, or the state and the log of the pod. Check `/healthz` from the"
        " host of the monitor.",
        do="Restart the monitor with the same store. Runs reconnect by themselves, and the monitor restores their"
        " state from the store.",
        panel=("koopmon-monitor", "Up"),
    ),
    Alert(
        name="KoopmonStorePaused",
        group="monitor",
        severity="critical",
        expr="max_over_time(koopmon_store_recording[1m]) == 0",
        for_seconds=60,
        summary="The monitor at {{ $labels.instance }} cannot write its history",
        description="The store is paused, and decisions wait until it can write again.",
        means="The disk is full, read-only or failing. koopmon records a decision before it acts, so the runs of this"
        " monitor are unguarded.",
        look="Check the free space and the mount of the store's directory. The monitor's log has the error.",
        do="Free space, or repair the mount. Recording then resumes by itself. `[store] max_bytes` limits the size of"
        " the store.",
        panel=("koopmon-monitor", "Store"),
    ),
    Alert(
        name="KoopmonDmdBacklog",
        group="monitor",
        severity="warning",
        expr="min_over_time(koopmon_engine_queue_length[5m]) > 0",
        for_seconds=60,
        keep_firing_seconds=120,
        summary="The monitor at {{ $labels.instance }} is overloaded",
        description='At least {{ $value | printf "%.0f" }} snapshots waited for the engine for five minutes.',
        means="Snapshots arrive faster than the engine profiles them. Warnings are late. When the queue is full"
        " (`[monitor] queue_length`), the monitor drops the oldest snapshots.",
        look="Check the duration of a profile, the number of runs and layers, and the load of the host.",
        do="Give the monitor a core or a GPU of its own (`--device`), lower `[monitor] svd_rank`, or distribute the"
        " runs over several monitors.",
        panel=("koopmon-monitor", "Engine queue"),
    ),
    Alert(
        name="KoopmonEngineFailing",
        group="monitor",
        severity="warning",
        expr="increase(koopmon_engine_failures_total[10m]) > 0",
        summary="The monitor at {{ $labels.instance }} failed to assess snapshots",
        description='{{ $value | printf "%.0f" }} snapshots of the last ten minutes were not profiled or assessed.',
        means="An error inside the monitor prevented the profile or the assessment of a snapshot. Other runs are"
        " unaffected.",
        look="The monitor's log has the traceback.",
        do="Report the error with its traceback. A run with repeated errors is unguarded.",
        panel=("koopmon-monitor", "Failures"),
    ),
    Alert(
        name="KoopmonInternalErrors",
        group="monitor",
        severity="warning",
        expr=('sum by (job, instance, part) (increase(koopmon_internal_errors_total{part!="judgement"}[10m])) > 0'),
        summary="The monitor at {{ $labels.instance }} had internal errors: {{ $labels.part }}",
        description='{{ $value | printf "%.0f" }} errors in the last ten minutes.',
        means="An error inside the monitor affected one run or one message. The run may be watch-only from now on, or"
        " it may have been refused. All other runs stay guarded.",
        look="The monitor's log has the traceback, the run, and the consequence for the run.",
        do="Report the error with its traceback. A watch-only run is guarded again after a restart of the monitor or"
        " at the next launch of the run.",
        panel=("koopmon-monitor", "Failures"),
    ),
    Alert(
        name="KoopmonMessagesRejected",
        group="monitor",
        severity="warning",
        expr=(
            f"sum by (job, instance, reason) (rate(koopmon_messages_rejected_total[5m])) > {MAX_REJECTED_PER_SECOND:g}"
        ),
        for_seconds=300,
        keep_firing_seconds=300,
        summary="The monitor at {{ $labels.instance }} rejects messages: {{ $labels.reason }}",
        description='The monitor rejects {{ $value | printf "%.1f" }} messages per second as {{ $labels.reason }}.',
        means="A peer sends messages that the monitor does not accept. `version`: another version of koopmon. `key`,"
        " `handshake`: an unknown key. `stale_incarnation`: two jobs with one name. `garbage`, `http_garbage`: another"
        " program on the port. `flood`: more messages than the monitor reads.",
        look="The monitor's log has one line per reason with details.",
        do="Use the same version and keys everywhere (`koopmon keys show`), or close the port to other hosts"
        " (docs/security.md).",
        panel=("koopmon-monitor", "Messages rejected"),
    ),
)
BY_NAME: Mapping[str, Alert] = {alert.name: alert for alert in ALERTS}
