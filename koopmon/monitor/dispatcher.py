"""From verdicts to answered commands: recorded, then sent to rank 0, offered again, and accounted for.

What only tells of a decision (metrics, page, annotations) may fail without touching it. A decision that cannot be
recorded is not sent.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from koopmon.errors import ProtocolError
from koopmon.monitor.annotations import Tell, tell_nobody
from koopmon.monitor.failures import Failures
from koopmon.monitor.guard import Guard, Verdict
from koopmon.monitor.live.board import LiveBoard, standing_of
from koopmon.monitor.metrics import Metrics
from koopmon.monitor.policy import Decision
from koopmon.monitor.runs import Run
from koopmon.monitor.sample import Sample
from koopmon.monitor.store import Store
from koopmon.wire.messages import Ack, Command, MonitorMessage

if TYPE_CHECKING:
    from koopmon.spectral import SpectralProfile

logger = logging.getLogger(__name__)


class Dispatcher:
    """A decision is in the store before its first command is offered to `send(peer, message)`."""

    def __init__(
        self,
        *,
        metrics: Metrics,
        store: Store,
        send: Callable[[bytes, MonitorMessage], bool],
        wall: Callable[[], float],
        board: LiveBoard,
        failures: Failures,
        tell: Tell = tell_nobody,
    ) -> None:
        """`tell` hears of every decision, and of every outcome of a command."""
        self._metrics = metrics
        self._store = store
        self._send = send
        self._wall = wall
        self._tell = tell
        self._board = board
        self._contained = failures.contained
        self._failures = failures

    def judge(
        self, now: float, run: Run, guard: Guard, sample: Sample, profile: SpectralProfile | None, *, decide: bool
    ) -> Verdict | None:
        """Let the guard judge a snapshot, record the verdict, then send what follows from it, unless it only watches.

        A `profile` of None means that the states were not finite; without `decide` nothing follows.
        Returns the verdict; None when there is none, which is counted. An error beyond that is the caller's: none of
        what was decided may be sent then.
        """
        try:
            if profile is not None:
                guard.score_initially(sample.step, profile)
            verdict = guard.judge(now, sample, profile, step=run.step, decide=decide)
        except Exception as error:
            self._failures.note("judgement", error, run=run.name, what=f"step {sample.step} cannot be judged")
            with self._contained("metrics", run.name):
                self._metrics.add("engine_failures")
            return None
        with self._contained("metrics", run.name):
            self._show(run, guard, verdict)
        with self._contained("store", run.name):
            self._record(run, guard, sample, verdict, non_finite=profile is None)
        if verdict.unencodable is not None:
            what = f"the decision at step {sample.step} is dropped"
            self._failures.note("command", verdict.unencodable, run=run.name, what=what)
        if verdict.decision is not None and verdict.remarkable:
            self._issue(run, guard, sample, verdict, verdict.decision)
        with self._contained("page", run.name):
            self._board.judged(run.name, sample, profile, verdict, standing_of(now, guard, verdict))
        return verdict

    def _show(self, run: Run, guard: Guard, verdict: Verdict) -> None:
        if guard.initial is not None:
            self._metrics.set("initial_risk", guard.initial.score, run.name)
        self._metrics.set("risk", verdict.risk.value, run.name)
        self._metrics.set("forecast", verdict.risk.forecast, run.name)
        self._metrics.set("divergence_probability", guard.divergence_probability, run.name)
        # What alerts ask of must not get lost between two scrapes.
        if guard.alarming(verdict.risk.value):
            self._metrics.add("risk_alarms", run.name)
        effect = None if verdict.decision is None else verdict.decision.took_effect
        if effect is not None and guard.sends:
            self._metrics.add("effect_checks", run.name, "effect" if effect else "no_effect")

    def _record(self, run: Run, guard: Guard, sample: Sample, verdict: Verdict, *, non_finite: bool) -> None:
        at = self._wall()
        self._store.record_observation(
            at,
            run.name,
            run.incarnation,
            sample.step,
            scalars={"learning_rate": sample.learning_rate, "loss": sample.loss, "grad_norm": sample.grad_norm},
            lr_scale=sample.lr_scale,
            kss_alpha=sample.kss_alpha,
            non_finite=non_finite,
            observation=verdict.observation,
            risk=verdict.risk.value,
            reason=verdict.risk.reason,
            components=verdict.risk.components,
        )
        self._store.record_memory(at, run.name, run.incarnation, guard.memory())

    def _issue(self, run: Run, guard: Guard, sample: Sample, verdict: Verdict, decision: Decision) -> None:
        for command in verdict.replaced:
            # Its answer may still be on its way, and then it takes the place of this.
            self._settle(command, "unanswered")
        self._store.record_decision(
            self._wall(),
            run.name,
            run.incarnation,
            sample.step,
            phase=decision.phase,
            reason=decision.reason,
            risk=verdict.risk.value,
            commands=verdict.commands,
            outcome="pending" if guard.sends else "dry_run",
        )
        logger.info(
            "run %s step %d: %s: %s (risk %.2f)%s",
            run.name,
            sample.step,
            decision.phase,
            decision.reason,
            verdict.risk.value,
            "" if guard.sends or not verdict.commands else ", not sent",
        )
        kinds = tuple(command.kind for command in verdict.commands)
        what = ", ".join(kinds) + ("" if guard.sends else " (not sent)") if kinds else "no command"
        text = f"{run.name} step {sample.step}: {what}: {decision.reason} (risk {verdict.risk.value:.2f})"
        with self._contained("annotation", run.name):
            self._tell(self._wall(), (run.name, decision.phase, *kinds), text)
        for command in verdict.commands:
            if guard.sends:
                self._offer(run, guard, command)
            else:
                self._count(command, "dry_run")

    def acknowledge(self, now: float, run: Run, guard: Guard, ack: Ack) -> None:
        """Take rank 0's answer. Raises ProtocolError when no command of this monitor has its id."""
        with self._contained("store", run.name):
            self._store.record_ack(self._wall(), ack)
        answered = guard.acknowledge(now, ack)
        if answered is None:
            raise ProtocolError("unknown_command", f"run {run.name} answers {ack.command_id}, which is not known")
        if answered.counts:
            with self._contained("metrics", run.name):
                self._metrics.add("commands", run.name, answered.kind, ack.outcome)
        if not answered.first:
            return
        with self._contained("page", run.name):
            self._board.answered(ack)
            self._board.stands(run.name, guard.policy_state)
        kind = answered.kind
        detail = f" ({ack.detail!r})" if ack.detail else ""
        logger.info("run %s step %d: %s %s%s", run.name, ack.step, kind, ack.outcome, detail)
        self._tell_outcome(run.name, kind, ack.outcome, f"{run.name} step {ack.step}: {kind} {ack.outcome}{detail}")

    def offer_again(self, now: float, run: Run, guard: Guard) -> None:
        """Give up commands past their expiry, and offer again those that wait for an answer too long."""
        self._unanswered(guard.give_up(now, run.step, run.applied))
        for command in guard.due(now):
            self._offer(run, guard, command)

    def abandon(self, guard: Guard) -> None:
        """The run is over, or its incarnation, or it is only watched from now on: no more answers are expected."""
        self._unanswered(guard.abandon())

    def _offer(self, run: Run, guard: Guard, command: Command) -> None:
        leader = run.leader
        if leader is not None and self._send(leader.identity, command) and guard.sent(command):
            self._count(command, "sent")

    def _unanswered(self, commands: Iterable[Command]) -> None:
        for command in commands:
            self._count(command, "unanswered")
            self._settle(command, "unanswered")
            text = f"{command.run}: {command.kind} was not answered"
            self._tell_outcome(command.run, command.kind, "unanswered", text)

    def _count(self, command: Command, outcome: str) -> None:
        with self._contained("metrics", command.run):
            self._metrics.add("commands", command.run, command.kind, outcome)

    def _settle(self, command: Command, outcome: str) -> None:
        with self._contained("store", command.run):
            self._store.record_outcome(command.id, outcome)
        with self._contained("page", command.run):
            self._board.settled(command.run, command.id, outcome)

    def _tell_outcome(self, run: str, kind: str, outcome: str, text: str) -> None:
        with self._contained("annotation", run):
            self._tell(self._wall(), (run, kind, outcome), text)
