"""The monitor process: sockets, poll loop with absolute deadlines, order of startup and shutdown."""

from __future__ import annotations

import functools
import logging
import math
import os
import platform
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import KW_ONLY, dataclass, replace
from pathlib import Path

import msgspec
import torch
from prometheus_client import CollectorRegistry, ProcessCollector

from koopmon import __version__
from koopmon.config import Config, checked
from koopmon.errors import ProtocolError
from koopmon.grafana.access import check_url, read_access
from koopmon.grafana.annotations import Annotate, Annotations, no_annotations
from koopmon.history.background_writer import BackgroundWriter
from koopmon.monitor.channels import Channels
from koopmon.monitor.engine import Engine, Result, check_device
from koopmon.monitor.failures import Failures
from koopmon.monitor.history_sink import COMMIT_SECONDS
from koopmon.monitor.http.address import reachable
from koopmon.monitor.http.live_backfill import LiveBackfill
from koopmon.monitor.http.live_state import LiveState
from koopmon.monitor.http.server import WebServer
from koopmon.monitor.http.web_config import read_access_to_pages
from koopmon.monitor.memory import MemoryWatch, memory_limit
from koopmon.monitor.otlp import open_push
from koopmon.monitor.rejection_log import RejectionLog
from koopmon.monitor.service import Outputs, Service
from koopmon.monitor.trainer_status import open_status
from koopmon.notify.notifier import Notifier
from koopmon.notify.targets import read_targets
from koopmon.risk import calibration
from koopmon.telemetry.metrics import Metrics
from koopmon.wire.auth_policy import make_auth_policy
from koopmon.wire.authorized_keys import AuthorizedKeys
from koopmon.wire.codec import decode_for_monitor, decode_shard, encode
from koopmon.wire.headers import Frame, WireLimits
from koopmon.wire.messages import PROTOCOL_VERSION, HeartbeatReply, MonitorMessage, Refused
from koopmon.wire.wakeup import Wakeup

logger = logging.getLogger(__name__)

MAX_WAIT_SECONDS = 1.0
FAILED_WAIT_SECONDS = 0.1
"""Pause in seconds after a failed wait, so that the loop does not spin."""
ALIVE_SECONDS = 10.0
"""The loop waits for at most MAX_WAIT_SECONDS at a time. /healthz fails when no wait has succeeded for this long."""
BURST = 64
"""Maximum number of messages read from one socket before the other sockets are read."""
GATHER_SECONDS = 0.05
"""Time for which control messages gather before they are read, unless a snapshot arrives or more than BURST wait.

Each turn of the loop costs as much as a heartbeat or two.
"""
RECEIVE_SECONDS = 5.0
"""Maximum time in seconds for reading the messages that have arrived at shutdown: peers may go on sending."""
DRAIN_SECONDS = 60.0
"""Maximum time in seconds for profiling the received snapshots at shutdown."""


@dataclass(frozen=True, slots=True)
class Addresses:
    """Addresses of a monitor in service; `http` is HOST:PORT, `scheme` is http or https."""

    endpoint: str
    data_endpoint: str
    http: str
    scheme: str = "http"


@dataclass
class Monitor:
    """One monitor daemon. `run` serves until `stop`; `ready` is called when it accepts messages.

    `bind` is the control endpoint, which users configure. `data_bind` defaults to an endpoint beside it. A monitor for
    `one_job` stops when its job has ended. Raises ConfigError or CalibrationError, each one line.
    """

    config: Config
    _: KW_ONLY
    bind: str
    http: str
    data_bind: str | None = None
    device: str = "auto"
    store_path: str | os.PathLike[str]
    ready: Callable[[Addresses], None] = lambda _: None
    one_job: bool = False
    turned: Callable[[], None] = lambda: None
    """Called in each turn of the loop, at least every MAX_WAIT_SECONDS while the loop works."""

    def __post_init__(self) -> None:
        self.config = config = checked(self.config)
        self._trust = make_auth_policy(**msgspec.structs.asdict(config.security), environ=os.environ)
        self._auth, self._tls = read_access_to_pages(config.http, os.environ)
        self._grafana = read_access(config.grafana, os.environ) if config.grafana.url else None
        self._targets = read_targets(config.notify, os.environ)
        self._pages = check_url(config.notify.url, "notify.url") if config.notify.url else ""
        self._memory = MemoryWatch(memory_limit(config.monitor.max_memory_bytes))
        check_device(self.device)
        self._calibrator = calibration.load(Path(chosen)) if (chosen := config.monitor.calibrator) else None
        self._results: deque[Result] = deque()
        self._wakeup = Wakeup()
        self._stop = False
        self._serving = False
        self._turned_at = -math.inf
        self._control_read_at = -math.inf
        """Time of the last read of control messages that left none unread."""

    def stop(self) -> None:
        """Ask `run` to return. Safe from any thread and from signal handlers."""
        self._stop = True
        self._wakeup.wake()

    def run(self) -> None:
        """Serve until `stop`, then write the received snapshots.

        Raises EndpointError, KeysError or StoreError when it cannot start.
        """
        with ExitStack() as stack:
            stack.callback(self._wakeup.close)
            self._open(stack)
            where = self._addresses
            words = (where.endpoint, where.data_endpoint, where.scheme, where.http)
            logger.info("monitor: control %s, data %s, live page %s://%s/", *words)
            self._turned_at = time.monotonic()
            self._serving = True
            self.ready(self._addresses)
            self._loop()
            self._serving = False
            self._finish()
        logger.info("monitor: stopped")

    def _open(self, stack: ExitStack) -> None:
        """Open all parts, which `stack` closes in the opposite order."""
        registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        outputs = self._open_outputs(stack, registry)
        self._rejection_log = RejectionLog(outputs.metrics, time.monotonic)
        self._failures = Failures(outputs.metrics, time.monotonic)
        agents = self._open_channels(stack)
        http = self._open_http(stack, registry, outputs)
        scheme = "http" if self._tls is None else "https"
        outputs = self._open_notifier(stack, outputs, f"{scheme}://{reachable(http)}/")
        self._open_pipeline(stack, outputs, agents)
        outputs.history.served_at(f"{scheme}://{reachable(http)}/")
        stack.callback(LiveBackfill(outputs.live_state, self.store_path).close)
        instance = f"{platform.node()}:{http.rpartition(':')[2]}"
        if (push := open_push(registry, os.environ, instance)) is not None:
            stack.callback(push.close)
        if self.config.monitor.trainer_status and (status := open_status(outputs.metrics, os.environ)) is not None:
            stack.callback(status.close)
        self._addresses = Addresses(self._channels.control.endpoint, self._channels.data.endpoint, http, scheme)

    def _open_outputs(self, stack: ExitStack, registry: CollectorRegistry) -> Outputs:
        """Open the history, the metrics, the live page's state, and the connection to Grafana."""
        history = BackgroundWriter.open(self.store_path, self.config.store)
        stack.callback(history.close)
        annotate: Annotate = no_annotations
        if self._grafana is not None:
            annotations = Annotations(self._grafana, self.config.grafana.queue_length)
            stack.callback(annotations.close)
            annotate = annotations.add
        metrics = Metrics(registry, _build())
        return Outputs(history=history, metrics=metrics, live_state=LiveState(), annotate=annotate)

    def _open_channels(self, stack: ExitStack) -> AuthorizedKeys | None:
        """Open both channels. Returns the agents' keys; None without key authentication."""
        monitor = self.config.monitor
        limits = WireLimits(
            max_header_bytes=monitor.max_header_bytes,
            max_message_bytes=monitor.max_message_bytes,
            max_frames=monitor.max_layers + 2,
        )
        self._channels = Channels(self.bind, self.data_bind, trust=self._trust, limits=limits, wakeup=self._wakeup)
        stack.callback(self._channels.close)
        return self._channels.agents

    def _open_http(self, stack: ExitStack, registry: CollectorRegistry, outputs: Outputs) -> str:
        """Open the web server. Returns its address."""
        web = WebServer(
            self.http,
            registry,
            {"healthz": self._alive, "readyz": lambda: self._serving and self._alive()},
            config=self.config,
            live_state=outputs.live_state,
            login=self._auth,
            tls=self._tls,
            note=self._rejection_log.note,
            exposition=outputs.metrics.exposition,
        )
        stack.callback(web.close)
        return web.address

    def _open_notifier(self, stack: ExitStack, outputs: Outputs, own_pages: str) -> Outputs:
        """Open the queues of notifications. Links lead to `own_pages` without `[notify] url`."""
        if not self._targets:
            return outputs
        settings = self.config.notify
        notifier = Notifier(
            self._targets,
            lambda channel, outcome: outputs.metrics.add("notifications", channel, outcome),
            max_per_hour=settings.max_per_hour,
            queue_length=settings.queue_length,
        )
        stack.callback(notifier.close)
        return replace(outputs, notify=notifier.notify, pages=self._pages or own_pages)

    def _open_pipeline(self, stack: ExitStack, outputs: Outputs, agents: AuthorizedKeys | None) -> None:
        """Open the engine and the service."""
        monitor = self.config.monitor
        self._engine = Engine(
            device=self.device,
            svd_rank=monitor.svd_rank,
            max_waiting=monitor.queue_length,
            max_bytes=monitor.max_pending_bytes,
            on_result=self._take_result,
            on_failure=lambda run, error: self._failures.note("snapshot", error, run=run),
        )
        stack.callback(self._engine.close)
        self._service = Service(
            config=self.config,
            outputs=outputs,
            engine=self._engine,
            rejection_log=self._rejection_log,
            send=self._send,
            data_endpoint=self._channels.data.endpoint,
            agents=agents,
            calibrator=self._calibrator,
            build=_build(),
            failures=self._failures,
        )

    def _loop(self) -> None:
        while not self._stop:
            self._wait()
            self._close_connections_above_limit()
            if 0 < self._receive_control(BURST) < BURST:
                self._control_read_at = time.monotonic()
            self._receive_data(BURST)
            with self._failures.contained("loop"):
                self._note_refusals()
            self._handle_results()
            with self._failures.contained("loop"):
                self._service.tick()

    def _close_connections_above_limit(self) -> None:
        """Close all connections, and free the messages that they have begun, when the memory is above its limit."""
        resident = 0
        with self._failures.contained("loop"):
            resident = self._memory.exceeded(time.monotonic())
        if not resident:
            return
        logger.error(
            "monitor: %.1f GiB of memory in use, the limit is %.1f ([monitor] max_memory_bytes): all connections are"
            " closed; agents connect again",
            resident / (1 << 30),
            self._memory.max_bytes / (1 << 30),
        )
        self._rejection_log.note("flood", "the messages that peers have begun fill the memory")
        self._channels.reopen()

    def _wait(self) -> None:
        now = time.monotonic()
        try:
            until = min(self._service.next_deadline(), now + MAX_WAIT_SECONDS)
            if now < (gathered_at := self._control_read_at + GATHER_SECONDS):
                self._channels.wait(min(until, gathered_at) - now, data_only=True)
            else:
                self._channels.wait(until - now)
        except Exception as error:
            self._failures.note("loop", error)
            time.sleep(FAILED_WAIT_SECONDS)
        else:
            self._turned_at = time.monotonic()
            self.turned()

    def _note_refusals(self) -> None:
        for refusal in self._channels.take_refusals():
            self._rejection_log.note(refusal.reason, refusal.detail, count=refusal.number)

    def _finish(self) -> None:
        """Read the messages that have arrived, then profile and store their snapshots; send no replies."""
        with self._failures.contained("loop"):
            self._service.stop()
        deadline = time.monotonic() + RECEIVE_SECONDS
        while self._receive_control(BURST) + self._receive_data(BURST):
            self._handle_results()
            if time.monotonic() >= deadline:
                logger.warning("monitor: peers still send after %.0f s: the rest is not read", RECEIVE_SECONDS)
                break
        with self._failures.contained("loop"):
            self._service.stop()
        deadline = time.monotonic() + DRAIN_SECONDS
        while not (done := self._engine.drain(COMMIT_SECONDS)) and time.monotonic() < deadline:
            self._handle_results()
            with self._failures.contained("loop"):
                self._service.tick()
            self.turned()
        if not done:
            logger.error("monitor: the engine was not done after %.0f s: its snapshots are lost", DRAIN_SECONDS)
        self._handle_results()
        if self.one_job:
            with self._failures.contained("loop"):
                self._service.job_ended()

    def _receive_control(self, most: int) -> int:
        """Handle up to `most` control messages; returns their number.

        A peer with another protocol version receives a refusal: it can read the version prefix, which gives the reason.
        """
        control = self._channels.control
        for count in range(most):
            with self._rejecting():
                received = control.recv()
                if received is None:
                    return count
                peer, frames = received
                try:
                    message = decode_for_monitor(frames, limits=control.limits)
                except ProtocolError as error:
                    if error.reason == "version":
                        self._send(peer, Refused(run="unknown", incarnation="0" * 8, reason=error.detail[:512]))
                    raise
                self._service.on_control(peer, message, control.sender_key)
        return most

    def _receive_data(self, most: int) -> int:
        data = self._channels.data
        for count in range(most):
            with self._rejecting():
                frames = data.recv()
                if frames is None:
                    return count
                self._service.on_shard(decode_shard(frames, limits=data.limits), data.sender_key)
        return most

    @contextmanager
    def _rejecting(self) -> Iterator[None]:
        try:
            yield
        except ProtocolError as error:
            self._rejection_log.note(error.reason, error.detail)
        except Exception as error:
            self._rejection_log.note("internal", f"{type(error).__name__}: {error}", cause=error)
            self._failures.count("message")

    def _handle_results(self) -> None:
        while self._results:
            result = self._results.popleft()
            with self._failures.contained("snapshot", result.snapshot.run):
                self._service.on_result(result)

    def _take_result(self, result: Result) -> None:
        self._results.append(result)
        self._wakeup.wake()

    def _send(self, peer: bytes, message: MonitorMessage) -> bool:
        """Send `message`; True if it was sent.

        A message that cannot be encoded counts as an error of the monitor, not of the peer.
        """
        try:
            # A run that changes nothing gets the same reply again and again.
            frames = _encoded_reply(message) if isinstance(message, HeartbeatReply) else encode(message)
            return self._channels.control.send(peer, frames)
        except Exception as error:
            self._failures.note("message", error, run=message.run)
            return False

    def _alive(self) -> bool:
        return time.monotonic() - self._turned_at < ALIVE_SECONDS


@functools.lru_cache(maxsize=1024)
def _encoded_reply(reply: HeartbeatReply) -> list[Frame]:
    return encode(reply)


def _build() -> dict[str, str]:
    return {
        "version": __version__,
        "protocol": str(PROTOCOL_VERSION),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
    }
