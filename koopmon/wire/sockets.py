"""The four sockets of the protocol, and how to wait for several of them.

With `transport`, `client`, `server` and `curve`, which they are made of, the only files that import zmq. Only
`Waker.wake` may be called from any thread or a signal handler. Nothing waits but `Poller.wait`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

import zmq

from koopmon.wire.client import LINK_EVENTS, Client
from koopmon.wire.endpoints import check_endpoint
from koopmon.wire.headers import Frame, WireLimits
from koopmon.wire.messages import DropReason
from koopmon.wire.server import Server
from koopmon.wire.transport import ForkedChildError, Options, Socket, WireContext
from koopmon.wire.waker import Waker

if TYPE_CHECKING:
    from koopmon.wire.pool import Slot

__all__ = [
    "ControlClient",
    "ControlServer",
    "DataReceiver",
    "DataSender",
    "ForkedChildError",
    "Poller",
    "ProbingClient",
    "Waker",
    "WireContext",
    "check_endpoint",
]

# Lossy: a closing data socket drops what is queued. No ZMTP heartbeat: a receiver that is full would not answer it.
_DATA: Final[Options] = {zmq.LINGER: 0}
# A control frame above its limit is refused and counted; from twice as much on, the transport cuts the peer off unread.
# Reliable: a last word (goodbye, refused) gets a moment to leave; a dead idle connection is noticed and made anew.
_CONTROL: Final[Options] = {
    zmq.LINGER: 500,
    zmq.SNDHWM: 64,
    zmq.RCVHWM: 64,
    zmq.HEARTBEAT_IVL: 5000,
    zmq.HEARTBEAT_TIMEOUT: 15000,
}


class DataSender(Client):
    """PUSH: snapshots from one rank, dropped rather than ever waited for."""

    def __init__(self, context: WireContext, endpoint: str, *, queue_length: int = 2) -> None:
        super().__init__(context, zmq.PUSH, _DATA | {zmq.SNDHWM: queue_length}, endpoint)

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


class DataReceiver(Server):
    """PULL: the monitor's end of the snapshots."""

    def __init__(
        self, context: WireContext, endpoint: str, *, limits: WireLimits | None = None, queue_length: int = 4
    ) -> None:
        limits = limits or WireLimits()
        options = _DATA | {zmq.RCVHWM: queue_length, zmq.MAXMSGSIZE: limits.max_message_bytes}
        super().__init__(context, zmq.PULL, options, endpoint, limits)

    def recv(self) -> list[memoryview] | None:
        """The frames of the next message, or None. Raises ProtocolError for one with too many frames."""
        return self._receive(self.limits.max_frames)


class ControlClient(Client):
    """DEALER: one rank's control channel."""

    def __init__(self, context: WireContext, endpoint: str, *, limits: WireLimits | None = None) -> None:
        self.limits = limits or WireLimits()
        super().__init__(context, zmq.DEALER, _CONTROL | {zmq.MAXMSGSIZE: 2 * self.limits.max_header_bytes}, endpoint)

    def send(self, frames: Sequence[Frame]) -> bool:
        """False when the monitor is away or does not read: nothing was queued."""
        self._guard()
        if not self._offer(frames):
            return False
        self._count(frames)
        return True

    def recv(self) -> list[memoryview] | None:
        """The frames of the monitor's next message, or None. Raises ProtocolError for more than one frame."""
        return self._receive(1)


class ProbingClient(ControlClient):
    """A control channel that asks: it also hears of connections to what does not shake hands."""

    _link_events = LINK_EVENTS | zmq.EVENT_CONNECTED | zmq.EVENT_CONNECT_RETRIED

    @property
    def in_vain(self) -> bool:
        """Whether it was tried twice, and nobody listened."""
        return not self.reached and self._retries > 1


class ControlServer(Server):
    """ROUTER: the monitor's end of every control channel."""

    def __init__(self, context: WireContext, endpoint: str, *, limits: WireLimits | None = None) -> None:
        limits = limits or WireLimits()
        options = _CONTROL | {zmq.ROUTER_MANDATORY: 1, zmq.MAXMSGSIZE: 2 * limits.max_header_bytes}
        super().__init__(context, zmq.ROUTER, options, endpoint, limits)

    def recv(self) -> tuple[bytes, list[memoryview]] | None:
        """The next message: the peer to answer, and its frames; or None. Raises ProtocolError for too many frames."""
        received = self._receive(2)
        return None if received is None else (bytes(received[0]), received[1:])

    def send(self, peer: bytes, frames: Sequence[Frame]) -> bool:
        """False when the peer is gone or does not read: nothing was queued."""
        self._guard()
        if not self._offer([peer, *frames]):
            return False
        self._count(frames)
        return True


class Poller:
    """Waits until one of several sockets has a message, or its peer came or went, or a waker was woken."""

    def __init__(self, *sources: Socket | Waker) -> None:
        self._sources: list[Socket | Waker] = list(sources)

    def register(self, source: Socket | Waker) -> None:
        self._sources.append(source)

    def unregister(self, source: Socket | Waker) -> None:
        """Nothing when it is not registered."""
        if source in self._sources:
            self._sources.remove(source)

    def wait(self, timeout_seconds: float) -> list[Socket | Waker]:
        """Those that are ready, in the order of registration; empty after `timeout_seconds`. Clears the wakers."""
        owners = {pollable: source for source in self._sources for pollable in _pollables(source)}
        timeout_ms = max(0, -int(-timeout_seconds * 1000 // 1))
        ready = zmq.zmq_poll([(pollable, zmq.POLLIN) for pollable in owners], timeout_ms)
        found = {id(owners[pollable]) for pollable, _ in ready}
        awake = [source for source in self._sources if id(source) in found]
        for source in awake:
            source.clear() if isinstance(source, Waker) else source._note_events()
        return awake


def _pollables(source: Socket | Waker) -> list[Any]:
    return [source.fileno()] if isinstance(source, Waker) else source._pollables()
