"""Handlers of messages, profiles and timeouts. The daemon owns the sockets.

An error in handling one run is noted and affects no other run. A run that cannot be admitted is refused. A run whose
commands fail becomes watch-only.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from koopmon.config import Config
from koopmon.errors import ProtocolError
from koopmon.grafana.annotations import Annotate, no_annotations
from koopmon.history.schema import RunState
from koopmon.history.writer import HistoryWriter
from koopmon.monitor.assembler import Assembler, Snapshot
from koopmon.monitor.authorization import Authorization
from koopmon.monitor.dispatcher import Dispatcher
from koopmon.monitor.engine import Engine, Result
from koopmon.monitor.failures import Failures
from koopmon.monitor.http.live_state import LiveState
from koopmon.monitor.probe_handler import ProbeHandler
from koopmon.monitor.registry import AdmissionError, Event, Run, RunRegistry
from koopmon.monitor.rejection_log import RejectionLog
from koopmon.monitor.run_controller import RunController
from koopmon.monitor.watch import Watch, publish_run
from koopmon.telemetry.metrics import KEPT_WHEN_VANISHED, Metrics
from koopmon.wire.codec import ReceivedShard
from koopmon.wire.messages import (
    MAX_TEXT,
    Ack,
    AgentMessage,
    Applied,
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

if TYPE_CHECKING:
    from koopmon.risk.calibration import Calibrator
    from koopmon.spectral import SpectralProfile

logger = logging.getLogger(__name__)

COMMIT_SECONDS = 0.5
WATCH_SECONDS = 0.25
"""Interval between checks for commands to resend."""


class Service:
    """Message handlers of the monitor.

    `send(peer, message)` sends a message and returns True if it was accepted; nothing here blocks.
    """

    def __init__(
        self,
        config: Config,
        *,
        metrics: Metrics,
        store: HistoryWriter,
        engine: Engine,
        rejection_log: RejectionLog,
        send: Callable[[bytes, MonitorMessage], bool],
        data_endpoint: str,
        authorization: Authorization | None = None,
        calibrator: Calibrator | None = None,
        annotate: Annotate = no_annotations,
        build: Mapping[str, str] | None = None,
        live_state: LiveState | None = None,
        failures: Failures | None = None,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._config = config
        self._metrics = metrics
        self._store = store
        self._engine = engine
        self._rejection_log = rejection_log
        self._send = send
        self._data_endpoint = data_endpoint
        self._authorization = authorization or Authorization()
        self._calibrator = calibrator
        self._clock = clock
        self._wall = wall
        self._stopping = False
        self._commit_at = math.inf
        self._live_state = live_state or LiveState(clock=clock, wall=wall)
        self._failures = failures or Failures(metrics, clock)
        self._contained = self._failures.contained
        self._dispatcher = Dispatcher(
            metrics=metrics,
            store=store,
            send=send,
            wall=wall,
            live_state=self._live_state,
            failures=self._failures,
            annotate=annotate,
        )
        self._registry = RunRegistry(config.monitor)
        self._probe_handler = ProbeHandler(
            self._registry, self._authorization, build=build or {}, data_endpoint=data_endpoint, wall=wall
        )
        self._watches: dict[str, Watch] = {}
        self._assembler = Assembler(
            timeout_seconds=config.monitor.assemble_timeout_seconds,
            max_bytes=config.monitor.max_pending_bytes,
            min_samples=2 * config.monitor.svd_rank,
            on_drop=self.on_dropped,
            on_failure=self._lost_in_assembly,
        )

    def on_control(self, peer: bytes, message: AgentMessage, key: str = "") -> None:
        """Handle an agent's message from the transport address `peer`.

        `key` is the authenticated key, "" without key authentication. Raises ProtocolError when the message must be
        rejected.
        """
        if isinstance(message, Probe):
            self._reply(peer, self._probe_handler.reply(message, key))
            return
        now = self._clock()
        if isinstance(message, Hello):
            if not self._stopping:
                self._on_hello(now, peer, message, key)
            return
        run = self._registry.on_message(now, message, peer, agent=self._authorization.agent(key, message.run))
        if isinstance(message, Heartbeat):
            self._on_heartbeat(now, peer, run, message)
        elif isinstance(message, Ack):
            self._watches[run.name].applied_changed(message.applied)
            self._publish_run(run)
            self._dispatcher.acknowledge(now, run, self._watches[run.name].controller, message)
        else:
            self._on_goodbye(run, message)
        self._schedule_commit()

    def on_shard(self, received: ReceivedShard, key: str = "") -> None:
        """Handle a shard from the agent with `key`. Raises ProtocolError when it must be rejected."""
        now, header = self._clock(), received.header
        run = self._registry.on_shard(now, header, agent=self._authorization.agent(key, header.run))
        for snapshot in self._assembler.add(now, header, received.points()):
            self._submit(snapshot)
        self._publish_run(run)

    def on_result(self, result: Result) -> None:
        """Handle a result of the engine."""
        snapshot = result.snapshot
        if result.again:
            self._on_kreiss(result)
            return
        with self._contained("metrics", snapshot.run):
            self._metrics.observe_duration(result.seconds)
        if result.failed:
            with self._contained("metrics", snapshot.run):
                self._metrics.add("engine_failures")
            self.on_dropped(snapshot.run, "engine_failed")
            return
        with self._contained("store", snapshot.run):
            self._store.record_profile(
                self._wall(),
                snapshot.run,
                snapshot.incarnation,
                snapshot.step,
                num_shards=snapshot.num_shards,
                masked=snapshot.masked,
                seconds=result.seconds,
                profile=None if result.profile is None else result.profile.to_dict(),
                observables=snapshot.observables,
            )
        self._schedule_commit()
        run = self._registry.get(snapshot.run)
        if run is None or run.incarnation != snapshot.incarnation or run.state is RunState.VANISHED:
            return
        profile = result.profile
        with self._contained("metrics", run.name):
            self._metrics.set_layers(run.name, profile)
            self._metrics.set_observables(run.name, snapshot.observables)
            self._metrics.set("informative", float(profile is not None and profile.informative), run.name)
        self._assess(run, snapshot.training, profile)

    def tick(self) -> None:
        """Process all timeouts that are due."""
        now = self._clock()
        for snapshot in self._assembler.expire(now):
            self._submit(snapshot)
        for event in self._registry.expire(now):
            with self._contained("command", event.run.name):
                self._on_event(event)
        for run in () if self._stopping else self._registry:
            with self._contained("command", run.name):
                if run.state is RunState.RUNNING:
                    self._offer_again(now, run)
        with self._contained("store"):
            self._keep_store(now)
        with self._contained("metrics"):
            self._metrics.set("engine_queue_length", self._engine.queue_length)
            self._metrics.set("store_recording", float(self._store.recording))

    def _offer_again(self, now: float, run: Run) -> None:
        controller = self._watches[run.name].controller
        try:
            self._dispatcher.resend_due(now, run, controller)
        except Exception as error:
            self._stand_down(run, controller, error)

    def _keep_store(self, now: float) -> None:
        if now >= self._commit_at:
            self._commit_at = math.inf
            self._store.commit()
        self._store.upkeep([run.name for run in self._registry if run.state is not RunState.ENDED])
        if lost := self._store.take_lost():
            self._metrics.add("store_lost", amount=lost)

    def next_deadline(self) -> float:
        """Time of the next timeout in `tick`, on the service's clock; infinity without one."""
        waiting = any(watch.controller.has_pending for watch in self._watches.values())
        watch_at = self._clock() + WATCH_SECONDS if waiting else math.inf
        return min(self._assembler.next_deadline(), self._registry.next_deadline(), self._commit_at, watch_at)

    def stop(self) -> None:
        """Send no more replies and make no more decisions; pass incomplete snapshots to the engine."""
        self._stopping = True
        for snapshot in self._assembler.flush():
            self._submit(snapshot)

    def on_dropped(self, run: str, reason: str) -> None:
        """Count a snapshot that was lost in the monitor."""
        with self._contained("page", run):
            self._live_state.count_drop(run, reason)
        with self._contained("metrics", run):
            if self._has_series(run):
                self._metrics.add("snapshots_dropped", run, reason)

    def _lost_in_assembly(self, run: str, error: Exception) -> None:
        self._failures.note("snapshot", error, run=run)
        self.on_dropped(run, "incomplete")

    def _on_hello(self, now: float, peer: bytes, hello: Hello, key: str) -> None:
        earlier = self._store.incarnations(hello.run)
        retired = earlier[:-1] if hello.incarnation in earlier[-1:] else earlier
        before = self._registry.get(hello.run)
        try:
            agent = self._authorization.agent(key, hello.run)
            admission, events = self._registry.admit(now, hello, peer, agent=agent, retired=retired)
        except (AdmissionError, ProtocolError) as error:
            text = error.detail if isinstance(error, ProtocolError) else str(error)
            self._rejection_log.note(error.reason, text)
            self._refuse(peer, hello, text)
            return
        for event in events:
            with self._contained("command", event.run.name):
                self._on_event(event)
        run = admission.run
        try:
            if admission.new_incarnation:
                if before is not None and admission.replaced is not None:
                    self._assembler.forget(run.name, admission.replaced)
                    self._dispatcher.abandon(self._watches[run.name].controller)
                self._begin(run, hello, before, known=hello.incarnation in earlier)
            elif hello.process_rank == 0:
                self._watches[run.name].controller.on_hello(hello)
        except Exception as error:
            self._failures.note("message", error, run=run.name, what="the run is refused")
            self._forget(run)
            self._refuse(peer, hello, "an error in the monitor: its log has the traceback")
            return
        self._probe_handler.note_welcomed(hello.run)
        with self._contained("store", run.name):
            self._store.record_hello(self._wall(), hello)
        self._schedule_commit()
        self._publish_run(run)
        self._reply(
            peer,
            Welcome(
                run=run.name,
                incarnation=run.incarnation,
                data_endpoint=self._data_endpoint,
                heartbeat_seconds=self._config.monitor.heartbeat_seconds,
                restore=None if admission.settled else self._watches[run.name].restore,
            ),
        )

    def _refuse(self, peer: bytes, hello: Hello, text: str) -> None:
        self._probe_handler.note_refused(hello.run, text[:MAX_TEXT])
        self._reply(peer, Refused(run=hello.run, incarnation=hello.incarnation, reason=text[:MAX_TEXT]))

    def _forget(self, run: Run) -> None:
        """Remove all state of a run that could not be admitted: `tick` expects a watch for each registered run."""
        self._registry.remove(run.name)
        self._watches.pop(run.name, None)
        self._assembler.forget(run.name, run.incarnation)
        with self._contained("metrics", run.name):
            self._metrics.end_run(run.name)

    def _begin(self, run: Run, hello: Hello, before: Run | None, *, known: bool) -> None:
        """Start to watch an incarnation.

        `before` is the run that it replaced; `known` is True if an earlier monitor watched this incarnation.
        """
        restore = before.applied if before is not None else None
        if before is None and not known:
            restore = self._store.last_applied(run.name, other_than=run.incarnation)
        if restore in (Applied(), hello.applied):
            restore = None
        self._store.abandon_pending(run.name)
        memory = self._store.memory(run.name, run.incarnation)
        controller = RunController(
            self._config, hello, restore or hello.applied, checkpoint=memory, calibrator=self._calibrator
        )
        self._watches[run.name] = Watch(controller, restore=restore)
        words = (run.name, run.incarnation, hello.step, hello.adapter, hello.world_size)
        logger.info("run %s: incarnation %s at step %d, adapter %r, %d ranks", *words)

    def _on_kreiss(self, result: Result) -> None:
        snapshot, profile = result.snapshot, result.profile
        assert profile is not None, "a second result always has a profile"
        place = (snapshot.run, snapshot.incarnation, snapshot.step)
        with self._contained("store", snapshot.run):
            self._store.replace_profile(self._wall(), *place, profile.to_dict(), snapshot.observables)
        run = self._registry.get(snapshot.run)
        if run is not None and run.incarnation == snapshot.incarnation and run.state is not RunState.VANISHED:
            self._metrics.set_layers(run.name, profile)

    def _assess(self, run: Run, training: TrainingStep, profile: SpectralProfile | None) -> None:
        decide = run.state is RunState.RUNNING and not self._stopping
        watch = self._watches[run.name]
        try:
            assessment = self._dispatcher.assess(self._clock(), run, watch.controller, training, profile, decide=decide)
        except Exception as error:
            self._stand_down(run, watch.controller, error)
            return
        if assessment is not None:
            with self._contained("judgement", run.name):
                watch.record_assessment(training.step, assessment, profile)

    def _stand_down(self, run: Run, controller: RunController, error: Exception) -> None:
        """Make a run watch-only, because handling one of its commands raised."""
        self._failures.note("command", error, run=run.name, what="from now on this run is only watched")
        controller.stand_down()
        self._dispatcher.abandon(controller)
        self._publish_run(run)

    def _on_not_finite(self, run: Run, heartbeat: Heartbeat) -> None:
        """Assess a snapshot that an agent dropped because its states were not finite."""
        if not self._watches[run.name].newly_not_finite(heartbeat.step):
            return
        with self._contained("metrics", run.name):
            self._metrics.set("informative", 0.0, run.name)
        self._assess(run, heartbeat.training, None)

    def _on_heartbeat(self, now: float, peer: bytes, run: Run, heartbeat: Heartbeat) -> None:
        watch = self._watches[run.name]
        self._publish_run(run)
        for reason, more in watch.new_drops(heartbeat):
            with self._contained("metrics", run.name):
                self._metrics.add("snapshots_dropped", run.name, reason, amount=more)
            if reason == "not_finite":
                self._on_not_finite(run, heartbeat)
        with self._contained("store", run.name):
            if watch.row_due(now, heartbeat):
                self._store.record_heartbeat(self._wall(), heartbeat)
            if heartbeat.process_rank == 0 and watch.applied_changed(heartbeat.applied):
                self._store.record_applied(self._wall(), run.name, run.incarnation, heartbeat.step, heartbeat.applied)
        self._reply(peer, HeartbeatReply(run=run.name, incarnation=run.incarnation, judgement=watch.judgement))

    def _on_goodbye(self, run: Run, goodbye: Goodbye) -> None:
        if run.state is RunState.ENDED:
            self._mark_ended(run, goodbye.reason or "goodbye")
        self._publish_run(run)

    def _on_event(self, event: Event) -> None:
        run = event.run
        if event.kind == "removed":
            self._assembler.forget(run.name, run.incarnation)
            self._watches.pop(run.name, None)
            with self._contained("metrics", run.name):
                self._metrics.end_run(run.name)
        elif event.kind == "ended":
            self._mark_ended(run, "silent after the goodbye of another rank")
            self._publish_run(run)
        else:
            logger.warning("run %s vanished at step %d", run.name, run.step)
            self._dispatcher.abandon(self._watches[run.name].controller)
            with self._contained("store", run.name):
                self._store.record_state(self._wall(), run.name, run.incarnation, RunState.VANISHED)
            with self._contained("metrics", run.name):
                self._metrics.end_run(run.name, keep=KEPT_WHEN_VANISHED)
                self._metrics.set("run_state", RunState.VANISHED, run.name)
            with self._contained("page", run.name):
                self._live_state.mark_ended(run.name, RunState.VANISHED)
        self._schedule_commit()

    def _mark_ended(self, run: Run, reason: str) -> None:
        logger.info("run %s ended at step %d: %r", run.name, run.step, reason)
        self._dispatcher.abandon(self._watches[run.name].controller)
        with self._contained("store", run.name):
            self._store.record_state(self._wall(), run.name, run.incarnation, RunState.ENDED, end_reason=reason)

    def _submit(self, snapshot: Snapshot) -> None:
        with self._contained("page", snapshot.run):
            self._live_state.count_snapshot(snapshot.run)
        with self._contained("metrics", snapshot.run):
            if self._has_series(snapshot.run):
                self._metrics.add("snapshots_received", snapshot.run)
                self._metrics.set("last_snapshot_timestamp_seconds", self._wall(), snapshot.run)
        with self._contained("snapshot", snapshot.run):
            self._engine.submit(snapshot, wait=self._stopping)

    def _publish_run(self, run: Run) -> None:
        with self._contained("metrics", run.name):
            publish_run(self._metrics, run)
        with self._contained("page", run.name):
            self._live_state.update_run(run, sends=self._watches[run.name].controller.sends)

    def _has_series(self, name: str) -> bool:
        """Return True while a run has all of its series."""
        run = self._registry.get(name)
        return run is not None and run.state is not RunState.VANISHED

    def _reply(self, peer: bytes, message: MonitorMessage) -> None:
        if not self._stopping:
            self._send(peer, message)

    def _schedule_commit(self) -> None:
        """Schedule a commit of the store within COMMIT_SECONDS."""
        self._commit_at = min(self._commit_at, self._clock() + COMMIT_SECONDS)
