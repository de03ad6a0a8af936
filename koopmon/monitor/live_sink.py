"""Shows events on the live page."""

from __future__ import annotations

from koopmon.history.schema import RunState
from koopmon.monitor.events import (
    Assessed,
    CommandAcked,
    CommandReplaced,
    CommandUnanswered,
    Decided,
    Event,
    RunChanged,
    RunClosed,
    SnapshotDropped,
    SnapshotReceived,
)
from koopmon.monitor.http.live_state import LiveState


class LiveSink:
    """Feeds a live state."""

    def __init__(self, live_state: LiveState) -> None:
        self._live_state = live_state

    def __call__(self, at: float, event: Event) -> None:
        live_state = self._live_state
        match event:
            case RunChanged(run):
                live_state.update_run(run, sends=run.controller.sends)
            case SnapshotReceived(run):
                live_state.count_snapshot(run.name)
            case SnapshotDropped(run, reason):
                live_state.count_drop(run.name, reason)
            case Assessed(run, assessment):
                live_state.record_assessment(run.name, assessment, run.controller)
            case Decided(run, assessment):
                live_state.record_decision(run.name, assessment)
            case CommandReplaced(run, command) | CommandUnanswered(run, command):
                live_state.record_outcome(run.name, command.id, "unanswered")
            case CommandAcked(run, ack) if event.first:
                live_state.record_ack(ack)
                live_state.set_policy_state(run.name, run.controller.policy_state)
            case RunClosed(run) if run.state is RunState.VANISHED:
                live_state.mark_ended(run.name, run.state)
