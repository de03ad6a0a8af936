"""A connecting socket: it knows whether its peer is there, and why not, and tries again with the keys of the day."""

from __future__ import annotations

import errno
import time
from typing import Any, Final

import zmq
from zmq.utils.monitor import parse_monitor_message

from koopmon.errors import EndpointError, KeysError
from koopmon.wire import curve
from koopmon.wire.endpoints import check_ipc_owner
from koopmon.wire.transport import Options, Socket, WireContext, closed_on_error

# IMMEDIATE: nothing queues while the peer is away. CONNECT_TIMEOUT: the kernel's own retries come ever more rarely, up
# to a minute apart, and would find a network late that is back.
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
LINK_EVENTS: Final = zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED | _HANDSHAKE_FAILED
MEND_SECONDS: Final = 2.0
"""Between two attempts at a connection whose handshake fails."""


class Client(Socket):
    """A connecting socket that knows whether its peer is there. Raises EndpointError and KeysError."""

    _link_events: int = LINK_EVENTS

    def __init__(self, context: WireContext, kind: int, options: Options, endpoint: str) -> None:
        self.endpoint = context.trust.check(endpoint)
        check_ipc_owner(self.endpoint)
        self._failure = ""
        self._curve = context.trust.uses_curve(self.endpoint)
        self._attempts = 0
        self._opened_at = time.monotonic()
        self._connect_at: float | None = None
        """When `mend` connects, after a pause."""
        self._reached = False
        self._retries = 0
        self._connected = False
        self._connections = 0
        if self._curve:
            self._read_keys(context)
        super().__init__(context, kind, CLIENT | options)

    def _read_keys(self, context: WireContext) -> None:
        # While the monitor's key changes there are two that it may have.
        secret, known = context.trust.agent_secret(), context.trust.monitor_key()
        self._keys = secret, known[self._attempts % len(known)]

    def _open(self) -> zmq.Socket[bytes]:
        raw = super()._open()
        with closed_on_error(raw):
            events = self._watch(raw, self._link_events)
            with closed_on_error(events):
                raw.set(zmq.IPV6, self.endpoint.startswith("tcp://["))
                if self._curve:
                    curve.show_keys(raw, *self._keys)
                if self._connect_at is None:
                    self._connect(raw)
        self._events = events
        return raw

    def _connect(self, raw: zmq.Socket[bytes]) -> None:
        try:
            raw.connect(self.endpoint)
        except zmq.ZMQError as error:
            raise EndpointError(f"endpoint {self.endpoint!r}: {error.strerror}") from None

    def _note_events(self) -> None:
        self._guard()
        while True:
            try:
                event = parse_monitor_message(self._events.recv_multipart(zmq.NOBLOCK))
            except zmq.Again:
                return
            self._reached = self._reached or event["event"] in (zmq.EVENT_CONNECTED, zmq.EVENT_HANDSHAKE_SUCCEEDED)
            self._retries += event["event"] == zmq.EVENT_CONNECT_RETRIED
            self._connected = event["event"] == zmq.EVENT_HANDSHAKE_SUCCEEDED
            self._connections += self._connected
            if self._connected or event["event"] & _HANDSHAKE_FAILED:
                self._failure = "" if self._connected else self._explain(event["event"], event["value"])

    def _explain(self, event: int, value: int) -> str:
        if event == zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL and value == errno.EAGAIN:
            return ""  # it stalled
        if event == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
            return "it does not know this agent's key: put the public file into its agents/ directory"
        if self._curve:
            return "its key is not the one in monitor.key, or it shows none"
        if event == zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL:
            return "it demands keys ([security] loopback), or is no monitor"
        return ""  # it went away

    @property
    def failure(self) -> str:
        """Why the last handshake failed, if it did, in words; "" once one has succeeded."""
        self._note_events()
        return self._failure

    def mend(self) -> bool:
        """After a failed handshake, try again by the keys as they are in their files now; returns whether it did.

        At most every MEND_SECONDS: the transport itself gives up on who refused it. Call it now and then.
        """
        now = time.monotonic()
        if self._connect_at is not None and now >= self._connect_at:
            self._connect_at = None
            self._connect(self._socket)
        if not self.failure or now < self._opened_at + MEND_SECONDS:
            return False
        self._opened_at = now
        self._attempts += 1
        if self._curve:
            try:
                self._read_keys(self._owner)
            except KeysError as error:
                self._failure = str(error)
                return False
        try:
            self.reconnect()
        except EndpointError as error:
            self._failure = str(error)
            return False
        return True

    @property
    def connected(self) -> bool:
        """Whether the peer is there, as far as is known."""
        self._note_events()
        return self._connected

    @property
    def reached(self) -> bool:
        """Whether a peer has ever been found there; a socket that watches connections too says so of anybody."""
        self._note_events()
        return self._reached

    @property
    def connections(self) -> int:
        """How often the peer has been found; a higher number than before means: say hello again."""
        self._note_events()
        return self._connections

    def reconnect(self, pause_seconds: float = 0.0) -> None:
        """Replace the connection by a new one to the same endpoint; what was queued is dropped.

        `pause_seconds`: stay away for so long, then let `mend` connect. Raises EndpointError, and then keeps what there
        is, when the process has no room for a socket.
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
        _shut(old, old_events)

    def _pollables(self) -> list[Any]:
        self._guard()
        return [self._socket, self._events]

    def _shut(self) -> None:
        _shut(self._socket, self._events)


def _shut(raw: zmq.Socket[bytes], events: zmq.Socket[bytes]) -> None:
    raw.disable_monitor()  # first: with nobody to read them events would block the transport's thread
    events.close()
    raw.close()
