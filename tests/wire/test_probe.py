"""Probes of an endpoint: real sockets on both sides, and peers that are not monitors."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from koopmon.errors import EndpointError, KeysError
from koopmon.wire.auth_policy import AuthPolicy
from koopmon.wire.headers import PREFIX
from koopmon.wire.messages import PROTOCOL_VERSION, HeartbeatReply
from koopmon.wire.probe import probe, reaches_data
from koopmon.wire.sockets import ControlServer, Poller
from koopmon.wire.transport import WireContext
from tests.agent.scripted_monitor import ScriptedMonitor, encode
from tests.keyring import Keyring

PLAIN = AuthPolicy()
OLDER = bytes([*PREFIX[:-1], PROTOCOL_VERSION - 1])


@contextmanager
def answering(answer: bytes) -> Iterator[str]:
    """Endpoint of a peer that completes handshakes and sends `answer` for every message."""
    stop = threading.Event()
    bound: list[str] = []
    ready = threading.Event()

    def serve() -> None:
        with WireContext() as context, ControlServer(context, "tcp://127.0.0.1:0") as server:
            bound.append(server.endpoint)
            ready.set()
            poller = Poller(server)
            while not stop.is_set():
                poller.wait(0.05)
                while (received := server.recv()) is not None:
                    server.send(received[0], [answer])

    thread = threading.Thread(target=serve)
    thread.start()
    assert ready.wait(10.0)
    try:
        yield bound[0]
    finally:
        stop.set()
        thread.join(10.0)


def test_a_monitor_answers_with_its_versions_its_clock_and_its_data_endpoint(tmp_path: Path) -> None:
    with ScriptedMonitor(tmp_path, koopmon_version="9.9", clock_offset_seconds=100.0) as monitor:
        found = probe(monitor.endpoint, PLAIN, run="mine")
        assert found.reply is not None
        assert (found.reply.run, found.reply.koopmon_version) == ("mine", "9.9")
        assert (found.reached, found.shook_hands, found.failure) == (True, True, "")
        assert found.clock_offset_seconds == pytest.approx(100.0, abs=0.5 + found.round_trip_seconds)
        assert reaches_data(found.reply.data_endpoint, monitor.endpoint, PLAIN) == ""


@pytest.mark.parametrize("endpoint", ["tcp://127.0.0.1:1", "ipc:///tmp/koopmon-nobody/control"])
def test_nobody_listens(endpoint: str) -> None:
    found = probe(endpoint, PLAIN, timeout_seconds=0.5)
    assert (found.reply, found.reached, found.shook_hands) == (None, False, False)
    assert reaches_data(endpoint, endpoint, PLAIN, timeout_seconds=0.3) == "no server there"


def test_a_server_of_pages_is_no_monitor() -> None:
    class Quiet(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            return

    with HTTPServer(("127.0.0.1", 0), Quiet) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        found = probe(f"tcp://127.0.0.1:{server.server_port}", PLAIN, timeout_seconds=1.0)
        server.shutdown()
        thread.join(10.0)
    assert (found.reply, found.reached, found.shook_hands) == (None, True, False)


def test_who_listens_and_says_nothing_is_given_up(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        began = time.monotonic()
        found = probe(f"tcp://127.0.0.1:{listener.getsockname()[1]}", PLAIN, timeout_seconds=0.5)
        assert 0.4 < time.monotonic() - began < 20.0
    assert (found.reply, found.reached, found.shook_hands) == (None, True, False)


@pytest.mark.parametrize(
    ("answer", "reason", "says"),
    [
        (
            bytes([*PREFIX[:-1], PROTOCOL_VERSION - 1]) + b"\x80",
            "version",
            f"has protocol version {PROTOCOL_VERSION - 1}",
        ),
        (b"hello", "garbage", "another program is talking"),
        (PREFIX + b"\x80", "schema", "type"),
        (bytes(encode(HeartbeatReply(run="a", incarnation="0" * 8))[0]), "direction", "HeartbeatReply"),
        (PREFIX + b"x" * 70_000, "size", "70008 bytes"),
    ],
)
def test_an_answer_that_breaks_the_protocol_is_told(answer: bytes, reason: str, says: str) -> None:
    with answering(answer) as endpoint:
        found = probe(endpoint, PLAIN)
    assert (found.reply, found.shook_hands, found.reason) == (None, True, reason)
    assert says in found.failure


def test_keys(tmp_path: Path) -> None:
    ring = Keyring(tmp_path / "keys")
    ring.agent("agent")
    ring.agent("stranger", served=False)
    with ScriptedMonitor(tmp_path, trust=ring.trust()) as monitor:
        found = probe(monitor.endpoint, ring.trust())
        assert found.reply is not None
        assert reaches_data(found.reply.data_endpoint, monitor.endpoint, ring.trust()) == ""
        assert "does not know this agent's key" in probe(monitor.endpoint, ring.trust("stranger")).failure
        assert "it demands keys" in probe(monitor.endpoint, PLAIN).failure
        other = Keyring(tmp_path / "others")
        other.agent("agent")
        assert "its key is not the one in monitor.key" in probe(monitor.endpoint, other.trust()).failure
        assert reaches_data(found.reply.data_endpoint, monitor.endpoint, other.trust()) != ""
    with pytest.raises(KeysError, match="koopmon keys make"):
        probe(monitor.endpoint, ring.trust("nobody"))


def test_what_is_no_endpoint_is_refused() -> None:
    with pytest.raises(EndpointError, match="expected tcp://HOST:PORT"):
        probe("nonsense", PLAIN)
