"""Shows events on the live page."""

from __future__ import annotations

from dataclasses import dataclass

from koopmon.history.schema import RunState
from koopmon.monitor import events
from koopmon.monitor.http.live_state import LiveState


@dataclass(frozen=True, slots=True)
class LiveSink:
    """Feeds a live state."""

    live_state: LiveState

    def __call__(self, at: float, event: events.Event) -> None:
        live_state = self.live_state
        match event:
            case events.RunChanged(run):
                live_state.update_run(run, sends=run.controller.sends)
            case events.SnapshotReceived(run):
                live_state.count_snapshot(run.name)
            case events.SnapshotDropped(run, reason):
                live_state.count_drop(run.name, reason)
            case events.Assessed(run, assessment) if assessment is not None:
                live_state.record_assessment(run.name, assessment, run.controller)
            case events.Decided(run, assessment):
                live_state.record_decision(run.name, assessment)
            case events.CommandUnanswered(run, command):
                live_state.record_outcome(run.name, command.id, "unanswered")
            case events.CommandAcked(run, ack) if event.first:
                live_state.record_ack(ack)
                live_state.set_policy_state(run.name, run.controller.policy_state)
            case events.RunClosed(run) if run.state is RunState.VANISHED:
                live_state.mark_ended(run.name, run.state)
