"""The I/O thread of a sending rank. It owns the sockets: it sends snapshots, and exchanges control messages.

The training thread never waits for it. A queue passes snapshots and outcomes, and the pool of buffers bounds the queue.
Items that cannot be sent are dropped and counted.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import msgspec

from koopmon.agent.capture.sampler import DTYPE_NAMES, RankSnapshot, all_finite
from koopmon.agent.circuit_breaker import CircuitBreaker
from koopmon.agent.comms.control_channel import CommandHandler, ControlChannel, RankInfo
from koopmon.agent.control.command_judge import CommandResult
from koopmon.agent.rank_identity import Identity
from koopmon.agent.stats import AgentStats
from koopmon.config import ControlConfig
from koopmon.errors import EndpointError, KeysError, ProtocolError
from koopmon.observables import tabulate
from koopmon.wire.auth_policy import AuthPolicy
from koopmon.wire.codec import encode
from koopmon.wire.endpoints import reached_beside
from koopmon.wire.messages import MAX_OBSERVATIONS, DropReason, Shard, Welcome
from koopmon.wire.sockets import ControlClient, DataSender, Poller
from koopmon.wire.transport import WireContext
from koopmon.wire.wakeup import Wakeup

logger = logging.getLogger("koopmon.agent")

IDENTITY_SECONDS = 0.05
"""Interval between two requests for the run's identity."""
CLOSE_SECONDS = 0.8
"""Longest wait of `close` for the goodbye."""
MIN_SAMPLES = 2
BURST = 64
"""Messages of the monitor in a row before the other work of the loop."""
FLOODED_SECONDS = 0.01
"""Pause after a full burst, because this thread shares its interpreter with the training."""
MAX_BURSTS = 32
"""Full bursts in a row that count as a flood, which fills this process's memory. The connection is then closed."""
FLOOD_PAUSE_SECONDS = 5.0
"""Pause before the next connection after a flood."""


class IOThread:
    """A daemon thread that runs from `start` to `close`. Any thread may call its public methods.

    `resolve_identity` returns the run's identity once it is known, else None. The thread holds no part of the user's
    model.
    """

    def __init__(
        self,
        endpoint: str,
        config: ControlConfig,
        stats: AgentStats,
        breaker: CircuitBreaker,
        handler: CommandHandler,
        resolve_identity: Callable[[], Identity | None],
        description: RankInfo,
        trust: AuthPolicy | None = None,
    ) -> None:
        self.identity: Identity | None = None
        self.connected = False
        """True while the monitor serves this rank and accepts its data: only then is a snapshot worth its cost."""
        self._endpoint = endpoint
        self._trust = trust
        self._config = config
        self._stats = stats
        self._breaker = breaker
        self._handler = handler
        self._resolve_identity = resolve_identity
        self._description = description
        self._pid = os.getpid()
        self._wakeup = Wakeup()
        self._outbox: deque[RankSnapshot | CommandResult] = deque()
        self._num_connections = 0
        self._stopping = False
        self._goodbye_reason = ""
        self._thread = threading.Thread(target=self._run, name="koopmon-sender", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def describe(self, **changes: Any) -> None:
        """Change fields of this rank's description, and send it to the monitor."""
        self._description = msgspec.structs.replace(self._description, **changes)
        self._wakeup.wake()

    def post(self, item: RankSnapshot | CommandResult) -> None:
        """Queue `item` for sending. Returns at once."""
        self._outbox.append(item)
        self._wakeup.wake()

    def close(self, reason: str = "", *, wait: bool = True) -> None:
        """Send the queued items and a goodbye with `reason`, and end the thread.

        Waits CLOSE_SECONDS at most, or not at all. Idempotent. No effect in a forked child.
        """
        if os.getpid() != self._pid:
            return
        self._goodbye_reason = reason or self._goodbye_reason
        self._stopping = True
        self._wakeup.wake()
        if wait and self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join(CLOSE_SECONDS)

    def _run(self) -> None:
        try:
            while not self._stopping and self.identity is None:
                self.identity = self._resolve_identity()
                if self.identity is None:
                    time.sleep(IDENTITY_SECONDS)
            if not self._stopping and (identity := self.identity) is not None:
                with WireContext(self._trust) as context, ControlClient(context, self._endpoint) as control:
                    self._serve(context, control, identity)
        except Exception as error:
            if self._stopping:  # the end of the process may close the transport first
                logger.debug("koopmon: sender: %s", error)
            else:
                self._breaker.trip("sender", error)
        finally:
            self.connected = False
            self._discard()
            self._wakeup.close()

    def _serve(self, context: WireContext, control: ControlClient, identity: Identity) -> None:
        channel = ControlChannel(control, identity, self._config, self._stats, self._handler, self._description)
        poller = Poller(self._wakeup, control)
        data: DataSender | None = None
        num_bursts = 0
        while not self._stopping:
            awake = poller.wait(max(0.0, channel.next_due() - time.monotonic()))
            if awake == [self._wakeup] and self._ship(channel, data, identity) and not self._has_more_work(channel):
                continue  # after a snapshot that was sent there is nothing to read or to check
            if channel.description is not self._description:
                channel.describe(self._description)
            control.retry()
            if data is not None and data.retry():
                channel.warn(time.monotonic(), "data", f"no snapshots reach {data.endpoint}: {data.failure}")
            num_messages = 0
            for answer in _incoming(control, channel):
                num_messages += 1
                if isinstance(answer, Welcome):
                    endpoint = reached_beside(answer.data_endpoint, control.endpoint)
                    data = self._connect(context, poller, data, endpoint, channel, control.connections)
                elif answer is not None:
                    channel.acknowledge(answer)
            self._ship(channel, data, identity)
            channel.tick(time.monotonic())
            self.connected = channel.welcomed and data is not None and data.connected
            num_bursts = num_bursts + 1 if num_messages == BURST else 0
            if num_bursts == MAX_BURSTS:
                now, words = time.monotonic(), f"{control.endpoint} sends more than can be read"
                channel.warn(now, "flood", f"{words}: the connection is closed for {FLOOD_PAUSE_SECONDS:.0f} s")
                channel.reconnect(now, FLOOD_PAUSE_SECONDS)
            elif num_bursts:
                time.sleep(FLOODED_SECONDS)
        self._ship(channel, data, identity)
        channel.say_goodbye(self._goodbye_reason)

    def _connect(
        self,
        context: WireContext,
        poller: Poller,
        data: DataSender | None,
        endpoint: str,
        channel: ControlChannel,
        num_connections: int,
    ) -> DataSender | None:
        """Return the data channel after a welcome on the control connection with number `num_connections`."""
        before, self._num_connections = self._num_connections, num_connections
        try:
            if data is not None and data.endpoint == endpoint:
                if num_connections != before:
                    # The data channel receives nothing, so that it may be as dead as the old control connection.
                    data.reconnect()
                return data
            if data is not None:
                poller.unregister(data)
                data.close()
                data = None
            data = DataSender(context, endpoint)
            poller.register(data)
        except (EndpointError, KeysError) as error:
            channel.warn(time.monotonic(), "data", f"no snapshots are sent: {error}")
        return data

    def _has_more_work(self, channel: ControlChannel) -> bool:
        return channel.description is not self._description or time.monotonic() >= channel.next_due()

    def _ship(self, channel: ControlChannel, data: DataSender | None, identity: Identity) -> bool:
        """Send what is queued. Returns True if nothing was dropped."""
        complete = True
        while self._outbox:
            item = self._outbox.popleft()
            if isinstance(item, CommandResult):
                channel.acknowledge(item)
                continue
            started = time.thread_time()
            reason = self._send_snapshot(item, data, identity)
            self._stats.sending_seconds += time.thread_time() - started
            if reason is None:
                self._stats.sent += 1
            else:
                self._stats.drop(reason)
                complete = False
        return complete

    def _send_snapshot(self, snapshot: RankSnapshot, data: DataSender | None, identity: Identity) -> DropReason | None:
        if snapshot.ready is not None:
            snapshot.ready.synchronize()
        states = snapshot.states
        if snapshot.num_valid is not None:
            states = states[:, : int(snapshot.num_valid)]
        num_points, num_samples, width = states.shape
        reason: DropReason | None = None
        if num_samples < MIN_SAMPLES:
            reason = "incomplete"
        elif not all_finite(states):
            reason = "not_finite"
        self._stats.finite = reason != "not_finite"
        if data is None or reason is not None:
            snapshot.slot.release()
            return reason or "monitor_away"
        measured = {name: reading.wait() for name, reading in snapshot.measured.items()}
        shard = Shard(
            run=identity.run,
            incarnation=identity.incarnation,
            process_rank=self._description.process_rank,
            num_senders=self._description.num_senders,
            training=msgspec.structs.replace(snapshot.training, **measured),
            first_point=0,
            num_points=num_points,
            num_samples=num_samples,
            width=width,
            dtype=DTYPE_NAMES[states.dtype],
            masked=snapshot.masked,
            paired=snapshot.paired,
            observables=_observables(snapshot, snapshot.num_layers),
        )
        return data.send(encode(shard, states), snapshot.slot)

    def _discard(self) -> None:
        """Drop the snapshots that were not sent."""
        while self._outbox:
            if isinstance(item := self._outbox.popleft(), RankSnapshot):
                item.slot.release()
                self._stats.drop("monitor_away")


def _incoming(control: ControlClient, channel: ControlChannel) -> Iterator[Welcome | CommandResult | None]:
    """Yield the channel's result for each received message, at most BURST of them."""
    for _ in range(BURST):
        now = time.monotonic()
        try:
            frames = control.recv()
        except ProtocolError as error:
            channel.reject(error, now)
            yield None
        else:
            if frames is None:
                return
            yield channel.receive(frames, now)


def _observables(snapshot: RankSnapshot, num_layers: int) -> dict[str, list[float | None]]:
    """Return the family's readings for a shard; empty if they exceed MAX_OBSERVATIONS."""
    if snapshot.observations is None:
        return {}
    table = tabulate(snapshot.observed, snapshot.observations.tolist(), num_layers)
    return table if len(table) * num_layers <= MAX_OBSERVATIONS else {}
