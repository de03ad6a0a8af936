"""The registry of runs: incarnation, sending ranks and state of each run.

Times are seconds of the caller's clock; this module reads no clock.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import msgspec

from koopmon.config import MAX_STEPS, MonitorConfig
from koopmon.errors import KoopmonError, ProtocolError
from koopmon.history.schema import RunState
from koopmon.wire.messages import (
    MAX_STEP,
    MEASURED,
    Ack,
    Applied,
    Goodbye,
    Heartbeat,
    Hello,
    Message,
    Shard,
    TrainingStep,
)

LAST_STEP = MAX_STEP - MAX_STEPS
"""Largest accepted step: at a later one the expiry of a command could exceed the protocol's last step."""
MAX_RETIRED = 64
"""Maximum number of earlier incarnations kept per run, to distinguish a late message from a new launch."""

EventKind = Literal["ended", "vanished", "removed"]


class AdmissionError(KoopmonError):
    """A refused hello. The text is sent to the peer and contains the fix; `reason` is the label of its count."""

    def __init__(self, text: str, reason: str = "refused") -> None:
        super().__init__(text)
        self.reason = reason


@dataclass(slots=True)
class Peer:
    """One sending rank of a run on the control channel; `identity` is its address."""

    process_rank: int
    identity: bytes
    gone: bool = False
    heartbeat: Heartbeat | None = None


@dataclass(slots=True)
class Run:
    """One job.

    `applied` holds the values in force that its rank 0 last reported; `restore` those of an earlier incarnation.
    `agent` is the owner of the key of its first hello; "" when the operating system authenticates.
    """

    name: str
    incarnation: str
    hello: Hello
    state: RunState
    started: float
    last_heard: float
    step: int
    applied: Applied
    agent: str = ""
    restore: Applied | None = None
    closed_at: float = math.inf
    peers: dict[int, Peer] = field(default_factory=dict)
    retired: list[str] = field(default_factory=list)

    @property
    def training(self) -> TrainingStep:
        """Latest known scalars: step and values in force of the run, measured values of rank 0's last heartbeat."""
        known, beat = self.applied.at_step(self.step), self.peers[0].heartbeat if 0 in self.peers else None
        if beat is None:
            return known
        return msgspec.structs.replace(known, **{name: getattr(beat.training, name) for name in MEASURED})

    @property
    def leader(self) -> Peer | None:
        """Rank 0's peer, which receives commands; None after its goodbye or before its hello."""
        peer = self.peers.get(0)
        return peer if peer is not None and not peer.gone else None


@dataclass(frozen=True, slots=True)
class Event:
    """A change of a run's state that no message of this run caused."""

    kind: EventKind
    run: Run


@dataclass(frozen=True, slots=True)
class Admission:
    """The outcome of a hello.

    `replaced` is the incarnation that this one replaced in this registry. `settled` is True if this rank has sent a
    heartbeat since an earlier hello: it then has the values to restore.
    """

    run: Run
    new_incarnation: bool
    replaced: str | None
    settled: bool


class RunRegistry:
    """Registry of at most `max_runs` runs, including closed runs until their series are removed."""

    def __init__(self, config: MonitorConfig) -> None:
        self._config = config
        self._runs: dict[str, Run] = {}

    def __iter__(self) -> Iterator[Run]:
        return iter(self._runs.values())

    def get(self, name: str) -> Run | None:
        return self._runs.get(name)

    def admit(
        self, now: float, hello: Hello, identity: bytes, *, agent: str = "", retired: Sequence[str] = ()
    ) -> tuple[Admission, list[Event]]:
        """Admit a rank; returns the admission and the events of runs removed to make room.

        `retired` lists the earlier incarnations of a run that is new to this registry. A running run belongs to the
        `agent` of its first hello; another agent cannot replace it with a later incarnation. Raises AdmissionError.
        """
        if hello.step > LAST_STEP:
            raise AdmissionError(f"run {hello.run!r} is at step {hello.step}: expected a step of at most {LAST_STEP}")
        events: list[Event] = []
        run = self._runs.get(hello.run)
        replaced: str | None = None
        new_run = run is None
        if (
            run is not None
            and run.agent != agent
            and (run.state is RunState.RUNNING or hello.incarnation == run.incarnation)
        ):
            raise AdmissionError(
                f"run {hello.run!r} belongs to another agent's key while it is running: give this job a run name of its"
                " own (KOOPMON_RUN), or wait until that one is over",
                "identity",
            )
        retired = retired if run is None else run.retired
        if hello.incarnation in retired:
            raise AdmissionError(
                f"run {hello.run!r} was taken over by a later incarnation: give each job that runs at the same time"
                " a run name of its own (KOOPMON_RUN)"
            )
        if run is None:
            events = self._make_place()
            run = self._runs[hello.run] = _new_run(now, hello, agent)
            run.retired = [*retired][-MAX_RETIRED:]
        elif hello.incarnation != run.incarnation:
            replaced = run.incarnation
            run = self._runs[hello.run] = _new_run(now, hello, agent)
            run.retired = [*retired, replaced][-MAX_RETIRED:]
        known = run.peers.get(hello.process_rank)
        if known is None and len(run.peers) >= self._config.max_peers:
            raise AdmissionError(
                f"run {hello.run!r} has {len(run.peers)} ranks that speak, as many as [monitor] max_peers allows"
            )
        run.peers[hello.process_rank] = Peer(
            hello.process_rank, identity, heartbeat=known.heartbeat if known is not None else None
        )
        if hello.process_rank == 0:
            run.hello, run.applied = hello, hello.applied
        self._mark_running(now, run, hello.step)
        settled = known is not None and known.heartbeat is not None
        return Admission(run, new_run or replaced is not None, replaced, settled), events

    def on_message(self, now: float, message: Heartbeat | Ack | Goodbye, identity: bytes, *, agent: str = "") -> Run:
        """Note a message of a known peer.

        Raises ProtocolError: "unknown_run", "stale_incarnation", "identity", and "refused" for a step beyond LAST_STEP.
        """
        run = self._current(message, agent, message.step)
        rank = message.process_rank if not isinstance(message, Ack) else 0
        peer = run.peers.get(rank)
        if peer is None:
            raise ProtocolError("unknown_run", f"run {run.name} rank {rank} has not said hello")
        if peer.identity != identity:
            raise ProtocolError("identity", f"run {run.name} rank {rank} speaks from another peer than its hello")
        if isinstance(message, Goodbye):
            run.step = max(run.step, message.step)
            run.last_heard = now
            peer.gone = True
            if all(peer.gone for peer in run.peers.values()):
                self._close(now, run, RunState.ENDED)
            return run
        if isinstance(message, Heartbeat):
            peer.heartbeat = message
        if rank == 0:
            run.applied = message.applied
        if not peer.gone:
            self._mark_running(now, run, message.step)
        return run

    def on_shard(self, now: float, shard: Shard, *, agent: str = "") -> Run:
        """Note a shard. Raises ProtocolError as `on_message` does."""
        run = self._current(shard, agent, shard.step)
        if run.state is not RunState.ENDED:
            self._mark_running(now, run, shard.step)
        return run

    def remove(self, name: str) -> None:
        """Remove a run whose admission failed."""
        self._runs.pop(name, None)

    def expire(self, now: float) -> list[Event]:
        """Apply the timeouts due by `now`: silent runs, and closed runs whose retention is over. Returns the events."""
        events = []
        for run in list(self._runs.values()):
            if run.state is RunState.RUNNING and now >= run.last_heard + self._config.vanished_after_seconds:
                # After a rank's goodbye, silence of the other ranks is a normal end: the launcher has killed them.
                ended = any(peer.gone for peer in run.peers.values())
                self._close(now, run, RunState.ENDED if ended else RunState.VANISHED)
                events.append(Event("ended" if ended else "vanished", run))
            if run.state is not RunState.RUNNING and now >= run.closed_at + self._kept_seconds(run):
                del self._runs[run.name]
                events.append(Event("removed", run))
        return events

    def next_deadline(self) -> float:
        """Time of the next timeout in `expire`; infinity without one."""
        return min(map(self._deadline, self._runs.values()), default=math.inf)

    def _deadline(self, run: Run) -> float:
        if run.state is RunState.RUNNING:
            return run.last_heard + self._config.vanished_after_seconds
        return run.closed_at + self._kept_seconds(run)

    def _kept_seconds(self, run: Run) -> float:
        ended = run.state is RunState.ENDED
        return self._config.ended_series_seconds if ended else self._config.vanished_series_seconds

    def _current(self, message: Message, agent: str, step: int) -> Run:
        run = self._runs.get(message.run)
        if run is None:
            raise ProtocolError("unknown_run", f"run {message.run} has not said hello")
        if run.incarnation != message.incarnation:
            raise ProtocolError("stale_incarnation", f"run {run.name} goes on as incarnation {run.incarnation}")
        if run.agent != agent:
            raise ProtocolError("identity", f"run {run.name} is {run.agent or 'no agent'!r}'s, not {agent!r}'s")
        if step > LAST_STEP:
            raise ProtocolError("refused", f"run {run.name} is at step {step}: expected a step of at most {LAST_STEP}")
        return run

    def _make_place(self) -> list[Event]:
        if len(self._runs) < self._config.max_runs:
            return []
        closed = [run for run in self._runs.values() if run.state is not RunState.RUNNING]
        if not closed:
            raise AdmissionError(
                f"the monitor watches {len(self._runs)} runs, as many as [monitor] max_runs allows: end one or raise it"
            )
        oldest = min(closed, key=lambda run: run.closed_at)
        del self._runs[oldest.name]
        return [Event("removed", oldest)]

    @staticmethod
    def _mark_running(now: float, run: Run, step: int) -> None:
        run.last_heard, run.step = now, max(run.step, step)
        run.state, run.closed_at = RunState.RUNNING, math.inf

    @staticmethod
    def _close(now: float, run: Run, state: RunState) -> None:
        run.state, run.closed_at = state, now


def _new_run(now: float, hello: Hello, agent: str) -> Run:
    return Run(
        name=hello.run,
        incarnation=hello.incarnation,
        hello=hello,
        state=RunState.RUNNING,
        started=now,
        last_heard=now,
        step=hello.step,
        applied=hello.applied,
        agent=agent,
    )
