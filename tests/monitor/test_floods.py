"""Peers that flood a monitor and die: it replies to the others, and its receive queue stays bounded."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from typing import Any

import pytest

from benchmarks.flooders import Flooders

pytestmark = pytest.mark.process

Start = Callable[..., Any]
Until = Callable[[Callable[[], Any]], Any]


@pytest.mark.parametrize("transport", ["ipc", "tcp"])
def test_agents_flood_both_channels_and_are_killed(
    transport: str, start_process: Start, connect: Start, tmp_path: Any
) -> None:
    monitor = start_process(bind="tcp://127.0.0.1:0" if transport == "tcp" else f"ipc://{tmp_path}/run/control")
    honest = connect(monitor.addresses.endpoint)
    honest.hello()
    with Flooders() as flooders:
        for step in range(1, 5):
            assert flooders.agents(monitor.addresses.endpoint, 0.3) > 100
            honest.heartbeat(step)
            honest.snapshot(step)
    time.sleep(0.5)
    honest.heartbeat(9)
    assert monitor.process.poll() is None, monitor.log.read_text()


@pytest.mark.slow
def test_agents_flood_for_long_and_are_killed(start_process: Start, connect: Start) -> None:
    """The original case: it ended with SIGABRT at the next tick of its ZMTP heartbeats, every 5 s."""
    monitor = start_process()
    honest = connect(monitor.addresses.endpoint)
    honest.hello()
    with Flooders() as flooders:
        assert flooders.agents(monitor.addresses.endpoint, 7.0) > 10_000
    until, step = time.monotonic() + 6.0, 0
    while time.monotonic() < until:
        step += 1
        honest.heartbeat(step)
    assert monitor.process.poll() is None, monitor.log.read_text()


def test_a_monitor_takes_all_the_descriptors_that_it_may_have(start_process: Start) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    try:
        monitor = start_process()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert resource.prlimit(monitor.process.pid, resource.RLIMIT_NOFILE) == (hard, hard)
