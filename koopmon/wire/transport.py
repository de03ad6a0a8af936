"""What every socket is made of: one `WireContext` per agent or monitor, and how a socket is owned, polled and closed.

Each socket belongs to the thread that uses it. In a forked child every call but `close` raises `ForkedChildError`: the
connection is the parent's.
"""

from __future__ import annotations

import atexit
import ctypes
import errno
import itertools
import os
import threading
import weakref
from collections.abc import Sequence
from typing import Any, Final, Self, TypeAlias

import zmq
from zmq.utils import garbage  # imported here and now: its exit handler must be registered before ours, to run after it

from koopmon.errors import EndpointError, ProtocolError
from koopmon.wire import curve
from koopmon.wire.authorised import AuthorisedAgents
from koopmon.wire.headers import Frame
from koopmon.wire.trust import Trust

Options: TypeAlias = dict[int, int]

COMMON: Final[Options] = {
    zmq.TCP_KEEPALIVE: 1,
    zmq.TCP_KEEPALIVE_IDLE: 30,
    zmq.TCP_KEEPALIVE_INTVL: 10,
    zmq.TCP_KEEPALIVE_CNT: 3,
}
_UNREACHED: Final = (errno.EAGAIN, errno.EHOSTUNREACH)
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
        self._sockets: set[Socket] = set()
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
            # With whatever a constructor that raised has left behind: `term` alone would wait for it for ever.
            self._context.destroy()

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


class Socket:
    """What all four sockets share: options, ownership, closing."""

    def __init__(self, context: WireContext, kind: int, options: Options) -> None:
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
        try:
            for option, value in (COMMON | self._options).items():
                raw.set(option, value)
        except BaseException:
            raw.close(linger=0)
            raise
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
