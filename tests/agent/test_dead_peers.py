"""A monitor that floods and dies while the interpreter is blocked, and connections that die silently."""

from __future__ import annotations

import contextlib
import select
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
import torch

from benchmarks.fuzz.strangers import GREETING, PING, frame, ready
from koopmon.agent.circuit_breaker import CircuitBreaker
from koopmon.agent.comms.io_thread import IOThread
from koopmon.agent.stats import AgentStats
from koopmon.config import ControlConfig
from koopmon.errors import EndpointError
from koopmon.wire.headers import PREFIX, decode_header, encode_header
from koopmon.wire.messages import HeartbeatReply, Hello, Welcome
from tests.agent.conftest import ROOT
from tests.agent.models import build, train_step
from tests.agent.scripted_monitor import Heartbeat, ScriptedMonitor

pytestmark = pytest.mark.process

Until = Callable[[Callable[[], Any]], Any]
NUM_REPLIES = 500


class DyingMonitor:
    """Monitor that welcomes one agent, sends NUM_REPLIES messages in `die`, and ends like a killed process."""

    def __init__(self, transport: str, directory: Path) -> None:
        if transport == "ipc":
            directory.mkdir(mode=0o700)
            self._listener = socket.socket(socket.AF_UNIX)
            self._listener.bind(str(directory / "control"))
            self._listener.listen()
            self.endpoint = f"ipc://{directory}/control"
        else:
            self._listener = socket.create_server(("127.0.0.1", 0))
            self.endpoint = f"tcp://127.0.0.1:{self._listener.getsockname()[1]}"
        self._listener.settimeout(60.0)
        self._connections: list[socket.socket] = []

    @property
    def _connection(self) -> socket.socket:
        return self._connections[-1]

    def welcome(self) -> None:
        self._connections.append(self._listener.accept()[0])
        self._connection.settimeout(60.0)
        self._connection.sendall(GREETING + ready(b"ROUTER"))
        heard = b""
        while PREFIX not in heard or len(heard) < heard.index(PREFIX) + heard[heard.index(PREFIX) - 1]:
            heard += self._connection.recv(4096)
        start = heard.index(PREFIX)
        long = heard[start - 9] == 2  # eight bytes with the length follow
        length = int.from_bytes(heard[start - 8 : start], "big") if long else heard[start - 1]
        hello = decode_header(heard[start : start + length])
        assert isinstance(hello, Hello)
        self._name = {"run": hello.run, "incarnation": hello.incarnation}
        where = "ipc:///nowhere/at/all"
        self._connection.sendall(frame(encode_header(Welcome(**self._name, data_endpoint=where))))

    def die(self, *, pings: bool) -> None:
        reply = frame(encode_header(HeartbeatReply(**self._name)))
        self._connection.sendall((reply * 5 + (PING if pings else b"")) * (NUM_REPLIES // 5))
        if self._connection.family == socket.AF_INET:
            self._connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            time.sleep(0.2)
        self.close()

    def flood(self) -> None:
        reply = frame(encode_header(HeartbeatReply(**self._name)))
        until = time.monotonic() + 30.0
        while time.monotonic() < until:
            self._connection.sendall(reply * 1000)

    def close(self) -> None:
        for each in (*self._connections, self._listener):
            each.close()


@pytest.mark.parametrize(
    ("transport", "how", "seconds", "pings"),
    [
        ("tcp", "sleep", 1.5, True),
        ("ipc", "sleep", 1.5, True),
        ("tcp", "power", 1.5, True),
        # Without a PING of its own, an agent with ZMTP heartbeats ends at its next tick, after 5 s.
        pytest.param("tcp", "sleep", 8.0, False, marks=pytest.mark.slow),
        pytest.param("ipc", "sleep", 8.0, False, marks=pytest.mark.slow),
    ],
)
def test_training_goes_on_when_its_monitor_floods_and_dies_while_the_interpreter_is_held(
    transport: str, how: str, seconds: float, pings: bool, tmp_path: Path
) -> None:
    monitor = DyingMonitor(transport, tmp_path / "m")
    command = [sys.executable, "-m", "tests.agent.programs.held", monitor.endpoint, how, str(seconds)]
    pipes: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    training = subprocess.Popen(command, cwd=ROOT, text=True, **pipes)
    try:
        monitor.welcome()
        assert training.stdin is not None
        training.stdin.write("\n")
        training.stdin.flush()
        time.sleep(0.3)
        monitor.die(pings=pings)
        said, errors = training.communicate(timeout=120.0)
    finally:
        training.kill()
        training.communicate()
    assert training.returncode == 0, errors
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    assert said.split() == [train_step(model, optimizer, step).hex() for step in range(30)]


class Cable:
    """TCP proxy. After `cut`, existing connections carry nothing, without a signal to either end."""

    def __init__(self, endpoint: str) -> None:
        self._path = endpoint.removeprefix("ipc://")
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"tcp://127.0.0.1:{self._listener.getsockname()[1]}"
        self.num_connections = 0
        self._live: dict[socket.socket, socket.socket] = {}
        self._dead: list[socket.socket] = []
        self._closing = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def cut(self) -> None:
        self._dead += self._live
        self._live = {}

    def _run(self) -> None:
        while not self._closing:
            for side in select.select([self._listener, *self._live], [], [], 0.02)[0]:
                if side is self._listener:
                    near, far = self._listener.accept()[0], socket.socket(socket.AF_UNIX)
                    far.connect(self._path)
                    self._live |= {near: far, far: near}
                    self.num_connections += 1
                elif side in self._live:
                    with contextlib.suppress(OSError):
                        if data := side.recv(1 << 16):
                            self._live[side].sendall(data)
                            continue
                    other = self._live.pop(side)
                    self._live.pop(other, None)
                    side.close()
                    other.close()

    def close(self) -> None:
        self._closing = True
        self._thread.join(10.0)
        for each in [self._listener, *self._live, *self._dead]:
            each.close()


@pytest.fixture
def cable() -> Iterator[Callable[[str], Cable]]:
    made: list[Cable] = []

    def lay(endpoint: str) -> Cable:
        made.append(Cable(endpoint))
        return made[-1]

    yield lay
    for each in made:
        each.close()


def test_connections_that_are_dead_are_made_anew_in_the_time_that_is_stated(
    agents: Callable[..., Any], monitor: ScriptedMonitor, cable: Callable[[str], Cable]
) -> None:
    """Both channels: after a new welcome on the control channel, the data channel, which receives nothing, is new."""
    control, data = cable(monitor.endpoint), cable(monitor._data_endpoint)
    monitor._data_endpoint = data.endpoint
    lost_seconds = 1.0
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    config = {"cadence": {"dense_every": 1, "warmup_steps": 100_000}, "control": {"monitor_lost_seconds": lost_seconds}}
    agent = agents(model, optimizer, endpoint=control.endpoint, config=config)
    losses: list[float] = []

    def train(condition: Callable[[], object], seconds: float) -> float:
        began = time.monotonic()
        while not condition():
            assert time.monotonic() - began < seconds, f"the condition stayed false: {agent.status()}"
            losses.append(train_step(model, optimizer, len(losses)))
            time.sleep(0.005)
        return time.monotonic() - began

    train(lambda: monitor.shards and monitor.of(Heartbeat), 30.0)
    for number in range(1, 3):
        num_shards, num_hellos = len(monitor.shards), len(monitor.of(Hello))
        control.cut()
        data.cut()
        took = train(lambda n=num_hellos: len(monitor.of(Hello)) > n, 20.0)  # type: ignore[misc]
        assert took < lost_seconds + 3.0
        train(lambda n=num_shards: len(monitor.shards) > n + 50, 20.0)  # type: ignore[misc]
        assert (control.num_connections, data.num_connections) == (number + 1, number + 1)
    assert losses == [train_step(*fresh, step) for fresh in [_fresh()] for step in range(len(losses))]


def _fresh() -> tuple[Any, Any]:
    model = build()
    return model, torch.optim.SGD(model.parameters(), lr=0.01)


def test_a_flood_costs_the_monitor_its_connection_for_a_while(
    agents: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pause_seconds = 0.5
    monkeypatch.setattr("koopmon.agent.comms.io_thread.FLOOD_PAUSE_SECONDS", pause_seconds)
    monitor = DyingMonitor("tcp", tmp_path)
    model, optimizer = _fresh()
    agent = agents(model, optimizer, endpoint=monitor.endpoint)
    train_step(model, optimizer, 0)
    monitor.welcome()
    with pytest.raises((BrokenPipeError, ConnectionResetError)):  # it is cut in the middle
        monitor.flood()
    cut_at = time.monotonic()
    monitor.welcome()
    assert time.monotonic() - cut_at > pause_seconds / 2
    assert "sends more than can be read" in caplog.text
    assert agent.enabled
    monitor.close()


def test_an_error_after_the_end_of_the_training_is_no_failure(caplog: pytest.LogCaptureFixture) -> None:
    """A script that ends within a moment of attach closes the transport while its thread begins."""
    breaker = CircuitBreaker("the agent")
    entered, closed = threading.Event(), threading.Event()

    def resolve() -> None:
        entered.set()
        closed.wait(30.0)
        raise EndpointError("the transport is closed")

    nobody: Any = None
    thread = IOThread("tcp://127.0.0.1:1", ControlConfig(), AgentStats(), breaker, nobody, resolve, nobody)
    thread.start()
    assert entered.wait(30.0)
    thread.close(wait=False)
    closed.set()
    thread._thread.join(30.0)
    assert not caplog.records
    assert not breaker.tripped
