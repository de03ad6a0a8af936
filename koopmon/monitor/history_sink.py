"""Writes events into the history, and commits soon after."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass

from koopmon.history.schema import RunState
from koopmon.history.writer import HistoryWriter
from koopmon.monitor import events

COMMIT_SECONDS = 0.5


@dataclass(slots=True)
class HistorySink:
    """Records of runs in `history`. `commit_at` is the time of the next commit, on the clock `clock`."""

    history: HistoryWriter
    clock: Callable[[], float]
    commit_at: float = math.inf

    def __call__(self, at: float, event: events.Event) -> None:
        self.commit_at = min(self.commit_at, self.clock() + COMMIT_SECONDS)
        history = self.history
        match event:
            case events.RankJoined(run, hello):
                if event.new:
                    history.abandon_pending(run.name)
                history.record_hello(at, hello)
            case events.HeartbeatReceived(run, heartbeat):
                if event.row_due:
                    history.record_heartbeat(at, heartbeat, event.logged)
                if event.applied_changed:
                    history.record_applied(at, run.name, run.incarnation, heartbeat.step, heartbeat.applied)
            case events.Profiled(_, result) if not result.failed:
                snapshot = result.snapshot
                history.record_profile(
                    at,
                    snapshot.run,
                    snapshot.incarnation,
                    snapshot.step,
                    num_shards=snapshot.num_shards,
                    masked=snapshot.masked,
                    seconds=result.seconds,
                    profile=event.plain,
                    observables=snapshot.observables,
                )
            case events.Assessed(run, assessment) if assessment is not None:
                observation, risk = assessment.observation, assessment.risk
                history.record_observation(
                    at,
                    run.name,
                    run.incarnation,
                    observation.training,
                    non_finite=assessment.profile is None,
                    observation=observation,
                    risk=risk.value,
                    reason=risk.reason,
                    components=risk.components,
                )
                history.record_memory(at, run.name, run.incarnation, run.controller.checkpoint())
            case events.Decided(run, assessment) if (decision := assessment.decision) is not None:
                history.record_decision(
                    at,
                    run.name,
                    run.incarnation,
                    assessment.observation.step,
                    phase=decision.phase,
                    reason=decision.reason,
                    risk=assessment.risk.value,
                    commands=assessment.commands,
                    outcome="pending" if run.controller.sends else "dry_run",
                )
            case events.CommandUnanswered(_, command):
                history.record_outcome(command.id, "unanswered")
            case events.CommandAcked(_, ack):
                history.record_ack(at, ack)
            case events.RunClosed(run, reason):
                ended = reason if run.state is RunState.ENDED else None
                history.record_state(at, run.name, run.incarnation, run.state, end_reason=ended)

    def upkeep(self, now: float, live: Collection[str]) -> None:
        """Commit if it is due, prune, and retry while recording is paused. `live` names the runs in progress."""
        if now >= self.commit_at:
            self.commit_at = math.inf
            self.history.commit()
        self.history.upkeep(live)
