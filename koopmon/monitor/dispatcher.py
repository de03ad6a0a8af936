"""Dispatch of decisions: record, send to rank 0, resend, and record the outcome.

Errors in metrics, page or annotations do not affect a decision. A decision that cannot be recorded is not sent.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from koopmon.errors import ProtocolError
from koopmon.grafana.annotations import Annotate, no_annotations
from koopmon.history.writer import HistoryWriter
from koopmon.monitor.failures import Failures
from koopmon.monitor.http.live_state import LiveState, policy_status_of
from koopmon.monitor.registry import Run
from koopmon.monitor.run_controller import Assessment, RunController
from koopmon.policy import Decision
from koopmon.telemetry.metrics import Metrics
from koopmon.wire.messages import Ack, Command, MonitorMessage, TrainingStep

if TYPE_CHECKING:
    from koopmon.spectral import SpectralProfile

logger = logging.getLogger(__name__)


class Dispatcher:
    """Records each decision in the store before its first command goes to `send(peer, message)`."""

    def __init__(
        self,
        *,
        metrics: Metrics,
        store: HistoryWriter,
        send: Callable[[bytes, MonitorMessage], bool],
        wall: Callable[[], float],
        live_state: LiveState,
        failures: Failures,
        annotate: Annotate = no_annotations,
    ) -> None:
        """`annotate` is called for every decision, and for every outcome of a command."""
        self._metrics = metrics
        self._store = store
        self._send = send
        self._wall = wall
        self._annotate = annotate
        self._live_state = live_state
        self._contained = failures.contained
        self._failures = failures

    def assess(
        self,
        now: float,
        run: Run,
        controller: RunController,
        training: TrainingStep,
        profile: SpectralProfile | None,
        *,
        decide: bool,
    ) -> Assessment | None:
        """Assess a snapshot, record the assessment, then send the commands of the decision.

        Nothing is sent while the run is watch-only. A `profile` of None means that the states were not finite; without
        `decide` no decision is made. Returns the assessment; None if it failed, and the failure is counted. The caller
        handles later errors: it must not send any command of this decision.
        """
        try:
            if profile is not None:
                controller.record_initial_score(training.step, profile)
            assessment = controller.assess(now, training, profile, step=run.step, decide=decide)
        except Exception as error:
            self._failures.note("judgement", error, run=run.name, what=f"step {training.step} cannot be judged")
            with self._contained("metrics", run.name):
                self._metrics.add("engine_failures")
            return None
        with self._contained("metrics", run.name):
            self._show(run, controller, assessment)
        with self._contained("store", run.name):
            self._record(run, controller, training, assessment, non_finite=profile is None)
        if assessment.unencodable is not None:
            what = f"the decision at step {training.step} is dropped"
            self._failures.note("command", assessment.unencodable, run=run.name, what=what)
        if assessment.decision is not None and assessment.remarkable:
            self._issue(run, controller, training, assessment, assessment.decision)
        with self._contained("page", run.name):
            self._live_state.record_assessment(
                run.name, training, profile, assessment, policy_status_of(now, controller, assessment)
            )
        return assessment

    def _show(self, run: Run, controller: RunController, assessment: Assessment) -> None:
        if controller.initial is not None:
            self._metrics.set("initial_risk", controller.initial.score, run.name)
        self._metrics.set("risk", assessment.risk.value, run.name)
        self._metrics.set("forecast", assessment.risk.forecast, run.name)
        self._metrics.set("divergence_probability", controller.divergence_probability, run.name)
        # Alerts use counters here, because a gauge would lose a value between two scrapes.
        if controller.is_alarming(assessment.risk.value):
            self._metrics.add("risk_alarms", run.name)
        effect = None if assessment.decision is None else assessment.decision.took_effect
        if effect is not None and controller.sends:
            self._metrics.add("effect_checks", run.name, "effect" if effect else "no_effect")

    def _record(
        self, run: Run, controller: RunController, training: TrainingStep, assessment: Assessment, *, non_finite: bool
    ) -> None:
        at = self._wall()
        self._store.record_observation(
            at,
            run.name,
            run.incarnation,
            training,
            non_finite=non_finite,
            observation=assessment.observation,
            risk=assessment.risk.value,
            reason=assessment.risk.reason,
            components=assessment.risk.components,
        )
        self._store.record_memory(at, run.name, run.incarnation, controller.checkpoint())

    def _issue(
        self, run: Run, controller: RunController, training: TrainingStep, assessment: Assessment, decision: Decision
    ) -> None:
        for command in assessment.replaced:
            # Its ack may still arrive; it then replaces this outcome.
            self._settle(command, "unanswered")
        self._store.record_decision(
            self._wall(),
            run.name,
            run.incarnation,
            training.step,
            phase=decision.phase,
            reason=decision.reason,
            risk=assessment.risk.value,
            commands=assessment.commands,
            outcome="pending" if controller.sends else "dry_run",
        )
        logger.info(
            "run %s step %d: %s: %s (risk %.2f)%s",
            run.name,
            training.step,
            decision.phase,
            decision.reason,
            assessment.risk.value,
            "" if controller.sends or not assessment.commands else ", not sent",
        )
        kinds = tuple(command.kind for command in assessment.commands)
        what = ", ".join(kinds) + ("" if controller.sends else " (not sent)") if kinds else "no command"
        text = f"{run.name} step {training.step}: {what}: {decision.reason} (risk {assessment.risk.value:.2f})"
        with self._contained("annotation", run.name):
            self._annotate(self._wall(), (run.name, decision.phase, *kinds), text)
        for command in assessment.commands:
            if controller.sends:
                self._offer(run, controller, command)
            else:
                self._count(command, "dry_run")

    def acknowledge(self, now: float, run: Run, controller: RunController, ack: Ack) -> None:
        """Handle an ack of rank 0. Raises ProtocolError when no command of this monitor has its id."""
        with self._contained("store", run.name):
            self._store.record_ack(self._wall(), ack)
        answered = controller.acknowledge(now, ack)
        if answered is None:
            raise ProtocolError("unknown_command", f"run {run.name} answers {ack.command_id}, which is not known")
        if answered.counts:
            with self._contained("metrics", run.name):
                self._metrics.add("commands", run.name, answered.kind, ack.outcome)
        if not answered.first:
            return
        with self._contained("page", run.name):
            self._live_state.record_ack(ack)
            self._live_state.set_policy_state(run.name, controller.policy_state)
        kind = answered.kind
        detail = f" ({ack.detail!r})" if ack.detail else ""
        logger.info("run %s step %d: %s %s%s", run.name, ack.step, kind, ack.outcome, detail)
        self._annotate_outcome(run.name, kind, ack.outcome, f"{run.name} step {ack.step}: {kind} {ack.outcome}{detail}")

    def resend_due(self, now: float, run: Run, controller: RunController) -> None:
        """Give up commands past their expiry, and resend those without an ack for RESEND_SECONDS."""
        self._unanswered(controller.expire(now, run.step, run.applied))
        for command in controller.due(now):
            self._offer(run, controller, command)

    def abandon(self, controller: RunController) -> None:
        """Mark all waiting commands as unanswered, because the run has ended or is now watch-only."""
        self._unanswered(controller.abandon())

    def _offer(self, run: Run, controller: RunController, command: Command) -> None:
        leader = run.leader
        if leader is not None and self._send(leader.identity, command) and controller.sent(command):
            self._count(command, "sent")

    def _unanswered(self, commands: Iterable[Command]) -> None:
        for command in commands:
            self._count(command, "unanswered")
            self._settle(command, "unanswered")
            text = f"{command.run}: {command.kind} was not answered"
            self._annotate_outcome(command.run, command.kind, "unanswered", text)

    def _count(self, command: Command, outcome: str) -> None:
        with self._contained("metrics", command.run):
            self._metrics.add("commands", command.run, command.kind, outcome)

    def _settle(self, command: Command, outcome: str) -> None:
        with self._contained("store", command.run):
            self._store.record_outcome(command.id, outcome)
        with self._contained("page", command.run):
            self._live_state.record_outcome(command.run, command.id, outcome)

    def _annotate_outcome(self, run: str, kind: str, outcome: str, text: str) -> None:
        with self._contained("annotation", run):
            self._annotate(self._wall(), (run, kind, outcome), text)
