"""Base of all sockets: one `WireContext` per agent or monitor, and the ownership, polling and closing of a socket.

Each socket belongs to the thread that uses it. In a forked child every call but `close` raises `ForkedChildError`,
because the connection belongs to the parent.
"""

from __future__ import annotations

import abc
import atexit
import ctypes
import errno
import itertools
import os
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final, Self, TypeAlias

import zmq
from zmq.utils import garbage  # imported first: atexit runs handlers in reverse order, and its handler must run last
from zmq.utils.monitor import parse_monitor_message

from koopmon.errors import EndpointError
from koopmon.wire import curve
from koopmon.wire.auth_policy import AuthPolicy
from koopmon.wire.authorized_keys import AuthorizedKeys
from koopmon.wire.headers import Frame

Options: TypeAlias = dict[int, int]

# The kernel closes the connection to a dead TCP peer after 60 s: by keepalive when idle, by TCP_MAXRT with data in
# flight. No socket uses ZMTP heartbeats: their timer may write to a broken connection, and libzmq 4.3.5 then aborts the
# process (`!_io_error`, stream_engine_base.cpp). The agent's own heartbeats replace them.
COMMON: Final[Options] = {
    zmq.TCP_KEEPALIVE: 1,
    zmq.TCP_KEEPALIVE_IDLE: 30,
    zmq.TCP_KEEPALIVE_INTVL: 10,
    zmq.TCP_KEEPALIVE_CNT: 3,
    zmq.TCP_MAXRT: 60_000,
}
_UNREACHED: Final = (errno.EAGAIN, errno.EHOSTUNREACH)
# Plain integers: each operation on zmq's own flags takes as long as a call of the transport.
_POLLIN: Final = int(zmq.POLLIN)
_LAST_FRAME: Final = int(zmq.NOBLOCK)
_ONE_OF_MORE: Final = int(zmq.NOBLOCK | zmq.SNDMORE)
_NEEDED_DESCRIPTORS: Final = 16
_NEEDED_THREADS: Final = 2
_serial = itertools.count()


class ForkedChildError(EndpointError):
    """A forked child used a socket of its parent process."""


class WireContext:
    """The transport of one agent or one monitor: its I/O thread and its sockets, which share one `trust` policy.

    This class and the sockets raise EndpointError when the process lacks descriptors or threads.
    """

    def __init__(self, trust: AuthPolicy | None = None) -> None:
        self.trust = trust or AuthPolicy()
        self.agents: AuthorizedKeys | None = None
        """Authorized agents of the CURVE servers; None while there is no such server."""
        self._zap_handler: curve.ZapHandler | None = None
        with _enough_room():
            self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context(io_threads=1)
        self._pid = os.getpid()
        self._sockets: set[Socket] = set()
        self._started = False
        self._ending = False  # True: sends are disabled
        _open_contexts.add(self)

    def close(self) -> None:
        """Close every socket, then the transport; waits at most half a second for queued messages. Idempotent.

        Call it when no other thread uses the sockets. An ipc path can be bound again only after this call.
        """
        _open_contexts.discard(self)
        for each in list(self._sockets):
            each.close()
        if os.getpid() == self._pid:
            if self._zap_handler is not None:
                self._zap_handler.close()
            # `destroy` also closes sockets that a failed constructor left open; `term` alone would wait for them for
            # ever.
            self._context.destroy()

    def _new_socket(self, kind: int) -> zmq.Socket[bytes]:
        """Create a raw socket. Raises EndpointError when the process lacks descriptors or threads."""
        if self._context.closed:
            raise EndpointError("the transport is closed")
        with _enough_room():
            if not self._started:
                _check_room()
            raw = self._context.socket(kind)
        self._started = True
        return raw

    def _zap_handler_for_agents(self) -> curve.ZapHandler:
        """Return the ZAP handler, created on first use from the key files. Raises KeysError."""
        if self._zap_handler is None:
            agents = self.agents = self.trust.authorized_keys()
            socket = self._new_socket(zmq.REP)
            with closed_on_error(socket):
                self._zap_handler = curve.ZapHandler(socket, lambda key: agents.name_of(key) is not None)
        return self._zap_handler

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


_open_contexts: weakref.WeakSet[WireContext] = weakref.WeakSet()


@atexit.register
def _at_exit() -> None:
    """Close the contexts that are still open when the process ends.

    The interpreter frees the memory of messages in flight at its end, and libzmq then aborts the process. This handler
    cannot close sockets that a daemon thread still uses; it leaks their message memory instead.
    """
    for context in list(_open_contexts):
        if context._pid != os.getpid():
            continue
        threads = {each._thread for each in context._sockets} - {threading.current_thread()}
        if any(thread.is_alive() for thread in threads):
            context._ending = True
            atexit.unregister(garbage.gc._atexit)  # its own daemon thread keeps the rest alive
            _leak(*garbage.gc.refs.values())
        else:
            context.close()


def _leak(*objects: object) -> None:
    """Keep objects alive until the process ends.

    pyzmq frees sent buffers in a daemon thread. A tensor's destructor releases the GIL for a moment. A daemon thread
    that requests the GIL from a finalizing interpreter is unwound through C++ code that forbids it, and the process
    aborts.
    """
    for each in objects:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(each))


@contextmanager
def _enough_room() -> Iterator[None]:
    """Raise EndpointError when the process is at its limit of descriptors or threads."""
    try:
        yield
    except (OSError, RuntimeError, zmq.ZMQError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise EndpointError(f"no room for a socket: {why.lower()}; raise the limit (ulimit -n, ulimit -u)") from None


def _check_room() -> None:
    """Raise OSError or RuntimeError when the process is at its limit of descriptors or threads.

    At that limit libzmq aborts the process with the first socket of a context (epoll.cpp, thread.cpp).
    """
    held: list[int] = []
    try:
        held += (os.open(os.devnull, os.O_RDONLY) for _ in range(_NEEDED_DESCRIPTORS))
        done = threading.Event()
        threads = [threading.Thread(target=done.wait, daemon=True) for _ in range(_NEEDED_THREADS)]
        try:
            for thread in threads:
                thread.start()
        finally:
            done.set()
        for thread in threads:
            thread.join()
    finally:
        for each in held:
            os.close(each)


@contextmanager
def closed_on_error(raw: zmq.Socket[bytes]) -> Iterator[None]:
    """Close a raw socket when the body raises, because `term` waits for ever for an open socket."""
    try:
        yield
    except BaseException:
        raw.close(linger=0)
        raise


def shut(raw: zmq.Socket[bytes], events: zmq.Socket[bytes]) -> None:
    """Close a socket and the one that receives its connection events."""
    raw.disable_monitor()  # first: unread events would block the transport's thread
    events.close()
    raw.close()


class Socket(abc.ABC):
    """Base class of the four sockets: options, ownership, connection events and closing."""

    _watched_events: int

    def __init__(self, context: WireContext, kind: int, options: Options) -> None:
        self._owner = context
        self._kind = kind
        self._options = options
        self._pid = context._pid
        self._thread = threading.current_thread()
        self._closed = False
        self._guard()
        self._socket = self._open()
        context._sockets.add(self)

    def _open(self) -> zmq.Socket[bytes]:
        raw = self._owner._new_socket(self._kind)
        with closed_on_error(raw):
            for option, value in (COMMON | self._options).items():
                raw.set(option, value)
            events = self._watch(raw)
            with closed_on_error(events):
                self._set_up(raw)
        self._events = events
        return raw

    @abc.abstractmethod
    def _set_up(self, raw: zmq.Socket[bytes]) -> None:
        """Set the options of the kind of socket, and connect."""

    def _guard(self) -> None:
        if os.getpid() != self._pid:
            raise ForkedChildError(f"this socket belongs to process {self._pid}, not to its forked child {os.getpid()}")
        if self._closed:
            raise EndpointError("the socket is closed")

    def _pollables(self) -> list[Any]:
        self._guard()
        return [self._socket, self._events]

    @abc.abstractmethod
    def _note_events(self) -> None:
        """Process the transport's connection events."""

    @property
    def _has_waiting(self) -> bool:
        """True while the socket holds unread messages outside the transport."""
        return False

    def _new_events(self) -> Iterator[tuple[int, int]]:
        """Yield the new connection events, each with its value."""
        while int(self._events.getsockopt(zmq.EVENTS)) & _POLLIN:
            event = parse_monitor_message(self._events.recv_multipart(zmq.NOBLOCK))
            yield event["event"], event["value"]

    def _watch(self, raw: zmq.Socket[bytes]) -> zmq.Socket[bytes]:
        """Return a socket that receives the connection events of `raw`."""
        address = f"inproc://koopmon-events-{next(_serial)}"
        watch = self._owner._new_socket(zmq.PAIR)
        with closed_on_error(watch):
            watch.set(zmq.LINGER, 0)
            watch.set(zmq.RCVHWM, 0)  # a full queue of events would block the transport's thread
            raw.monitor(address, self._watched_events)
            watch.connect(address)
        return watch

    def _offer(self, frames: Sequence[Frame | zmq.Frame]) -> bool:
        """Send all frames of one message, or none; return False when no peer accepts it now.

        Bytes are copied, a `zmq.Frame` is not.
        """
        complete, last = True, len(frames) - 1
        for index, frame in enumerate(frames):
            try:
                flags = _LAST_FRAME if index == last else _ONE_OF_MORE
                self._socket.send(frame, flags, copy=not isinstance(frame, zmq.Frame))
            except zmq.ZMQError as error:
                if error.errno not in _UNREACHED:
                    raise
                if index == 0:
                    return False
                # The peer disconnected within the message. libzmq discards the remaining frames but requires that they
                # are sent.
                complete = False
        return complete

    def _shut(self) -> None:
        shut(self._socket, self._events)

    def close(self) -> None:
        """Close the socket. Idempotent; in a forked child it only marks the socket as closed."""
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
