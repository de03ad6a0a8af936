"""Watch on the monitor's memory, with peers that begin messages and never finish them."""

from __future__ import annotations

import socket
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from koopmon.errors import ConfigError, EndpointError
from koopmon.monitor import memory
from koopmon.monitor.memory import (
    CHECK_SECONDS,
    PAUSE_SECONDS,
    MemoryWatch,
    available_bytes,
    memory_limit,
    resident_bytes,
)
from tests.monitor.conftest import ScriptedAgent

Start = Callable[..., Any]
Until = Callable[[Callable[[], Any]], Any]
MIB = 1 << 20


def test_the_limit_is_half_of_the_memory_that_is_left_by_default(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert 10 * MIB < resident_bytes() < available_bytes()
    monkeypatch.setattr(memory, "resident_bytes", lambda: 250 * MIB)
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(memory, "_CONTAINER_LIMIT", limit)
    host = available_bytes()
    for text, expected in (("max\n", host), (f"{512 * MIB}\n", 512 * MIB), (f"{host * 2}\n", host)):
        limit.write_text(text)
        assert available_bytes() == expected
        assert memory_limit(0) == (expected + 250 * MIB) // 2
    limit.write_text(f"{100 * MIB}\n")
    assert memory_limit(0) == 250 * MIB


def test_a_limit_that_a_monitor_at_rest_exceeds_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would close all connections twice a minute."""
    monkeypatch.setattr(memory, "resident_bytes", lambda: 250 * MIB)
    assert memory_limit(378 * MIB) == 378 * MIB
    for configured in (1, MIB, 378 * MIB - 1):
        with pytest.raises(ConfigError, match=rf"max_memory_bytes = {configured}: expected 0, or at least {378 * MIB}"):
            memory_limit(configured)


@pytest.mark.process
def test_a_monitor_with_such_a_limit_does_not_start(start_process: Start) -> None:
    with pytest.raises(AssertionError, match="max_memory_bytes = 1048576: expected 0, or at least"):
        start_process(monitor={"max_memory_bytes": MIB})


def test_a_check_is_due_from_time_to_time(monkeypatch: pytest.MonkeyPatch) -> None:
    resident = 10
    monkeypatch.setattr(memory, "resident_bytes", lambda: resident)
    watch = MemoryWatch(10)
    assert watch.exceeded(100.0) == 0
    resident = 11
    assert watch.exceeded(100.0 + 0.9 * CHECK_SECONDS) == 0
    assert watch.exceeded(100.0 + CHECK_SECONDS) == 11
    assert watch.exceeded(100.0 + PAUSE_SECONDS) == 0
    assert watch.exceeded(101.0 + PAUSE_SECONDS) == 11


def test_an_address_that_is_taken_is_tried_again(
    start_monitor: Start, connect: Callable[..., ScriptedAgent], until: Until, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = start_monitor()
    agent = connect(served.addresses.endpoint)
    agent.hello()
    monitor, attempts = served.monitor, list[str]()
    open_sockets = monitor._channels._open

    def refused_twice(bind: str, data_bind: str | None) -> None:
        attempts.append(bind)
        if len(attempts) < 3:
            raise EndpointError("in use")
        open_sockets(bind, data_bind)

    monkeypatch.setattr(monitor._channels, "_open", refused_twice)
    monkeypatch.setattr(monitor, "_memory", MemoryWatch(1))
    until(lambda: len(attempts) == 3)
    monkeypatch.setattr(monitor, "_memory", MemoryWatch(memory_limit(0)))
    until(lambda: agent.control.connections >= 2)
    agent.hello(step=2)
    assert attempts == [served.addresses.endpoint] * 3


def began(endpoint: str, kind: str) -> socket.socket:
    """Return a connection after the handshake of ZMTP 3.0 without security (rfc.zeromq.org/spec/23)."""
    if endpoint.startswith("ipc://"):
        peer = socket.socket(socket.AF_UNIX)
        peer.connect(endpoint.removeprefix("ipc://"))
    else:
        host, _, port = endpoint.removeprefix("tcp://").rpartition(":")
        peer = socket.create_connection((host, int(port)))
    peer.settimeout(30.0)
    peer.sendall(b"\xff" + bytes(8) + b"\x7f\x03\x00" + b"NULL".ljust(20, b"\0") + bytes(32))
    name, value = b"Socket-Type", kind.encode()
    body = b"\x05READY" + bytes([len(name)]) + name + len(value).to_bytes(4, "big") + value
    peer.sendall(b"\x04" + bytes([len(body)]) + body)
    received = b""
    while b"READY" not in received:
        received += peer.recv(4096)
    return peer


@pytest.mark.process
@pytest.mark.slow
@pytest.mark.parametrize("transport", ["tcp", "ipc"])
@pytest.mark.parametrize("channel", ["control", "data"])
def test_a_message_without_end_costs_connections_and_not_the_monitor(
    start_process: Start,
    connect: Callable[..., ScriptedAgent],
    until: Until,
    tmp_path: Path,
    channel: str,
    transport: str,
) -> None:
    bind = "tcp://127.0.0.1:0" if transport == "tcp" else f"ipc://{tmp_path}/run/control"
    monitor = start_process(bind=bind, monitor={"max_memory_bytes": 1 << 30})
    honest = connect(monitor.addresses.endpoint)
    honest.hello()
    honest.snapshot(1)
    until(lambda: monitor.sample("dmd_duration_seconds_count") == 1)
    endpoint = monitor.addresses.endpoint if channel == "control" else monitor.addresses.data_endpoint
    frame = (
        b"\x03" + (32 << 10).to_bytes(8, "big") + bytes(32 << 10)
    )  # flags: more frames follow, eight bytes of length
    with began(endpoint, "DEALER" if channel == "control" else "PUSH") as hostile:
        sent = 0
        while "all connections are closed" not in monitor.log.read_text():
            assert sent < 8 << 30
            with suppress(OSError):  # the closed connection
                for _ in range(256):
                    hostile.sendall(frame)
            sent += 256 * len(frame)
    assert monitor.process.poll() is None
    until(lambda: honest.control.connections >= 2)
    honest.hello(step=2)
    honest.snapshot(3)
    until(lambda: monitor.sample("dmd_duration_seconds_count") == 2)
    assert monitor.sample('messages_rejected_total{reason="flood"}') >= 1
    until(lambda: int(Path(f"/proc/{monitor.process.pid}/statm").read_text().split()[1]) * 4096 < 900 * MIB)
