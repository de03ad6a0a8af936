"""The four sockets of the protocol, and a poller for several of them.

Only this file, `transport`, `client`, `server` and `curve` import zmq. Of all calls only `Wakeup.wake` is safe from any
thread or a signal handler. Only `Poller.wait` blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

import zmq

from koopmon.errors import ProtocolError
from koopmon.wire.client import CONNECTION_EVENTS, RETRY_SECONDS, Client
from koopmon.wire.headers import Frame, WireLimits
from koopmon.wire.messages import DropReason
from koopmon.wire.server import READ_BYTES, Server
from koopmon.wire.transport import Options, Socket, WireContext
from koopmon.wire.wakeup import Wakeup

if TYPE_CHECKING:
    from koopmon.wire.buffer_pool import Slot

# Snapshots may be lost: a closing data socket drops its queue.
_DATA: Final[Options] = {zmq.LINGER: 0}
# A monitor sends nothing on the data channel and the agent reads nothing there, so the incoming queue is minimal.
_SENDER: Final[Options] = {zmq.RCVHWM: 1, zmq.MAXMSGSIZE: 4096}
# The codec rejects and counts a control frame above its limit. Above twice the limit, the transport disconnects the
# peer without reading the frame. LINGER: the last messages (goodbye, refused) have 500 ms to leave.
_CONTROL: Final[Options] = {zmq.LINGER: 500, zmq.SNDHWM: 64}
_MAX_WAITING_CONTROL_BYTES: Final = 16 << 20
_MIN_WAITING_BYTES: Final = 64 << 20
_POLLOUT: Final = int(zmq.POLLOUT)
COPIED_BYTES: Final = 256 << 10
"""Size of the largest frame of a snapshot that is copied.

Of a larger one the transport reads the memory itself. At its end a thread of pyzmq wakes, which costs more than the
copy of a small frame.
"""


class DataSender(Client):
    """PUSH socket for the snapshots of one rank. It drops a snapshot when it cannot send at once."""

    def __init__(self, context: WireContext, endpoint: str, *, queue_length: int = 2) -> None:
        super().__init__(context, zmq.PUSH, _DATA | _SENDER | {zmq.SNDHWM: queue_length}, endpoint)

    def send(self, frames: Sequence[Frame], slot: Slot | None = None) -> DropReason | None:
        """Queue one message without copying frames above COPIED_BYTES; return None, or the reason for a drop.

        `slot` is the memory behind the frames. It becomes free at once after a drop, otherwise when the transport no
        longer uses it. Without a slot the caller must never change the memory of the frames.
        """
        tracker: zmq.MessageTracker | None = None
        try:
            self._guard()
            if self._owner._ending or not int(self._socket.getsockopt(zmq.EVENTS)) & _POLLOUT:
                return "queue_full" if self.connected else "monitor_away"
            parts = [each if len(each) <= COPIED_BYTES else _shared(each) for each in frames]
            if shared := [each for each in parts if isinstance(each, zmq.Frame)]:
                tracker = zmq.MessageTracker(*shared)
            if not self._offer(parts):
                return "monitor_away"
        finally:
            if slot is not None:
                slot.release() if tracker is None else slot.release_when_done(tracker)
        return None


def _shared(frame: Frame) -> zmq.Frame:
    return zmq.Frame(frame, track=True, copy=False)


class DataReceiver(Server[int]):
    """PULL socket of the monitor for snapshots."""

    _overhead_bytes = READ_BYTES

    def __init__(self, context: WireContext, endpoint: str, *, limits: WireLimits | None = None) -> None:
        limits = limits or WireLimits()
        self._max_frames = limits.max_frames
        options = _DATA | {zmq.MAXMSGSIZE: limits.max_message_bytes}
        max_waiting_bytes = max(limits.max_message_bytes, _MIN_WAITING_BYTES)
        super().__init__(context, zmq.PULL, options, endpoint, limits, max_waiting_bytes)

    def _begin(self) -> tuple[int, zmq.Frame]:
        first = self._socket.recv(zmq.NOBLOCK, copy=False)
        try:
            connection: Any = first.get(zmq.SRCFD)  # PULL has no identities for its peers
        except zmq.ZMQError:
            connection = -1  # the connection broke before it was accepted
        return int(connection), first

    def recv(self) -> list[memoryview] | None:
        """Return the frames of the next message, or None. Raises ProtocolError for one with too many frames."""
        received = self._next()
        return None if received is None else received[1]


class ControlClient(Client):
    """DEALER socket: the control channel of one rank."""

    def __init__(self, context: WireContext, endpoint: str, *, limits: WireLimits | None = None) -> None:
        self.limits = limits or WireLimits()
        # RCVHWM 0: see `server.SERVER`. The incoming traffic is small: the monitor mostly sends replies.
        options = _CONTROL | {zmq.RCVHWM: 0, zmq.MAXMSGSIZE: 2 * self.limits.max_header_bytes}
        super().__init__(context, zmq.DEALER, options, endpoint)

    def send(self, frames: Sequence[Frame]) -> bool:
        """Queue one message; return False, with nothing queued, when the monitor is away or does not read."""
        self._guard()
        return self._offer(frames)

    def recv(self) -> list[memoryview] | None:
        """Return the frames of the monitor's next message, or None. Raises ProtocolError for more than one frame.

        In that case it reconnects after a pause. If the connection broke while the other frames are read, libzmq 4.3.5
        would abort the process (`!_more`, fq.cpp).
        """
        self._guard()
        try:
            frame = self._socket.recv(zmq.NOBLOCK, copy=False)
        except zmq.Again:
            return None
        if frame.more:
            self.reconnect(RETRY_SECONDS)
            raise ProtocolError("size", "more than one frame; the connection is given up")
        return [frame.buffer]


class ProbeClient(ControlClient):
    """A control channel for probes, which also detects connections that fail the handshake."""

    _watched_events = CONNECTION_EVENTS | zmq.EVENT_CONNECTED | zmq.EVENT_CONNECT_RETRIED

    @property
    def failed(self) -> bool:
        """True after at least two connection attempts that found no listener."""
        return not self.reached and self._retries > 1


class ControlServer(Server[bytes]):
    """ROUTER socket of the monitor for all control channels."""

    _max_frames = 1

    def __init__(self, context: WireContext, endpoint: str, *, limits: WireLimits | None = None) -> None:
        limits = limits or WireLimits()
        options = _CONTROL | {zmq.ROUTER_MANDATORY: 1, zmq.MAXMSGSIZE: 2 * limits.max_header_bytes}
        super().__init__(context, zmq.ROUTER, options, endpoint, limits, _MAX_WAITING_CONTROL_BYTES)

    def _begin(self) -> tuple[bytes, zmq.Frame]:
        return self._socket.recv(zmq.NOBLOCK), self._socket.recv(zmq.NOBLOCK, copy=False)

    def _kept(self, frame: zmq.Frame) -> memoryview:
        return memoryview(frame.bytes)  # copied: a small frame would keep libzmq's whole read buffer alive

    def recv(self) -> tuple[bytes, list[memoryview]] | None:
        """Return the next message as peer identity and one frame, or None. Raises ProtocolError for more frames."""
        return self._next()

    def send(self, peer: bytes, frames: Sequence[Frame]) -> bool:
        """Queue one message; return False, with nothing queued, when the peer is gone or does not read."""
        self._guard()
        return self._offer([peer, *frames])


class Poller:
    """Waits until a socket has a message or a connection event, or until a wakeup is triggered."""

    def __init__(self, *sources: Socket | Wakeup) -> None:
        self._sources: list[Socket | Wakeup] = list(sources)

    def register(self, source: Socket | Wakeup) -> None:
        self._sources.append(source)

    def unregister(self, source: Socket | Wakeup) -> None:
        """Remove a source. An unregistered source is ignored."""
        if source in self._sources:
            self._sources.remove(source)

    def wait(self, timeout_seconds: float) -> list[Socket | Wakeup]:
        """Return the ready sources in order of registration; empty after a timeout. Clears the ready wakeups."""
        owners = {pollable: source for source in self._sources for pollable in _pollables(source)}
        found = {id(source) for source in self._sources if isinstance(source, Socket) and source._has_waiting}
        timeout_ms = 0 if found else max(0, -int(-timeout_seconds * 1000 // 1))
        ready = zmq.zmq_poll([(pollable, zmq.POLLIN) for pollable in owners], timeout_ms)
        found |= {id(owners[pollable]) for pollable, _ in ready}
        awake = [source for source in self._sources if id(source) in found]
        for source in awake:
            source.clear() if isinstance(source, Wakeup) else source._note_events()
        return awake


def _pollables(source: Socket | Wakeup) -> list[Any]:
    return [source.fileno()] if isinstance(source, Wakeup) else source._pollables()
