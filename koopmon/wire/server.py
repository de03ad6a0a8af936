"""A bound socket: where it is, whom it lets in, and whom it did not."""

from __future__ import annotations

import errno
import shutil
from collections import deque
from pathlib import Path
from typing import Any

import zmq
from zmq.utils.monitor import parse_monitor_message

from koopmon.errors import EndpointError
from koopmon.wire import curve
from koopmon.wire.endpoints import claimed, temporary_ipc
from koopmon.wire.headers import WireLimits
from koopmon.wire.transport import Options, Socket, WireContext


class Server(Socket):
    """A bound socket."""

    endpoint: str
    """The endpoint actually bound, for peers to connect to."""
    sender_key: str
    """The key that the sender of the message last received has shown; "" where no keys are demanded."""

    def __init__(self, context: WireContext, kind: int, options: Options, endpoint: str, limits: WireLimits) -> None:
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
