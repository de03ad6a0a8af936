"""A monitor that is missing, killed, stalled or refuses: counted, logged at intervals, without an effect on the
training.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from koopmon.agent.comms.control_channel import HELLO_SECONDS
from koopmon.wire.messages import Applied, KssSettings
from tests.agent.conftest import ROOT
from tests.agent.models import build, train_step
from tests.agent.scripted_monitor import Hello, ScriptedMonitor

Attach = Callable[..., Any]
CONFIG = {
    "cadence": {"dense_every": 1, "warmup_steps": 100_000},
    "control": {"monitor_lost_seconds": 0.4, "on_monitor_lost": "hold"},
}


def reference(steps: int) -> list[float]:
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    return [train_step(model, optimizer, step) for step in range(steps)]


class Job:
    """Training that records its losses and its slowest step."""

    def __init__(self, agents: Attach, endpoint: str, config: Any = CONFIG) -> None:
        self.model = build()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01)
        self.agent = agents(self.model, self.optimizer, endpoint=endpoint, config=config)
        self.losses: list[float] = []
        self.slowest = 0.0

    def train(self, condition: Callable[[], object], most: int = 5000) -> None:
        """Train until `condition`."""
        for _ in range(most):
            if condition():
                return
            started = time.monotonic()
            self.losses.append(train_step(self.model, self.optimizer, len(self.losses)))
            self.slowest = max(self.slowest, time.monotonic() - started)
            time.sleep(0.005)
        pytest.fail("the condition stayed false")

    def dropped(self, reason: str) -> int:
        return int(self.agent.status()["dropped"][reason])


@pytest.fixture
def monitor_process(tmp_path: Path) -> Iterator[Callable[[], subprocess.Popen[str]]]:
    """Start a scripted monitor in another process, always at the same endpoint."""
    started: list[subprocess.Popen[str]] = []

    def start() -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.agent.scripted_monitor", str(tmp_path / "m")],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "bound\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.send_signal(signal.SIGCONT)
        process.communicate()


def test_no_monitor_at_all(agents: Attach, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    job = Job(agents, f"ipc://{tmp_path}/m/control")
    job.train(lambda: "no monitor at" in caplog.text)
    started = time.monotonic()
    job.train(lambda: time.monotonic() > started + 1.0 and len(job.losses) > 20)
    assert job.losses == reference(len(job.losses))
    assert job.dropped("monitor_away") >= len(job.losses) - 2
    assert job.agent.enabled
    assert sum("no monitor at" in record.message for record in caplog.records) == 1, "it repeats after a minute only"


@pytest.mark.process
def test_a_killed_monitor_is_only_counted_and_is_found_again(
    agents: Attach, tmp_path: Path, monitor_process: Callable[[], Any]
) -> None:
    first = monitor_process()
    job = Job(agents, f"ipc://{tmp_path}/m/control")
    job.train(lambda: job.agent.status()["sent"] > 3)
    first.kill()
    first.wait()
    job.train(lambda: job.dropped("monitor_away") > 20)
    sent = job.agent.status()["sent"]
    monitor_process()
    job.train(lambda: job.agent.status()["sent"] > sent + 3)
    assert job.losses == reference(len(job.losses))
    assert job.agent.enabled
    assert job.agent.status()["errors"] == 0
    assert job.agent.status()["taps_missing"] == 0


@pytest.mark.process
def test_a_stalled_monitor_is_never_waited_for(
    agents: Attach, tmp_path: Path, monitor_process: Callable[[], Any], caplog: pytest.LogCaptureFixture
) -> None:
    process = monitor_process()
    config = {**CONFIG, "control": {"monitor_lost_seconds": 3.0}}
    job = Job(agents, f"ipc://{tmp_path}/m/control", config)
    job.train(lambda: job.agent.status()["sent"] > 3)
    os.kill(process.pid, signal.SIGSTOP)
    job.train(lambda: "no monitor at" in caplog.text)
    sent, dropped = job.agent.status()["sent"], sum(job.agent.status()["dropped"].values())
    assert dropped > 0
    job.train(lambda: sum(job.agent.status()["dropped"].values()) > dropped + 10)
    assert job.agent.status()["sent"] == sent, "nothing more is tried while it is silent"
    assert job.slowest < 3.0, "no step waited for it"
    os.kill(process.pid, signal.SIGCONT)
    job.train(lambda: job.agent.status()["sent"] > sent + 3)
    assert "is back" in caplog.text
    assert job.losses == reference(len(job.losses))
    started = time.monotonic()
    os.kill(process.pid, signal.SIGSTOP)
    job.agent.close()
    assert time.monotonic() - started < 3.0, "neither does close"


def test_a_monitor_that_refuses_is_said_once(agents: Attach, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with ScriptedMonitor(tmp_path / "m", refuse="this monitor is full: raise max_runs") as monitor:
        started = time.monotonic()
        job = Job(agents, monitor.endpoint)
        job.train(lambda: monitor.heard and len(job.losses) > 40)
        # One at the start, one with the result of the first forward pass, one when there are copies to return to, and
        # one more for each slow reply.
        assert len(monitor.of(Hello)) <= 3 + (time.monotonic() - started) / HELLO_SECONDS
    assert caplog.text.count("this monitor is full: raise max_runs") == 1
    assert job.losses == reference(len(job.losses))


def test_a_reason_is_one_printable_line(agents: Attach, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with ScriptedMonitor(tmp_path / "m", refuse="full\x1b[2J\nkoopmon: all is well\u202e") as monitor:
        job = Job(agents, monitor.endpoint)
        job.train(lambda: "full" in caplog.text)
    (line,) = [record.getMessage() for record in caplog.records if "full" in record.getMessage()]
    assert line.isprintable()
    assert "full?[2J?koopmon: all is well?" in line


@pytest.mark.parametrize(("choice", "end"), [("hold", 0.25), ("ramp", 1.0)])
def test_what_is_applied_outlives_the_monitor_or_ramps_back_as_configured(
    choice: str, end: float, agents: Attach, tmp_path: Path
) -> None:
    control = {"monitor_lost_seconds": 0.3, "on_monitor_lost": choice, "ramp_back_steps": 20}
    with ScriptedMonitor(tmp_path / "m") as monitor:
        job = Job(agents, monitor.endpoint, {**CONFIG, "control": control})
        job.train(lambda: job.agent.status()["connected"])
        command_id = monitor.command("set_lr_scale", lr_scale=0.25)
        job.train(lambda: monitor.acked(command_id))
    steps = len(job.losses)
    started = time.monotonic()
    job.train(lambda: time.monotonic() > started + 2.0 and len(job.losses) > steps + 60)
    assert job.agent.status()["applied"]["lr_scale"] == end


def test_a_new_monitor_hands_back_what_was_applied(agents: Attach, tmp_path: Path) -> None:
    before = Applied(lr_scale=0.5, kss=KssSettings(alpha=0.1, svd_rank=4, num_samples=16))
    with ScriptedMonitor(tmp_path / "m", restore=before) as monitor:
        job = Job(agents, monitor.endpoint)
        job.train(lambda: job.agent.status()["applied"]["lr_scale"] == 0.5)
        assert job.agent.status()["applied"]["kss"]["alpha"] == 0.1
        job.train(lambda: job.agent.status()["sent"] > 3)
        assert monitor.shards[-1][0].training.lr_scale == 0.5
        assert monitor.shards[-1][0].training.kss_alpha == 0.1
