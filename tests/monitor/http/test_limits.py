"""Connections of untrusted peers to the pages: bounded in number and in length, with counted refusals."""

from __future__ import annotations

import contextlib
import logging
import os
import resource
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing

import pytest
from prometheus_client import CollectorRegistry

from koopmon.config import from_mapping
from koopmon.monitor.http.server import WebServer
from tests.monitor.conftest import MonitorProcess, wait_until

httpx = pytest.importorskip("httpx")

WAIT_SECONDS = 60.0


@pytest.fixture
def noted() -> list[tuple[str, str]]:
    return []


@pytest.fixture
def server(noted: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch) -> Iterator[WebServer]:
    def broken() -> bool:
        raise RuntimeError("a page of ours")

    checks = {"healthz": lambda: True, "broken": broken}
    server = WebServer(
        "127.0.0.1:0",
        CollectorRegistry(),
        checks,
        config=from_mapping({"monitor": {"max_http_connections": 8}}),
        note=lambda reason, detail, **_: noted.append((reason, detail)),
    )
    yield server
    server.close()


def connect(server: WebServer, said: bytes = b"") -> socket.socket:
    host, _, port = server.address.rpartition(":")
    connection = socket.create_connection((host, int(port)), timeout=WAIT_SECONDS)
    connection.sendall(said)
    return connection


def fine(server: WebServer) -> bool:
    return httpx.get(f"http://{server.address}/healthz", timeout=WAIT_SECONDS).status_code == 200


def cut(connection: socket.socket) -> bool:
    """Return True if the server ended it: a reset with unread data."""
    try:
        return connection.recv(100) == b""
    except ConnectionResetError:
        return True


def until(noted: list[tuple[str, str]], reason: str, count: int = 1) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while [each for each, _ in noted].count(reason) < count:
        assert time.monotonic() < deadline, noted
        time.sleep(0.01)


def test_those_who_dawdle_do_not_keep_others_out(server: WebServer, noted: list[tuple[str, str]]) -> None:
    idle = [connect(server, b"GET /healthz HTTP/1.1\r\nX: ") for _ in range(12)]
    assert fine(server)
    assert fine(server)
    until(noted, "http_connections", 5)
    assert cut(idle[0]), "the oldest"
    idle[-1].setblocking(False)
    with pytest.raises(BlockingIOError):
        idle[-1].recv(100)
    for connection in idle:
        connection.close()


def test_a_flood_of_connections_is_bounded(server: WebServer, noted: list[tuple[str, str]]) -> None:
    """Silent peers keep at most the allowed number of connections open."""
    silent = [connect(server) for _ in range(100)]
    until(noted, "http_connections", 84)
    assert fine(server)
    for connection in silent[:80]:
        assert cut(connection)
    for connection in silent:
        connection.close()


@pytest.mark.parametrize(
    "said",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # TLS
        b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"a" * (1 << 18),
        b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nabc\r\n",
    ],
)
def test_what_is_no_request_is_counted_and_fills_no_log(
    server: WebServer, noted: list[tuple[str, str]], said: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        for _ in range(3):
            with contextlib.suppress(ConnectionError):
                connect(server, said).close()
        until(noted, "http_garbage", 3)
        assert fine(server)
    assert not [record for record in caplog.records if record.name.startswith("uvicorn")]


def test_connections_that_arrive_at_once_are_bounded_too(server: WebServer, noted: list[tuple[str, str]]) -> None:
    assert fine(server)
    server._server.servers[0].get_loop().call_soon_threadsafe(time.sleep, 0.5)  # accepts all of them in one turn
    waiting = [connect(server, b"GET / HT") for _ in range(9)]
    until(noted, "http_connections")
    assert cut(waiting[0])
    for each in waiting:
        each.close()


def test_a_page_that_fails_ends_its_request_alone(server: WebServer, noted: list[tuple[str, str]]) -> None:
    with pytest.raises(httpx.HTTPError):
        httpx.get(f"http://{server.address}/broken", timeout=WAIT_SECONDS).raise_for_status()
    until(noted, "internal")
    assert "a page of ours" in noted[-1][1]
    assert fine(server)


@pytest.mark.process
def test_a_monitor_without_a_descriptor_logs_little_and_serves_again(
    start_process: Callable[..., MonitorProcess],
) -> None:
    monitor = start_process()
    host, port = monitor.addresses.http.split(":")
    limits = resource.prlimit(monitor.process.pid, resource.RLIMIT_NOFILE)
    used = len(os.listdir(f"/proc/{monitor.process.pid}/fd"))
    resource.prlimit(monitor.process.pid, resource.RLIMIT_NOFILE, (used + 3, limits[1]))
    with ExitStack() as stack:
        for _ in range(30):
            stack.enter_context(closing(socket.create_connection((host, int(port)), timeout=WAIT_SECONDS)))
        wait_until(lambda: "socket.accept()" in monitor.log.read_text())
        time.sleep(2.5)  # asyncio tries again each second
        assert monitor.log.read_text().count("socket.accept()") == 1
        assert monitor.log.read_text().count("Traceback") <= 1, "that of the watch on the memory"
    assert monitor.sample('messages_rejected_total{reason="http_connections"}')
    resource.prlimit(monitor.process.pid, resource.RLIMIT_NOFILE, limits)
    assert monitor.end(signal.SIGTERM) == 0
