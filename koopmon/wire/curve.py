"""CURVE key pairs, and the socket options of CURVE servers and clients.

CURVE encrypts and authenticates both directions and rejects replayed messages. A client proves that it owns its key.
The server proves that it owns the secret of the key that the client expects. A `ZapHandler` (ZeroMQ's authentication
protocol, ZAP) admits or refuses each client, once per connection.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Final, NamedTuple

import zmq
from zmq.utils import z85

from koopmon.errors import KeysError

_ZAP_ENDPOINT: Final = "inproc://zeromq.zap.01"
_ZAP_VERSION: Final = b"1.0"
DOMAIN: Final = b"koopmon"
MAX_REFUSALS = 4096
"""Bound on refusals that wait in the queue; beyond it the oldest are dropped uncounted."""


class KeyPair(NamedTuple):
    """A public and a secret key, 40 characters each."""

    public: str
    secret: str

    def __repr__(self) -> str:
        return f"KeyPair({self.public!r})"


class Refusal(NamedTuple):
    """A refused connection or dropped messages: a reason for metrics, and a text for the log."""

    reason: str
    detail: str
    number: int = 1


def new_pair() -> KeyPair:
    """Generate a new random key pair."""
    public, secret = zmq.curve_keypair()
    return KeyPair(public.decode(), secret.decode())


def pair_of(secret: str) -> KeyPair:
    """Derive the key pair of a secret key. Raises KeysError."""
    try:
        return KeyPair(zmq.curve_public(secret.encode()).decode(), secret)
    except (zmq.ZMQError, ValueError):
        raise KeysError("a secret key is not one of CURVE: `koopmon keys rotate` makes another") from None


def make_curve_server(socket: zmq.Socket[bytes], secret: str) -> None:
    """Make an unbound socket a CURVE server; it accepts only clients that a ZapHandler admits."""
    socket.set(zmq.CURVE_SERVER, 1)
    _set_pair(socket, secret)
    socket.set(zmq.ZAP_DOMAIN, DOMAIN)
    socket.set(zmq.ZAP_ENFORCE_DOMAIN, 1)  # without a handler no client is admitted


def make_curve_client(socket: zmq.Socket[bytes], secret: str, server: str) -> None:
    """Make an unconnected socket a CURVE client that accepts only the server with the key `server`."""
    socket.set(zmq.CURVE_SERVERKEY, server.encode())
    _set_pair(socket, secret)


def _set_pair(socket: zmq.Socket[bytes], secret: str) -> None:
    socket.set(zmq.CURVE_SECRETKEY, secret.encode())
    socket.set(zmq.CURVE_PUBLICKEY, pair_of(secret).public.encode())


def key_of(frame: zmq.Frame) -> str:
    """Return the key of the client that sent a frame; "" without CURVE."""
    try:
        found = frame.get("User-Id")
    except zmq.ZMQError:
        return ""
    return found if isinstance(found, str) else ""


def handshake_error(code: int) -> str:
    """Describe the event value of a handshake that failed with a protocol error."""
    names: dict[int, str] = {
        zmq.PROTOCOL_ERROR_ZMTP_CRYPTOGRAPHIC: "a client that expects another key of the monitor",
        zmq.PROTOCOL_ERROR_ZMTP_MECHANISM_MISMATCH: "a client without keys where they are demanded, or the reverse",
    }
    return names.get(code, f"a client that breaks the transport's protocol (error {code:#x})")


class ZapHandler:
    """Admits the clients of one context whose key `admits` accepts. The poll loop of the servers' thread calls `serve`.

    Only the handshake of a client waits for the answer; other traffic continues.
    """

    def __init__(self, socket: zmq.Socket[bytes], admits: Callable[[str], bool]) -> None:
        """Take ownership of `socket`, which must be of type REP."""
        self.refusals: deque[Refusal] = deque(maxlen=MAX_REFUSALS)
        self._admits = admits
        self.socket = socket
        self.socket.set(zmq.LINGER, 0)
        self.socket.bind(_ZAP_ENDPOINT)

    def serve(self) -> None:
        """Answer all pending requests."""
        while True:
            try:
                request = self.socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            self.socket.send_multipart(self._answer(request), zmq.NOBLOCK)

    def _answer(self, request: list[bytes]) -> list[bytes]:
        # version, request id, domain, address, routing id, mechanism, credentials
        number = request[1] if len(request) > 1 else b""
        if len(request) == 7 and request[0] == _ZAP_VERSION and request[2] == DOMAIN and request[5] == b"CURVE":
            key = z85.encode(request[6])
            if self._admits(key.decode()):
                return [_ZAP_VERSION, number, b"200", b"OK", key, b""]
            address = request[3].decode(errors="replace")
            self.refusals.append(Refusal("key", f"{address} shows the key {key.decode()}, which no agent here has"))
        return [_ZAP_VERSION, number, b"400", b"the key is not known here", b"", b""]

    def close(self) -> None:
        self.socket.close()
