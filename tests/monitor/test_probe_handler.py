"""A probe of a real monitor: its reply, and no side effect."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from koopmon.wire.auth_policy import AuthPolicy
from koopmon.wire.codec import encode
from koopmon.wire.messages import Probe
from koopmon.wire.probe import probe
from koopmon.wire.sockets import ControlClient
from koopmon.wire.transport import WireContext
from tests.keyring import Keyring

PLAIN = AuthPolicy()


def test_a_probe_tells_of_the_run_and_leaves_no_trace(
    start_monitor: Callable[..., Any], connect: Callable[..., Any], until: Callable[..., Any]
) -> None:
    monitor = start_monitor()
    endpoint = monitor.addresses.endpoint
    before = monitor.samples()
    found = probe(endpoint, PLAIN, run="job")
    assert found.reply is not None
    assert (found.reply.run_state, found.reply.step, found.reply.refused) == (None, None, "")
    assert found.reply.data_endpoint == monitor.addresses.data_endpoint
    assert found.reply.torch_version.startswith("2.")
    assert abs(found.clock_offset_seconds) < 5.0
    assert monitor.samples() == before, "neither a run, nor misconduct, nor anything that is counted"
    with monitor.history() as history:
        assert history.runs() == []
    agent = connect(endpoint)
    agent.hello(step=7)
    seen = probe(endpoint, PLAIN, run="job")
    assert seen.reply is not None
    assert (seen.reply.run_state, seen.reply.step) == ("running", 7)
    agent.goodbye(step=9)
    until(lambda: monitor.sample('run_state{run="job",state="ended"}') == 1.0)
    over = probe(endpoint, PLAIN, run="job")
    assert over.reply is not None
    assert (over.reply.run_state, over.reply.step) == ("ended", 9)


def test_a_refused_hello_is_told_until_one_is_welcome(
    start_monitor: Callable[..., Any], connect: Callable[..., Any]
) -> None:
    monitor = start_monitor(monitor={"max_peers": 1})
    endpoint = monitor.addresses.endpoint
    connect(endpoint, rank=0, num_senders=2).hello()
    connect(endpoint, rank=1, num_senders=2).hello()
    found = probe(endpoint, PLAIN, run="job")
    assert found.reply is not None
    assert "as many as [monitor] max_peers allows" in found.reply.refused
    connect(endpoint, incarnation="bbbbbbbb").hello()
    again = probe(endpoint, PLAIN, run="job")
    assert again.reply is not None
    assert again.reply.refused == ""


def test_behind_keys_each_agent_asks_for_its_own_runs_alone(
    start_monitor: Callable[..., Any], connect: Callable[..., Any], tmp_path: Path
) -> None:
    ring = Keyring(tmp_path / "keys")
    ring.agent("agent", runs=("mine/*",))
    ring.agent("rival")
    monitor = start_monitor(security=ring.security())
    endpoint = monitor.addresses.endpoint
    connect(endpoint, run="mine/1", trust=ring.trust()).hello()
    own = probe(endpoint, ring.trust(), run="mine/1")
    assert own.reply is not None
    assert own.reply.run_state == "running"
    theirs = probe(endpoint, ring.trust("rival"), run="mine/1")
    assert theirs.reply is not None
    assert theirs.reply.run_state is None, "another agent's run is as one that is not there"
    refused = probe(endpoint, ring.trust(), run="yours/1")
    assert refused.reply is not None
    assert "may not use run yours/1" in refused.reply.refused
    rejected = {name: count for name, count in monitor.samples().items() if name.startswith("messages_rejected")}
    assert set(rejected.values()) == {0.0}


@pytest.mark.parametrize("count", [200])
def test_a_monitor_that_is_asked_without_end_goes_on(
    start_monitor: Callable[..., Any], connect: Callable[..., Any], count: int
) -> None:
    monitor = start_monitor()
    endpoint = monitor.addresses.endpoint
    with WireContext() as context:
        client = ControlClient(context, endpoint)
        frames = encode(Probe(run="job", incarnation="0" * 8))
        sent = 0
        while sent < count:  # and no reply is read
            sent += client.send(frames)
        connect(endpoint).hello()
    assert monitor.sample('run_state{run="job",state="running"}') == 1.0
