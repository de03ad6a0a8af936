"""Writes one log line, and one annotation in Grafana, for each decision and its outcome."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from koopmon.grafana.annotations import Annotate
from koopmon.history.schema import RunState
from koopmon.monitor import events

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LogSink:
    """Writes the log and calls `annotate`."""

    annotate: Annotate

    def __call__(self, at: float, event: events.Event) -> None:
        match event:
            case events.RankJoined(run, hello, new=True):
                words = f"step {hello.step}, adapter {hello.adapter!r}, {hello.world_size} ranks"
                logger.info("run %s: incarnation %s at %s", run.name, run.incarnation, words)
            case events.Decided(run, assessment) if (decision := assessment.decision) is not None:
                if assessment.commands and all(command.corrects for command in assessment.commands):
                    return  # one at each snapshot
                kinds = tuple(command.kind for command in assessment.commands)
                unsent = bool(kinds) and not run.controller.sends
                where, risk = f"{run.name} step {assessment.observation.step}", assessment.risk.value
                why = f"{decision.reason} (risk {risk:.2f})"
                logger.info("run %s: %s: %s%s", where, decision.phase, why, ", not sent" if unsent else "")
                text = f"{where}: {', '.join(kinds) or 'no command'}{' (not sent)' if unsent else ''}: {why}"
                self.annotate(at, (run.name, decision.phase, *kinds), text)
            case events.CommandAcked(run, ack, answered) if answered is not None and answered.first:
                if answered.kind == "set_ceilings" and ack.outcome == "applied":
                    return  # as above; the first one has the line of its decision
                kind = answered.kind
                detail = f" ({ack.detail!r})" if ack.detail else ""
                text = f"{run.name} step {ack.step}: {kind} {ack.outcome}{detail}"
                logger.info("run %s", text)
                self.annotate(at, (run.name, kind, ack.outcome), text)
            case events.CommandUnanswered(run, command, replaced=False):
                text = f"{run.name}: {command.kind} was not answered"
                self.annotate(at, (run.name, command.kind, "unanswered"), text)
            case events.RunClosed(run, reason):
                if run.state is RunState.VANISHED:
                    logger.warning("run %s vanished at step %d", run.name, run.step)
                else:
                    logger.info("run %s ended at step %d: %r", run.name, run.step, reason)
