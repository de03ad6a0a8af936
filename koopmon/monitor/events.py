"""Events: what happened to a run, and the one place that passes it on.

A new fact about a run is a field or a class here, and a case in each sink that shows it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from koopmon.monitor.failures import Failures
from koopmon.monitor.registry import Run
from koopmon.wire.messages import Ack, Command, CommandKind, DropReason, Heartbeat, Hello

if TYPE_CHECKING:
    from koopmon.monitor.engine import Result
    from koopmon.monitor.run_controller import Assessment
    from koopmon.telemetry.metrics import ErrorPart


class Event:
    """Base of all events."""

    __slots__ = ()
    must_record: ClassVar[bool] = False
    """True if nothing may follow from the event before it is on disk: an error of the history then stops it."""

    @property
    def name(self) -> str:
        """Name of the run."""
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class RunEvent(Event):
    """Base of the events of a run in the registry."""

    run: Run

    @property
    def name(self) -> str:
        return self.run.name


@dataclass(frozen=True, slots=True)
class RankJoined(RunEvent):
    """A rank said hello. `new` is True for the first hello of an incarnation."""

    hello: Hello
    new: bool


@dataclass(frozen=True, slots=True)
class HeartbeatReceived(RunEvent):
    """A rank sent a heartbeat. `drops` counts the shards that it dropped since its last one, by reason."""

    heartbeat: Heartbeat
    drops: Mapping[DropReason, int]
    row_due: bool
    """True if the heartbeat is to be recorded: the history does not keep all of them."""
    applied_changed: bool
    """True if rank 0 reports other values in force than before."""


@dataclass(frozen=True, slots=True)
class SnapshotReceived(RunEvent):
    """A snapshot was assembled."""


@dataclass(frozen=True, slots=True)
class SnapshotDropped(RunEvent):
    """The monitor lost a snapshot."""

    reason: str


@dataclass(frozen=True, slots=True)
class Profiled(Event):
    """The engine is done with a snapshot. `run` is None if its incarnation is no longer watched."""

    run: Run | None
    result: Result

    @property
    def name(self) -> str:
        return self.result.snapshot.run


@dataclass(frozen=True, slots=True)
class Assessed(RunEvent):
    """Detector and policy have assessed a snapshot."""

    assessment: Assessment


@dataclass(frozen=True, slots=True)
class AssessmentFailed(RunEvent):
    """An error kept a snapshot from being assessed."""


@dataclass(frozen=True, slots=True)
class Decided(RunEvent):
    """The policy made a remarkable decision. Its commands are sent after this event."""

    must_record = True
    assessment: Assessment


@dataclass(frozen=True, slots=True)
class CommandSent(RunEvent):
    """A command was sent for the first time."""

    command: Command


@dataclass(frozen=True, slots=True)
class CommandReplaced(RunEvent):
    """A newer command replaced this one before its ack. The ack may still arrive; it then sets the outcome."""

    command: Command


@dataclass(frozen=True, slots=True)
class CommandUnanswered(RunEvent):
    """A command was given up without an ack."""

    command: Command


@dataclass(frozen=True, slots=True)
class CommandAcked(RunEvent):
    """Rank 0 sent an ack.

    `kind` is None for an unknown command. `first` is True for the first ack of the command, `counts` if no outcome of
    it was counted before.
    """

    ack: Ack
    kind: CommandKind | None
    first: bool
    counts: bool


@dataclass(frozen=True, slots=True)
class RunChanged(RunEvent):
    """The displayed state of a run may have changed: step, state, health, values in force."""


@dataclass(frozen=True, slots=True)
class RunClosed(RunEvent):
    """A run ended for `reason`, or vanished: see its state."""

    reason: str


@dataclass(frozen=True, slots=True)
class RunRemoved(RunEvent):
    """The retention time of a closed run is over, or it made room for another."""


Sink = Callable[[float, Event], None]
"""Takes the Unix time and an event."""


class Publisher:
    """Passes each event to every sink, in order, on the caller's thread.

    The first sink is the history, so that an event is recorded before anything else shows it. An error of a sink is
    noted and affects no other sink.
    """

    def __init__(self, sinks: Sequence[tuple[ErrorPart, Sink]], failures: Failures, wall: Callable[[], float]) -> None:
        self._sinks = sinks
        self._failures = failures
        self._wall = wall

    def publish(self, event: Event) -> None:
        """Pass on one event. Raises the error of the history if the event must be recorded; no other sink gets it."""
        at = self._wall()
        for part, sink in self._sinks:
            try:
                sink(at, event)
            except Exception as error:
                if event.must_record and part == "store":
                    raise
                self._failures.note(part, error, run=event.name)
