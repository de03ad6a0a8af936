"""CURVE: pairs of keys, and what makes a socket show and demand them.

CURVE encrypts and authenticates both ways, and refuses what was recorded: a client proves its key to the server, and
the server proves that it has the secret to the key that the client expects. Which clients may connect is asked of a
`ZapHandler` (ZeroMQ's authentication protocol, ZAP), once for each connection.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any, Final, NamedTuple

import zmq
from zmq.utils import z85

from koopmon.errors import KeysError

_ZAP_ENDPOINT: Final = "inproc://zeromq.zap.01"
_ZAP_VERSION: Final = b"1.0"
DOMAIN: Final = b"koopmon"
MAX_REFUSALS = 4096
"""Refusals that may wait to be taken; then the oldest go uncounted."""


class KeyPair(NamedTuple):
    """Two keys of 40 characters each."""

    public: str
    secret: str

    def __repr__(self) -> str:
        return f"KeyPair({self.public!r})"


class Refusal(NamedTuple):
    """A connection that was not let in, or messages that were dropped: a reason to count by, and the words."""

    reason: str
    detail: str
    number: int = 1


def new_pair() -> KeyPair:
    """A pair that nobody else has."""
    public, secret = zmq.curve_keypair()
    return KeyPair(public.decode(), secret.decode())


def pair_of(secret: str) -> KeyPair:
    """The pair that a secret key belongs to. Raises KeysError."""
    try:
        return KeyPair(zmq.curve_public(secret.encode()).decode(), secret)
    except (zmq.ZMQError, ValueError):
        raise KeysError("a secret key is not one of CURVE: `koopmon keys rotate` makes another") from None


def demand_keys(socket: zmq.Socket[bytes], secret: str) -> None:
    """Make a server of a socket before it is bound: it takes clients with keys only, and only those a Gate lets in."""
    pair = pair_of(secret)
    socket.set(zmq.CURVE_SERVER, 1)
    socket.set(zmq.CURVE_SECRETKEY, pair.secret.encode())
    socket.set(zmq.CURVE_PUBLICKEY, pair.public.encode())
    socket.set(zmq.ZAP_DOMAIN, DOMAIN)
    socket.set(zmq.ZAP_ENFORCE_DOMAIN, 1)  # without a gate nobody enters


def show_keys(socket: zmq.Socket[bytes], secret: str, server: str) -> None:
    """Make a client of a socket before it connects: it speaks to who has the secret to the key `server`."""
    pair = pair_of(secret)
    socket.set(zmq.CURVE_SERVERKEY, server.encode())
    socket.set(zmq.CURVE_SECRETKEY, pair.secret.encode())
    socket.set(zmq.CURVE_PUBLICKEY, pair.public.encode())


def key_of(frame: zmq.Frame) -> str:
    """The key of the client that sent a frame; "" where no keys are shown."""
    try:
        found = frame.get("User-Id")
    except zmq.ZMQError:
        return ""
    return found if isinstance(found, str) else ""


def handshake_error(code: int) -> str:
    """What the transport means by the value of a handshake that broke the protocol, in words."""
    names: dict[int, str] = {
        zmq.PROTOCOL_ERROR_ZMTP_CRYPTOGRAPHIC: "a client that expects another key of the monitor",
        zmq.PROTOCOL_ERROR_ZMTP_MECHANISM_MISMATCH: "a client without keys where they are demanded, or the reverse",
    }
    return names.get(code, f"a client that breaks the transport's protocol (error {code:#x})")


class ZapHandler:
    """Lets in the clients of one context whose key `admits`; the poll loop of the servers' thread serves it.

    A client waits for it in its handshake; nobody else does.
    """

    def __init__(self, socket: zmq.Socket[bytes], admits: Callable[[str], bool]) -> None:
        """`socket`, of type REP, is the gate's from now on."""
        self.refusals: deque[Refusal] = deque(maxlen=MAX_REFUSALS)
        self._admits = admits
        self._socket = socket
        self._socket.set(zmq.LINGER, 0)
        self._socket.bind(_ZAP_ENDPOINT)

    @property
    def pollable(self) -> Any:
        return self._socket

    def serve(self) -> None:
        """Answer every request that has come."""
        while True:
            try:
                request = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            self._socket.send_multipart(self._answer(request), zmq.NOBLOCK)

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
        self._socket.close()
