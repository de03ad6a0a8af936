"""The four sockets of the protocol, and how to wait for several of them.

With `transport`, `client`, `server` and `curve`, which they are made of, the only files that import zmq. Only
`Wakeup.wake` may be called from any thread or a signal handler. Nothing waits but `Poller.wait`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

import zmq

from koopmon.errors import ProtocolError
from koopmon.wire.client import LINK_EVENTS, MEND_SECONDS, Client
from koopmon.wire.endpoints import check_endpoint
from koopmon.wire.headers import Frame, WireLimits
from koopmon.wire.messages import DropReason
from koopmon.wire.server import READ_BYTES, Server
from koopmon.wire.transport import ForkedChildError, Options, Socket, WireContext
from koopmon.wire.wakeup import Wakeup

if TYPE_CHECKING:
    from koopmon.wire.buffer_pool import Slot

__all__ = [
    "ControlClient",
    "ControlServer",
    "DataReceiver",
    "DataSender",
    "ForkedChildError",
    "Poller",
    "ProbeClient",
    "Wakeup",
    "WireContext",
    "check_endpoint",
]

# Lossy: a closing data socket drops what is queued.
_DATA: Final[Options] = {zmq.LINGER: 0}
# A monitor sends nothing on the data channel, so nobody reads it there: hardly anything may come in.
_SENDER: Final[Options] = {zmq.RCVHWM: 1, zmq.MAXMSGSIZE: 4096}
# A control frame above its limit is refused and counted; from twice as much on, the transport cuts the peer off unread.
# Reliable: a last word (goodbye, refused) gets a moment to leave.
_CONTROL: Final[Options] = {zmq.LINGER: 500, zmq.SNDHWM: 64}
_MAX_WAITING_CONTROL_BYTES: Final = 16 << 20
_MIN_WAITING_BYTES: Final = 64 << 20


class DataSender(Client):
    """PUSH: snapshots from one rank, dropped rather than ever waited for."""

    def __init__(self, context: WireContext, endpoint: str, *, queue_length: int = 2) -> None:
        super().__init__(context, zmq.PUSH, _DATA | _SENDER | {zmq.SNDHWM: queue_length}, endpoint)

    def send(self, frames: Sequence[Frame], slot: Slot | None = None) -> DropReason | None:
        """Hand one message over without copying large frames; None, or why it was dropped.

        `slot`, the memory behind the frames, is free again at once after a drop, else when the transport lets go of it.
        Without a slot the caller leaves the frames' memory alone for good.
        """
        tracker: zmq.MessageTracker | None = None
        try:
            self._guard()
            if self._owner._ending or not self._socket.poll(0, zmq.POLLOUT):
                return "queue_full" if self.connected else "monitor_away"
            parts = [zmq.Frame(frame, track=True) for frame in frames]
            tracker = zmq.MessageTracker(*parts)
            if not self._offer(parts):
                return "monitor_away"
        finally:
            if slot is not None:
                slot.release() if tracker is None else slot.release_when_done(tracker)
        self._count(frames)
        return None


class DataReceiver(Server[int]):
    """PULL: the monitor's end of the snapshots."""

    _overhead_bytes = READ_BYTES

    def __init__(
        self,
        context: WireContext,
        endpoint: str,
        *,
        limits: WireLimits | None = None,
        max_waiting_bytes: int | None = None,
    ) -> None:
        """`max_waiting_bytes`: of snapshots that wait to be read; by default as much as one may have, or 64 MiB."""
        limits = limits or WireLimits()
        super().__init__(
            context,
            zmq.PULL,
            _DATA | {zmq.MAXMSGSIZE: limits.max_message_bytes},
            endpoint,
            limits,
            max_frames=limits.max_frames,
            max_waiting_bytes=max_waiting_bytes or max(limits.max_message_bytes, _MIN_WAITING_BYTES),
        )

    def _begin(self) -> tuple[int, zmq.Frame]:
        first = self._socket.recv(zmq.NOBLOCK, copy=False)
        try:
            connection: Any = first.get(zmq.SRCFD)  # PULL has no names for its peers
        except zmq.ZMQError:
            connection = -1  # it was broken before it was accepted
        return int(connection), first

    def recv(self) -> list[memoryview] | None:
        """The frames of the next message, or None. Raises ProtocolError for one with too many frames."""
        received = self._next()
        return None if received is None else received[1]


class ControlClient(Client):
    """DEALER: one rank's control channel."""

    def __init__(self, context: WireContext, endpoint: str, *, limits: WireLimits | None = None) -> None:
        self.limits = limits or WireLimits()
        # RCVHWM 0: see `server.SERVER`. A monitor answers, and has little to say beside that.
        options = _CONTROL | {zmq.RCVHWM: 0, zmq.MAXMSGSIZE: 2 * self.limits.max_header_bytes}
        super().__init__(context, zmq.DEALER, options, endpoint)

    def send(self, frames: Sequence[Frame]) -> bool:
        """False when the monitor is away or does not read: nothing was queued."""
        self._guard()
        if not self._offer(frames):
            return False
        self._count(frames)
        return True

    def recv(self) -> list[memoryview] | None:
        """The frames of the monitor's next message, or None. Raises ProtocolError for more than one frame.

        Then the connection is given up for a moment: were it to break while the other frames are read, libzmq 4.3.5
        would abort the process (`!_more`, fq.cpp).
        """
        self._guard()
        try:
            frame = self._socket.recv(zmq.NOBLOCK, copy=False)
        except zmq.Again:
            return None
        if frame.more:
            self.reconnect(MEND_SECONDS)
            raise ProtocolError("size", "more than one frame; the connection is given up")
        return [frame.buffer]


class ProbeClient(ControlClient):
    """A control channel that asks: it also hears of connections to what does not shake hands."""

    _link_events = LINK_EVENTS | zmq.EVENT_CONNECTED | zmq.EVENT_CONNECT_RETRIED

    @property
    def failed(self) -> bool:
        """Whether it was tried twice, and nobody listened."""
        return not self.reached and self._retries > 1


class ControlServer(Server[bytes]):
    """ROUTER: the monitor's end of every control channel."""

    def __init__(self, context: WireContext, endpoint: str, *, limits: WireLimits | None = None) -> None:
        limits = limits or WireLimits()
        super().__init__(
            context,
            zmq.ROUTER,
            _CONTROL | {zmq.ROUTER_MANDATORY: 1, zmq.MAXMSGSIZE: 2 * limits.max_header_bytes},
            endpoint,
            limits,
            max_frames=1,
            max_waiting_bytes=_MAX_WAITING_CONTROL_BYTES,
        )

    def _begin(self) -> tuple[bytes, zmq.Frame]:
        return self._socket.recv(zmq.NOBLOCK), self._socket.recv(zmq.NOBLOCK, copy=False)

    def _kept(self, frame: zmq.Frame) -> memoryview:
        return memoryview(frame.bytes)  # small: copied, so that it keeps nothing of its neighbours

    def recv(self) -> tuple[bytes, list[memoryview]] | None:
        """The next message: the peer to answer, and its frame; or None. Raises ProtocolError for more frames."""
        return self._next()

    def send(self, peer: bytes, frames: Sequence[Frame]) -> bool:
        """False when the peer is gone or does not read: nothing was queued."""
        self._guard()
        if not self._offer([peer, *frames]):
            return False
        self._count(frames)
        return True


class Poller:
    """Waits until one of several sockets has a message, or its peer came or went, or a wakeup was woken."""

    def __init__(self, *sources: Socket | Wakeup) -> None:
        self._sources: list[Socket | Wakeup] = list(sources)

    def register(self, source: Socket | Wakeup) -> None:
        self._sources.append(source)

    def unregister(self, source: Socket | Wakeup) -> None:
        """Nothing when it is not registered."""
        if source in self._sources:
            self._sources.remove(source)

    def wait(self, timeout_seconds: float) -> list[Socket | Wakeup]:
        """Those that are ready, in the order of registration; empty after `timeout_seconds`. Clears the wakers."""
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
