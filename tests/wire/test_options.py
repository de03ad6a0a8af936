"""Every option of every socket, so that a new one needs a check of its effect in libzmq."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import zmq

from koopmon.wire.headers import WireLimits
from koopmon.wire.sockets import ControlClient, ControlServer, DataReceiver, DataSender, ProbeClient
from koopmon.wire.transport import WireContext
from tests.keyring import Keyring

LIMITS = WireLimits()
WIRE = Path(__file__).parents[2] / "koopmon" / "wire"
COMMON = {
    "TCP_KEEPALIVE": 1,
    "TCP_KEEPALIVE_IDLE": 30,
    "TCP_KEEPALIVE_INTVL": 10,
    "TCP_KEEPALIVE_CNT": 3,
    "TCP_MAXRT": 60_000,
    "IPV6": 0,
}
CLIENT = {
    "IMMEDIATE": 1,
    "RECONNECT_IVL": 100,
    "RECONNECT_IVL_MAX": 1000,
    "CONNECT_TIMEOUT": 5000,
    "HANDSHAKE_IVL": 5000,
}
SERVER = {"ZAP_DOMAIN": b"koopmon"}
CONTROL = {"LINGER": 500, "SNDHWM": 64, "RCVHWM": 0, "MAXMSGSIZE": 2 * LIMITS.max_header_bytes}
OPTIONS: dict[Any, dict[str, Any]] = {
    ControlClient: COMMON | CLIENT | CONTROL,
    ProbeClient: COMMON | CLIENT | CONTROL,
    ControlServer: COMMON | SERVER | CONTROL | {"ROUTER_MANDATORY": 1},
    DataSender: COMMON | CLIENT | {"LINGER": 0, "SNDHWM": 2, "RCVHWM": 1, "MAXMSGSIZE": 4096},
    DataReceiver: COMMON | SERVER | {"LINGER": 0, "RCVHWM": 0, "MAXMSGSIZE": LIMITS.max_message_bytes},
}
KEYS = {
    "client": {"CURVE_SERVERKEY", "CURVE_SECRETKEY", "CURVE_PUBLICKEY"},
    "server": {"CURVE_SERVER", "CURVE_SECRETKEY", "CURVE_PUBLICKEY", "ZAP_ENFORCE_DOMAIN", "ZAP_DOMAIN"},
}
WHY = """
HEARTBEAT_IVL, HEARTBEAT_TIMEOUT, HEARTBEAT_TTL: the timer writes to a connection that may be marked as broken, and
libzmq aborts the process (`!_io_error`, stream_engine_base.cpp). The control channel has heartbeats of its own.
RCVHWM on a socket that is read: a full queue is what lets a connection be marked so while it still has input, and a
PING of its peer in that input aborts the process as well, whatever our own options are. The limits are those of
koopmon.wire.receive_queue.
HANDSHAKE_IVL is a timer too: it ends with the handshake, before which no queue can be full.
ROUTER_HANDOVER and all others that are not listed here: not used, and not looked into.
"""


def options_of(kind: Any, context: WireContext, endpoint: str, patch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Options of the socket itself; its events have a socket of their own."""
    found: dict[Any, dict[str, Any]] = {}
    true_set = zmq.Socket.set

    def note(self: Any, option: int, value: Any) -> None:
        found.setdefault(self, {})[zmq.SocketOption(option).name] = value
        true_set(self, option, value)

    with patch.context() as patched:
        patched.setattr(zmq.Socket, "set", note)
        ours = kind(context, endpoint)
    return {name: value if isinstance(value, bytes) else int(value) for name, value in found[ours._socket].items()}


def endpoint_of(kind: Any) -> str:
    return "tcp://127.0.0.1:0" if kind in (ControlServer, DataReceiver) else "tcp://127.0.0.1:1"


@pytest.mark.parametrize("kind", OPTIONS, ids=lambda kind: kind.__name__)
def test_each_socket_has_these_options_and_no_others(
    kind: Any, near: WireContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert options_of(kind, near, endpoint_of(kind), monkeypatch) == OPTIONS[kind], WHY


@pytest.mark.parametrize("kind", OPTIONS, ids=lambda kind: kind.__name__)
def test_keys_add_their_own(kind: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ring = Keyring(tmp_path / "keys")
    ring.agent()
    with WireContext(ring.trust()) as context:
        found = options_of(kind, context, endpoint_of(kind), monkeypatch)
    side = "server" if kind in (ControlServer, DataReceiver) else "client"
    assert set(found) - set(OPTIONS[kind]) == KEYS[side] - {"ZAP_DOMAIN"}, WHY
    assert {name: found[name] for name in OPTIONS[kind]} == OPTIONS[kind], WHY


def test_nothing_in_the_wire_sets_a_zmtp_heartbeat() -> None:
    for path in WIRE.glob("*.py"):
        assert not re.search(r"zmq\.HEARTBEAT|ROUTER_HANDOVER|setsockopt", path.read_text(encoding="utf-8")), WHY


def test_what_is_new_in_libzmq_is_looked_at() -> None:
    """The assertions were read in 4.3.5; the sources of later versions have the same."""
    assert zmq.zmq_version_info()[:2] == (4, 3)
