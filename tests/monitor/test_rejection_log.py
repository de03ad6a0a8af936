"""A peer can cause every counted reason, and the limits of the configuration hold."""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
import torch

from koopmon.telemetry.metrics import REJECTIONS
from koopmon.wire.codec import encode
from koopmon.wire.headers import MAGIC, PREFIX
from koopmon.wire.messages import Ack, Applied, Heartbeat, Refused, TrainingStep

httpx = pytest.importorskip("httpx")

Cause = Callable[[Any, Callable[..., Any], Any], None]
LIMITS = {"max_runs": 1, "max_peers": 2, "max_layers": 8, "max_header_bytes": 4096, "max_http_connections": 4}


def _agent(monitor: Any, connect: Any, **options: Any) -> Any:
    agent = connect(monitor.addresses.endpoint, **options)
    agent.hello()
    return agent


def garbage(monitor: Any, connect: Any, patch: Any) -> None:
    connect(monitor.addresses.endpoint).send_frames([b"hello there"])


def version(monitor: Any, connect: Any, patch: Any) -> None:
    connect(monitor.addresses.endpoint).send_frames([MAGIC + b"\xff"])


def direction(monitor: Any, connect: Any, patch: Any) -> None:
    agent = _agent(monitor, connect)
    agent.send_data(encode(Heartbeat(**agent.name, process_rank=0, training=TrainingStep(step=1), applied=Applied())))


def schema(monitor: Any, connect: Any, patch: Any) -> None:
    connect(monitor.addresses.endpoint).send_frames([PREFIX + msgspec.msgpack.encode({"type": "hello"})])


def size(monitor: Any, connect: Any, patch: Any) -> None:
    agent = _agent(monitor, connect)
    agent.send_data([PREFIX] + [b"x"] * 10)


def shape(monitor: Any, connect: Any, patch: Any) -> None:
    agent = _agent(monitor, connect)
    beat = encode(Heartbeat(**agent.name, process_rank=0, training=TrainingStep(step=1), applied=Applied()))
    agent.send_data([*beat, b"x"])


def identity(monitor: Any, connect: Any, patch: Any) -> None:
    _agent(monitor, connect)
    impostor = connect(monitor.addresses.endpoint)
    impostor.send(Heartbeat(**impostor.name, process_rank=0, training=TrainingStep(step=1), applied=Applied()))


def unknown_run(monitor: Any, connect: Any, patch: Any) -> None:
    agent = connect(monitor.addresses.endpoint)
    agent.send(Heartbeat(**agent.name, process_rank=0, training=TrainingStep(step=1), applied=Applied()))


def stale_incarnation(monitor: Any, connect: Any, patch: Any) -> None:
    agent = _agent(monitor, connect)
    agent.send(
        Heartbeat(run="job", incarnation="b" * 8, process_rank=0, training=TrainingStep(step=1), applied=Applied())
    )


def refused(monitor: Any, connect: Any, patch: Any) -> None:
    _agent(monitor, connect)
    assert isinstance(connect(monitor.addresses.endpoint, run="another").hello(), Refused)


def duplicate(monitor: Any, connect: Any, patch: Any) -> None:
    agent = _agent(monitor, connect, num_senders=2)
    for _ in range(2):
        agent.snapshot(1)


def late(monitor: Any, connect: Any, patch: Any) -> None:
    agent = _agent(monitor, connect)
    for _ in range(2):
        agent.snapshot(1)


def inconsistent(monitor: Any, connect: Any, patch: Any) -> None:
    agent = _agent(monitor, connect, num_senders=2)
    agent.snapshot(1)
    agent.snapshot(1, torch.zeros((4, 96, 6)).bfloat16(), process_rank=1)


def unknown_command(monitor: Any, connect: Any, patch: Any) -> None:
    agent = _agent(monitor, connect)
    agent.send(Ack(**agent.name, command_id="f" * 8, outcome="applied", step=1, applied=Applied()))


def flood(monitor: Any, connect: Any, patch: Any) -> None:
    agent = _agent(monitor, connect)
    patch.setattr(monitor.monitor._channels.control._waiting, "_max_bytes", 1)
    beat = encode(Heartbeat(**agent.name, process_rank=0, training=TrainingStep(step=1), applied=Applied()))
    for _ in range(2000):
        agent.control.send(beat)


def http_garbage(monitor: Any, connect: Any, patch: Any) -> None:
    with _http(monitor, b"\x16\x03\x01") as connection:
        assert b" 400 " in connection.recv(100)


def http_connections(monitor: Any, connect: Any, patch: Any) -> None:
    idle = [_http(monitor, b"GET / HT") for _ in range(5)]
    assert cut(idle[0])
    for each in idle:
        each.close()


def cut(connection: socket.socket) -> bool:
    """Return True if the server ended it: a reset with unread data."""
    try:
        return connection.recv(100) == b""
    except ConnectionResetError:
        return True


CAUSES: tuple[Cause, ...] = (
    *(garbage, version, direction, schema, size, shape, identity, unknown_run, stale_incarnation, refused),
    *(duplicate, late, inconsistent, unknown_command, flood, http_garbage, http_connections),
)


def _http(monitor: Any, said: bytes) -> socket.socket:
    host, _, port = monitor.addresses.http.rpartition(":")
    connection = socket.create_connection((host, int(port)), timeout=60.0)
    connection.sendall(said)
    return connection


@pytest.mark.parametrize("cause", CAUSES, ids=lambda cause: cause.__name__)
def test_every_reason_is_counted(
    start_monitor: Callable[..., Any], connect: Any, until: Any, monkeypatch: pytest.MonkeyPatch, cause: Cause
) -> None:
    monitor = start_monitor(monitor=LIMITS)
    cause(monitor, connect, monkeypatch)

    def counted() -> dict[str, float]:
        found = {reason: monitor.sample(f'messages_rejected_total{{reason="{reason}"}}') for reason in REJECTIONS}
        return {reason: count for reason, count in found.items() if count}

    until(lambda: cause.__name__ in counted())
    assert set(counted()) == {cause.__name__}
    assert httpx.get(f"http://{monitor.addresses.http}/readyz", timeout=60.0).status_code == 200


def test_no_reason_is_left_out() -> None:
    """test_daemon has "internal", test_event_stream has "http_slow", and tests/attacks has those of keys."""
    elsewhere = {"internal", "http_slow", "key", "handshake", "authorisation"}
    assert {cause.__name__ for cause in CAUSES} == set(REJECTIONS) - elsewhere


def test_one_rank_too_many_is_told_why(start_monitor: Callable[..., Any], connect: Any) -> None:
    monitor = start_monitor(monitor=LIMITS)
    for rank in range(2):
        _agent(monitor, connect, rank=rank, num_senders=3)
    answer = connect(monitor.addresses.endpoint, rank=2, num_senders=3).hello()
    assert isinstance(answer, Refused)
    assert "max_peers" in answer.reason
