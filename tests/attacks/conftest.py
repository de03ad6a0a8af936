"""A real monitor in another process, behind keys, and a real training under it. The tests attack both."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch

import koopmon
from tests.agent.models import build, record_rates, train_step
from tests.agent.scripted_monitor import ScriptedMonitor
from tests.keyring import Keyring
from tests.monitor.conftest import MonitorProcess, ScriptedAgent

CADENCE = {"dense_every": 1, "warmup_steps": 100_000, "initial_credit_seconds": 1000.0}


class Training:
    """Real agent on a small model, with a final check that its losses are unchanged."""

    def __init__(self, endpoint: str, ring: Keyring, run: str, agent: str, **tables: Any) -> None:
        torch.set_num_threads(1)
        self.run = run
        self.model = build()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01)
        config = {"security": ring.security(agent), "cadence": CADENCE, **tables}
        self.agent = koopmon.attach(self.model, self.optimizer, endpoint=endpoint, run=run, config=config)
        self.losses: list[float] = []
        self.rates: list[float] = []
        record_rates(self.optimizer, self.rates)

    def until(self, condition: Callable[[], Any], seconds: float = 90.0) -> Any:
        """Train until `condition` is true, and return its value."""
        deadline = time.monotonic() + seconds
        while not (found := condition()):
            assert time.monotonic() < deadline, f"the condition stayed false: {self.agent.status()}"
            self.losses.append(train_step(self.model, self.optimizer, len(self.losses)))
            time.sleep(0.005)
        return found

    def go_on(self, steps: int = 20) -> None:
        """Train some more steps, which the monitor must receive."""
        sent, done = self.agent.status()["sent"], len(self.losses)
        self.until(lambda: len(self.losses) >= done + steps and self.agent.status()["sent"] > sent)

    def untouched(self) -> bool:
        """Check that the losses are bit-identical to a training without koopmon, and that the agent works."""
        model = build()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        alone = [train_step(model, optimizer, step) for step in range(len(self.losses))]
        status = self.agent.status()
        return self.losses == alone and status["enabled"] and status["errors"] == 0


class Attacked(MonitorProcess):
    """The attacked monitor. `refused` counts its rejections since `begin`, by reason."""

    def begin(self) -> None:
        self._before = self._rejected()

    def _rejected(self) -> dict[str, float]:
        prefix = 'messages_rejected_total{reason="'
        return {name[len(prefix) : -2]: value for name, value in self.samples().items() if name.startswith(prefix)}

    def refused(self) -> dict[str, int]:
        return {
            reason: int(count - self._before[reason])
            for reason, count in self._rejected().items()
            if count > self._before[reason]
        }


@pytest.fixture(scope="module")
def ring(tmp_path_factory: pytest.TempPathFactory) -> Keyring:
    """Keys of the monitor and of four agents: one bound to its own runs, one to other runs, one to all."""
    ring = Keyring(tmp_path_factory.mktemp("attacks") / "keys")
    ring.agent("victim", runs=("victim/*",))
    ring.agent("thief", runs=("thief/*",))
    ring.agent("rival", runs=("*",))
    ring.agent("stranger", served=False)
    return ring


@pytest.fixture(scope="module")
def process(ring: Keyring, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Attacked]:
    directory = tmp_path_factory.mktemp("monitor")
    tables = {"security": ring.security(), "policy": {"name": "observe"}}
    monitor = Attacked(tables, directory / "history.sqlite3", "tcp://127.0.0.1:0", directory)
    yield monitor
    monitor.process.kill()
    monitor.process.wait()


@pytest.fixture
def monitor(process: Attacked) -> Attacked:
    process.begin()
    return process


@pytest.fixture
def train(ring: Keyring) -> Iterator[Callable[..., Training]]:
    """Start a training with its own run."""
    made: list[Training] = []

    def start(endpoint: str, agent: str = "victim", **tables: Any) -> Training:
        made.append(Training(endpoint, ring, f"victim/{time.monotonic_ns()}", agent, **tables))
        return made[-1]

    yield start
    for training in made:
        training.agent.close()


@pytest.fixture
def attacker(ring: Keyring) -> Iterator[Callable[..., ScriptedAgent]]:
    """Connect a peer with the keys of `agent`, or without keys."""
    made: list[ScriptedAgent] = []

    def connect(endpoint: str, agent: str | None, **options: Any) -> ScriptedAgent:
        made.append(ScriptedAgent(endpoint, trust=None if agent is None else ring.trust(agent), **options))
        return made[-1]

    yield connect
    for each in made:
        each.close()


@pytest.fixture
def demanding(tmp_path: Path) -> Iterator[Callable[..., ScriptedMonitor]]:
    """Monitor with any keys that sends the messages of the test."""
    with ExitStack() as stack:
        yield lambda trust: stack.enter_context(ScriptedMonitor(tmp_path / "m", trust=trust, heartbeat_seconds=0.2))
