"""The registry of runs: which runs and ranks are admitted, and when runs end and are removed.

Times are seconds of the caller's clock; this module reads no clock.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from koopmon.config import MAX_STEPS, MonitorConfig
from koopmon.errors import ProtocolError
from koopmon.history.schema import RunState
from koopmon.monitor.run import Peer, Run
from koopmon.monitor.run_controller import RunController
from koopmon.monitor.turnover import MAX_LAUNCHES, Turnover
from koopmon.wire.authorized_keys import AuthorizedKeys
from koopmon.wire.messages import MAX_STEP, Ack, Applied, Goodbye, Heartbeat, Hello, Shard

LAST_STEP = MAX_STEP - MAX_STEPS
"""Largest accepted step: at a later one the expiry of a command could exceed the protocol's last step."""
SILENT_SECONDS = 10.0
"""Time after which a run that has sent only hellos may be removed for a new one. Agents send heartbeats at once."""
MAX_RETIRED = 64
"""Maximum number of earlier incarnations kept per run, to distinguish a late message from a new launch."""

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
        self._turnover = Turnover(config.max_runs)
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
                self._turnover.check(now, source)
                victim = self._victim(now, source)
            controller, restore = begin(before)
            if before is None:
                self._turnover.add(now, source)
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
