"""Server socket: binding, authentication of clients, and counts of refused connections."""

from __future__ import annotations

import abc
import errno
import shutil
import time
from collections import deque
from collections.abc import Hashable
from pathlib import Path
from typing import Any, Final, Generic, NamedTuple, TypeVar

import zmq

from koopmon.errors import EndpointError, ProtocolError
from koopmon.wire import curve
from koopmon.wire.endpoints import claimed, socket_directory
from koopmon.wire.headers import WireLimits
from koopmon.wire.receive_queue import ReceiveQueue
from koopmon.wire.transport import Options, Socket, WireContext

# RCVHWM 0: libzmq 4.3.5 stops reading a connection whose queue is full and marks it as broken when its peer dies. It
# aborts the process when a later read finds a PING of that peer (`!_io_error`, stream_engine_base.cpp). Without a limit
# the queue is never full; `ReceiveQueue` bounds the memory instead.
# ZAP_DOMAIN: a peer of ZMTP 1 or 2 triggers another assertion while the socket closes (zmtp_engine.cpp). With a domain
# libzmq refuses such peers; without a handler for the domain it admits all others.
SERVER: Final[Options] = {zmq.RCVHWM: 0}
_TAKE_SECONDS: Final = 0.1
"""Longest time in seconds for which one call takes messages off the transport, before the loop serves other work."""
_TAKEN_AT_ONCE: Final = 64
"""Number of messages between two checks of that time."""
_FRAME_BYTES: Final = 512
"""Approximate memory of a frame beside its content, in bytes."""
READ_BYTES: Final = 8192
"""Size of libzmq's read buffer in bytes. Small frames are slices of it, and each may keep the whole buffer alive."""


P = TypeVar("P", bound=Hashable)


class _Message(NamedTuple):
    frames: list[memoryview]
    key: str


class Server(Socket, Generic[P]):
    """A bound socket; `P` is the type of its peer identifiers.

    `max_waiting_bytes` bounds the memory of unread messages, see `ReceiveQueue`.
    """

    endpoint: str
    """The endpoint actually bound, for peers to connect to."""
    sender_key: str
    """Key of the sender of the last received message; "" without CURVE."""
    _max_frames: int
    _overhead_bytes: int = _FRAME_BYTES
    """Memory of a message beside its content and its further frames, in bytes."""

    def __init__(
        self,
        context: WireContext,
        kind: int,
        options: Options,
        endpoint: str,
        limits: WireLimits,
        max_waiting_bytes: int,
    ) -> None:
        self.limits = limits
        self._waiting: ReceiveQueue[P, _Message | ProtocolError] = ReceiveQueue(max_waiting_bytes)
        self._num_dropped = 0
        self.sender_key = ""
        checked = context.trust.check(endpoint, binding=True)
        self._curve = context.trust.uses_curve(checked)
        # With CURVE, a client without keys may detect the mismatch first and disconnect.
        left = zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL if self._curve else 0
        self._watched_events = zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | left
        self._zap_handler: curve.ZapHandler | None = None
        self._refusals: deque[curve.Refusal] = deque(maxlen=curve.MAX_REFUSALS)
        super().__init__(context, kind, SERVER | options)
        self._directory: Path | None = None
        try:
            if self._curve:
                with context.trust.needed_for(checked):
                    curve.make_curve_server(self._socket, context.trust.monitor_secret())
                    self._zap_handler = context._zap_handler_for_agents()
            if checked == "ipc://*":
                self._directory = socket_directory()
                checked = f"ipc://{self._directory / 'socket'}"
            self._socket.set(zmq.IPV6, checked.startswith("tcp://["))
            with claimed(checked) as address:
                self._bind(address)
        except BaseException:
            self.close()
            raise
        self.endpoint = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)

    def _set_up(self, raw: zmq.Socket[bytes]) -> None:
        raw.set(zmq.ZAP_DOMAIN, curve.DOMAIN)

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
    def requires_keys(self) -> bool:
        """True when every client has authenticated with an authorized key."""
        return self._zap_handler is not None

    def _next(self) -> tuple[P, list[memoryview]] | None:
        """Return the next message and its sender, or None. Raises ProtocolError for a message with too many frames."""
        self._guard()
        if not self._has_waiting:
            self._take()
        found = self._waiting.pop()
        if found is None:
            return None
        peer, message = found
        if isinstance(message, ProtocolError):
            raise message
        self.sender_key = message.key
        return peer, message.frames

    def _take(self) -> None:
        """Take pending messages off the transport and drop those that exceed the memory limit."""
        until = time.monotonic() + _TAKE_SECONDS
        while time.monotonic() < until:
            for _ in range(_TAKEN_AT_ONCE):
                if not int(self._socket.getsockopt(zmq.EVENTS)) & zmq.POLLIN:  # cheaper than the exception of a receive
                    return
                try:
                    peer, part = self._begin()
                except zmq.Again:
                    return
                if self._waiting.has_room(peer):
                    self._keep(peer, part)
                    continue
                self._num_dropped += 1
                while part.more:
                    part = self._socket.recv(zmq.NOBLOCK, copy=False)

    def _keep(self, peer: P, part: zmq.Frame) -> None:
        """Queue the message whose first frame is `part`."""
        frames, num_frames, num_bytes = [self._kept(part)], 1, len(part) + self._overhead_bytes
        while part.more:
            part = self._socket.recv(zmq.NOBLOCK, copy=False)
            num_frames += 1
            if num_frames <= self._max_frames:
                frames.append(self._kept(part))
                num_bytes += len(part) + _FRAME_BYTES
        # Without CURVE a client could claim any name in its metadata.
        message: _Message | ProtocolError = _Message(frames, "" if self._zap_handler is None else curve.key_of(part))
        if num_frames > self._max_frames:
            what = f"{num_frames} frames, at most {self._max_frames} are taken"
            message, num_bytes = ProtocolError("size", what), _FRAME_BYTES
        self._waiting.put(peer, message, num_bytes)

    @abc.abstractmethod
    def _begin(self) -> tuple[P, zmq.Frame]:
        """Return the sender and the first frame of the next message on the transport. Raises zmq.Again."""

    def _kept(self, frame: zmq.Frame) -> memoryview:
        """Return the frame for the queue: the transport's own buffer, or a copy."""
        return frame.buffer

    @property
    def _has_waiting(self) -> bool:
        return len(self._waiting) > 0

    def _pollables(self) -> list[Any]:
        handlers = [] if self._zap_handler is None else [self._zap_handler.socket]
        return [*super()._pollables(), *handlers]

    def _note_events(self) -> None:
        self._guard()
        if self._zap_handler is not None:
            self._zap_handler.serve()
        for event, value in self._new_events():
            if event == zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL:
                self._refuse(curve.handshake_error(value))
            elif value == errno.EPIPE:
                self._refuse("a client without keys, or one that left before it had shown any")
        self._take()

    def _refuse(self, detail: str) -> None:
        self._refusals.append(curve.Refusal("handshake", f"{self.endpoint}: {detail}"))

    def take_refusals(self) -> list[curve.Refusal]:
        """Return the connections and messages refused since the last call; a `Poller` collects them."""
        sources = [self._refusals] if self._zap_handler is None else [self._refusals, self._zap_handler.refusals]
        taken = [refusal for source in sources for refusal in source]
        for source in sources:
            source.clear()
        if self._num_dropped:
            words = f"{self.endpoint}: a peer sends more than is read"
            taken.append(curve.Refusal("flood", words, self._num_dropped))
            self._num_dropped = 0
        return taken

    def _shut(self) -> None:
        super()._shut()
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)
