"""The monitor as a process: signals, kills, and its state after a restart."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.flooders import Flooders
from koopmon.errors import EndpointError
from koopmon.monitor import process
from koopmon.monitor.daemon import Addresses
from koopmon.wire.messages import Applied, Heartbeat, TrainingStep
from tests.monitor.conftest import ScriptedAgent

pytestmark = pytest.mark.process

Start = Callable[..., Any]
Until = Callable[[Callable[[], Any]], Any]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_it_with_nothing_lost(
    start_process: Start, connect: Start, until: Until, number: signal.Signals
) -> None:
    """Snapshots that wait for the engine are profiled, and also those that wait for a missing shard."""
    monitor = start_process(monitor={"assemble_timeout_seconds": 600.0})
    lonely = connect(monitor.addresses.endpoint, run="lonely", num_senders=2)
    lonely.hello()
    lonely.snapshot(1)
    agents = [connect(monitor.addresses.endpoint, run=f"job{index}") for index in range(8)]
    for agent in agents:
        agent.hello()
    for step in (1, 2):
        for agent in agents:
            agent.snapshot(step)
    for index in range(len(agents)):
        until(lambda: monitor.sample(f'snapshots_received_total{{run="job{index}"}}') == 2)  # noqa: B023
    assert monitor.end(number) == 0
    assert not monitor.ready_file.exists()
    assert not monitor.store.with_name(monitor.store.name + "-wal").exists()
    log = monitor.log.read_text()
    assert "stopped" in log
    assert "Traceback" not in log
    with monitor.history() as history:
        for index in range(len(agents)):
            assert [row.step for row in history.profiles(f"job{index}")] == [1, 2]
            assert [row.step for row in history.observations(f"job{index}")] == [1, 2]
        assert [row.step for row in history.profiles("lonely")] == [1]


def test_after_a_sudden_death_the_run_is_seen_again(
    start_process: Start, start_monitor: Start, connect: Start, until: Until
) -> None:
    """Applied settings, assessments and decisions come from the store, for this incarnation and the next."""
    first = start_process()
    agent = connect(first.addresses.endpoint)
    agent.hello()
    agent.snapshot(1)
    agent.snapshot(2, torch.full((4, 96, 12), math.nan).bfloat16())
    agent.expect_command("set_cadence")
    agent.snapshot(3, torch.full((4, 96, 12), math.nan).bfloat16())
    command = agent.expect_command("set_lr_scale")
    held = Applied(lr_scale=command.lr_scale)
    agent.acknowledge(command, "applied", held, step=4)
    until(lambda: first.sample('commands_settled_total{kind="set_lr_scale",outcome="applied",run="job"}') == 1)
    first.process.kill()
    first.process.wait()

    second = start_monitor(bind=first.addresses.endpoint)
    until(lambda: agent.control.connections == 2)
    agent.send(Heartbeat(**agent.name, process_rank=0, training=TrainingStep(step=5), applied=held))
    until(lambda: second.sample('messages_rejected_total{reason="unknown_run"}') == 1)
    welcome = agent.hello(step=5, applied=held)
    assert welcome.restore is None, "this incarnation knows what it has"
    assert second.sample('lr_scale{run="job"}') == held.lr_scale
    agent.snapshot(50, torch.full((4, 96, 12), math.nan).bfloat16())
    deeper = agent.expect_command("set_lr_scale")
    assert deeper.lr_scale < held.lr_scale, "the policy goes on from what it had decided"
    heir = connect(second.addresses.endpoint, incarnation="bbbbbbbb")
    assert heir.hello().restore == held
    with second.history() as history:
        assert [row.incarnation for row in history.incarnations("job")] == ["aaaaaaaa", "bbbbbbbb"]
        outcomes = [row.outcome for decision in history.decisions("job") for row in decision.commands]
    assert "applied" in outcomes


@pytest.mark.slow
def test_a_signal_is_obeyed_while_peers_send(start_process: Start) -> None:
    monitor = start_process()
    with Flooders() as flooders, ThreadPoolExecutor(1) as pool:
        flood = pool.submit(flooders.agents, monitor.addresses.endpoint, 25.0)
        time.sleep(1.0)
        assert monitor.end(signal.SIGTERM) == 0
        assert not flood.done()
        assert flood.result() > 100
    assert "peers still send" in monitor.log.read_text()


@pytest.mark.slow
def test_a_large_snapshot_holds_up_neither_another_run_nor_the_end(
    start_process: Start, connect: Callable[..., ScriptedAgent], until: Until
) -> None:
    monitor = start_process()
    large = connect(monitor.addresses.endpoint, run="large")
    large.hello(num_layers=512, width=64)
    small = connect(monitor.addresses.endpoint, run="small")
    small.hello()
    large.snapshot(1, torch.cumsum(torch.randn((513, 1024, 64)), dim=0).bfloat16())
    until(lambda: monitor.sample('snapshots_received_total{run="large"}') == 1)
    for step in (1, 2, 3):
        small.snapshot(step)
        until(lambda: monitor.sample("dmd_duration_seconds_count") == step)  # noqa: B023
    with monitor.history() as history:
        assert list(history.profiles("large")) == []
    assert monitor.end(signal.SIGTERM) == 0
    with monitor.history() as history:
        assert [row.step for row in history.profiles("small")] == [1, 2, 3]
        assert [row.step for row in history.profiles("large")] == [1]


@pytest.mark.parametrize("name", ["none/ready", "file/ready", "directory", "x" * 254, "loop/ready"])
def test_a_ready_file_that_cannot_be_written_is_one_line(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "directory").mkdir()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    addresses = Addresses("tcp://127.0.0.1:1", "tcp://127.0.0.1:2", "127.0.0.1:3")
    with pytest.raises(EndpointError, match=r"ready file .*: cannot be written"):
        process._write_ready(tmp_path / name, addresses)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["directory", "file", "loop"]
