"""Exchanges with real servers on loopback: limits of time and size, and what is sent."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from koopmon.http_client import exchange
from tests.slow_server import ANSWERS, slow_server


@pytest.fixture
def echo() -> Iterator[str]:
    """Address of a server whose answer repeats the request."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"] or 0))
            said = f"{self.command} {self.path} {self.headers['User-Agent']} {self.headers['X-Key']} ".encode() + body
            self.send_response(302 if self.path.startswith("/elsewhere") else 200)
            self.send_header("Location", "/other")
            self.end_headers()
            self.wfile.write(said)

        def do_GET(self) -> None:
            self.do_POST()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()
    thread.join()


def test_request_and_answer(echo: str) -> None:
    answer = exchange("POST", f"{echo}/a?b=c", body=b"text", headers={"X-Key": "k"}, seconds=30.0, max_bytes=1000)
    assert (answer.status, answer.reason, answer.complete) == (200, "OK", True)
    assert answer.body == b"POST /a?b=c koopmon k text"


def test_an_address_without_a_path_is_the_root(echo: str) -> None:
    assert exchange("GET", echo, seconds=30.0, max_bytes=6).body == b"GET / "


def test_no_redirect_is_followed(echo: str) -> None:
    assert exchange("GET", f"{echo}/elsewhere", seconds=30.0, max_bytes=1000).status == 302


@pytest.mark.parametrize("answer", [name for name in ANSWERS if name not in ("body", "chunk size")])
def test_a_head_without_end_is_an_error(answer: str) -> None:
    with slow_server(answer) as url, pytest.raises(TimeoutError, match=r"no complete answer within 0\.3 s"):
        exchange("GET", url, seconds=0.3)


def test_a_body_without_end_is_incomplete() -> None:
    with slow_server("body") as url:
        answer = exchange("GET", url, seconds=0.3, max_bytes=1 << 20)
        assert (answer.status, answer.complete) == (200, False)
        assert 0 < len(answer.body) < 1000
        assert exchange("GET", url, seconds=30.0, max_bytes=2).body == b"  "
