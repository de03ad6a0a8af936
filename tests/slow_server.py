"""HTTP server that answers without end: each byte comes within a socket timeout, the whole answer never."""

from __future__ import annotations

import contextlib
import socketserver
import threading
from collections.abc import Iterator

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 100000\r\n\r\n"
ANSWERS = {
    "status line": (b"HTTP/1.1 200 ", b"O"),
    "headers": (b"HTTP/1.1 200 OK\r\n", b"X-Slow: yes\r\n"),
    "body": (HEAD, b" "),
    "chunk size": (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"0"),
    "100 Continue": (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
}
"""Start of an answer, sent at once, and the bytes that follow one by one."""


@contextlib.contextmanager
def slow_server(answer: str, *, wait_seconds: float = 0.02) -> Iterator[str]:
    """Yield the address of a server with one of ANSWERS."""
    begin, rest = ANSWERS[answer]
    released = threading.Event()

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            with contextlib.suppress(OSError):
                self.request.recv(65536)
                self.request.sendall(begin)
                number = 0
                while not released.wait(wait_seconds):
                    self.request.sendall(rest[number % len(rest) :][:1])
                    number += 1

    server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        released.set()
        server.shutdown()
        server.server_close()
        thread.join()
