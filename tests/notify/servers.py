"""Receivers of notifications on real sockets: a webhook over HTTP and a mail server with STARTTLS. Both can fail."""

from __future__ import annotations

import base64
import contextlib
import json
import socketserver
import ssl
import subprocess
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

PASSWORD = "p ss-word of the test"


def make_certificate(directory: Path) -> tuple[str, str]:
    """Create a self-signed certificate for 127.0.0.1, and its key."""
    files = str(directory / "cert.pem"), str(directory / "key.pem")
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
         "-subj", "/CN=koopmon", "-addext", "subjectAltName=IP:127.0.0.1", "-out", files[0], "-keyout", files[1]],
        check=True, capture_output=True, timeout=60,
    )  # fmt: skip
    return files


class _Server:
    """Common part: a server in a thread until `close`. `hang` ends with it."""

    def _start(self, server: socketserver.TCPServer) -> None:
        self._server = server
        self.released = threading.Event()
        self.port: int = server.server_address[1]
        self._thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()

    def close(self) -> None:
        self.released.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def drip(self, write: Any, data: bytes) -> None:
        """Send one byte at a time, each within a socket timeout, until the client closes."""
        for number in range(len(data)):
            if self.released.wait(0.05):
                return
            try:
                write(data[number : number + 1])
            except OSError:
                return


@dataclass(frozen=True)
class Request:
    path: str
    headers: dict[str, str]
    body: Any
    at: float


class WebhookServer(_Server):
    """Takes POST requests. `faults` holds an answer for each next request: a status, "hang", "close" or "drip"."""

    def __init__(self, certificate: tuple[str, str] | None = None, port: int = 0) -> None:
        self.requests: list[Request] = []
        self.faults: deque[int | str] = deque()
        hook = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                hook._serve(self)

            def do_GET(self) -> None:
                hook._serve(self)

            def log_message(self, *_: Any) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        server.daemon_threads = True
        if certificate is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(*certificate)
            server.socket = context.wrap_socket(server.socket, server_side=True)
        self._scheme = "http" if certificate is None else "https"
        self._start(server)

    @property
    def url(self) -> str:
        return f"{self._scheme}://127.0.0.1:{self.port}/services/T0/SECRET?key=SECRET"

    @property
    def texts(self) -> list[str]:
        return [request.body["text"] for request in self.requests]

    def _serve(self, handler: BaseHTTPRequestHandler) -> None:
        raw = handler.rfile.read(int(handler.headers.get("Content-Length") or 0))
        headers = {key.lower(): value for key, value in handler.headers.items()}
        fault = self.faults.popleft() if self.faults else 200
        self.requests.append(Request(handler.path, headers, json.loads(raw) if raw else None, time.monotonic()))
        if fault == "hang":
            self.released.wait(60)
        elif fault == "drip":
            self.drip(handler.wfile.write, b"HTTP/1.1 200 OK\r\n" + b"X-Slow: yes\r\n" * 1000)
        elif isinstance(fault, int):
            # The body repeats the secret, as the pages of some servers do.
            body = f"no {handler.path}\n".encode()
            handler.send_response(fault)
            if 300 <= fault < 400:
                handler.send_header("Location", f"http://127.0.0.1:{self.port}/elsewhere")
            handler.send_header("Content-Length", str(len(body)))
            handler.end_headers()
            handler.wfile.write(body)


@dataclass
class Letter:
    sender: str
    recipients: list[str] = field(default_factory=list)
    content: bytes = b""
    user: str = ""
    encrypted: bool = False


class MailServer(_Server):
    """Speaks SMTP. `answers` replaces the reply to a verb such as "RCPT", or to "DATA." after a message."""

    def __init__(self, certificate: tuple[str, str] | None = None, *, tls: bool = False) -> None:
        self.letters: list[Letter] = []
        self.answers: dict[str, str] = {}
        self._context: ssl.SSLContext | None = None
        if certificate is not None:
            self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            self._context.load_cert_chain(*certificate)
        mail = self

        class Handler(socketserver.StreamRequestHandler):
            def handle(self) -> None:
                # Errors: the client closes, at the latest at its deadline.
                with contextlib.suppress(OSError, ValueError), contextlib.ExitStack() as stack:
                    mail._session(self, tls, stack)

        server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        self._start(server)

    def _session(self, handler: socketserver.StreamRequestHandler, tls: bool, stack: contextlib.ExitStack) -> None:
        connection, encrypted = handler.request, False
        if tls and self._context is not None:
            connection, encrypted = stack.enter_context(self._context.wrap_socket(connection, server_side=True)), True
        lines, letter = stack.enter_context(connection.makefile("rb")), Letter("")

        def reply(text: str) -> None:
            connection.sendall(text.encode() + b"\r\n")

        if self.answers.get("greeting") == "drip":
            self.drip(connection.sendall, b"220-more\r\n" * 1000)
            return
        reply("220 mail ESMTP")
        while line := lines.readline():
            verb, _, rest = line.decode().strip().partition(" ")
            verb = verb.upper()
            if (said := self.answers.get(verb)) is not None:
                if said == "hang":
                    self.released.wait(60)
                    return
                if said == "drip":
                    self.drip(connection.sendall, b"250-more\r\n" * 1000)
                    return
                reply(said)
            elif verb == "EHLO":
                offers = ["mail", "8BITMIME", "AUTH PLAIN"]
                offers += ["STARTTLS"] if self._context is not None and not encrypted else []
                for offer in offers[:-1]:
                    reply(f"250-{offer}")
                reply(f"250 {offers[-1]}")
            elif verb == "STARTTLS" and self._context is not None:
                reply("220 go on")
                connection, encrypted = (
                    stack.enter_context(self._context.wrap_socket(connection, server_side=True)),
                    True,
                )
                lines = stack.enter_context(connection.makefile("rb"))
            elif verb == "AUTH":
                _, user, password = base64.b64decode(rest.split()[1]).decode().split("\0")
                letter.user = user
                reply("235 ok" if password == PASSWORD else "535 bad credentials")
            elif verb == "MAIL":
                letter.sender, letter.recipients, letter.encrypted = rest, [], encrypted
                reply("250 ok")
            elif verb == "RCPT":
                letter.recipients.append(rest.partition("<")[2].partition(">")[0])
                refused = "nobody" in rest
                reply("550 no such user" if refused else "250 ok")
            elif verb == "DATA":
                reply("354 go on")
                rows: list[bytes] = []
                while (row := lines.readline()) not in (b".\r\n", b""):
                    rows.append(row[1:] if row.startswith(b"..") else row)
                letter.content = b"".join(rows)
                if said := self.answers.get("DATA."):
                    reply(said)
                else:
                    self.letters.append(letter)
                    reply("250 taken")
            elif verb == "QUIT":
                reply("221 bye")
                return
            else:
                reply("250 ok")
