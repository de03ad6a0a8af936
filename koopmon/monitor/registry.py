"""The registry of runs: incarnation, sending ranks and state of each run.

Times are seconds of the caller's clock; this module reads no clock.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import msgspec

from koopmon.config import MAX_STEPS, MonitorConfig
from koopmon.errors import ProtocolError
from koopmon.history.schema import RunState
from koopmon.monitor.assembler import over_ranks
from koopmon.monitor.pacing import Pacing
from koopmon.monitor.run_controller import RunController
from koopmon.risk.band import Band, BandReading
from koopmon.wire.authorized_keys import AuthorizedKeys
from koopmon.wire.messages import (
    MAX_LOGGED,
    MAX_STEP,
    MEASURED,
    Ack,
    Applied,
    DropReason,
    Goodbye,
    Heartbeat,
    Hello,
    Shard,
    TrainingStep,
)

LAST_STEP = MAX_STEP - MAX_STEPS
"""Largest accepted step: at a later one the expiry of a command could exceed the protocol's last step."""
MAX_LAUNCHES = 60
"""Maximum number of launches of a run within a minute, so that a peer cannot fill the history with launches."""
MAX_TURNOVER = 4
"""New runs within a minute, beside MAX_LAUNCHES, as a multiple of `[monitor] max_runs`. A source may begin as many as
it leaves to others."""
SILENT_SECONDS = 10.0
"""Time after which a run that has sent only hellos may be removed for a new one. Agents send heartbeats at once."""
MAX_RETIRED = 64
"""Maximum number of earlier incarnations kept per run, to distinguish a late message from a new launch."""

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


Begin = Callable[[Run | None], tuple[RunController, Applied | None]]
"""Makes the controller of a new incarnation and the values to restore, given the run that it replaces."""


@dataclass(frozen=True, slots=True)
class Admission:
    """The outcome of a hello.

    `before` is the run as it was known: `run` itself, or an earlier incarnation that `run` replaces. `settled` is True
    if this rank has sent a heartbeat since an earlier hello: it then has the values to restore. `removed` made room;
    `displaced` is one of them that was running until then.
    """

    run: Run
    before: Run | None
    settled: bool
    removed: list[Run]
    displaced: Run | None = None


class RunRegistry:
    """Registry of at most `max_runs` runs, including closed runs until their series are removed.

    `agents` is None without key authentication: the operating system then controls access, for all runs.
    """

    def __init__(self, config: MonitorConfig, agents: AuthorizedKeys | None = None) -> None:
        self._config = config
        self._agents = agents
        self._runs: dict[str, Run] = {}
        self._begun: deque[tuple[float, bytes]] = deque()
        """Times and sources of the runs that came to this registry within the last minute."""
        self._num_begun: Counter[bytes] = Counter()
        """Their number by source."""
        self._heap: list[tuple[float, str]] = []
        """Times at which to look at runs, no later than their deadlines."""
        self._due: dict[str, float] = {}
        """The valid entry of each run in the heap."""

    def __iter__(self) -> Iterator[Run]:
        return iter(self._runs.values())

    def get(self, name: str) -> Run | None:
        return self._runs.get(name)

    def agent(self, key: str, run: str) -> str:
        """Return the name of the agent with this key, if it may use `run`; "" without key authentication.

        Call it for each message, because a key can be revoked during a connection. Raises ProtocolError "authorisation"
        for an unknown or revoked key, and for an agent without permission for this run.
        """
        if self._agents is None:
            return ""
        name = self._agents.name_of(key)
        if name is None:
            raise ProtocolError("authorisation", "no agent has the peer's key: `koopmon keys show`")
        if not self._agents.is_authorized(name, run):
            remedy = "its file in agents/ lists its runs"
            raise ProtocolError("authorisation", f"agent {name!r} may not use run {run}: {remedy}")
        return name

    def admit(
        self, now: float, hello: Hello, identity: bytes, begin: Begin, *, key: str = "", retired: Sequence[str] = ()
    ) -> Admission:
        """Admit a rank. `begin` is called for a new incarnation; if it raises, the registry stays as it was.

        `retired` lists the earlier incarnations of a run that is new to this registry. A running run belongs to the
        agent of its first hello; another agent cannot replace it with a later incarnation.

        Raises ProtocolError. Its text is sent to the peer and contains the fix.
        """
        agent = self.agent(key, hello.run)
        before = self._runs.get(hello.run)
        earlier = retired if before is None else before.retired
        self._check(hello, before, agent, earlier)
        removed: list[Run] = []
        displaced = None
        run, source = before, agent.encode() or identity
        if run is None or hello.incarnation != run.incarnation:
            recent = [] if before is None else [at for at in before.launched if now - at < 60.0]
            if len(recent) >= MAX_LAUNCHES:
                what = f"run {hello.run!r} was launched {len(recent)} times within a minute"
                raise ProtocolError("refused", f"{what}: each launch is a record of the history; wait a minute")
            victim = None
            if before is None:
                self._check_turnover(now, source)
                victim = self._victim(now, source)
            controller, restore = begin(before)
            if before is None:
                self._begun.append((now, source))
                self._num_begun[source] += 1
            run = Run(hello, controller, now, hello.step, hello.applied, agent, source, restore=restore)
            run.retired = [*earlier, *([] if before is None else [before.incarnation])][-MAX_RETIRED:]
            run.launched = (*recent, now)
            run.logged_names = set() if before is None else before.logged_names
            if victim is not None:
                removed.append(self._runs.pop(victim.name))
                if victim.state is RunState.RUNNING:
                    displaced, victim.state = victim, RunState.VANISHED
            self._runs[hello.run] = run
            self._schedule(run)
        peer = run.peers.get(hello.process_rank)
        settled = peer is not None and peer.heartbeat is not None
        if peer is None:
            peer = run.peers[hello.process_rank] = Peer(identity)
        peer.identity, peer.gone = identity, False
        if hello.process_rank == 0:
            run.hello, run.applied = hello, hello.applied
        self._mark_running(now, run, hello.step)
        return Admission(run, before, settled, removed, displaced)

    def _check(self, hello: Hello, run: Run | None, agent: str, retired: Sequence[str]) -> None:
        """Raise ProtocolError for a hello that the registry must refuse."""
        name, running = f"run {hello.run!r}", run is not None and run.state is RunState.RUNNING
        same = run is not None and hello.incarnation == run.incarnation
        if hello.step > LAST_STEP:
            raise ProtocolError("refused", f"{name} is at step {hello.step}: expected a step of at most {LAST_STEP}")
        if run is not None and run.agent != agent and (running or same):
            remedy = "give this job a run name of its own (KOOPMON_RUN), or wait until that one is over"
            raise ProtocolError("identity", f"{name} belongs to another agent's key while it is running: {remedy}")
        if hello.incarnation in retired:
            remedy = "give each job that runs at the same time a run name of its own (KOOPMON_RUN)"
            raise ProtocolError("refused", f"{name} was taken over by a later incarnation: {remedy}")
        num_peers = len(run.peers) if run is not None and same and hello.process_rank not in run.peers else 0
        if num_peers >= self._config.max_peers:
            limit = "as many as [monitor] max_peers allows"
            raise ProtocolError("refused", f"{name} has {num_peers} connected ranks, {limit}")

    def _check_turnover(self, now: float, source: bytes) -> None:
        """Raise ProtocolError for too many new runs within a minute. A restart of a known run is none."""
        while self._begun and now - self._begun[0][0] >= 60.0:
            _, earlier = self._begun.popleft()
            self._num_begun[earlier] -= 1
            if not self._num_begun[earlier]:
                del self._num_begun[earlier]
        left = MAX_LAUNCHES + MAX_TURNOVER * self._config.max_runs - len(self._begun)
        if (own := self._num_begun[source]) >= left:
            what = f"{len(self._begun)} new runs came within a minute, {own} of them from this peer"
            limit = f"{left} more are allowed for [monitor] max_runs = {self._config.max_runs}"
            raise ProtocolError("refused", f"{what}; {limit}: wait a minute")

    def on_message(self, now: float, message: Heartbeat | Ack | Goodbye, identity: bytes, *, key: str = "") -> Run:
        """Note a message of a known peer.

        Raises ProtocolError: "unknown_run", "stale_incarnation", "identity", and "refused" for a step beyond LAST_STEP.
        """
        run = self._current(message, key)
        rank = message.process_rank if not isinstance(message, Ack) else 0
        peer = run.peers.get(rank)
        if peer is None:
            raise ProtocolError("unknown_run", f"run {run.name} rank {rank} has not said hello")
        if peer.identity != identity:
            raise ProtocolError("identity", f"run {run.name} rank {rank} sends from another peer than its hello")
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

    def on_shard(self, now: float, shard: Shard, *, key: str = "") -> Run:
        """Note a shard. Raises ProtocolError as `on_message` does."""
        run = self._current(shard, key)
        if run.state is not RunState.ENDED:
            self._mark_running(now, run, shard.step)
        run.sampled = True
        return run

    def expire(self, now: float) -> tuple[list[Run], list[Run]]:
        """Apply the timeouts due by `now`.

        Returns the silent runs, now ended or vanished, and the removed ones, whose retention is over.
        """
        closed, removed = [], []
        while (run := self._first()) is not None and now >= self._deadline(run):
            if run.state is RunState.RUNNING:
                # After a rank's goodbye, silence of the other ranks is a normal end: the launcher has killed them.
                ended = any(peer.gone for peer in run.peers.values())
                self._close(now, run, RunState.ENDED if ended else RunState.VANISHED)
                closed.append(run)
            else:
                removed.append(self._runs.pop(run.name))
        return closed, removed

    def next_deadline(self) -> float:
        """Time of the next timeout in `expire`; infinity without one."""
        run = self._first()
        return math.inf if run is None else self._deadline(run)

    def _first(self) -> Run | None:
        """Return the run with the earliest deadline.

        A message moves the deadline of its run, not its entry in the heap: entries move when they are due.
        """
        while self._heap:
            at, name = self._heap[0]
            run = self._runs.get(name)
            valid = self._due.get(name) == at
            if run is None or not valid:
                heapq.heappop(self._heap)
                if valid:
                    del self._due[name]
                continue
            if (deadline := self._deadline(run)) <= at:
                return run
            self._due[name] = deadline
            heapq.heapreplace(self._heap, (deadline, name))
        return None

    def _schedule(self, run: Run) -> None:
        """Add an entry for the deadline of a run, unless an earlier one is in the heap."""
        deadline = self._deadline(run)
        if run.name not in self._due or deadline < self._due[run.name]:
            self._due[run.name] = deadline
            heapq.heappush(self._heap, (deadline, run.name))

    def _deadline(self, run: Run) -> float:
        match run.state:
            case RunState.RUNNING:
                return run.last_heard + self._config.vanished_after_seconds
            case RunState.ENDED:
                return run.closed_at + self._config.ended_series_seconds
            case RunState.VANISHED:
                return run.closed_at + self._config.vanished_series_seconds

    def _current(self, message: Heartbeat | Ack | Goodbye | Shard, key: str) -> Run:
        agent = self.agent(key, message.run)
        run = self._runs.get(message.run)
        if run is None:
            raise ProtocolError("unknown_run", f"run {message.run} has not said hello")
        if run.incarnation != message.incarnation:
            raise ProtocolError("stale_incarnation", f"run {run.name} now has the incarnation {run.incarnation}")
        if run.agent != agent:
            raise ProtocolError("identity", f"run {run.name} is {run.agent or 'no agent'!r}'s, not {agent!r}'s")
        if message.step > LAST_STEP:
            expected = f"expected a step of at most {LAST_STEP}"
            raise ProtocolError("refused", f"run {run.name} is at step {message.step}: {expected}")
        return run

    def _victim(self, now: float, source: bytes) -> Run | None:
        """Return the run to remove for a new one of `source`, None while there is room.

        If all runs are running, the oldest one without a snapshot goes if its source has more runs than this one would
        have, or if it has sent nothing but hellos for SILENT_SECONDS. Raises ProtocolError if there is none.
        """
        if len(self._runs) < self._config.max_runs:
            return None
        runs = list(self._runs.values())
        if closed := [run for run in runs if run.state is not RunState.RUNNING]:
            return min(closed, key=lambda run: run.closed_at)
        held = Counter(run.source for run in runs)
        weak = [
            run
            for run in runs
            if not run.sampled
            and (held[run.source] > held[source] + 1 or (not run.heartbeats and now - run.last_heard >= SILENT_SECONDS))
        ]
        if not weak:
            limit = "as many as [monitor] max_runs allows: end one or raise it"
            raise ProtocolError("refused", f"the monitor watches {len(runs)} runs, {limit}")
        return max(weak, key=lambda run: (held[run.source], -run.launched[-1]))

    def _mark_running(self, now: float, run: Run, step: int) -> None:
        run.last_heard, run.step = now, max(run.step, step)
        if run.state is not RunState.RUNNING:
            run.state, run.closed_at = RunState.RUNNING, math.inf
            self._schedule(run)

    def _close(self, now: float, run: Run, state: RunState) -> None:
        run.state, run.closed_at = state, now
        self._schedule(run)
