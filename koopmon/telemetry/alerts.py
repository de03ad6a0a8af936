"""Table of all alerts, the source of Prometheus' rules, Grafana's rules, the page /alerts and the docs.

The thresholds are the policy's defaults. The counters `risk_alarms` and `effect_checks` use the run's own
configuration. Counters are queried over windows of at least a minute, so that at scrape intervals of 15 s no event is
missed. `keep_firing_seconds` prevents flapping where a window does not.
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
"""Divergence probability above which an alert fires."""
HIGH_FORECAST = 0.8
STALE_SECONDS = 600
MAX_OVERHEAD_RATIO = 4 * CadenceConfig().budget_ratio
MAX_DROPPED_RATIO = 0.5
MAX_REJECTED_PER_SECOND = 0.1

ON_RUN = "on (job, instance, run)"
STATE = "last_over_time(koopmon_run_state[2m])"
"""Every gauge here is queried over a window: one failed scrape must not end an alert or restart its `for` time."""
RUNNING = f"and {ON_RUN} {STATE} == 1"
BY_RUN = "sum by (job, instance, run)"
SNAPSHOT_TIME = "last_over_time(koopmon_last_snapshot_timestamp_seconds[2m])"
LOST = 'koopmon_snapshots_dropped_total{reason!~"budget|not_finite|superseded"}'
"""Snapshots that were lost, without those skipped on purpose."""


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
        summary="{{ $labels.run }}: some layer lurches",
        description="In the last minute the risk of divergence was high enough to act on.",
        means="The map of some layer changed so violently between two snapshots that the risk reached the value at"
        f" which the policy acts (`[policy] act_risk`, {ACT_RISK:g} unless configured). In runs that died, this mostly"
        " came before the loss moved. It resolves after a minute without such a snapshot.",
        look="The risk and the update ratio by layer of the run: one layer, or all of them? Was the learning rate just"
        " raised, or did the data change?",
        do="Under a policy that acts: nothing; see whether the alert resolves. Under `observe` or `--dry-run`: lower"
        " the learning rate, or restart from the last checkpoint at a lower one.",
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
        means=f"Over a minute and more the mean risk was at least {ACT_RISK:g} (`[policy] act_risk`): either nothing"
        " acts, or what was done is not enough. A run whose states are not finite any more has risk 1.",
        look="The commands of the run, their outcomes and the learning-rate scale; whether the run is watch-only"
        " (docs/support.md); whether KoopmonActionWithoutEffect or KoopmonCommandNotApplied fires too.",
        do="Save a checkpoint if the loss is still good. Lower the learning rate, or let koopmon do it (`--policy lr`)."
        " When the loss is lost already, go back to the checkpoint before the risk rose.",
    ),
    Alert(
        name="KoopmonForecastHigh",
        group="risk",
        severity="info",
        expr=f"avg_over_time(koopmon_forecast[5m]) >= {HIGH_FORECAST:g} {RUNNING}",
        for_seconds=60,
        keep_firing_seconds=300,
        summary="{{ $labels.run }}: what is known beforehand speaks for divergence",
        description='The mean forecast of the last five minutes is {{ $value | printf "%.2f" }}.',
        means="By learning rate, width, depth and normalisation, and by the loss or the spectrum since, runs like this"
        " one often diverge. No layer need have lurched yet. The forecast only warns; no policy acts on it.",
        look="The forecast beside the risk: a forecast that was high from the first step speaks of the configuration,"
        " one that rises speaks of the run.",
        do="Nothing at once. Consider a lower learning rate or a longer warm-up for the next launch, and see that"
        " checkpoints are written often enough.",
    ),
    Alert(
        name="KoopmonDivergenceLikely",
        group="risk",
        severity="warning",
        expr=f"last_over_time(koopmon_divergence_probability[2m]) >= {LIKELY:g} {RUNNING}",
        for_seconds=60,
        keep_firing_seconds=300,
        summary="{{ $labels.run }}: at this learning rate it probably diverges",
        description="The calibrated probability of divergence is {{ $value | humanizePercentage }}.",
        means="The calibrator, fitted on recorded runs, says that of runs that start like this one, with this learning"
        f" rate, width and depth, at least {LIKELY:.0%} diverged. Absent without a calibrator.",
        look="`koopmon profile FACTORY --calibrator FILE --max-lr` tells the highest rate that it holds to be safe.",
        do="Lower the peak learning rate, or guard the run (`--policy lr`).",
    ),
    Alert(
        name="KoopmonActionTaken",
        group="risk",
        severity="info",
        expr=(
            "sum by (job, instance, run, kind) (increase("
            'koopmon_commands_total{kind=~"set_lr_scale|set_kss|stop",outcome="applied"}[5m])) > 0'
        ),
        summary="{{ $labels.run }}: {{ $labels.kind }} was applied",
        description="koopmon changed how this run trains; the monitor's log of decisions says why.",
        means="All ranks applied a command at one optimizer step: the learning-rate scale or the weight of Koopman"
        " Spectral Shaping is another one now. The way back, in small notches after calm, counts as well.",
        look="Learning-rate scale and KSS alpha of the run, and its risk since; the monitor's log has every decision"
        " with its reason.",
        do="Nothing. It resolves five minutes after the last command.",
        panel=("koopmon-run", "What is in force"),
    ),
    Alert(
        name="KoopmonActionWithoutEffect",
        group="risk",
        severity="critical",
        expr=f'{BY_RUN} (increase(koopmon_effect_checks_total{{outcome="no_effect"}}[5m])) > 0 {RUNNING}',
        summary="{{ $labels.run }}: the risk is still high after an action",
        description='{{ $value | printf "%.0f" }} snapshots of the last five minutes saw no effect of the last action.',
        means="A command was applied and had its time (`[policy] cooldown_steps`), and the risk is high all the same."
        " koopmon goes further down, as far as `[policy] min_lr_scale`, and no further.",
        look="Whether the risk falls with the next cut; whether the scale is at its least already; whether the"
        " gradient norm or the data, and not the learning rate, is what changed.",
        do="When the scale is at its least and the risk stays: stop the run and go back to the checkpoint before the"
        " risk rose. A cause other than the learning rate (data, loss, hardware) is not cured by lowering it.",
        panel=("koopmon-run", "Alarms and effect"),
    ),
    Alert(
        name="KoopmonCommandNotApplied",
        group="risk",
        severity="critical",
        expr=(
            f"{BY_RUN} (increase(koopmon_commands_total"
            '{kind=~"set_lr_scale|set_kss|stop",outcome=~"refused|failed|expired|unanswered"}[10m])) > 0'
        ),
        summary="{{ $labels.run }}: a command was not applied",
        description='{{ $value | printf "%.0f" }} commands of the last ten minutes changed nothing in the run.',
        means="The agent refused a command, the ranks could not agree on a step, or no answer came before it expired."
        " Training goes on as it was; the guard does not act.",
        look="The agent's log line that names the reason (a cap in `[limits]`, a layout that is watch-only, a hung"
        " rank), and the outcomes by kind.",
        do="Mend what the line names. Until then treat the run as unguarded.",
        panel=("koopmon-run", "Commands"),
    ),
    Alert(
        name="KoopmonRunVanished",
        group="run",
        severity="critical",
        expr=f"{STATE} == 2 unless {ON_RUN} last_over_time(koopmon_run_state[2m] offset 1h) == 2",
        summary="{{ $labels.run }} vanished",
        description="No rank of the run has been heard of, and none said goodbye.",
        means="The job was killed, its node died, or the network between job and monitor broke. The alert stays for an"
        " hour; the run's state stays in the metrics for a day.",
        look="The job's own state in the scheduler; whether other runs of the same hosts vanished too.",
        do="When the job is gone, restart it: koopmon hands back what was in force. When it lives, mend the network;"
        " it connects again by itself.",
        panel=("koopmon-fleet", "Runs"),
    ),
    Alert(
        name="KoopmonTrainingStalled",
        group="run",
        severity="warning",
        expr=f"changes(koopmon_step[5m]) == 0 {RUNNING}",
        for_seconds=600,
        summary="{{ $labels.run }}: no optimizer step in a quarter of an hour",
        description="The agents answer, and the step does not move.",
        means="The ranks live, and for a quarter of an hour none has taken an optimizer step: a hung collective, a"
        " stuck data loader, or a long evaluation or checkpoint.",
        look="The job's own log; the stacks of its ranks (`py-spy dump --pid PID`).",
        do="When it is an evaluation: nothing, or silence the alert for the time. Else restart the job.",
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
        summary="{{ $labels.run }} trains unseen",
        description="The run takes optimizer steps, and its last snapshot is more than ten minutes old, or none came.",
        means="Heartbeats come and snapshots do not: spectra, risk and decisions are those of the past.",
        look="Snapshots dropped by reason and taps missing: `budget` means that steps are too short for the time that"
        " koopmon may take, `monitor_away` that the data endpoint is out of reach.",
        do="Mend what the reason names: open the data endpoint's port, or raise `[cadence] budget_ratio`. Taps that"
        " never fire: see KoopmonTapsMissing.",
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
        summary="{{ $labels.run }}: a layer was not seen",
        description='In {{ $value | printf "%.0f" }} snapshots of the last ten minutes a tap did not fire.',
        means="A forward pass went round a tapped block, or the model was compiled or wrapped after `attach`, so that"
        " hooks do not fire. Layers are missing from the spectra.",
        look="The agent's log line at the first missing tap; what changed about the model since the start (compile,"
        " activation checkpointing, layer drop).",
        do="Attach before the first forward and after wrapping. Blocks that are skipped on purpose: nothing.",
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
        description="{{ $value | humanizePercentage }} of the last ten minutes' snapshots were lost on the way.",
        means="Snapshots are taken and do not arrive, or arrive and are not profiled. koopmon sees the run more rarely"
        " than it wants to. Those that the agent leaves out to keep its budget do not count, nor do those that were"
        " not finite.",
        look="The reasons: `monitor_away`, `queue_full` and `no_buffer` are the way to the monitor, `incomplete` a rank"
        " that does not send, `engine_queue_full`, `engine_failed` and `assembler_full` the monitor.",
        do="For the way: bring monitor and job closer, or make snapshots smaller (`[sampling] num_samples`). For the"
        " monitor: see KoopmonDmdBacklog.",
        panel=("koopmon-run", "Snapshots"),
    ),
    Alert(
        name="KoopmonNotInformative",
        group="run",
        severity="info",
        expr=f"max_over_time(koopmon_informative[2m]) == 0 {RUNNING}",
        for_seconds=1800,
        summary="{{ $labels.run }}: its spectra say nothing",
        description="For half an hour no profile was informative: koopmon is blind on this run.",
        means="The blocks hardly move the residual stream (as at initialisation with zero-initialised branches), there"
        " are too few tokens, or the states are not finite.",
        look="The update ratio by layer: near 0 there is nothing to analyse. `koopmon profile FACTORY` tells the"
        " reason.",
        do="Blocks that start at zero become visible by themselves. Too few tokens: raise `[sampling] num_samples`.",
        panel=("koopmon-run", "Informative"),
    ),
    Alert(
        name="KoopmonAgentOverhead",
        group="run",
        severity="warning",
        expr=f"avg_over_time(koopmon_agent_overhead_ratio[5m]) > {MAX_OVERHEAD_RATIO:g} {RUNNING}",
        for_seconds=600,
        keep_firing_seconds=300,
        summary="{{ $labels.run }}: koopmon takes more than its share",
        description="A rank spends {{ $value | humanizePercentage }} of its step time in koopmon's hooks.",
        means=f"The budget is {CadenceConfig().budget_ratio:.1%} of the step time in the long run. Above"
        f" {MAX_OVERHEAD_RATIO:.0%} for ten minutes something is slower than the agent foresees: very short steps, or"
        " a host without a free core.",
        look="Steps per second of the run, and the load of its hosts.",
        do="Raise `[cadence] calm_every`, or lower `[sampling] num_samples`. Training is slower by that share, and"
        " otherwise the same.",
        panel=("koopmon-run", "Agent overhead"),
    ),
    Alert(
        name="KoopmonMonitorDown",
        group="monitor",
        severity="critical",
        expr='up{job=~".*koopmon.*"} == 0',
        for_seconds=60,
        summary="The monitor at {{ $labels.instance }} is down",
        description="Prometheus could not scrape it for a minute. Its runs go on as they are, unguarded.",
        means="The monitor's process is gone, hangs, or is out of Prometheus' reach. Jobs are not harmed: what was in"
        " force stays in force (`[control] on_monitor_lost`). The job's name in Prometheus must hold `koopmon`.",
        look="`systemctl status koopmon-monitor` or the pod's state and log; `/healthz` from the monitor's own host.",
        do="Start it again with the same store: runs connect by themselves, and it remembers what it did.",
        panel=("koopmon-monitor", "Up"),
    ),
    Alert(
        name="KoopmonStorePaused",
        group="monitor",
        severity="critical",
        expr="max_over_time(koopmon_store_recording[1m]) == 0",
        for_seconds=60,
        summary="The monitor at {{ $labels.instance }} cannot record",
        description="Its store is paused, and decisions wait until they can be written down.",
        means="The disk is full, read-only or failing. koopmon does not act without a record, so its runs are"
        " unguarded until there is room.",
        look="Free space and the mount of the store's directory; the monitor's log names the error.",
        do="Make room or mend the mount: recording goes on by itself. `[store] max_bytes` bounds what it takes.",
        panel=("koopmon-monitor", "Store"),
    ),
    Alert(
        name="KoopmonDmdBacklog",
        group="monitor",
        severity="warning",
        expr="min_over_time(koopmon_engine_queue_length[5m]) > 0",
        for_seconds=60,
        keep_firing_seconds=120,
        summary="The monitor at {{ $labels.instance }} falls behind",
        description='For five minutes {{ $value | printf "%.0f" }} snapshots or more have waited at any time.',
        means="Snapshots come faster than the engine profiles them. Warnings come late, and once the queue is full"
        " (`[monitor] queue_length`) the oldest snapshots give way.",
        look="The duration of a profile, the number of runs and layers, and what else runs on the host.",
        do="Give the monitor a core or a GPU of its own (`--device`), lower `[monitor] svd_rank`, or share the runs"
        " among several monitors.",
        panel=("koopmon-monitor", "Engine queue"),
    ),
    Alert(
        name="KoopmonEngineFailing",
        group="monitor",
        severity="warning",
        expr="increase(koopmon_engine_failures_total[10m]) > 0",
        summary="The monitor at {{ $labels.instance }} could not judge snapshots",
        description='{{ $value | printf "%.0f" }} snapshots of the last ten minutes were not profiled or judged.',
        means="An error inside the monitor kept a snapshot from being profiled or judged. Other runs are not touched.",
        look="The monitor's log has the traceback.",
        do="Report it with that traceback. A run that is hit by it again and again is unguarded.",
        panel=("koopmon-monitor", "Failures"),
    ),
    Alert(
        name="KoopmonInternalErrors",
        group="monitor",
        severity="warning",
        expr=('sum by (job, instance, part) (increase(koopmon_internal_errors_total{part!="judgement"}[10m])) > 0'),
        summary="The monitor at {{ $labels.instance }} had errors of its own: {{ $labels.part }}",
        description='{{ $value | printf "%.0f" }} errors in the last ten minutes.',
        means="An error inside the monitor was confined to one run or one message. A run may only be watched from then"
        " on, or may have been refused; the others are guarded as before.",
        look="The monitor's log has the traceback, the run, and what follows for it.",
        do="Report it with that traceback. A run that is only watched is guarded again after the monitor has been"
        " restarted, or with the run's next launch.",
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
        summary="The monitor at {{ $labels.instance }} refuses messages: {{ $labels.reason }}",
        description='{{ $value | printf "%.1f" }} messages a second are refused as {{ $labels.reason }}.',
        means="Someone speaks to the monitor in a way that it does not accept: another version of koopmon (`version`),"
        " a key that it does not know (`key`, `handshake`), a job that shares its name with another"
        " (`stale_incarnation`), a stranger on the port (`garbage`, `http_garbage`), or a peer that sends more than is"
        " read (`flood`).",
        look="The monitor's log has one line per reason, with the detail.",
        do="Bring versions and keys in line (`koopmon keys show`), or close the port to strangers (docs/security.md).",
        panel=("koopmon-monitor", "Messages rejected"),
    ),
)
BY_NAME: Mapping[str, Alert] = {alert.name: alert for alert in ALERTS}
