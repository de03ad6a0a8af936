"""Turns the events of the runs into notifications: alarm, action, return, end and lost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from urllib.parse import quote

from koopmon.config import NotifyEvent
from koopmon.history.schema import RunState
from koopmon.monitor import events
from koopmon.monitor.run import Run
from koopmon.monitor.run_controller import Assessment
from koopmon.notify.message import Notification
from koopmon.notify.notifier import Notify
from koopmon.risk.causes import CAUSES
from koopmon.wire.messages import Ack, CommandKind

MEANS_ALARM = "Most runs that diverged had such a jump before their loss rose."
MEANS_ACTION: dict[CommandKind, str] = {
    "set_lr_scale": "The learning rate stays below that of your schedule.",
    "set_kss": "Koopman Spectral Shaping adds a term to the loss for some steps.",
    "set_ceilings": "Some layers write less into the residual stream, until the run is calm.",
    "rewind": "Weights and optimizer state return to a copy from before the fault, and training goes on from there.",
    "stop": "The training ends.",
}
MEANS_RETURN = "The run trains with your own settings again."
MEANS_LOST = "The process was killed, or hangs, or has lost its network. No koopmon guards it now."
MEANS_KILLED = "It was killed, or it crashed without an exception of Python."
NOT_APPLIED = "The settings of the training did not change. The policy decides again at the next alarm."


@dataclass(slots=True)
class NotifySink:
    """Calls `notify`. `pages` is the address of the monitor's pages, with a slash at its end; empty without links."""

    notify: Notify
    pages: str = ""
    _alarmed: set[str] = field(default_factory=set)
    """Runs with an alarm. It lasts until the risk is below `release_risk`."""

    def __call__(self, at: float, event: events.Event) -> None:
        match event:
            case events.RankJoined(run, _, new=True) | events.RunRemoved(run):
                self._alarmed.discard(run.name)
            case events.Assessed(run, assessment) if assessment is not None:
                self._assessed(at, run, assessment)
            case events.CommandAcked(run, ack, answered) if answered is not None and answered.first:
                if answered.kind in MEANS_ACTION and ack.outcome not in ("applied", "duplicate"):
                    self._not_applied(at, run, answered.kind, f"was not applied: {_outcome(ack)}")
            case events.CommandUnanswered(run, command, replaced=False) if command.kind in MEANS_ACTION:
                self._not_applied(at, run, command.kind, "was not answered")
            case events.RunClosed(run, reason):
                self._closed(at, run, reason)
            case events.JobEnded(run):
                happened = "The job, or its koopmon run, ended, and the training sent no goodbye."
                self._send(at, run, ("lost",), happened=happened, means=MEANS_KILLED)

    def _assessed(self, at: float, run: Run, assessment: Assessment) -> None:
        """Notify of an alarm, an action, or both at once, as soon as the decision is known."""
        policy, risk, decision = run.controller.config.policy, assessment.risk, assessment.decision
        alarm = risk.value >= policy.act_risk and run.name not in self._alarmed
        if alarm:
            self._alarmed.add(run.name)
        elif risk.value < policy.release_risk:
            self._alarmed.discard(run.name)
        kinds = tuple(
            command.kind for command in assessment.commands if command.kind in MEANS_ACTION and not command.corrects
        )
        acts = returns = False
        if kinds and decision is not None:
            state = decision.state
            own = (state.lr_scale, state.max_rate, state.kss.alpha, state.held_layers) == (1.0, None, 0.0, ())
            returns = own and "stop" not in kinds
            acts = not returns and (decision.phase == "acting" or not {"rewind", "stop"}.isdisjoint(kinds))
        found: tuple[tuple[NotifyEvent, bool], ...] = (
            ("alarm", alarm),
            ("action", acts),
            ("return", returns and run.controller.sends),
        )
        if not (names := tuple(name for name, happens in found if happens)):
            return
        cause = f"The risk of divergence is {risk.value:.2f} (threshold {policy.act_risk:.2f}): {risk.reason}."
        reaction = _reaction(run, assessment, kinds)
        effects = MEANS_RETURN if returns else " ".join(MEANS_ACTION[kind] for kind in dict.fromkeys(kinds))
        self._send(
            at,
            run,
            names,
            step=assessment.observation.step,
            risk=risk.value,
            happened=cause if alarm else reaction,
            means=f"{MEANS_ALARM} {_remedy(risk.causes)}".strip() if alarm else effects,
            did=f"{reaction} {effects}".strip() if alarm else "",
        )

    def _not_applied(self, at: float, run: Run, kind: CommandKind, outcome: str) -> None:
        self._send(at, run, ("action",), happened=f"The command {kind} {outcome}.", means=NOT_APPLIED)

    def _closed(self, at: float, run: Run, reason: str) -> None:
        scale, cap = run.applied.lr_scale, run.applied.max_rate
        force = f"A learning-rate scale of {scale:g} was in force." if scale < 1.0 else ""
        force = force if cap is None else f"A cap of {cap:.3g} on the learning rate was in force."
        if bound := len(run.applied.rate_shares):
            force += f" Parameter groups with a bound on their rate: {bound}."
        if run.state is RunState.VANISHED:
            happened = "No message of the run arrives any more."
            self._send(at, run, ("lost",), happened=happened, means=MEANS_LOST, did=force)
        else:
            said = "" if reason in ("", "goodbye") else f": {reason}"
            self._send(at, run, ("end",), happened=f"The training ended{said}.", did=force)

    def _send(
        self,
        at: float,
        run: Run,
        names: tuple[NotifyEvent, ...],
        *,
        happened: str,
        step: int | None = None,
        risk: float | None = None,
        means: str = "",
        did: str = "",
    ) -> None:
        self.notify(
            Notification(
                events=names,
                run=run.name,
                at=at,
                step=run.step if step is None else step,
                risk=risk,
                happened=happened,
                means=means,
                did=did,
                page=f"{self.pages}runs/{quote(run.name)}" if self.pages else "",
            )
        )


def _remedy(names: Sequence[str]) -> str:
    """Return what to do if the alarm returns, for each cause that a signal shows."""
    found = dict.fromkeys(cause.next for cause in CAUSES if cause.name in names)
    return f"If the alarm returns: {' '.join(found)}" if found else ""


def _reaction(run: Run, assessment: Assessment, kinds: Sequence[CommandKind]) -> str:
    """Return the reaction of koopmon to a snapshot, and the reason if it is none."""
    decision, controller = assessment.decision, run.controller
    if decision is None:
        return "koopmon does nothing, because the run or the monitor is about to end."
    # The reason of the risk has its own line.
    reason = decision.reason.replace(f"; {assessment.risk.reason}", "")
    if not kinds:
        if controller.config.policy.name == "observe":
            return "koopmon only watches, because the policy is observe."
        return f"koopmon changes nothing at this snapshot: {reason}."
    if not controller.sends:
        why = "of --dry-run" if controller.config.policy.dry_run else "the run is watch-only"
        return f"koopmon sends no command, because {why}. Otherwise it would act: {reason}."
    return f"koopmon acts: {reason}."


def _outcome(ack: Ack) -> str:
    return f"{ack.outcome} ({ack.detail})" if ack.detail else ack.outcome
