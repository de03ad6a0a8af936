"""The sockets: with `curve`, which knows of keys, the only file that imports zmq; every other socket option is here.

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
import time
import weakref
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, Self, TypeAlias

import zmq
from zmq.utils import garbage  # imported here and now: its exit handler must be registered before ours, to run after it
from zmq.utils.monitor import parse_monitor_message

from koopmon.errors import EndpointError, KeysError, ProtocolError
from koopmon.wire import curve
from koopmon.wire.authorised import AuthorisedAgents
from koopmon.wire.codec import Frame, WireLimits
from koopmon.wire.endpoints import check_endpoint, check_ipc_owner, claimed, temporary_ipc
from koopmon.wire.messages import DropReason
from koopmon.wire.pool import Slot
from koopmon.wire.trust import Trust
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
# A control frame above its limit is refused and counted; from twice as much on, the transport cuts the peer off unread.
# Reliable: a last word (goodbye, refused) gets a moment to leave; a dead idle connection is noticed and made anew.
_CONTROL: Final[_Options] = {
    zmq.LINGER: 500,
    zmq.SNDHWM: 64,
    zmq.RCVHWM: 64,
    zmq.HEARTBEAT_IVL: 5000,
    zmq.HEARTBEAT_TIMEOUT: 15000,
}
_UNREACHED: Final = (errno.EAGAIN, errno.EHOSTUNREACH)
_HANDSHAKE_FAILED: Final = (
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_AUTH
)
_LINK_EVENTS: Final = zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED | _HANDSHAKE_FAILED
MEND_SECONDS: Final = 2.0
"""Between two attempts at a connection whose handshake fails."""
_serial = itertools.count()


class ForkedChildError(EndpointError):
    """A socket was touched in a forked child of the process that made it."""


class WireContext:
    """The transport of one agent or one monitor: its input/output thread and all its sockets, which share its trust."""

    def __init__(self, trust: Trust | None = None) -> None:
        self.trust = trust or Trust()
        self.agents: AuthorisedAgents | None = None
        """Whom the servers with keys serve; None while there is no such server."""
        self._gate: curve.Gate | None = None
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
            if self._gate is not None:
                self._gate.close()
            self._context.term()

    def _gate_for_agents(self) -> curve.Gate:
        """Whom it lets in is read from the key files. Raises KeysError."""
        if self._gate is None:
            agents = self.agents = self.trust.authorised_agents()
            self._gate = curve.Gate(self._context, lambda key: agents.name_of(key) is not None)
        return self._gate

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
        """Take in what the transport reports about its connections."""

    def _watch(self, raw: zmq.Socket[bytes], events: int) -> zmq.Socket[bytes]:
        """Where the transport reports these events of a socket."""
        address = f"inproc://koopmon-events-{next(_serial)}"
        raw.monitor(address, events)
        watch = self._owner._context.socket(zmq.PAIR)
        watch.set(zmq.LINGER, 0)
        watch.set(zmq.RCVHWM, 0)  # a bounded queue of events would block the transport's thread when full
        watch.connect(address)
        return watch

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
        self._received(part)
        return [frame.buffer for frame in frames]

    def _received(self, frame: zmq.Frame) -> None:
        """The last frame of a message came."""

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
    """A connecting socket that knows whether its peer is there. Raises EndpointError and KeysError."""

    def __init__(self, context: WireContext, kind: int, options: _Options, endpoint: str) -> None:
        self.endpoint = context.trust.check(endpoint)
        check_ipc_owner(self.endpoint)
        self._failure = ""
        self._curve = context.trust.uses_curve(self.endpoint)
        self._attempts = 0
        self._opened_at = time.monotonic()
        self._connected = False
        self._connections = 0
        if self._curve:
            self._read_keys(context)
        super().__init__(context, kind, _CLIENT | options)

    def _read_keys(self, context: WireContext) -> None:
        # While the monitor's key changes there are two that it may have.
        secret, known = context.trust.agent_secret(), context.trust.monitor_key()
        self._keys = secret, known[self._attempts % len(known)]

    def _open(self) -> zmq.Socket[bytes]:
        raw = super()._open()
        self._socket = raw
        self._events = self._watch(raw, _LINK_EVENTS)
        raw.set(zmq.IPV6, self.endpoint.startswith("tcp://["))
        if self._curve:
            curve.show_keys(raw, *self._keys)
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

        At most every MEND_SECONDS: the transport itself gives up on who refused it.
        """
        now = time.monotonic()
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
        self.reconnect()
        return True

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
    sender_key: str
    """The key that the sender of the message last received has shown; "" where no keys are demanded."""

    def __init__(self, context: WireContext, kind: int, options: _Options, endpoint: str, limits: WireLimits) -> None:
        self.limits = limits
        self.sender_key = ""
        checked = context.trust.check(endpoint, binding=True)
        self._curve = context.trust.uses_curve(checked)
        self._gate: curve.Gate | None = None
        self._refusals: deque[curve.Refusal] = deque(maxlen=curve.MAX_REFUSALS)
        super().__init__(context, kind, options)
        self._directory: Path | None = None
        try:
            if self._curve:
                with context.trust.needed_for(checked):
                    curve.demand_keys(self._socket, context.trust.monitor_secret())
                    self._gate = context._gate_for_agents()
            if checked == "ipc://*":
                checked, self._directory = temporary_ipc()
            self._socket.set(zmq.IPV6, checked.startswith("tcp://["))
            with claimed(checked) as address:
                self._bind(address)
        except BaseException:
            self.close()
            raise
        self.endpoint = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)

    def _open(self) -> zmq.Socket[bytes]:
        raw = super()._open()
        # Where keys are demanded, a client without any may be the first to notice and leave.
        left = zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL if self._curve else 0
        self._events = self._watch(raw, zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | left)
        return raw

    def _bind(self, address: str) -> None:
        try:
            self._socket.bind(address)
        except zmq.ZMQError as error:
            advice = {
                errno.EADDRINUSE: "in use by another process; stop it or choose another port",
                errno.EACCES: "not permitted; choose a port above 1023 or a directory of your own",
            }.get(error.errno or 0, f"{error.strerror}; choose another")
            raise EndpointError(f"endpoint {address!r}: {advice}") from None

    @property
    def demands_keys(self) -> bool:
        """Whether every client has shown a key that the context's trust knows."""
        return self._gate is not None

    def _received(self, frame: zmq.Frame) -> None:
        # Without keys a client could call itself what it likes.
        self.sender_key = "" if self._gate is None else curve.key_of(frame)

    def _pollables(self) -> list[Any]:
        gate = [] if self._gate is None else [self._gate.pollable]
        return [*super()._pollables(), self._events, *gate]

    def _note_events(self) -> None:
        self._guard()
        if self._gate is not None:
            self._gate.serve()
        while True:
            try:
                event = parse_monitor_message(self._events.recv_multipart(zmq.NOBLOCK))
            except zmq.Again:
                return
            kind, value = event["event"], event["value"]
            if kind == zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL:
                self._refuse(curve.handshake_error(value))
            elif value == errno.EPIPE:
                self._refuse("a client without keys, or one that left before it had shown any")

    def _refuse(self, detail: str) -> None:
        self._refusals.append(curve.Refusal("handshake", f"{self.endpoint}: {detail}"))

    def take_refusals(self) -> list[curve.Refusal]:
        """Connections refused since the last call; a `Poller` that waits for this socket sees to them."""
        sources = [self._refusals] if self._gate is None else [self._refusals, self._gate.refusals]
        taken = [refusal for source in sources for refusal in source]
        for source in sources:
            source.clear()
        return taken

    def _shut(self) -> None:
        self._socket.disable_monitor()
        self._events.close()
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


class ControlServer(_Server):
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
