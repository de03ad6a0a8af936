"""Messages to a real datagram socket that stands for systemd."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from koopmon.monitor.systemd import Watchdog, sd_notify


@pytest.fixture(params=["path", "abstract"])
def systemd(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[tuple[socket.socket, str]]:
    """A socket, and its name in NOTIFY_SOCKET."""
    name = f"@koopmon-test-{os.getpid()}" if request.param == "abstract" else str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
        channel.bind(name.replace("@", "\0", 1))
        channel.settimeout(60.0)
        yield channel, name


def received(channel: socket.socket) -> list[bytes]:
    """Return the messages that have arrived."""
    channel.setblocking(False)
    found = []
    try:
        while True:
            found.append(channel.recv(100))
    except BlockingIOError:
        return found


def test_a_message_arrives(systemd: tuple[socket.socket, str]) -> None:
    channel, name = systemd
    sd_notify("READY=1", {"NOTIFY_SOCKET": name})
    assert received(channel) == [b"READY=1"]


@pytest.mark.parametrize("name", ["", "relative", "/no/such/socket", "@koopmon-nobody", "vsock:2:1", "/" + "x" * 500])
def test_without_a_socket_nothing_happens(name: str) -> None:
    sd_notify("READY=1", {"NOTIFY_SOCKET": name})
    sd_notify("READY=1", {})


def test_a_systemd_that_reads_nothing_does_not_block_the_monitor(systemd: tuple[socket.socket, str]) -> None:
    channel, name = systemd
    for _ in range(5000):
        sd_notify("WATCHDOG=1", {"NOTIFY_SOCKET": name})
    assert 0 < len(received(channel)) < 5000, "the queue of the socket was full"


def test_the_watchdog_sends_twice_in_a_period(systemd: tuple[socket.socket, str]) -> None:
    channel, name = systemd
    now = [100.0]
    watchdog = Watchdog({"NOTIFY_SOCKET": name, "WATCHDOG_USEC": "10000000"}, lambda: now[0])
    for tenth in range(200):
        now[0] = 100.0 + tenth / 10
        watchdog.alive()
    assert received(channel) == [b"WATCHDOG=1"] * 4


@pytest.mark.parametrize(
    "environ",
    [{}, {"WATCHDOG_USEC": "0"}, {"WATCHDOG_USEC": "-1"}, {"WATCHDOG_USEC": "soon"},
     {"WATCHDOG_USEC": "1", "WATCHDOG_PID": "1"}],
)  # fmt: skip
def test_no_watchdog_is_asked_for(systemd: tuple[socket.socket, str], environ: dict[str, str]) -> None:
    channel, name = systemd
    watchdog = Watchdog({"NOTIFY_SOCKET": name, **environ})
    for _ in range(3):
        watchdog.alive()
    assert received(channel) == []


def test_a_loop_that_stands_still_sends_nothing(
    start_monitor: Callable[..., Any], until: Callable[[Callable[[], Any]], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A failed wait is no sign of life, as for /healthz."""
    turns: list[None] = []
    monitor = start_monitor()
    monitor.monitor.turned = lambda: turns.append(None)
    until(lambda: len(turns) > 1)

    def fail() -> float:
        raise RuntimeError("no deadline")

    monkeypatch.setattr(monitor.monitor._service, "next_deadline", fail)
    until(lambda: (monitor.sample('internal_errors_total{part="loop"}') or 0) > 1)
    seen = len(turns)
    until(lambda: (monitor.sample('internal_errors_total{part="loop"}') or 0) > 4)
    assert len(turns) == seen
    monkeypatch.undo()


@pytest.mark.process
def test_a_monitor_reports_ready_alive_and_stopping(
    start_process: Callable[..., Any], systemd: tuple[socket.socket, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    channel, name = systemd
    monkeypatch.setenv("NOTIFY_SOCKET", name)
    monkeypatch.setenv("WATCHDOG_USEC", "100000")
    monitor = start_process()
    assert channel.recv(100) == b"READY=1"
    assert [channel.recv(100) for _ in range(3)] == [b"WATCHDOG=1"] * 3
    assert monitor.end(signal.SIGTERM) == 0
    assert b"STOPPING=1" in received(channel)
