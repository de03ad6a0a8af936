"""A monitor in a thread or in another process, and a scripted agent with real sockets."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families
from torch import Tensor

from koopmon.config import Config, from_mapping
from koopmon.history.reader import HistoryReader
from koopmon.monitor.daemon import Addresses, Monitor
from koopmon.wire.auth_policy import AuthPolicy
from koopmon.wire.codec import decode_for_agent, encode
from koopmon.wire.headers import WireLimits
from koopmon.wire.messages import (
    Ack,
    AgentMessage,
    Applied,
    Command,
    Goodbye,
    HeartbeatReply,
    MonitorMessage,
    Refused,
    Shard,
    Welcome,
)
from koopmon.wire.sockets import ControlClient, DataSender, Poller
from koopmon.wire.transport import WireContext
from tests import factories

WAIT_SECONDS = 60.0
Waiter = Callable[[Callable[[], Any]], Any]


def wait_until(condition: Callable[[], Any]) -> Any:
    """Return the first true value of `condition`; fail after the time limit."""
    deadline = time.monotonic() + WAIT_SECONDS
    while not (value := condition()):
        assert time.monotonic() < deadline, "the condition stayed false"
        time.sleep(0.01)
    return value


def make_states(step: int, *, num_points: int = 4, rows: int = 96, width: int = 12) -> Tensor:
    """Draw a residual stream in bfloat16 that changes smoothly with the step."""
    generator = torch.Generator().manual_seed(7)
    updates = torch.randn((num_points, rows, width), generator=generator)
    return torch.cumsum(updates * (1 + 0.001 * step), dim=0).bfloat16()


class ScriptedAgent:
    """One rank that sends the messages of a test."""

    def __init__(
        self,
        endpoint: str,
        *,
        run: str = "job",
        incarnation: str = "aaaaaaaa",
        rank: int = 0,
        num_senders: int = 1,
        trust: AuthPolicy | None = None,
    ) -> None:
        self.name = {"run": run, "incarnation": incarnation}
        self.rank, self.num_senders = rank, num_senders
        self.context = WireContext(trust)
        self.control = ControlClient(self.context, endpoint)
        self.data: DataSender | None = None
        self._poller = Poller(self.control)
        self.seen: list[MonitorMessage] = []

    def send(self, message: AgentMessage) -> None:
        self.send_frames(encode(message))

    def send_frames(self, frames: Any) -> None:
        wait_until(lambda: self.control.send(frames))

    def hello(self, **fields: Any) -> Welcome | Refused:
        """Send hello and wait for the reply; a welcome opens the data channel."""
        ranks = {"world_size": max(self.num_senders, self.rank + 1), "num_senders": self.num_senders}
        values = {"process_rank": self.rank, "num_layers": 3, "width": 12, **ranks}
        self.send(factories.hello(**self.name, **{**values, **fields}))
        answer = self.expect((Welcome, Refused))
        if isinstance(answer, Welcome):
            if self.data is not None:
                self.data.close()
            self.data = DataSender(self.context, answer.data_endpoint, queue_length=64)
        return answer

    def heartbeat(self, step: int = 1, **fields: Any) -> None:
        """Send a heartbeat and wait for its reply."""
        self.send(factories.heartbeat(step, **self.name, **{"process_rank": self.rank, **fields}))
        self.expect(HeartbeatReply)

    def acknowledge(self, command: Command, outcome: Any, applied: Applied, step: int = 1) -> None:
        self.send(Ack(**self.name, command_id=command.id, outcome=outcome, step=step, applied=applied))

    def goodbye(self, step: int = 9, reason: str = "finished") -> None:
        self.send(Goodbye(**self.name, process_rank=self.rank, step=step, reason=reason))

    def snapshot(self, step: int, states: Tensor | None = None, **fields: Any) -> None:
        """Send this rank's shard of a snapshot."""
        states = make_states(step) if states is None else states
        shard = Shard(
            **self.name,
            **factories.gathered(
                {
                    "process_rank": self.rank,
                    "num_senders": self.num_senders,
                    "step": step,
                    "first_point": 0,
                    "num_points": states.shape[0],
                    "num_samples": states.shape[1],
                    "width": states.shape[2],
                    "dtype": "bfloat16",
                    "learning_rate": 0.1,
                    "loss": 2.0,
                    **fields,
                }
            ),
        )
        self.send_data(encode(shard, states))

    def send_data(self, frames: Any) -> None:
        data = self.data
        assert data is not None, "hello comes first"
        wait_until(lambda: data.send(frames) is None)

    def expect(self, kind: Any) -> Any:
        """Return the next message of `kind`; other messages are kept in `seen`."""
        deadline = time.monotonic() + WAIT_SECONDS
        while time.monotonic() < deadline:
            frames = self.control.recv()
            if frames is None:
                self._poller.wait(0.5)
                continue
            message = decode_for_agent(frames, limits=WireLimits())
            self.seen.append(message)
            if isinstance(message, kind):
                return message
        raise AssertionError(f"no {kind} came, only {self.seen}")

    def expect_command(self, kind: str) -> Command:
        while True:
            command: Command = self.expect(Command)
            if command.kind == kind:
                return command

    def close(self) -> None:
        self.context.close()


class Served:
    """Common part of monitors in a thread and in a process: addresses, pages, history."""

    addresses: Addresses
    store: Path

    def samples(self) -> dict[str, float]:
        """Return koopmon's samples of /metrics as `name{label="value",...}` without the prefix."""
        with urlopen(f"http://{self.addresses.http}/metrics", timeout=30.0) as answer:
            text = answer.read().decode("utf-8")
        found = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples if family.name.startswith("koopmon_") else ():
                labels = ",".join(f'{key}="{value}"' for key, value in sorted(sample.labels.items()))
                found[sample.name.removeprefix("koopmon_") + (f"{{{labels}}}" if labels else "")] = sample.value
        return found

    def sample(self, name: str) -> float | None:
        return self.samples().get(name)

    def history(self) -> HistoryReader:
        return HistoryReader.open(self.store)


class ThreadedMonitor(Served):
    """A monitor in a thread of this process."""

    def __init__(self, config: Config, store: Path, bind: str) -> None:
        self.store = store
        told: list[Addresses] = []
        self.monitor = Monitor(config, bind=bind, http="127.0.0.1:0", device="cpu", store_path=store, ready=told.append)
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        wait_until(lambda: told or self.error)
        if self.error is not None:
            raise self.error
        (self.addresses,) = told

    def _run(self) -> None:
        try:
            self.monitor.run()
        except BaseException as error:
            self.error = error

    def stop(self) -> None:
        self.monitor.stop()
        self._thread.join(WAIT_SECONDS)
        assert not self._thread.is_alive()
        assert self.error is None


SERVE = """
import json, logging, sys
from pathlib import Path
from koopmon.config import from_mapping
from koopmon.errors import KoopmonError
from koopmon.monitor.daemon import Monitor
from koopmon.monitor.process import serve
logging.basicConfig(level=logging.INFO)
given = json.loads(sys.argv[1])
try:
    monitor = Monitor(from_mapping(given["config"]), bind=given["bind"], http="127.0.0.1:0", device="cpu",
                      store_path=given["store"])
    status = serve(monitor, Path(given["ready"]))
except KoopmonError as error:
    print(error, file=sys.stderr)
    status = error.exit_status
sys.exit(status)
"""


def _hang_ups_end_it() -> None:
    """Undo what nohup does to the tests: an ignored signal is inherited."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


class MonitorProcess(Served):
    """A monitor in another process, which can be signalled and killed."""

    def __init__(self, tables: dict[str, Any], store: Path, bind: str, directory: Path) -> None:
        self.store = store
        self.ready_file = directory / "ready.json"
        self.log = directory / "monitor.log"
        given = {"config": tables, "bind": bind, "store": str(store), "ready": str(self.ready_file)}
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", SERVE, json.dumps(given)],
                preexec_fn=_hang_ups_end_it,
                stdout=log,
                stderr=log,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
        wait_until(lambda: self.ready_file.exists() or self.process.poll() is not None)
        assert self.process.poll() is None, self.log.read_text()
        told = json.loads(self.ready_file.read_text())
        assert told.pop("pid") == self.process.pid
        self.addresses = Addresses(**told)

    def end(self, number: signal.Signals) -> int:
        """Send a signal; return the exit status."""
        self.process.send_signal(number)
        return self.process.wait(WAIT_SECONDS)


@pytest.fixture
def until() -> Waiter:
    return wait_until


@pytest.fixture
def store_path(tmp_path: Path) -> Path:
    return tmp_path / "history.sqlite3"


@pytest.fixture
def one_snapshot_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """One snapshot that is not finite is an alarm here: the tests are about what follows it."""
    monkeypatch.setattr("koopmon.policy.state.NON_FINITE_SNAPSHOTS", 1)


@pytest.fixture
def start_monitor(store_path: Path, one_snapshot_is_enough: None) -> Iterator[Callable[..., ThreadedMonitor]]:
    """Start a monitor in a thread; `tables` is its configuration. The engine may drop all snapshots but the newest."""
    started: list[ThreadedMonitor] = []

    def start(*, bind: str = "tcp://127.0.0.1:0", store: Path | None = None, **tables: Any) -> ThreadedMonitor:
        started.append(ThreadedMonitor(from_mapping(tables), store or store_path, bind))
        return started[-1]

    yield start
    for monitor in started:
        monitor.stop()


@pytest.fixture
def start_process(tmp_path: Path, store_path: Path) -> Iterator[Callable[..., MonitorProcess]]:
    """Start a monitor in another process; `tables` is its configuration."""
    started: list[MonitorProcess] = []

    def start(*, bind: str = "tcp://127.0.0.1:0", **tables: Any) -> MonitorProcess:
        directory = tmp_path / f"process-{len(started)}"
        directory.mkdir()
        started.append(MonitorProcess(tables, store_path, bind, directory))
        return started[-1]

    yield start
    for monitor in started:
        if monitor.process.poll() is None:
            monitor.process.kill()
            monitor.process.wait()


@pytest.fixture
def connect() -> Iterator[Callable[..., ScriptedAgent]]:
    """Connect a scripted agent to an endpoint."""
    agents: list[ScriptedAgent] = []

    def start(endpoint: str, **options: Any) -> ScriptedAgent:
        agents.append(ScriptedAgent(endpoint, **options))
        return agents[-1]

    yield start
    for agent in agents:
        agent.close()


@pytest.fixture
def quiet_logs(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, logger="koopmon")
    return caplog
