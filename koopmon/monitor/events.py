"""Events: what happened to a run, and the one place that passes it on.

A new fact about a run is a field or a class here, and a case in each sink that shows it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from koopmon.history.plain_profile import PlainProfile
from koopmon.monitor.engine import Result
from koopmon.monitor.failures import Failures
from koopmon.monitor.pending_commands import Answered
from koopmon.monitor.run import Run
from koopmon.monitor.run_controller import Assessment
from koopmon.risk.band import BandReading
from koopmon.telemetry.metrics import ErrorPart
from koopmon.wire.messages import Ack, Command, DropReason, Heartbeat, Hello


@dataclass(frozen=True, slots=True)
class Event:
    """Base of all events."""

    must_record: ClassVar[bool] = False
    """True if nothing may follow from the event before it is on disk: an error of the history then stops it."""
    run: Run


@dataclass(frozen=True, slots=True)
class RankJoined(Event):
    """A rank said hello. `new` is True for the first hello of an incarnation."""

    hello: Hello
    new: bool


@dataclass(frozen=True, slots=True)
class RunChanged(Event):
    """The displayed state of a run may have changed: step, state, health, values in force."""


@dataclass(frozen=True, slots=True)
class HeartbeatReceived(Event):
    """A rank sent a heartbeat. `drops` counts the shards that it dropped since its last one, by reason."""

    heartbeat: Heartbeat
    drops: Mapping[DropReason, int]
    row_due: bool
    """True if the heartbeat is to be recorded: the history does not keep all of them."""
    applied_changed: bool
    """True if rank 0 reports other values in force than before."""
    logged: Mapping[str, BandReading] = field(default_factory=dict)
    """Readings of the scalars that the user's loop logs, by name."""


@dataclass(frozen=True, slots=True)
class SnapshotReceived(Event):
    """A snapshot was assembled."""


@dataclass(frozen=True, slots=True)
class SnapshotDropped(Event):
    """The monitor lost a snapshot."""

    reason: str


@dataclass(frozen=True, slots=True)
class Profiled(Event):
    """The engine is done with a snapshot. `run` is None if its incarnation is no longer watched.

    `plain` has the profile's columns. The history and the page take the same ones, so that they cannot disagree.
    `age_seconds` is the time since the snapshot's first shard arrived.
    """

    run: Run | None  # type: ignore[assignment]
    result: Result
    plain: PlainProfile | None
    age_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Assessed(Event):
    """Detector and policy have assessed a snapshot; `assessment` is None if an error kept them from it.

    `plain` has its profile's columns; None when the states were not finite.
    """

    assessment: Assessment | None
    plain: PlainProfile | None = None
    loss: BandReading | None = None


@dataclass(frozen=True, slots=True)
class Decided(Event):
    """The policy made a remarkable decision. Its commands are sent after this event."""

    must_record = True
    assessment: Assessment


@dataclass(frozen=True, slots=True)
class CommandSent(Event):
    """A command was sent for the first time."""

    command: Command


@dataclass(frozen=True, slots=True)
class CommandUnanswered(Event):
    """A command has no ack: it was given up, or a newer one `replaced` it. A late ack still sets the outcome."""

    command: Command
    replaced: bool = False


@dataclass(frozen=True, slots=True)
class CommandAcked(Event):
    """Rank 0 sent an ack. `answered` is None for an unknown command."""

    ack: Ack
    answered: Answered | None


@dataclass(frozen=True, slots=True)
class RunClosed(Event):
    """A run ended for `reason`, or vanished: see its state."""

    reason: str


@dataclass(frozen=True, slots=True)
class JobEnded(Event):
    """The job of the monitor has ended, and the run has sent no goodbye. Its state stays as it is."""


@dataclass(frozen=True, slots=True)
class RunRemoved(Event):
    """The retention time of a closed run is over, or it made room for another."""


Sink = Callable[[float, Event], None]
"""Takes the Unix time and an event."""


@dataclass(frozen=True, slots=True)
class Publisher:
    """Passes each event to every sink, in order, on the caller's thread.

    The first sink is the history, so that an event is recorded before anything else shows it. An error of a sink is
    noted and affects no other sink.
    """

    sinks: Sequence[tuple[ErrorPart, Sink]]
    failures: Failures
    wall: Callable[[], float]

    def publish(self, event: Event) -> None:
        """Pass on one event. Raises the error of the history if the event must be recorded; no other sink gets it."""
        at = self.wall()
        for part, sink in self.sinks:
            try:
                sink(at, event)
            except Exception as error:
                if event.must_record and part == "store":
                    raise
                self.failures.note(part, error, run=event.run.name if event.run else "")
