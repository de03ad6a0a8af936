"""Handlers of messages, profiles and timeouts. The daemon owns the sockets.

Each handler updates the run and publishes what happened; the sinks record and show it. An error in handling one run is
noted and affects no other run. A run that cannot be admitted is refused. A run whose commands fail becomes watch-only.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import msgspec

from koopmon.config import Config
from koopmon.errors import ProtocolError
from koopmon.grafana.annotations import Annotate, no_annotations
from koopmon.history.plain_profile import PlainProfile
from koopmon.history.schema import RunState
from koopmon.history.writer import HistoryWriter
from koopmon.monitor import events
from koopmon.monitor.assembler import Assembler, Snapshot
from koopmon.monitor.engine import Engine, Result
from koopmon.monitor.failures import Failures
from koopmon.monitor.history_sink import HistorySink
from koopmon.monitor.http.live_state import LiveState
from koopmon.monitor.log_sink import LogSink
from koopmon.monitor.metrics_sink import MetricsSink
from koopmon.monitor.notify_sink import NotifySink
from koopmon.monitor.probe_handler import ProbeHandler
from koopmon.monitor.registry import RunRegistry
from koopmon.monitor.rejection_log import RejectionLog
from koopmon.monitor.run import Run
from koopmon.monitor.run_controller import Assessment, RunController
from koopmon.notify.notifier import Notify, no_notifications
from koopmon.risk.calibration import Calibrator
from koopmon.spectral import SpectralProfile
from koopmon.telemetry.metrics import ErrorPart, Metrics
from koopmon.wire.authorized_keys import AuthorizedKeys
from koopmon.wire.codec import ReceivedShard
from koopmon.wire.messages import (
    MAX_STEP,
    MAX_TEXT,
    Ack,
    AgentMessage,
    Applied,
    Command,
    Goodbye,
    Heartbeat,
    HeartbeatReply,
    Hello,
    MonitorMessage,
    Probe,
    Refused,
    TrainingStep,
    Welcome,
)

logger = logging.getLogger(__name__)

RESEND_CHECK_SECONDS = 0.25
"""Interval between checks for commands to resend."""
UPKEEP_SECONDS = 1.0
"""Interval between two checks of the history."""
MANY_RANKS = 16
"""A run of more ranks is not shown with each of their messages, because each time all of its ranks are read."""
SHOW_SECONDS = 1.0
"""Interval at which such a run is shown."""
HEARTBEATS_PER_INTERVAL = 100
"""Number of ranks of one run that send a heartbeat in each interval. Above it, all ranks but rank 0 send fewer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outputs:
    """Outputs that the sinks write."""

    history: HistoryWriter
    metrics: Metrics
    live_state: LiveState
    annotate: Annotate = no_annotations
    notify: Notify = no_notifications
    pages: str = ""
    """Address of the pages for links; ends with a slash."""


@dataclass(kw_only=True)
class Service:
    """Message handlers of the monitor.

    `send(peer, message)` sends a message and returns True if it was accepted; nothing here blocks. `agents` is None
    without key authentication. `clock` is monotonic, `wall` returns Unix seconds.
    """

    config: Config
    outputs: Outputs
    engine: Engine
    failures: Failures
    rejection_log: RejectionLog
    send: Callable[[bytes, MonitorMessage], bool]
    data_endpoint: str
    agents: AuthorizedKeys | None = None
    calibrator: Calibrator | None = None
    build: Mapping[str, str] = field(default_factory=dict)
    clock: Callable[[], float] = time.monotonic
    wall: Callable[[], float] = time.time

    def __post_init__(self) -> None:
        outputs, monitor = self.outputs, self.config.monitor
        self._stopping = False
        self._waiting: set[str] = set()
        """Names of the runs with commands that wait for an ack."""
        self._unshown: dict[str, float] = {}
        """Times at which to show runs that changed, in the order of these times."""
        self._upkeep_at = -math.inf
        self._busy_seconds = 0.0
        """Computing time of the engine."""
        self._store, self._metrics = outputs.history, outputs.metrics
        self._history = HistorySink(outputs.history, self.clock)
        sinks: tuple[tuple[ErrorPart, events.Sink], ...] = (
            ("store", self._history),
            ("metrics", MetricsSink(outputs.metrics)),
            ("page", outputs.live_state),
            ("annotation", LogSink(outputs.annotate)),
            ("notification", NotifySink(outputs.notify, outputs.pages)),
        )
        self._publish = events.Publisher(sinks, self.failures, self.wall).publish
        self._registry = RunRegistry(monitor, self.agents)
        self._probe_handler = ProbeHandler(
            registry=self._registry, build=self.build, data_endpoint=self.data_endpoint, wall=self.wall
        )
        self._assembler = Assembler(
            timeout_seconds=monitor.assemble_timeout_seconds,
            max_bytes=monitor.max_pending_bytes,
            min_samples=2 * monitor.svd_rank,  # a fit of rank R needs more than R samples; twice as many: by hand
            on_drop=self.on_dropped,
            on_failure=self._lost_in_assembly,
        )

    def on_control(self, peer: bytes, message: AgentMessage, key: str = "") -> None:
        """Handle an agent's message from the transport address `peer`.

        `key` is the authenticated key, "" without key authentication. Raises ProtocolError when the message must be
        rejected.
        """
        now = self.clock()
        if isinstance(message, Probe):
            self._reply(peer, self._probe_handler.reply(message, key))
            return
        if isinstance(message, Hello):
            if not self._stopping:
                self._on_hello(now, peer, message, key)
            return
        run = self._registry.on_message(now, message, peer, key=key)
        match message:
            case Heartbeat():
                self._on_heartbeat(now, peer, run, message)
            case Ack():
                self._on_ack(run, message)
            case Goodbye(reason=reason):
                if run.state is RunState.ENDED:
                    self._close(run, reason or "goodbye")
                else:
                    self._changed(now, run)

    def on_shard(self, received: ReceivedShard, key: str = "") -> None:
        """Handle a shard from the agent with `key`. Raises ProtocolError when it must be rejected."""
        now, header = self.clock(), received.header
        run = self._registry.on_shard(now, header, key=key)
        for snapshot in self._assembler.add(now, header, received.points()):
            self._submit(snapshot)
        self._changed(now, run)

    def on_result(self, result: Result) -> None:
        """Handle a result of the engine."""
        snapshot = result.snapshot
        run = self._registry.get(snapshot.run)
        if run is not None and (run.incarnation != snapshot.incarnation or run.state is RunState.VANISHED):
            run = None
        self._busy_seconds += result.seconds
        plain = None if result.profile is None else PlainProfile.of(result.profile)
        self._publish(events.Profiled(run, result, plain, self.clock() - snapshot.since))
        if result.failed:
            self.on_dropped(snapshot.run, "engine_failed")
        elif run is not None:
            logits = snapshot.observables.get("max_attention_logit", ())
            self._assess(run, snapshot.training, result.profile, plain, logits)
            self._pace(run, snapshot.step)

    def tick(self) -> None:
        """Process all timeouts that are due."""
        now = self.clock()
        for snapshot in self._assembler.expire(now):
            self._submit(snapshot)
        closed, removed = self._registry.expire(now)
        for run in closed:
            with self.failures.contained("command", run.name):
                self._close(run, "silent after the goodbye of another rank")
        for run in removed:
            self._forget(run)
        self._follow_commands(now)
        self._show_late(now)
        if now >= min(self._upkeep_at, self._history.commit_at):
            self._upkeep_at = now + UPKEEP_SECONDS
            with self.failures.contained("store"):
                self._history.upkeep(now, [run.name for run in self._registry if run.state is not RunState.ENDED])
                if lost := self._store.take_lost():
                    self._metrics.add("store_lost", amount=lost)
        with self.failures.contained("metrics"):
            self._metrics.set("engine_queue_length", self.engine.queue_length)
            self._metrics.set("store_recording", float(self._store.recording))

    def next_deadline(self) -> float:
        """Time of the next timeout in `tick`, on the service's clock; infinity without one."""
        waiting = any(run.controller.pending for run in self._runs_with_commands())
        return min(
            self._assembler.next_deadline(),
            self._registry.next_deadline(),
            self._history.commit_at,
            next(iter(self._unshown.values()), math.inf),
            self.clock() + RESEND_CHECK_SECONDS if waiting else math.inf,
        )

    def _runs_with_commands(self) -> list[Run]:
        if not self._waiting:
            return []
        found = [run for run in self._registry if run.name in self._waiting and len(run.controller.pending)]
        self._waiting = {run.name for run in found}
        return found

    def _follow_commands(self, now: float) -> None:
        """Send unanswered commands again, and give up the expired ones."""
        for run in () if self._stopping else self._runs_with_commands():
            if run.state is RunState.RUNNING:
                with self._watching_only_after_error(run):
                    self._give_up(run, run.controller.expire(now, run.step, run.applied))
                    for command in run.controller.pending.due(now):
                        self._offer(run, command)

    def _changed(self, now: float, run: Run) -> None:
        """Show a run after a message of one rank: at once, or soon if it has many ranks."""
        if len(run.peers) <= MANY_RANKS:
            self._publish(events.RunChanged(run))
        else:
            self._unshown.setdefault(run.name, now + SHOW_SECONDS)

    def _show_late(self, now: float) -> None:
        while self._unshown and next(iter(self._unshown.values())) <= now:
            name = next(iter(self._unshown))
            del self._unshown[name]
            if (run := self._registry.get(name)) is not None:
                self._publish(events.RunChanged(run))

    def stop(self) -> None:
        """Send no more replies and make no more decisions; pass incomplete snapshots to the engine."""
        self._stopping = True
        for snapshot in self._assembler.flush():
            self._submit(snapshot)

    def job_ended(self) -> None:
        """Publish that the only job of this monitor has ended, for the runs without a goodbye."""
        for run in self._registry:
            if run.state is RunState.RUNNING:
                self._publish(events.JobEnded(run))

    def on_dropped(self, name: str, reason: str) -> None:
        """Count a snapshot of the run `name` that was lost in the monitor."""
        if (run := self._registry.get(name)) is not None:
            if reason in ("superseded", "engine_queue_full"):
                run.pacing.on_skipped()
            self._publish(events.SnapshotDropped(run, reason))

    def _pace(self, run: Run, step: int) -> None:
        """Choose the stride of the run's snapshots. All ranks learn it before the step from which it is in force."""
        stride = run.pacing.on_judged(self.clock(), step, self._busy_seconds)
        if stride == run.pacing.steps:
            return
        slowest = max(each.heartbeat_seconds for each in run.peers.values())
        if (lead := run.lead_steps(2.0 * slowest + 1.0)) is not None:
            run.pacing.change(stride, min(run.step + lead, MAX_STEP))
            words = "snapshots at least %d steps apart from step %d on"
            logger.info(f"run %s: {words}", run.name, stride, run.pacing.from_step)

    def _lost_in_assembly(self, name: str, error: Exception) -> None:
        self.failures.note("snapshot", error, run=name)
        self.on_dropped(name, "incomplete")

    def _submit(self, snapshot: Snapshot) -> None:
        if (run := self._registry.get(snapshot.run)) is not None:
            self._publish(events.SnapshotReceived(run))
        with self.failures.contained("snapshot", snapshot.run):
            for name, reason in self.engine.submit(snapshot, wait=self._stopping):
                self.on_dropped(name, reason)

    def _on_hello(self, now: float, peer: bytes, hello: Hello, key: str) -> None:
        launches = self._store.launches.incarnations(hello.run)
        retired = launches[:-1] if hello.incarnation in launches[-1:] else launches

        begin = partial(self._begin, hello, hello.incarnation in launches)
        try:
            admission = self._registry.admit(now, hello, peer, begin, key=key, retired=retired)
            run, before = admission.run, admission.before
            if before is run and hello.process_rank == 0:
                run.controller.on_hello(hello)
        except ProtocolError as error:
            self.rejection_log.note(error.reason, error.detail)
            self._refuse(peer, hello, error.detail)
            return
        except Exception as error:
            self.failures.note("message", error, run=hello.run, what="the run is refused")
            self._refuse(peer, hello, "an error in the monitor: its log has the traceback")
            return
        if admission.displaced is not None:
            logger.info("run %s is removed for run %s: it has sent no snapshot", admission.displaced.name, hello.run)
            with self.failures.contained("command", admission.displaced.name):
                self._close(admission.displaced, "")
        for removed in admission.removed:
            self._forget(removed)
        if before is not None and before is not run:
            self._assembler.forget(before.name, before.incarnation)
            self._give_up(before, before.controller.pending.abandon())
        self._probe_handler.note_welcomed(hello.run)
        self._publish(events.RankJoined(run, hello, before is not run))
        self._changed(now, run)
        heartbeat_seconds = self._heartbeat_seconds(hello)
        run.peers[hello.process_rank].heartbeat_seconds = heartbeat_seconds
        self._reply(
            peer,
            Welcome(
                run=run.name,
                incarnation=run.incarnation,
                data_endpoint=self.data_endpoint,
                heartbeat_seconds=heartbeat_seconds,
                restore=None if admission.settled else run.restore,
            ),
        )

    def _begin(self, hello: Hello, known: bool, before: Run | None) -> tuple[RunController, Applied | None]:
        """Make the controller of a new incarnation, and the values to restore.

        `before` is the run that it replaces; `known` is True if an earlier monitor watched this incarnation. Only an
        incarnation that was killed or vanished leaves values: after a goodbye, the next one is another training.
        """
        restore = None if before is None else before.left_in_force
        if before is None and not known:
            restore = self._store.launches.last_applied(hello.run, other_than=hello.incarnation)
        if restore is not None:  # a new launch begins without ceilings: its weights may be others
            restore = msgspec.structs.replace(restore, held_layers=())
        if restore == Applied() or hello.applied != Applied():  # the agent may have kept them itself
            restore = None
        memory = self._store.launches.memory(hello.run, hello.incarnation)
        applied = restore or hello.applied
        return RunController(self.config, hello, applied, checkpoint=memory, calibrator=self.calibrator), restore

    def _heartbeat_seconds(self, hello: Hello) -> float:
        """Return the time between two heartbeats of a rank.

        Rank 0 keeps the configured one: it reports the values in force. The others of a large run share the capacity of
        the monitor, but each alone keeps the run from being taken for vanished.
        """
        monitor = self.config.monitor
        if hello.process_rank == 0:
            return monitor.heartbeat_seconds
        seconds = monitor.heartbeat_seconds * max(1.0, hello.num_senders / HEARTBEATS_PER_INTERVAL)
        return min(seconds, monitor.vanished_after_seconds / 3.0)

    def _refuse(self, peer: bytes, hello: Hello, text: str) -> None:
        self._probe_handler.note_refused(hello.run, text[:MAX_TEXT])
        self._reply(peer, Refused(run=hello.run, incarnation=hello.incarnation, reason=text[:MAX_TEXT]))

    def _on_heartbeat(self, now: float, peer: bytes, run: Run, heartbeat: Heartbeat) -> None:
        rank = run.peers[heartbeat.process_rank]
        logged = run.read_logged(heartbeat)
        drops, row_due = rank.new_drops(heartbeat), rank.row_due(now, logged)
        applied_changed = heartbeat.process_rank == 0 and run.applied_changed()
        self._changed(now, run)
        self._publish(events.HeartbeatReceived(run, heartbeat, drops, row_due, applied_changed, logged))
        # The agent dropped the snapshot because its states were not finite: the run has diverged.
        if "not_finite" in drops and run.newly_not_finite(heartbeat.step):
            self._assess(run, heartbeat.training)
        self._reply(
            peer,
            HeartbeatReply(
                run=run.name,
                incarnation=run.incarnation,
                judgement=run.controller.judgement,
                min_stride=run.pacing.steps,
                min_stride_from=run.pacing.from_step,
            ),
        )

    def _on_ack(self, run: Run, ack: Ack) -> None:
        run.applied_changed()  # the history takes the values in force from the ack
        self._publish(events.RunChanged(run))
        answered = run.controller.acknowledge(ack)
        self._publish(events.CommandAcked(run, ack, answered))
        if answered is None:
            raise ProtocolError("unknown_command", f"run {run.name} answers {ack.command_id}, which is not known")

    def _assess(
        self,
        run: Run,
        training: TrainingStep,
        profile: SpectralProfile | None = None,
        plain: PlainProfile | None = None,
        attention_logits: Sequence[float | None] = (),
    ) -> None:
        decide = run.state is RunState.RUNNING and not self._stopping
        try:
            assessment = run.controller.assess(
                self.clock(), training, profile, step=run.step, decide=decide, attention_logits=attention_logits
            )
        except Exception as error:
            self.failures.note("judgement", error, run=run.name, what=f"step {training.step} cannot be judged")
            self._publish(events.Assessed(run, None))
            return
        if len(run.controller.pending):
            self._waiting.add(run.name)
        self._publish(events.Assessed(run, assessment, plain, run.read_loss(training)))
        if assessment.unencodable is not None:
            what = f"the decision at step {training.step} is dropped"
            self.failures.note("command", assessment.unencodable, run=run.name, what=what)
        if assessment.remarkable:
            with self._watching_only_after_error(run):
                self._issue(run, assessment)

    def _issue(self, run: Run, assessment: Assessment) -> None:
        for command in assessment.replaced:
            self._publish(events.CommandUnanswered(run, command, replaced=True))
        self._publish(events.Decided(run, assessment))
        for command in assessment.commands if run.controller.sends else ():
            self._offer(run, command)

    def _offer(self, run: Run, command: Command) -> None:
        leader = run.leader
        if leader is not None and self.send(leader.identity, command) and run.controller.pending.mark_sent(command):
            self._publish(events.CommandSent(run, command))

    def _give_up(self, run: Run, commands: Iterable[Command]) -> None:
        for command in commands:
            self._publish(events.CommandUnanswered(run, command))

    @contextmanager
    def _watching_only_after_error(self, run: Run) -> Iterator[None]:
        """Make a run watch-only if handling one of its commands raises."""
        try:
            yield
        except Exception as error:
            self.failures.note("command", error, run=run.name, what="from now on this run is only watched")
            with self.failures.contained("command", run.name):
                run.controller.stand_down()
                self._give_up(run, run.controller.pending.abandon())
            self._publish(events.RunChanged(run))

    def _close(self, run: Run, reason: str) -> None:
        """Follow the registry, for which the run has ended or vanished."""
        self._unshown.pop(run.name, None)  # a vanished run keeps few series
        self._give_up(run, run.controller.pending.abandon())
        self._publish(events.RunClosed(run, reason))
        if run.state is RunState.ENDED:
            self._publish(events.RunChanged(run))

    def _forget(self, run: Run) -> None:
        """Follow the registry, which has removed the run."""
        self._assembler.forget(run.name, run.incarnation)
        self._publish(events.RunRemoved(run))

    def _reply(self, peer: bytes, message: MonitorMessage) -> None:
        if not self._stopping:
            self.send(peer, message)
