"""Keys on real sockets: admission, identity, and reconnection after a refusal."""

from __future__ import annotations

import socket
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import zmq

from koopmon.errors import KeysError
from koopmon.wire.auth_policy import AuthPolicy
from koopmon.wire.authorized_keys import CHECK_SECONDS
from koopmon.wire.codec import encode
from koopmon.wire.curve import Refusal, new_pair
from koopmon.wire.keys import MONITOR, public_file, read_public, secret_file, write_public
from koopmon.wire.messages import HeartbeatReply, Shard, TrainingStep
from koopmon.wire.sockets import ControlClient, ControlServer, DataReceiver, DataSender, Poller
from koopmon.wire.transport import WireContext
from tests.keyring import Keyring

Until = Callable[..., None]
REPLY = encode(HeartbeatReply(run="job", incarnation="00c0ffee"))
LOOPBACK = "tcp://127.0.0.1:0"


@pytest.fixture
def ring(tmp_path: Path) -> Keyring:
    return Keyring(tmp_path / "keys")


class Far:
    """A monitor's two sockets; `turn` runs one turn of its loop."""

    def __init__(self, trust: AuthPolicy, bind: str = LOOPBACK) -> None:
        self.context = WireContext(trust)
        self.control = ControlServer(self.context, bind)
        self.data = DataReceiver(self.context, LOOPBACK)
        self.refusals: list[Refusal] = []
        self._poller = Poller(self.control, self.data)

    def turn(self, *near: Any) -> None:
        for client in near:
            client.retry()
        self._poller.wait(0.01)
        self.refusals += [*self.control.take_refusals(), *self.data.take_refusals()]

    def refused(self, reason: str) -> bool:
        self.turn()
        return any(refusal.reason == reason for refusal in self.refusals)


@pytest.fixture
def serve() -> Iterator[Callable[..., Far]]:
    made: list[Far] = []

    def start(trust: AuthPolicy, bind: str = LOOPBACK) -> Far:
        made.append(Far(trust, bind))
        return made[-1]

    yield start
    for far in made:
        far.context.close()


@pytest.fixture
def client() -> Iterator[Callable[..., Any]]:
    contexts: list[WireContext] = []

    def make(kind: Any, trust: AuthPolicy | None, endpoint: str) -> Any:
        contexts.append(WireContext(trust))
        return kind(contexts[-1], endpoint)

    yield make
    for context in contexts:
        context.close()


def test_both_channels_know_whose_key_it_was(
    ring: Keyring, serve: Callable[..., Far], client: Callable[..., Any], until: Until
) -> None:
    pairs = {name: ring.agent(name) for name in ("one", "two")}
    far = serve(ring.trust())
    assert far.control.requires_keys
    assert far.data.requires_keys
    states = torch.ones(1, 4, 4)
    header = Shard(
        run="job", incarnation="00c0ffee", process_rank=0, num_senders=1, training=TrainingStep(step=1),
            first_point=0, num_points=1,
        num_samples=4, width=4, dtype="float32",
    )  # fmt: skip
    for name, pair in pairs.items():
        near = client(ControlClient, ring.trust(name), far.control.endpoint)
        until(lambda near=near: far.turn() or near.connected)
        assert near.send(REPLY)
        until(lambda: far.turn() or far.control.recv() is not None)
        assert far.control.sender_key == pair.public
        data = client(DataSender, ring.trust(name), far.data.endpoint)
        until(lambda data=data: far.turn() or data.connected)
        assert data.send(encode(header, states)) is None
        until(lambda: far.turn() or far.data.recv() is not None)
        assert far.data.sender_key == pair.public
        assert far.control.send(b"nobody", REPLY) is False
    assert far.refusals == []


def test_a_key_that_no_agent_has_is_refused_and_let_in_once_it_is_known(
    ring: Keyring, serve: Callable[..., Far], client: Callable[..., Any], until: Until, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("koopmon.wire.client.RETRY_SECONDS", 0.1)
    pair = ring.agent(served=False)
    far = serve(ring.trust())
    near = client(ControlClient, ring.trust(), far.control.endpoint)
    until(lambda: far.refused("key"))
    assert pair.public in far.refusals[0].detail
    until(lambda: far.turn(near) or near.failure)
    assert "agents/" in near.failure
    assert not near.connected
    assert not near.send(REPLY)
    ring.serve("agent")
    until(lambda: far.turn(near) or near.connected, timeout=20.0 + CHECK_SECONDS)
    assert near.failure == ""
    assert near.connections == 1


@pytest.mark.parametrize("kind", [ControlClient, DataSender])
def test_a_server_with_another_key_is_not_spoken_to(
    ring: Keyring, serve: Callable[..., Far], client: Callable[..., Any], until: Until, tmp_path: Path, kind: Any
) -> None:
    ring.agent()
    impostor = Keyring(tmp_path / "impostor")
    impostor.agent(served=False)
    victim = read_public(public_file(ring.place, "agent"))
    write_public(public_file(impostor.place / "agents", "victim"), victim)
    far = serve(impostor.trust())
    near = client(kind, ring.trust(), far.control.endpoint if kind is ControlClient else far.data.endpoint)
    until(lambda: far.refused("handshake"))
    until(lambda: far.turn(near) or near.failure)
    assert "monitor.key" in near.failure
    assert not near.connected
    assert far.control.recv() is None


def test_without_keys_there_is_no_way_in(
    ring: Keyring, serve: Callable[..., Far], client: Callable[..., Any], until: Until
) -> None:
    far = serve(ring.trust())
    near = client(ControlClient, None, far.control.endpoint)
    until(lambda: far.refused("handshake"))
    until(lambda: far.turn(near) or near.failure)
    assert "demands keys" in near.failure
    assert not near.connected


def test_with_keys_there_is_no_way_to_who_has_none(
    ring: Keyring, serve: Callable[..., Far], client: Callable[..., Any], until: Until
) -> None:
    ring.agent()
    far = serve(AuthPolicy())
    near = client(ControlClient, ring.trust(), far.control.endpoint)
    until(lambda: far.turn(near) or near.failure)
    assert "shows none" in near.failure
    assert not near.connected


def test_a_client_that_calls_itself_someone_is_no_one_where_no_keys_are_demanded(
    serve: Callable[..., Far], until: Until
) -> None:
    """ZMTP lets a client send its own properties, such as User-Id: an unverified key."""
    far = serve(AuthPolicy())
    stolen = new_pair().public
    properties = {b"Socket-Type": b"DEALER", b"Identity": b"", b"User-Id": stolen.encode()}
    ready = b"\x05READY" + b"".join(
        bytes([len(name)]) + name + struct.pack(">I", len(value)) + value for name, value in properties.items()
    )
    port = int(far.control.endpoint.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port)) as raw:
        raw.sendall(b"\xff" + bytes(8) + b"\x7f\x03\x00" + b"NULL".ljust(20, b"\0") + b"\0" + bytes(31))
        greeting = b""
        while len(greeting) < 64:  # continuing before it has arrived breaks the protocol
            greeting += raw.recv(64 - len(greeting))
        raw.sendall(b"\x04" + bytes([len(ready)]) + ready)
        raw.sendall(b"\x00" + bytes([len(REPLY[0])]) + bytes(REPLY[0]))
        heard: list[Any] = []
        until(lambda: far.turn() or heard.append(far.control.recv()) or heard[-1])
    assert far.control.sender_key == ""
    assert not far.control.requires_keys


def test_a_rotated_monitor_is_found_again_before_and_after_its_restart(
    ring: Keyring, serve: Callable[..., Far], client: Callable[..., Any], until: Until, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("koopmon.wire.client.RETRY_SECONDS", 0.1)
    ring.agent()
    far = serve(ring.trust())
    endpoint = far.control.endpoint
    running = client(ControlClient, ring.trust(), endpoint)
    until(lambda: far.turn() or running.connected)
    ring.rotate_monitor()
    late = client(ControlClient, ring.trust(), endpoint)
    until(lambda: far.turn(late) or late.connected)
    assert running.connected
    far.context.close()
    until(lambda: not running.connected)
    restarted = serve(ring.trust(), endpoint)
    for near in (running, late):
        until(lambda near=near: restarted.turn(near) or near.connected)


def test_keys_that_cannot_be_used_are_told_for_which_endpoint(ring: Keyring, tmp_path: Path) -> None:
    ring.agent()
    with WireContext(AuthPolicy(tmp_path / "none")) as context:
        for kind in (ControlServer, DataReceiver):
            with pytest.raises(KeysError, match=r"'tcp://0\.0\.0\.0:\*' needs keys: keys .*none: no such file"):
                kind(context, "tcp://0.0.0.0:0")
        with pytest.raises(KeysError, match="none: no such file"):
            ControlClient(context, "tcp://10.0.0.1:1")
    secret_file(ring.place, MONITOR).chmod(0o640)
    with WireContext(ring.trust()) as context:
        with pytest.raises(KeysError, match=r"monitor\.secret: mode 0640 lets others read it; chmod 600"):
            ControlServer(context, LOOPBACK)
        assert not context._sockets


def test_keys_that_go_away_later_are_told_and_nothing_breaks(
    ring: Keyring, client: Callable[..., Any], serve: Callable[..., Far], until: Until, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("koopmon.wire.client.RETRY_SECONDS", 0.05)
    ring.agent(served=False)
    far = serve(ring.trust())
    near = client(ControlClient, ring.trust(), far.control.endpoint)
    until(lambda: far.turn(near) or near.failure)
    secret_file(ring.place, "agent").chmod(0o644)
    until(lambda: far.turn(near) or "chmod 600" in near.failure)
    secret_file(ring.place, "agent").chmod(0o600)
    ring.serve("agent")
    until(lambda: far.turn(near) or near.connected)


def test_a_server_whose_gate_is_gone_lets_nobody_in(
    ring: Keyring, serve: Callable[..., Far], client: Callable[..., Any], until: Until
) -> None:
    ring.agent()
    far = serve(ring.trust())
    assert far.context._zap_handler is not None
    far.context._zap_handler.close()
    with zmq.Context() as bare, bare.socket(zmq.DEALER) as raw:
        raw.set(zmq.LINGER, 0)
        raw.set(zmq.IMMEDIATE, 1)
        raw.set(zmq.SNDTIMEO, 1000)
        pair = new_pair()
        raw.set(zmq.CURVE_SERVERKEY, ring.monitor.public.encode())
        raw.set(zmq.CURVE_PUBLICKEY, pair.public.encode())
        raw.set(zmq.CURVE_SECRETKEY, pair.secret.encode())
        raw.connect(far.control.endpoint)
        with pytest.raises(zmq.Again):
            raw.send(b"let me in")
    assert far.control._socket.poll(0) == 0
