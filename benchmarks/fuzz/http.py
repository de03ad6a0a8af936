"""Target http: bytes on a connection to the monitor's pages, in up to four pieces, over a real socket."""

from __future__ import annotations

import select
import socket
import struct
from collections.abc import Iterator

from prometheus_client import CollectorRegistry

from koopmon.monitor.http.server import WebServer
from koopmon.telemetry.metrics import Metrics

HEALTH = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
HEALTH_EVERY = 256
ANSWER_SECONDS = 0.01
RESET = struct.pack("ii", 1, 0)
"""No linger, so that ports are free at once."""


_failures: list[str] = []
"""Internal errors of the server. No request may cause one."""


def _note(reason: str, detail: str, **_: object) -> None:
    if reason == "internal":
        _failures.append(detail)


_registry = CollectorRegistry()
Metrics(_registry, {"version": "0"}).begin_run("job")
_server = WebServer("127.0.0.1:0", _registry, {"healthz": lambda: True, "readyz": lambda: False}, note=_note)
_host, _, _port = _server.address.rpartition(":")
_count = 0


def seeds() -> Iterator[bytes]:
    for request in (
        HEALTH,
        b"GET /metrics HTTP/1.1\r\nHost: [::1]\r\nAccept: application/openmetrics-text;version=1.0.0,*/*;q=0.1\r\n\r\n",
        b"POST /metrics HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
        b"PUT /readyz HTTP/1.1\r\nHost: localhost\r\nContent-Length: 4\r\nExpect: 100-continue\r\n\r\nabcd",
        b"GET / HTTP/1.1\r\nHost: [::1]\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 1\r\n"
        b"\r\n",
        b"OPTIONS * HTTP/1.0\r\n\r\nGET /%ff%00..//metrics?x=%zz HTTP/1.1\r\nHost: [::1]:\r\n\r\n",
    ):
        yield b"\x10\x20" + request


def run(data: bytes) -> str:
    """Send, then read to the end; check the health from time to time."""
    global _count
    _count += 1
    if _count % HEALTH_EVERY == 0:
        assert b" 200 OK" in _exchange([HEALTH], seconds=20.0), "the server does not answer any more"
    cuts = sorted({*data[:2], len(data)})
    body, pieces, start = data[2:], [], 0
    for cut in cuts:
        pieces.append(body[start:cut])
        start = cut
    answer = _exchange([piece for piece in pieces if piece])
    assert not _failures, _failures
    if not answer:
        return "no answer"
    assert answer.startswith(b"HTTP/1.1 "), answer[:80]
    return answer[9:12].decode()


def _exchange(pieces: list[bytes], *, seconds: float = ANSWER_SECONDS) -> bytes:
    with socket.create_connection((_host, int(_port)), timeout=20.0) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        received = []
        try:
            for piece in pieces:
                connection.sendall(piece)
            # A peer that has closed its side gets no reply. An input without a reply may be half a request.
            select.select([connection], [], [], seconds)
            connection.shutdown(socket.SHUT_WR)
            while chunk := connection.recv(65536):
                received.append(chunk)
        except TimeoutError:
            raise
        except OSError:
            pass  # the server has closed the connection, as it may
        return b"".join(received)


def close() -> None:
    _server.close()
