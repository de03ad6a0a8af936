"""One run: its current incarnation, its sending ranks, and the values in force.

Times are seconds of the registry's clock.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import msgspec

from koopmon.config import MAX_STEPS
from koopmon.history.schema import RunState
from koopmon.monitor.assembler import over_ranks
from koopmon.monitor.pacing import Pacing
from koopmon.monitor.run_controller import RunController
from koopmon.risk.band import Band, BandReading
from koopmon.wire.messages import MAX_LOGGED, MEASURED, Applied, DropReason, Heartbeat, Hello, TrainingStep

HEARTBEAT_ROW_SECONDS = 10.0
"""Interval between recorded heartbeats of one rank."""
LOGGED_ROW_SECONDS = 2.0
"""Interval between recorded heartbeats with new values of logged scalars."""


@dataclass(slots=True)
class Peer:
    """One sending rank of a run on the control channel; `identity` is its address."""

    identity: bytes
    gone: bool = False
    heartbeat: Heartbeat | None = None
    drops: dict[DropReason, int] = field(default_factory=dict)
    recorded_at: float = -math.inf
    heartbeat_seconds: float = 1.0
    """Time between two heartbeats, as the monitor asks."""
    recorded_logged: dict[str, int] = field(default_factory=dict)
    """Step of each logged scalar in the last recorded heartbeat."""

    def new_drops(self, heartbeat: Heartbeat) -> dict[DropReason, int]:
        """Return the shards dropped since the last heartbeat, by reason. Agents report totals."""
        more = {reason: total - self.drops.get(reason, 0) for reason, total in heartbeat.dropped.items()}
        self.drops |= heartbeat.dropped
        return {reason: count for reason, count in more.items() if count > 0}

    def row_due(self, now: float, logged: Mapping[str, BandReading]) -> bool:
        """Return True if a heartbeat must be recorded: by time, or earlier with a new value among `logged`."""
        steps = {name: reading.step for name, reading in logged.items()}
        pause = HEARTBEAT_ROW_SECONDS if steps == self.recorded_logged else LOGGED_ROW_SECONDS
        due = now - self.recorded_at >= pause
        if due:
            self.recorded_at, self.recorded_logged = now, steps
        return due


@dataclass(slots=True)
class Run:
    """One job: the state of its current incarnation in the monitor.

    `applied` holds the values in force that its rank 0 last reported; `restore` those of an earlier incarnation, which
    each rank receives once. `agent` is the owner of the key of its first hello; "" when the operating system
    authenticates.
    """

    hello: Hello
    controller: RunController
    last_heard: float
    step: int
    applied: Applied
    agent: str = ""
    source: bytes = b""
    """The agent of the first hello; without key authentication, its connection."""
    sampled: bool = False
    """True once a shard of a snapshot has come."""
    restore: Applied | None = None
    state: RunState = RunState.RUNNING
    closed_at: float = math.inf
    peers: dict[int, Peer] = field(default_factory=dict)
    retired: list[str] = field(default_factory=list)
    launched: tuple[float, ...] = ()
    """Times of the launches within the last minute, in seconds of the registry's clock."""
    recorded: Applied | None = None
    """Values in force in the history."""
    pacing: Pacing = field(default_factory=Pacing)
    not_finite_step: int = -1
    """Latest step at which an agent reported states that were not finite."""
    bands: dict[str, Band] = field(default_factory=dict)
    """Histories of the loss and of the logged scalars, by name."""
    _loggers: dict[str, int] = field(default_factory=dict)
    """Lowest rank that logs each scalar."""
    logged_names: set[str] = field(default_factory=set)
    """Names of the logged scalars of all launches: Prometheus keeps each name that it has ever seen."""

    @property
    def name(self) -> str:
        return self.hello.run

    @property
    def incarnation(self) -> str:
        return self.hello.incarnation

    @property
    def training(self) -> TrainingStep:
        """Latest known scalars, at the run's latest step, from the last heartbeats: see `over_ranks`.

        Settings are those of rank 0. Without a heartbeat since they changed, the LR scale is the commanded one.
        """
        known, beats = self.applied.at_step(self.step), [self.peers[rank].heartbeat for rank in sorted(self.peers)]
        steps = [beat.training for beat in beats if beat is not None]
        if not steps:
            return known
        seen, leader = over_ranks(steps), self.peers[0].heartbeat if 0 in self.peers else None
        # Under a cap, and during a ramp, the scale in force is lower than the commanded one; agents measure it.
        agrees = leader is not None and leader.applied == self.applied
        names = TrainingStep.__struct_fields__ if agrees else MEASURED
        return msgspec.structs.replace(known, **{name: getattr(seen, name) for name in names if name != "step"})

    @property
    def leader(self) -> Peer | None:
        """Rank 0's peer, which receives commands; None after its goodbye or before its hello."""
        peer = self.peers.get(0)
        return peer if peer is not None and not peer.gone else None

    @property
    def left_in_force(self) -> Applied | None:
        """The values that a later incarnation gets back if it replaces this one; None after the goodbye of all ranks.

        An incarnation that did no step has not yet put in force what it got back itself.
        """
        if self.state is RunState.ENDED:
            return None
        return self.restore if self.restore is not None and self.step == 0 else self.applied

    @property
    def heartbeats(self) -> list[Heartbeat]:
        """The last heartbeat of each rank that has sent one."""
        return [peer.heartbeat for peer in self.peers.values() if peer.heartbeat is not None]

    def applied_changed(self) -> bool:
        """Return True if rank 0 reports other values in force than the last time; stores them."""
        changed = self.applied != self.recorded
        self.recorded = self.applied
        return changed

    def lead_steps(self, seconds: float) -> int | None:
        """Return the optimizer steps that the ranks do in some time; None if unknown."""
        times = [each.step_seconds for each in self.heartbeats if each.step_seconds]
        return math.ceil(min(seconds / min(times), MAX_STEPS)) if times else None

    def read_logged(self, heartbeat: Heartbeat) -> dict[str, BandReading]:
        """Return the readings of the logged scalars of which this rank is the lowest that logs them.

        At most MAX_LOGGED names of a run are read. The names of measured scalars are not among them.
        """
        readings = {}
        for name, logged in heartbeat.logged.items():
            lowest = self._loggers.get(name)
            if name in MEASURED or (name not in self.logged_names and len(self.logged_names) >= MAX_LOGGED):
                continue
            self.logged_names.add(name)
            if lowest is None or heartbeat.process_rank <= lowest:
                self._loggers[name] = heartbeat.process_rank
                readings[name] = self.bands.setdefault(name, Band()).read(logged.step, logged.value)
        return readings

    def read_loss(self, training: TrainingStep) -> BandReading | None:
        """Return the reading of the loss at a snapshot; None where it is unknown."""
        if training.loss is None:
            return None
        return self.bands.setdefault("loss", Band(upper_only=True)).read_measured(training.step, training.loss)

    def newly_not_finite(self, step: int) -> bool:
        """Return True if `step` is later than every reported step with non-finite states; stores it."""
        newly = step > self.not_finite_step
        self.not_finite_step = max(step, self.not_finite_step)
        return newly
