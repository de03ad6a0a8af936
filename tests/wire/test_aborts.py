"""No peer ends the process: libzmq 4.3.5 calls abort() in several cases.

The docstrings have the assertion. koopmon/wire describes the protection beside the option that provides it.
"""

from __future__ import annotations

import contextlib
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.fuzz.strangers import GREETING, PING, frame, ready
from koopmon.errors import EndpointError
from koopmon.wire.codec import encode
from koopmon.wire.messages import Goodbye
from koopmon.wire.sockets import ControlClient, ControlServer, DataReceiver, DataSender, Poller
from koopmon.wire.transport import WireContext
from tests.keyring import Keyring

pytestmark = pytest.mark.process

ROOT = Path(__file__).parents[2]
SECONDS = 60.0
Until = Callable[..., None]
Program = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def program() -> Iterator[Program]:
    """Start a Python program with pipes; end it if it still runs."""
    started: list[subprocess.Popen[str]] = []

    def start(*arguments: object) -> subprocess.Popen[str]:
        pipes: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        command = [sys.executable, *map(str, arguments)]
        started.append(subprocess.Popen(command, cwd=ROOT, text=True, **pipes))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    said = process.stdout.readline().strip()
    assert said, process.communicate()[1]
    return said


def finish(process: subprocess.Popen[str]) -> str:
    """Let the program end, which must be normal; return its output."""
    said, errors = process.communicate("\n", timeout=SECONDS)
    assert (process.returncode, errors) == (0, ""), f"it ended with status {process.returncode}: {errors}"
    return said


KINDS = ("ControlServer", "DataReceiver", "ControlClient", "ProbeClient")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("transport", ["ipc", "tcp", "curve"])
def test_a_peer_with_zmtp_heartbeats_floods_and_is_killed(
    kind: str, transport: str, program: Program, tmp_path: Path
) -> None:
    """`!_io_error`: its PINGs are still in the buffer of a broken connection."""
    endpoint = f"ipc://{tmp_path}/run/wire" if transport == "ipc" else "tcp://127.0.0.1:0"
    keys: list[object] = []
    if transport == "curve":
        ring = Keyring(tmp_path / "keys")
        ring.agent()
        keys = [ring.place]
    ours_binds = kind in ("ControlServer", "DataReceiver")
    first, second = ("stand", "flood") if ours_binds else ("flood", "stand")
    bound = program("-m", "tests.wire.peers", first, kind, endpoint, *keys)
    connected = program("-m", "tests.wire.peers", second, kind, line(bound), *keys)
    ours, peer = (bound, connected) if ours_binds else (connected, bound)
    line(connected)
    assert line(peer) == "found"
    ours.send_signal(signal.SIGSTOP)  # so that one later read gets many messages
    peer.communicate("\n", timeout=SECONDS)
    assert peer.returncode == -signal.SIGKILL
    ours.send_signal(signal.SIGCONT)
    time.sleep(0.1)
    assert int(finish(ours)) > 0 or not ours_binds  # a client drops unread messages with its connection


def dial(endpoint: str) -> socket.socket:
    if endpoint.startswith("ipc://"):
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(endpoint.removeprefix("ipc://"))
        return connection
    host, _, port = endpoint.removeprefix("tcp://").rpartition(":")
    return socket.create_connection((host, int(port)), timeout=10.0)


def shake_hands(connection: socket.socket, kind: bytes) -> None:
    """Send the handshake of ZMTP 3.1 without keys, as the socket type `kind`."""
    connection.settimeout(10.0)
    connection.sendall(GREETING)
    _read(connection, 64)
    connection.sendall(ready(kind))
    _read(connection, _read(connection, 2)[1])


def _read(connection: socket.socket, count: int) -> bytes:
    said = b""
    while len(said) < count:
        more = connection.recv(count - len(said))
        if not more:
            raise ConnectionError("cut")
        said += more
    return said


def die(connection: socket.socket) -> None:
    """Reset a connection, like the kernel for a killed process with unread data."""
    if connection.family != socket.AF_UNIX:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


@pytest.mark.parametrize(("kind", "peer"), [("ControlServer", b"DEALER"), ("DataReceiver", b"PUSH")])
def test_a_stranger_pings_and_leaves(kind: str, peer: bytes, endpoint: str, program: Program) -> None:
    """`!_io_error` for two kilobytes from any peer that can reach the port."""
    ours = program("-m", "tests.wire.peers", "stand", kind, endpoint)
    connection = dial(line(ours))
    shake_hands(connection, peer)
    connection.sendall((frame(b"x" * 20) * 70 + PING) * 3)
    time.sleep(0.2)
    die(connection)
    time.sleep(0.1)
    assert int(finish(ours)) == 210, "what had been sent is read"


class Impostor:
    """Monitor in a thread that completes handshakes, sends `said` on each connection, and closes it."""

    def __init__(self, kind: bytes, said: Callable[[int], bytes]) -> None:
        self._kind, self._said = kind, said
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"tcp://127.0.0.1:{self._listener.getsockname()[1]}"
        self.served = 0
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with contextlib.suppress(OSError):
                shake_hands(connection, self._kind)
                time.sleep(0.005)
                connection.sendall(self._said(self.served))
                time.sleep(0.0004 * (self.served % 8))
                self.served += 1
            die(connection)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(10.0)


@pytest.fixture
def impostor() -> Iterator[Callable[..., Impostor]]:
    made: list[Impostor] = []

    def start(kind: bytes, said: Callable[[int], bytes]) -> Impostor:
        made.append(Impostor(kind, said))
        return made[-1]

    yield start
    for each in made:
        each.close()


AGENT = """
import contextlib, sys, time
from koopmon.errors import ProtocolError
from koopmon.wire import client, sockets
from koopmon.wire.sockets import *
client.RETRY_SECONDS = sockets.RETRY_SECONDS = 0.02
with WireContext() as context:
    ours = ControlClient(context, sys.argv[1])
    poller, until = Poller(ours), time.monotonic() + 4.0
    while time.monotonic() < until:
        ours.retry()
        poller.wait(0.02)
        for _ in range(64):
            with contextlib.suppress(ProtocolError):
                if ours.recv() is None:
                    break
"""


@pytest.mark.parametrize("num_frames", [1, 2, 3, 50])
def test_a_monitor_dies_while_its_messages_are_read(
    num_frames: int, program: Program, impostor: Callable[..., Impostor]
) -> None:
    """`!_more`: between two frames of one message. With one frame each, a PING after many, and `!_io_error`."""
    whole = frame(b"x", more=True) * (num_frames - 1) + frame(b"x")
    monitor = impostor(b"ROUTER", lambda number: whole * (100 + 90 * (number % 11)) + PING + whole * 3)
    finish(program("-c", AGENT, monitor.endpoint))
    assert monitor.served > 5


PUSHING = """
import sys, time
from koopmon.wire.sockets import *
with WireContext() as context:
    ours = DataSender(context, sys.argv[1])
    poller, until = Poller(ours), time.monotonic() + 2.0
    while time.monotonic() < until:
        poller.wait(0.02)
        ours.send([b"x" * 100])
    print(ours.endpoint, flush=True)
    sys.stdin.readline()
    ours.reconnect()
    until = time.monotonic() + 20.0
    while time.monotonic() < until and ours.send([b"finally"]) is not None:
        poller.wait(0.02)
"""


def test_a_receiver_of_snapshots_talks_and_dies(program: Program, impostor: Callable[..., Impostor]) -> None:
    monitor = impostor(b"PULL", lambda _: (frame(b"x" * 20) * 70 + PING) * 40 + frame(bytes(1 << 16)))
    ours = program("-c", PUSHING, monitor.endpoint)
    port = int(line(ours).rpartition(":")[2])
    monitor.close()
    with WireContext() as far, DataReceiver(far, f"tcp://127.0.0.1:{port}") as receiver:
        assert ours.stdin is not None
        ours.stdin.write("\n")
        ours.stdin.flush()
        assert Poller(receiver).wait(20.0) == [receiver]
        received = receiver.recv()
        assert received is not None
        assert bytes(received[0]) == b"finally"
        finish(ours)


CLOSING = """
import sys, time
from koopmon.wire.sockets import *
for _ in range(60):
    with WireContext() as context:
        ours, until = ControlServer(context, sys.argv[1]), time.monotonic() + 0.05
        print(ours.endpoint, flush=True)
        while time.monotonic() < until:
            Poller(ours).wait(0.01)
            while ours.recv():
                pass
"""
OLD = ((b"\xff" + bytes(8) + b"\x7f\x01\x05", b"\x00\x00\x00\x01x"), (b"\x01\x00", b"\x02\x00x"))
"""Greetings of ZMTP 2 and ZMTP 1, and the bytes after the greeting of the other side."""


def test_peers_of_zmtp_1_and_2_at_a_server_that_closes(program: Program) -> None:
    """`errno_assert` in zmtp_engine.cpp, for the name of a peer without a queue."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    ours = program("-c", CLOSING, f"tcp://127.0.0.1:{port}")
    line(ours)
    done = threading.Event()

    def hit(greeting: bytes, rest: bytes) -> None:
        while not done.is_set():
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=0.5) as connection:
                connection.sendall(greeting)
                connection.recv(12)
                connection.sendall(rest)

    threads = [threading.Thread(target=hit, args=said, daemon=True) for said in OLD * 4]
    for thread in threads:
        thread.start()
    try:
        finish(ours)
    finally:
        done.set()
        for thread in threads:
            thread.join()


STARVED = """
import os, resource, sys, time
import zmq
from koopmon.errors import EndpointError
from koopmon.wire.sockets import *
limit, left = sys.argv[1], int(sys.argv[2])
held = []
if limit == "descriptors":
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
    while True:
        try:
            held.append(os.open("/dev/null", 0))
        except OSError:
            break
    for _ in range(left):
        os.close(held.pop())
else:
    if os.getuid() == 0:  # nothing limits root
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
    resource.setrlimit(resource.RLIMIT_NPROC, (left, left))
try:
    context = WireContext()
    client = ControlClient(context, "tcp://127.0.0.1:1")
    client.reconnect()
    sender = DataSender(context, "tcp://127.0.0.1:1")
    client.reconnect()
    said = "made"
except EndpointError as error:
    said = str(error)
for each in held:
    os.close(each)
if "context" in globals():
    context.close()
print(said)
"""


@pytest.mark.parametrize("left", [*range(16), 20, 24, 28])
def test_a_process_at_its_limit_of_descriptors_is_told_so(left: int, program: Program) -> None:
    """epoll.cpp: libzmq does not check the resources of the first socket of a context."""
    said = finish(program("-c", STARVED, "descriptors", left))
    assert said.startswith("made" if left > 24 else "no room for a socket: too many open files") or left > 15


def test_a_process_at_its_limit_of_threads_is_told_so(program: Program) -> None:
    """thread.cpp: it does not check its threads either."""
    assert finish(program("-c", STARVED, "threads", 0)).startswith("no room for a socket: can't start new thread")


# --- open resources after a failed step ---


def closes(context: WireContext) -> bool:
    """Return True if a context closes in time: `term` waits for ever for an open socket."""
    thread = threading.Thread(target=context.close, daemon=True)
    thread.start()
    thread.join(10.0)
    return not thread.is_alive()


class StepError(Exception):
    """Step that fails."""


def fail(*_: object) -> Any:
    raise StepError


@pytest.mark.parametrize(
    ("make", "step"),
    [
        (ControlClient, "zmq.Socket.set"),
        (ControlServer, "zmq.Socket.set"),
        (DataSender, "koopmon.wire.transport.Socket._watch"),
        (DataReceiver, "zmq.Socket.monitor"),
        (ControlServer, "zmq.Socket.monitor"),
        (ControlClient, "zmq.Socket.connect"),
        (DataSender, "zmq.Socket.connect"),
        (ControlServer, "zmq.Socket.bind"),
        (ControlServer, "koopmon.wire.server.claimed"),
        (DataReceiver, "koopmon.wire.curve.make_curve_server"),
        (ControlClient, "koopmon.wire.curve.make_curve_client"),
        (ControlServer, "koopmon.wire.curve.ZapHandler.__init__"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_a_socket_that_could_not_be_made_leaves_nothing_open(
    make: Any, step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ring = Keyring(tmp_path / "keys")
    ring.agent()
    context = WireContext(ring.trust())
    with monkeypatch.context() as patch:
        patch.setattr(step, fail)
        with pytest.raises(StepError):
            make(context, f"tcp://127.0.0.1:{int(make in (ControlClient, DataSender))}")
    assert closes(context)


def test_a_limit_that_the_transport_does_not_take_leaves_nothing_open() -> None:
    from koopmon.wire.headers import WireLimits

    context = WireContext()
    with pytest.raises(OverflowError):
        DataReceiver(context, "tcp://127.0.0.1:0", limits=WireLimits(max_message_bytes=1 << 63))
    assert closes(context)


@pytest.mark.parametrize("step", ["zmq.Socket.set", "koopmon.wire.transport.Socket._watch", "zmq.Socket.connect"])
def test_a_connection_that_cannot_be_replaced_stays(
    step: str, near: WireContext, far: WireContext, until: Until, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = ControlServer(far, "tcp://127.0.0.1:0")
    client = ControlClient(near, server.endpoint)
    until(lambda: client.connected)
    with monkeypatch.context() as patch:
        patch.setattr(step, fail)
        with pytest.raises(StepError):
            client.reconnect()
    assert client.connected
    assert client.send(encode(Goodbye(run="job", incarnation="00c0ffee", process_rank=0, step=1)))
    assert Poller(server).wait(20.0) == [server]
    client.reconnect()
    until(lambda: client.connected)


def test_a_paused_connection_comes_back_when_its_time_has_come(
    near: WireContext, far: WireContext, until: Until
) -> None:
    server = ControlServer(far, "tcp://127.0.0.1:0")
    client = ControlClient(near, server.endpoint)
    until(lambda: client.connected)
    client.reconnect(0.3)
    began = time.monotonic()
    assert not client.connected
    until(lambda: client.retry() or client.connected)
    assert time.monotonic() - began >= 0.3
    assert client.connections == 2


def test_no_room_is_an_error_of_the_endpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("koopmon.wire.transport._NEEDED_DESCRIPTORS", 1 << 20)
    with WireContext() as context, pytest.raises(EndpointError, match="too many open files"):
        ControlClient(context, "tcp://127.0.0.1:1")
