"""Sets the metrics of a run from its events."""

from __future__ import annotations

from dataclasses import dataclass

from koopmon.history.schema import RunState
from koopmon.monitor import events
from koopmon.monitor.run import Run
from koopmon.monitor.run_controller import Assessment
from koopmon.risk.band import BandReading
from koopmon.telemetry.metrics import KEPT_WHEN_VANISHED, RUN_STATES, Metrics


@dataclass(frozen=True, slots=True)
class MetricsSink:
    """Values of `metrics`. A vanished run has few series: see KEPT_WHEN_VANISHED."""

    metrics: Metrics

    def __call__(self, at: float, event: events.Event) -> None:
        metrics = self.metrics
        match event:
            case events.RunChanged(run):
                self._show_run(run)
            case events.HeartbeatReceived(run):
                for reason, count in event.drops.items():
                    metrics.add("agent_snapshots_dropped", run.name, reason, amount=count)
                for name, reading in event.logged.items():
                    metrics.set("logged_value", reading.value, run.name, name)
                    self._show_band(run, name, reading)
            case events.SnapshotReceived(run) if run.state is not RunState.VANISHED:
                metrics.add("snapshots_received", run.name)
                metrics.set("last_snapshot_timestamp_seconds", at, run.name)
            case events.SnapshotDropped(run, reason) if run.state is not RunState.VANISHED:
                metrics.add("snapshots_dropped", run.name, reason)
            case events.Profiled(run, result):
                metrics.observe_duration(result.seconds)
                if result.failed:
                    metrics.add("engine_failures")
                elif run is not None:
                    metrics.set_layers(run.name, result.profile)
                    metrics.set("snapshot_age_seconds", event.age_seconds, run.name)
                    metrics.set_observables(run.name, result.snapshot.observables)
            case events.Assessed(run, None):
                metrics.add("engine_failures")
            case events.Assessed(run, assessment) if assessment is not None:
                self._show_assessment(run, assessment)
                if event.loss is not None:
                    self._show_band(run, "loss", event.loss)
            case events.Decided(run, assessment) if not run.controller.sends:
                for command in assessment.commands:
                    metrics.add("commands_issued", run.name, command.kind)
                    metrics.add("commands_settled", run.name, command.kind, "dry_run")
            case events.CommandSent(run, command):
                metrics.add("commands_issued", run.name, command.kind)
            case events.CommandUnanswered(run, command, replaced=False):
                metrics.add("commands_settled", run.name, command.kind, "unanswered")
            case events.CommandAcked(run, ack, answered) if answered is not None and answered.counts:
                metrics.add("commands_settled", run.name, answered.kind, ack.outcome)
            case events.RunClosed(run) if run.state is RunState.VANISHED:
                metrics.end_run(run.name, keep=KEPT_WHEN_VANISHED)
                self._show_state(run)
            case events.RunRemoved(run):
                metrics.end_run(run.name)

    def _show_run(self, run: Run) -> None:
        metrics = self.metrics
        if metrics.value("snapshots_received", run.name) is None:
            metrics.begin_run(run.name)
        self._show_state(run)
        sends, policy = run.controller.sends, run.controller.config.policy
        metrics.set("acting", float(sends), run.name)
        metrics.set("watch_only", float(not sends and policy.name != "observe" and not policy.dry_run), run.name)
        metrics.set("ranks", sum(not peer.gone for peer in run.peers.values()), run.name)
        for level in ("act", "severe", "release"):
            metrics.set("risk_threshold", getattr(policy, f"{level}_risk"), run.name, level)
        metrics.set_training(run.name, run.training)
        metrics.set("min_stride", run.pacing.steps, run.name)
        if heartbeats := run.heartbeats:
            metrics.set("agent_overhead_ratio", max(each.overhead_ratio for each in heartbeats), run.name)
            durations = [each.step_seconds for each in heartbeats if each.step_seconds is not None]
            metrics.set("step_seconds", max(durations, default=None), run.name)
            metrics.set("taps_missing", sum(each.taps_missing for each in heartbeats), run.name)

    def _show_state(self, run: Run) -> None:
        self.metrics.set_state("run_state", run.state.name.lower(), RUN_STATES, run.name)

    def _show_band(self, run: Run, name: str, reading: BandReading) -> None:
        self.metrics.set("band_low", None if run.bands[name].upper_only else reading.low, run.name, name)
        self.metrics.set("band_high", reading.high, run.name, name)
        self.metrics.add("band_departures", run.name, name, amount=int(reading.departed))

    def _show_assessment(self, run: Run, assessment: Assessment) -> None:
        metrics, controller, risk = self.metrics, run.controller, assessment.risk
        profile, decision = assessment.profile, assessment.decision
        metrics.set("informative", float(profile is not None and profile.informative), run.name)
        if controller.initial is not None:
            metrics.set("initial_near_unit_mass", controller.initial.score, run.name)
        metrics.set("risk", risk.value, run.name)
        metrics.set("forecast", risk.forecast, run.name)
        metrics.set("divergence_probability", controller.divergence_probability, run.name)
        # Alerts use counters here, because a gauge would lose a value between two scrapes.
        if risk.value >= controller.config.policy.act_risk:
            metrics.add("risk_alarms", run.name)
        if decision is not None and decision.took_effect is not None and controller.sends:
            metrics.add("effect_checks", run.name, "effect" if decision.took_effect else "no_effect")
