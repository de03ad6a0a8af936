"""The sockets: the only file that imports zmq, and every socket option is here.

One `WireContext` per agent or monitor; each socket belongs to the thread that uses it, and only `Waker.wake` may be
called from any thread or a signal handler. Nothing waits but `Poller.wait`. In a forked child every call but `close`
raises `ForkedChildError`: the connection is the parent's.
"""

from __future__ import annotations

import atexit
import ctypes
import errno
import itertools
import os
import shutil
import threading
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, Self, TypeAlias

import zmq
from zmq.utils import garbage  # imported here and now: its exit handler must be registered before ours, to run after it
from zmq.utils.monitor import parse_monitor_message

from koopmon.errors import EndpointError, ProtocolError
from koopmon.wire.codec import Frame, WireLimits
from koopmon.wire.endpoints import check_endpoint, check_ipc_owner, claimed, temporary_ipc
from koopmon.wire.messages import DropReason
from koopmon.wire.pool import Slot
from koopmon.wire.waker import Waker

__all__ = [
    "ControlClient",
    "ControlServer",
    "DataReceiver",
    "DataSender",
    "ForkedChildError",
    "Poller",
    "Waker",
    "WireContext",
    "check_endpoint",
]

_Options: TypeAlias = dict[int, int]

_COMMON: Final[_Options] = {
    zmq.TCP_KEEPALIVE: 1,
    zmq.TCP_KEEPALIVE_IDLE: 30,
    zmq.TCP_KEEPALIVE_INTVL: 10,
    zmq.TCP_KEEPALIVE_CNT: 3,
}
# IMMEDIATE: nothing queues while the peer is away.
_CLIENT: Final[_Options] = {
    zmq.IMMEDIATE: 1,
    zmq.RECONNECT_IVL: 100,
    zmq.RECONNECT_IVL_MAX: 1000,
    zmq.HANDSHAKE_IVL: 5000,
}
# Lossy: a closing data socket drops what is queued. No ZMTP heartbeat: a receiver that is full would not answer it.
_DATA: Final[_Options] = {zmq.LINGER: 0}
# Reliable: a last word (goodbye, refused) gets a moment to leave; a dead idle connection is noticed and made anew.
_CONTROL: Final[_Options] = {
    zmq.LINGER: 500,
    zmq.SNDHWM: 64,
    zmq.RCVHWM: 64,
    zmq.HEARTBEAT_IVL: 5000,
    zmq.HEARTBEAT_TIMEOUT: 15000,
}
_UNREACHED: Final = (errno.EAGAIN, errno.EHOSTUNREACH)
_LINK_EVENTS: Final = zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED
_serial = itertools.count()


class ForkedChildError(EndpointError):
    """A socket was touched in a forked child of the process that made it."""


class WireContext:
    """The transport of one agent or one monitor: its input/output thread and all its sockets."""

    def __init__(self) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context(io_threads=1)
        self._pid = os.getpid()
        self._sockets: set[_Socket] = set()
        self._ending = False  # nothing may be sent any more
        _open_contexts.add(self)

    def close(self) -> None:
        """Close every socket, then the transport; waits at most half a second for last words. Idempotent.

        Call it where no other thread uses the sockets any more. Only after it may an ipc path be bound again.
        """
        _open_contexts.discard(self)
        for each in list(self._sockets):
            each.close()
        if os.getpid() == self._pid:
            self._context.term()

    @property
    def _in_use_elsewhere(self) -> bool:
        """Whether a thread other than this one may be using a socket now."""
        threads = {each._thread for each in self._sockets} - {threading.current_thread()}
        return any(thread.is_alive() for thread in threads)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


_open_contexts: weakref.WeakSet[WireContext] = weakref.WeakSet()


@atexit.register
def _at_exit() -> None:
    """Close what a process that ends forgot to close.

    The end of the interpreter frees the memory behind messages that are on their way, and libzmq aborts the process for
    it. Sockets that a daemon thread still uses cannot be closed from here: then that memory stays, to the very end.
    """
    for context in list(_open_contexts):
        if context._pid != os.getpid():
            continue
        if context._in_use_elsewhere:
            context._ending = True
            atexit.unregister(garbage.gc._atexit)  # its own daemon thread keeps the rest alive
            _leak(*garbage.gc.refs.values())
        else:
            context.close()


def _leak(*objects: object) -> None:
    """Never free them.

    pyzmq frees what was sent in a daemon thread. A tensor's destructor gives the interpreter up for a moment, and a
    daemon thread that wants it back from an interpreter at its end is unwound through C++ that forbids it: the process
    aborts.
    """
    for each in objects:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(each))


class _Socket:
    """What all four sockets share: options, ownership, closing."""

    def __init__(self, context: WireContext, kind: int, options: _Options) -> None:
        self._owner = context
        self._kind = kind
        self._options = options
        self._pid = context._pid
        self._thread = threading.current_thread()
        self._closed = False
        self.messages_sent = 0
        self.bytes_sent = 0
        self._guard()
        self._socket = self._open()
        context._sockets.add(self)

    def _open(self) -> zmq.Socket[bytes]:
        if self._owner._context.closed:
            raise EndpointError("the transport is closed")
        raw = self._owner._context.socket(self._kind)
        for option, value in (_COMMON | self._options).items():
            raw.set(option, value)
        return raw

    def _guard(self) -> None:
        if os.getpid() != self._pid:
            raise ForkedChildError(f"this socket belongs to process {self._pid}, not to its forked child {os.getpid()}")
        if self._closed:
            raise EndpointError("the socket is closed")

    def _pollables(self) -> list[Any]:
        self._guard()
        return [self._socket]

    def _note_events(self) -> None:
        """Take in what the transport reports about the connection."""

    def _receive(self, max_frames: int) -> list[memoryview] | None:
        """All frames of the next message, each in the transport's own buffer, or None when there is none."""
        self._guard()
        try:
            part = self._socket.recv(zmq.NOBLOCK, copy=False)
        except zmq.Again:
            return None
        frames = [part]
        num_frames = 1
        while part.more:
            part = self._socket.recv(zmq.NOBLOCK, copy=False)
            num_frames += 1
            if num_frames <= max_frames:
                frames.append(part)
        if num_frames > max_frames:
            raise ProtocolError("size", f"{num_frames} frames, at most {max_frames} are taken")
        return [frame.buffer for frame in frames]

    def _offer(self, frames: Sequence[Frame | zmq.Frame]) -> bool:
        """Send all frames of one message, or none: False when no peer takes it now."""
        complete = True
        for index, frame in enumerate(frames):
            more = zmq.SNDMORE if index < len(frames) - 1 else 0
            try:
                self._socket.send(frame, zmq.NOBLOCK | more, copy=False)
            except zmq.ZMQError as error:
                if error.errno not in _UNREACHED:
                    raise
                if index == 0:
                    return False
                # The peer left in mid-message. libzmq swallows the frames that are left, and must be offered them.
                complete = False
        return complete

    def _count(self, frames: Sequence[Frame]) -> None:
        self.messages_sent += 1
        self.bytes_sent += sum(memoryview(frame).nbytes for frame in frames)

    def _shut(self) -> None:
        self._socket.close()

    def close(self) -> None:
        """Idempotent; in a forked child it only forgets."""
        if self._closed:
            return
        self._closed = True
        self._owner._sockets.discard(self)
        if os.getpid() == self._pid:
            self._shut()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Client(_Socket):
    """A connecting socket that knows whether its peer is there."""

    def __init__(self, context: WireContext, kind: int, options: _Options, endpoint: str) -> None:
        self.endpoint = check_endpoint(endpoint)
        check_ipc_owner(self.endpoint)
        self._connected = False
        self._connections = 0
        super().__init__(context, kind, _CLIENT | options)

    def _open(self) -> zmq.Socket[bytes]:
        raw = super()._open()
        self._socket = raw
        address = f"inproc://koopmon-events-{next(_serial)}"
        raw.monitor(address, _LINK_EVENTS)
        self._events = self._owner._context.socket(zmq.PAIR)
        self._events.set(zmq.LINGER, 0)
        self._events.set(zmq.RCVHWM, 0)  # a bounded queue of events would block the transport's thread when full
        self._events.connect(address)
        raw.set(zmq.IPV6, self.endpoint.startswith("tcp://["))
        raw.connect(self.endpoint)
        return raw

    def _note_events(self) -> None:
        self._guard()
        while True:
            try:
                event = parse_monitor_message(self._events.recv_multipart(zmq.NOBLOCK))
            except zmq.Again:
                return
            self._connected = event["event"] == zmq.EVENT_HANDSHAKE_SUCCEEDED
            self._connections += self._connected

    @property
    def connected(self) -> bool:
        """Whether the peer is there, as far as is known."""
        self._note_events()
        return self._connected

    @property
    def connections(self) -> int:
        """How often the peer has been found; a higher number than before means: say hello again."""
        self._note_events()
        return self._connections

    def reconnect(self) -> None:
        """Replace the connection by a new one to the same endpoint; what was queued is dropped."""
        self._guard()
        self._socket.set(zmq.LINGER, 0)
        self._shut()
        self._connected = False
        self._socket = self._open()

    def _pollables(self) -> list[Any]:
        self._guard()
        return [self._socket, self._events]

    def _shut(self) -> None:
        self._socket.disable_monitor()
        self._events.close()
        super()._shut()


class _Server(_Socket):
    """A bound socket."""

    endpoint: str
    """The endpoint actually bound, for peers to connect to."""

    def __init__(self, context: WireContext, kind: int, options: _Options, endpoint: str, limits: WireLimits) -> None:
        self.limits = limits
        checked = check_endpoint(endpoint, binding=True)
        super().__init__(context, kind, options)
        self._directory: Path | None = None
        try:
            if checked == "ipc://*":
                checked, self._directory = temporary_ipc()
            self._socket.set(zmq.IPV6, checked.startswith("tcp://["))
            with claimed(checked) as address:
                self._bind(address)
        except BaseException:
            self.close()
            raise
        self.endpoint = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)

    def _bind(self, address: str) -> None:
        try:
            self._socket.bind(address)
        except zmq.ZMQError as error:
            advice = {
                errno.EADDRINUSE: "in use by another process; stop it or choose another port",
                errno.EACCES: "not permitted; choose a port above 1023 or a directory of your own",
            }.get(error.errno or 0, f"{error.strerror}; choose another")
            raise EndpointError(f"endpoint {address!r}: {advice}") from None

    def _shut(self) -> None:
        super()._shut()
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)


class DataSender(_Client):
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


class DataReceiver(_Server):
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


class ControlClient(_Client):
    """DEALER: one rank's control channel."""

    def __init__(self, context: WireContext, endpoint: str, *, limits: WireLimits | None = None) -> None:
        self.limits = limits or WireLimits()
        super().__init__(context, zmq.DEALER, _CONTROL | {zmq.MAXMSGSIZE: self.limits.max_header_bytes}, endpoint)

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


class ControlServer(_Server):
    """ROUTER: the monitor's end of every control channel."""

    def __init__(self, context: WireContext, endpoint: str, *, limits: WireLimits | None = None) -> None:
        limits = limits or WireLimits()
        options = _CONTROL | {zmq.ROUTER_MANDATORY: 1, zmq.MAXMSGSIZE: limits.max_header_bytes}
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

    def __init__(self, *sources: _Socket | Waker) -> None:
        self._sources: list[_Socket | Waker] = list(sources)

    def register(self, source: _Socket | Waker) -> None:
        self._sources.append(source)

    def unregister(self, source: _Socket | Waker) -> None:
        """Nothing when it is not registered."""
        if source in self._sources:
            self._sources.remove(source)

    def wait(self, timeout_seconds: float) -> list[_Socket | Waker]:
        """Those that are ready, in the order of registration; empty after `timeout_seconds`. Clears the wakers."""
        owners = {pollable: source for source in self._sources for pollable in _pollables(source)}
        timeout_ms = max(0, -int(-timeout_seconds * 1000 // 1))
        ready = zmq.zmq_poll([(pollable, zmq.POLLIN) for pollable in owners], timeout_ms)
        found = {id(owners[pollable]) for pollable, _ in ready}
        awake = [source for source in self._sources if id(source) in found]
        for source in awake:
            source.clear() if isinstance(source, Waker) else source._note_events()
        return awake


def _pollables(source: _Socket | Waker) -> list[Any]:
    return [source.fileno()] if isinstance(source, Waker) else source._pollables()
