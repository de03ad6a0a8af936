"""A real monitor, one normal run, and agents with legal but absurd numbers: the normal run stays guarded."""

from __future__ import annotations

import math
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from koopmon.wire.messages import Refused, Welcome
from tests.factories import heartbeat
from tests.monitor.conftest import MonitorProcess, ScriptedAgent, wait_until

httpx = pytest.importorskip("httpx")

pytestmark = pytest.mark.process

LAST = (1 << 53) - 1
HUGE = sys.float_info.max
TABLES = {
    "policy": {"name": "kss+lr", "cooldown_steps": 1},
    "kss": {"method": "published"},
    "monitor": {"assemble_timeout_seconds": 0.3, "svd_rank": 12, "max_runs": 1000},
}
TURNS_SECONDS = 2.5
"""Time in which the loop repeats a command and closes snapshots with missing shards."""


def amplified(factor: float) -> torch.Tensor:
    """Build a stream that each layer rotates and multiplies, (3, 64, 12)."""
    generator = torch.Generator().manual_seed(0)
    rotation = torch.linalg.qr(torch.randn((12, 12), generator=generator))[0]
    states = [torch.randn((64, 12), generator=generator)]
    for _ in range(2):
        states.append(factor * states[-1] @ rotation)
    return torch.stack(states).bfloat16()


def not_finite() -> torch.Tensor:
    return torch.full((4, 96, 12), math.nan).bfloat16()


def say(agent: ScriptedAgent, step: int, states: torch.Tensor | None = None, **fields: Any) -> None:
    """Send a snapshot if the agent was accepted, and leave time for its profile: a newer one would replace it."""
    if agent.data is not None:
        agent.snapshot(step, states, **fields)
        time.sleep(0.1)


def shards_near_the_last_step(agent: ScriptedAgent) -> None:
    agent.hello()
    for step in (LAST - 14, LAST - 13, LAST):
        say(agent, step, not_finite())


def hello_near_the_last_step(agent: ScriptedAgent) -> None:
    agent.hello(step=LAST)
    for step in (1, 2, 3):
        say(agent, step, not_finite())


def heartbeats_near_the_last_step(agent: ScriptedAgent) -> None:
    agent.hello()
    for step in (LAST - 14, LAST):
        agent.send(heartbeat(step, **agent.name, dropped={"not_finite": step}))


def a_stack_that_amplifies(agent: ScriptedAgent) -> None:
    agent.hello()
    for step in range(1, 9):
        say(agent, step, amplified(800.0))
    for step in range(9, 13):
        say(agent, step, amplified(1.0))


def a_stack_that_amplifies_beyond_measure(agent: ScriptedAgent) -> None:
    agent.hello()
    for step in range(1, 9):
        say(agent, step, amplified(1e6))
    for step in range(9, 13):
        say(agent, step, amplified(1.0))


def losses_that_cannot_be_summed(agent: ScriptedAgent) -> None:
    """Two ranks of three, so that time closes the snapshot."""
    agent.hello(num_senders=3, world_size=3)
    for rank in (0, 1):
        say(agent, 1, process_rank=rank, num_senders=3, loss=HUGE, grad_norm=HUGE)


def observables_that_cannot_be_summed(agent: ScriptedAgent) -> None:
    agent.hello(num_layers=130)
    states = torch.cumsum(torch.randn((131, 1, 4)), dim=0).bfloat16()
    say(agent, 1, states, observables={"a": [HUGE] * 130})


def a_rate_that_is_no_number(agent: ScriptedAgent) -> None:
    agent.hello(rate_sized_steps=True, update_exponent=0.0, thresholds={"normalized_weight": 1e300, "prior_slope": 0.0})
    for step, factor in enumerate((2.0, 300.0, 2.0, 300.0), start=1):
        say(agent, step, amplified(factor), learning_rate=(math.nan, math.inf, HUGE, -HUGE)[step - 1])


ABSURD = (
    shards_near_the_last_step,
    hello_near_the_last_step,
    heartbeats_near_the_last_step,
    a_stack_that_amplifies,
    a_stack_that_amplifies_beyond_measure,
    losses_that_cannot_be_summed,
    observables_that_cannot_be_summed,
    a_rate_that_is_no_number,
)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MonitorProcess]:
    directory = tmp_path_factory.mktemp("monitor")
    monitor = MonitorProcess(TABLES, directory / "history.sqlite3", "tcp://127.0.0.1:0", directory)
    yield monitor
    if monitor.process.poll() is None:
        assert monitor.end(signal.SIGTERM) == 0


def guarded(monitor: MonitorProcess, agent: ScriptedAgent, step: int) -> None:
    """The monitor runs, and the run gets the command for its states."""
    assert monitor.process.poll() is None, monitor.log.read_text()[-2000:]
    agent.heartbeat(step, dropped={"not_finite": step + 1})  # the first of two in a row
    agent.snapshot(step, not_finite())
    assert agent.expect_command("set_lr_scale").lr_scale is not None
    assert monitor.process.poll() is None, monitor.log.read_text()[-2000:]
    assert httpx.get(f"http://{monitor.addresses.http}/healthz", timeout=30.0).status_code == 200
    samples = monitor.samples()
    assert samples[f'run_state{{run="{agent.name["run"]}",state="running"}}'] == 1
    assert all(math.isfinite(value) for value in samples.values())


@pytest.mark.parametrize("absurd", ABSURD, ids=lambda absurd: absurd.__name__)
def test_an_agent_with_absurd_numbers_ends_nothing(
    absurd: Callable[[ScriptedAgent], None], shared: MonitorProcess, connect: Callable[..., ScriptedAgent]
) -> None:
    honest = connect(shared.addresses.endpoint, run=f"honest-{absurd.__name__}")
    assert isinstance(honest.hello(), Welcome)
    before = shared.samples()
    absurd(connect(shared.addresses.endpoint, run=f"absurd-{absurd.__name__}"))
    time.sleep(TURNS_SECONDS)
    wait_until(lambda: shared.sample("engine_queue_length") == 0)
    guarded(shared, honest, 10)
    failed = {
        name: value - before[name]
        for name, value in shared.samples().items()
        if name.startswith(("internal_errors_total", "engine_failures_total", "store_lost_total"))
        or name == 'messages_rejected_total{reason="internal"}'
    }
    assert not any(failed.values()), f"nothing had to be contained: {failed}"


@pytest.mark.slow
def test_a_restart_on_the_same_history_ends_nothing(
    start_process: Callable[..., MonitorProcess], connect: Callable[..., ScriptedAgent]
) -> None:
    """The records of an absurd run and its reconnecting agents cause no crash loop."""
    for launch in range(3):
        monitor = start_process(**TABLES)
        agents = [connect(monitor.addresses.endpoint, run=absurd.__name__) for absurd in ABSURD]
        for absurd, agent in zip(ABSURD, agents, strict=True):
            absurd(agent)
        time.sleep(TURNS_SECONDS)
        honest = connect(monitor.addresses.endpoint, run="honest")
        assert isinstance(honest.hello(), Welcome)
        guarded(monitor, honest, 10 * (launch + 1))
        for agent in (*agents, honest):
            agent.close()
        monitor.end(signal.SIGKILL)


def test_a_step_that_has_no_answer_is_refused_in_words(
    shared: MonitorProcess, connect: Callable[..., ScriptedAgent]
) -> None:
    refused = connect(shared.addresses.endpoint, run="late").hello(step=LAST)
    assert isinstance(refused, Refused)
    assert f"is at step {LAST}: expected a step of at most" in refused.reason
    wait_until(lambda: shared.samples()['messages_rejected_total{reason="refused"}'] >= 1)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[policy]\ndense_every = 100001\n", "policy.dense_every = 100001: expected `int` >= 1 and <= 100000"),
        ("[kss]\nevery = 10001\n", "kss.every = 10001: expected `int` >= 1 and <= 10000"),
        ("[policy]\nkss_ramp_steps = 100001\n", "policy.kss_ramp_steps = 100001: expected `int` >= 1 and <= 100000"),
        ("[policy]\nramp_steps = 100001\n", "policy.ramp_steps = 100001: expected `int` >= 1 and <= 100000"),
        ("[kss]\ntemperature = 1e4\n", "kss.temperature = 10000.0: expected `float` > 0.0 and <= 1000.0"),
        ("[risk]\nnormalized_weight = inf\n", "risk.normalized_weight = inf: expected `float` >= 0.0 and <= 20.0"),
        (f"[monitor]\nmax_message_bytes = {1 << 63}\n", f"monitor.max_message_bytes = {1 << 63}: expected `int`"),
        ("[monitor]\nvanished_after_seconds = 1e-9\n", "expected 3 x monitor.heartbeat_seconds <= monitor.vanished"),
    ],
)
def test_a_configuration_that_could_not_be_sent_does_not_start(text: str, says: str, tmp_path: Path) -> None:
    config = tmp_path / "k.toml"
    config.write_text(text)
    words = ["monitor", "--config", str(config), "--store", str(tmp_path / "h.sqlite3"), "--bind", "tcp://127.0.0.1:0"]
    done = subprocess.run(
        [sys.executable, "-m", "koopmon", *words], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 2
    assert says in done.stderr
    assert len(done.stderr.splitlines()) == 1
