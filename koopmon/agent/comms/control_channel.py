"""The agent's side of the control channel: hello, heartbeats, acks, goodbye, and the monitor's replies.

It runs in the sender's thread and sends without waiting. It retries an absent monitor without end.
"""

from __future__ import annotations

import logging
import os
import platform
import time
from typing import Any, Protocol

import msgspec
import torch
from msgspec import Struct

from koopmon import __version__
from koopmon.agent.comms.pending_acks import PendingAcks
from koopmon.agent.control.command_judge import CommandResult
from koopmon.agent.rank_identity import Identity
from koopmon.agent.stats import AgentStats
from koopmon.config import ControlConfig
from koopmon.errors import EndpointError, ProtocolError, one_line
from koopmon.logs import LogLimit
from koopmon.wire.codec import decode_for_agent, encode
from koopmon.wire.headers import WireLimits
from koopmon.wire.messages import (
    Ack,
    AgentMessage,
    Applied,
    Command,
    Goodbye,
    Heartbeat,
    HeartbeatReply,
    Hello,
    KssSettings,
    Refused,
    TrainingStep,
    Welcome,
)
from koopmon.wire.sockets import ControlClient

logger = logging.getLogger("koopmon.agent")

MAX_LINE = 1000
"""Largest number of characters of a log line."""
HELLO_SECONDS = 1.0
"""Interval between two hellos without a reply."""
REFUSED_SECONDS = 30.0
"""Pause before the next hello to a monitor that refused."""
MIN_HEARTBEAT_SECONDS = 0.02
"""Lower bound of the heartbeat interval that the monitor requests."""
URGENT_SECONDS = 1.0
"""Upper bound of that interval while states that are not finite are unreported: they show a divergence."""


class RankInfo(Struct, frozen=True, kw_only=True):
    """The fields of hello that describe this rank, beside its name; see `koopmon.wire.messages.Hello`."""

    process_rank: int
    world_size: int
    num_senders: int
    adapter: str
    num_layers: int = 0
    width: int = 0
    acts: bool = False
    thresholds: dict[str, float] = {}
    rate_sized_steps: bool = False
    update_exponent: float | None = None
    kss: KssSettings | None = None
    rewinds: bool = False


class CommandHandler(Protocol):
    """Applies commands and reports the values in force. All methods are called in the sender's thread."""

    @property
    def ready(self) -> bool:
        """True while commands can be applied."""

    def applied(self) -> Applied:
        """Return the values in force."""

    def at_step(self) -> TrainingStep:
        """Return the scalars of the current step that are known without a measurement."""

    def submit(self, command: Command) -> None:
        """Apply `command` at the next opportunity, and report the outcome."""

    def restore(self, applied: Applied) -> None:
        """Put in force the values of an earlier incarnation."""

    def monitor_lost(self) -> None:
        """Handle the loss of the monitor."""


class ControlChannel:
    """The exchange with one monitor. `welcomed`: the monitor serves this rank now. Times are of `time.monotonic`."""

    def __init__(
        self,
        control: ControlClient,
        identity: Identity,
        config: ControlConfig,
        stats: AgentStats,
        handler: CommandHandler,
        description: RankInfo,
    ) -> None:
        self.welcomed = False
        self._acks = PendingAcks()
        self.description = description
        self._control = control
        self._name: dict[str, Any] = {"run": identity.run, "incarnation": identity.incarnation}
        self._config = config
        self._stats = stats
        self._handler = handler
        self._limits = WireLimits()
        self._num_connections = 0
        self._hello_due: float | None = 0.0
        self._hello_outdated = True
        """True until a hello with this description was sent."""
        self._heartbeat_due = 0.0
        self._heartbeat_seconds = 1.0
        self._heartbeat_at = 0.0
        self._reported_not_finite = 0
        self._last_message_at = time.monotonic()
        self._unanswered_since: float | None = None
        """Time of the first hello or heartbeat on this connection that has no reply yet."""
        self._lost = False
        self._found = False
        """True once a monitor has served this rank."""
        self._restored = False
        self._limit = LogLimit()
        self._told_stride = False
        self._reported_busy = 0.0
        self._reported_elapsed = 0.0

    def describe(self, description: RankInfo) -> None:
        """Send hello again, with this description."""
        self.description = description
        self._hello_outdated, self._hello_due = True, 0.0

    def next_due(self) -> float:
        """Return the time of the next work of `tick`."""
        return self._heartbeat_due if self._hello_due is None else min(self._hello_due, self._heartbeat_due)

    def tick(self, now: float) -> None:
        """Send the messages that are due, and check if the monitor is present."""
        connections = self._control.connections
        if connections != self._num_connections:
            self._num_connections, self._hello_due = connections, now
            self.welcomed, self._unanswered_since = False, None
            self._acks.on_reconnect()
        elif self.welcomed and not self._control.connected:
            self.welcomed = False
        if self._hello_due is not None and now >= self._hello_due:
            if self._send_request(self._hello(), now):
                self._hello_outdated = False
            self._hello_due = now + HELLO_SECONDS
        num_not_finite = self._stats.dropped["not_finite"]
        if num_not_finite > self._reported_not_finite:
            self._heartbeat_due = min(self._heartbeat_due, self._heartbeat_at + URGENT_SECONDS)
        if now >= self._heartbeat_due:
            self._heartbeat_at, self._heartbeat_due = now, now + self._heartbeat_seconds
            if self.welcomed:
                self._send_acks()
                if self._send_request(self._heartbeat(), now):
                    self._reported_not_finite = num_not_finite
                    self._acks.on_heartbeat_sent()
        silence = max(self._config.monitor_lost_seconds, 3.0 * self._heartbeat_seconds)
        if now - self._last_message_at > silence:
            self._on_silence(now)
        if self._unanswered_since is not None and now - self._unanswered_since > silence:
            self.reconnect(now)  # the connection may be dead without either kernel's notice

    def _send_request(self, message: Hello | Heartbeat, now: float) -> bool:
        """Send a message that requires a reply. Returns True if it was sent."""
        sent = self._send(message)
        if sent and self._unanswered_since is None:
            self._unanswered_since = now
        return sent

    def reconnect(self, now: float, pause_seconds: float = 0.0) -> None:
        """Replace the connection, after a pause. The old one stays if the process has no room for another."""
        self._unanswered_since = None
        try:
            self._control.reconnect(pause_seconds)
        except EndpointError as error:
            self.warn(now, "reconnect", f"the connection to {self._control.endpoint} stays as it is: {error}")

    def _on_silence(self, now: float) -> None:
        self.welcomed = False
        if self._hello_due is None:
            self._hello_due = now
        why = f" ({self._control.failure})" if self._control.failure else ""
        text = f"no monitor at {self._control.endpoint}{why}: training goes on, the settings in force stay"
        self.warn(now, "lost", text)
        if not self._lost:
            self._lost = True
            if self._found:  # a monitor that starts beside the job is not lost
                self._handler.monitor_lost()

    def receive(self, frames: list[memoryview], now: float) -> Welcome | CommandResult | None:
        """Handle one message. Returns a welcome, for its data endpoint, or an outcome to acknowledge, or None."""
        self._unanswered_since = None
        try:
            message = decode_for_agent(frames, limits=self._limits)
        except ProtocolError as error:
            self.reject(error, now)
            return None
        if isinstance(message, Refused):
            self.welcomed, self._hello_due = False, now + REFUSED_SECONDS
            self.warn(now, "refused", f"the monitor at {self._control.endpoint} refuses: {message.reason}")
            return None
        if (message.run, message.incarnation) != tuple(self._name.values()):
            if isinstance(message, Command):
                return CommandResult(message.id, "refused", self._stats.step, "it is for another run or incarnation")
            return None
        self._last_message_at = now
        if self._lost:
            self._lost = False
            logger.warning("koopmon: the monitor at %s is back", self._control.endpoint)
        if isinstance(message, Welcome):
            self._on_welcome(message)
            self._send_acks()
            return message
        if isinstance(message, HeartbeatReply):
            self._acks.on_heartbeat_reply()
            self._stats.judgement = message.judgement
            self._limit_stride(message)
        if isinstance(message, Command):
            if self.description.process_rank != 0:
                return CommandResult(message.id, "refused", self._stats.step, "commands go to rank 0")
            self._handler.submit(message)
        return None

    def _limit_stride(self, reply: HeartbeatReply) -> None:
        self._stats.stride_limit = self._stats.stride_limit.followed_by(reply.min_stride, reply.min_stride_from)
        if reply.min_stride > 1 and not self._told_stride and self.description.process_rank == 0:
            self._told_stride = True
            words = f"from step {reply.min_stride_from} on, snapshots are at least {reply.min_stride} steps apart"
            logger.warning(
                "koopmon: the monitor cannot judge all snapshots: %s; this changes with its load, see"
                ' agent.status()["min_stride"]',
                words,
            )

    def reject(self, error: ProtocolError, now: float) -> None:
        """Count a message that breaks the protocol."""
        self._stats.reject(error.reason)
        self.warn(now, error.reason, f"a message from {self._control.endpoint} was refused: {error}")

    def _on_welcome(self, welcome: Welcome) -> None:
        # The welcome may answer an older hello than the one that is due.
        self.welcomed, self._hello_due = True, 0.0 if self._hello_outdated else None
        self._found = True
        self._heartbeat_seconds = max(welcome.heartbeat_seconds, MIN_HEARTBEAT_SECONDS)
        self._heartbeat_due = 0.0
        if welcome.restore is not None and not self._restored and self.description.process_rank == 0:
            self._restored = True
            self._handler.restore(welcome.restore)

    def acknowledge(self, outcome: CommandResult) -> None:
        """Send the outcome of a command to the monitor. A new hello repeats it if the monitor may not have read it."""
        ack = Ack(
            **self._name,
            command_id=outcome.command_id,
            outcome=outcome.outcome,
            step=outcome.step,
            detail=outcome.detail[:512],
            permanent=outcome.permanent,
            applied=self._handler.applied(),
        )
        if outcome.outcome == "duplicate":  # the outcome was sent before
            self._send(ack)
        else:
            # Sent at once, so that no "duplicate" overtakes it. Only a monitor that has sent a welcome is sure to
            # accept it.
            self._acks.add(ack, sent=self._send(ack) and self.welcomed)

    def _send_acks(self) -> None:
        for ack in self._acks.unsent():
            self._acks.add(ack, sent=self._send(ack))

    def say_goodbye(self, reason: str) -> None:
        rank, step = self.description.process_rank, self._stats.step
        self._send(Goodbye(**self._name, process_rank=rank, step=step, reason=reason[:512]))

    def warn(self, now: float, trouble: str, text: str) -> None:
        """Log `text`, which may quote the monitor, at most once a minute for each `trouble`."""
        if (more := self._limit.admit(now, trouble)) is not None:
            logger.warning("koopmon: %s%s", one_line(text, MAX_LINE), more)

    def _send(self, message: AgentMessage) -> bool:
        return self._control.send(encode(message))

    def _hello(self) -> Hello:
        return Hello(
            **self._name,
            **msgspec.structs.asdict(self.description),
            step=self._stats.step,
            applied=self._handler.applied(),
            koopmon_version=__version__,
            torch_version=str(torch.__version__),
            hostname=platform.node()[:255],
            pid=os.getpid(),
        )

    def _heartbeat(self) -> Heartbeat:
        stats, applied = self._stats, self._handler.applied()
        busy, elapsed = stats.busy_seconds, stats.elapsed_seconds
        spent, passed = busy - self._reported_busy, elapsed - self._reported_elapsed
        self._reported_busy, self._reported_elapsed = busy, elapsed
        return Heartbeat(
            **self._name,
            process_rank=self.description.process_rank,
            training=stats.with_measured(self._handler.at_step()),
            applied=applied,
            sent=stats.sent,
            dropped=dict(stats.dropped),
            taps_missing=stats.taps_missing,
            overhead_ratio=max(0.0, spent / passed) if passed > 0.0 else 0.0,
            step_seconds=stats.step_seconds,
            logged=stats.logged_scalars(),
            control_ready=self._handler.ready,
        )
