"""Client socket: tracks the connection state, explains handshake failures, rereads keys and reconnects."""

from __future__ import annotations

import errno
import time
from typing import Final

import zmq

from koopmon.errors import EndpointError, KeysError
from koopmon.wire import curve
from koopmon.wire.endpoints import check_ipc_owner
from koopmon.wire.transport import Options, Socket, WireContext, shut

# IMMEDIATE: the socket queues nothing while the peer is away. CONNECT_TIMEOUT: the kernel's retry interval grows up to
# a minute, so without a timeout the socket could reconnect long after the network has recovered.
CLIENT: Final[Options] = {
    zmq.IMMEDIATE: 1,
    zmq.RECONNECT_IVL: 100,
    zmq.RECONNECT_IVL_MAX: 1000,
    zmq.CONNECT_TIMEOUT: 5000,
    zmq.HANDSHAKE_IVL: 5000,
}
_HANDSHAKE_FAILED: Final = (
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_AUTH
)
CONNECTION_EVENTS: Final = zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED | _HANDSHAKE_FAILED
RETRY_SECONDS: Final = 2.0
"""Interval between two connection attempts after a failed handshake, in seconds."""


class Client(Socket):
    """A connecting socket that tracks the state of its connection. Raises EndpointError and KeysError."""

    _watched_events = CONNECTION_EVENTS

    def __init__(self, context: WireContext, kind: int, options: Options, endpoint: str) -> None:
        self.endpoint = context.trust.check(endpoint)
        check_ipc_owner(self.endpoint)
        self._failure = ""
        self._curve = context.trust.uses_curve(self.endpoint)
        self._attempts = 0
        self._opened_at = time.monotonic()
        self._connect_at: float | None = None
        """Monotonic time at which `retry` connects after a pause; None without a pause."""
        self._reached = False
        self._retries = 0
        self._connected = False
        self._connections = 0
        if self._curve:
            self._read_keys(context)
        super().__init__(context, kind, CLIENT | options)

    def _read_keys(self, context: WireContext) -> None:
        # During a rotation of the monitor's key two keys are valid; successive attempts alternate between them.
        secret, known = context.trust.agent_secret(), context.trust.monitor_key()
        self._keys = secret, known[self._attempts % len(known)]

    def _set_up(self, raw: zmq.Socket[bytes]) -> None:
        raw.set(zmq.IPV6, self.endpoint.startswith("tcp://["))
        if self._curve:
            curve.make_curve_client(raw, *self._keys)
        if self._connect_at is None:
            self._connect(raw)

    def _connect(self, raw: zmq.Socket[bytes]) -> None:
        try:
            raw.connect(self.endpoint)
        except zmq.ZMQError as error:
            raise EndpointError(f"endpoint {self.endpoint!r}: {error.strerror}") from None

    def _note_events(self) -> None:
        self._guard()
        for event, value in self._new_events():
            self._reached = self._reached or event in (zmq.EVENT_CONNECTED, zmq.EVENT_HANDSHAKE_SUCCEEDED)
            self._retries += event == zmq.EVENT_CONNECT_RETRIED
            self._connected = event == zmq.EVENT_HANDSHAKE_SUCCEEDED
            self._connections += self._connected
            if self._connected or event & _HANDSHAKE_FAILED:
                self._failure = "" if self._connected else self._explain(event, value)

    def _explain(self, event: int, value: int) -> str:
        if event == zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL and value == errno.EAGAIN:
            return ""  # the handshake stalled
        if event == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
            return "it does not know this agent's key: put the public file into its agents/ directory"
        if self._curve:
            return "its key is not the one in monitor.key, or it shows none"
        if event == zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL:
            return "it demands keys ([security] loopback), or is no monitor"
        return ""  # the peer closed the connection

    @property
    def failure(self) -> str:
        """Reason why the last handshake failed; "" after a success or before the first failure."""
        self._note_events()
        return self._failure

    def retry(self) -> bool:
        """After a failed handshake, reread the key files and reconnect; return True if it reconnected.

        Call it periodically: libzmq does not retry after a peer refuses the key. It acts at most every RETRY_SECONDS.
        """
        now = time.monotonic()
        if self._connect_at is not None and now >= self._connect_at:
            self._connect_at = None
            self._connect(self._socket)
        if not self.failure or now < self._opened_at + RETRY_SECONDS:
            return False
        self._opened_at = now
        self._attempts += 1
        try:
            if self._curve:
                self._read_keys(self._owner)
            self.reconnect()
        except (EndpointError, KeysError) as error:
            self._failure = str(error)
            return False
        return True

    @property
    def connected(self) -> bool:
        """True while the peer is connected, as far as the transport has reported."""
        self._note_events()
        return self._connected

    @property
    def reached(self) -> bool:
        """True once a handshake has succeeded; a socket that also watches connections counts any TCP or ipc peer."""
        self._note_events()
        return self._reached

    @property
    def connections(self) -> int:
        """Number of successful handshakes. After an increase the agent must send its hello again."""
        self._note_events()
        return self._connections

    def reconnect(self, pause_seconds: float = 0.0) -> None:
        """Replace the connection by a new one to the same endpoint; queued messages are dropped.

        With `pause_seconds`, `retry` opens the new connection after that time. Raises EndpointError when the process
        has no room for a socket; the old connection then stays.
        """
        self._guard()
        old, old_events, before = self._socket, self._events, self._connect_at
        self._connect_at = time.monotonic() + pause_seconds if pause_seconds else None
        try:
            self._socket = self._open()
        except BaseException:
            self._connect_at = before
            raise
        self._connected = False
        old.set(zmq.LINGER, 0)
        shut(old, old_events)
