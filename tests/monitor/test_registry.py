"""The registry of runs under a clock of our own."""

from __future__ import annotations

import math
from typing import Any

import pytest

from koopmon.config import MonitorConfig
from koopmon.errors import ProtocolError
from koopmon.history.schema import RunState
from koopmon.monitor.registry import RunRegistry
from koopmon.wire.messages import Ack, Applied, Goodbye, Heartbeat, Hello, Shard, TrainingStep
from tests import factories
from tests.factories import admit

FIRST, SECOND = "aaaaaaaa", "bbbbbbbb"
CONFIG = MonitorConfig(
    max_runs=2, vanished_after_seconds=60.0, ended_series_seconds=300.0, vanished_series_seconds=86400.0
)


def hello(run: str = "job", incarnation: str = FIRST, rank: int = 0, **fields: Any) -> Hello:
    return factories.hello(run, incarnation, process_rank=rank, **{"world_size": 8, "num_senders": 2, **fields})


def heartbeat(rank: int = 0, incarnation: str = FIRST, step: int = 5, run: str = "job", **fields: Any) -> Heartbeat:
    return factories.heartbeat(step, run, incarnation, process_rank=rank, **fields)


def goodbye(rank: int = 0, step: int = 9) -> Goodbye:
    return Goodbye(run="job", incarnation=FIRST, process_rank=rank, step=step)


def shard(incarnation: str = FIRST, step: int = 3) -> Shard:
    return Shard(
        run="job",
        incarnation=incarnation,
        process_rank=0,
        num_senders=1,
        training=TrainingStep(step=step),
        first_point=0,
        num_points=2,
        num_samples=4,
        width=4,
        dtype="float32",
    )


@pytest.fixture
def registry() -> RunRegistry:
    return RunRegistry(CONFIG)


def test_hello_admits_and_tells_what_is_new(registry: RunRegistry) -> None:
    first = admit(registry, 0.0, hello(), b"p0")
    again = admit(registry, 1.0, hello(rank=1), b"p1")
    assert (first.before, first.settled) == (None, False)
    assert again.before is again.run
    assert not again.settled
    assert first.run is again.run
    assert first.run.leader is first.run.peers[0]
    registry.on_message(2.0, heartbeat(0), b"p0")
    settled = admit(registry, 3.0, hello(), b"p0-again")
    assert settled.settled
    registry.on_message(4.0, heartbeat(0), b"p0-again")
    with pytest.raises(ProtocolError, match="another peer"):
        registry.on_message(5.0, heartbeat(0), b"p0")


def test_a_run_ends_when_all_ranks_said_goodbye_and_its_series_go_later(registry: RunRegistry) -> None:
    admit(registry, 0.0, hello(), b"p0")
    admit(registry, 0.0, hello(rank=1), b"p1")
    assert registry.on_message(10.0, goodbye(0), b"p0").state is RunState.RUNNING
    run = registry.on_message(11.0, goodbye(1), b"p1")
    assert run.state is RunState.ENDED
    assert run.leader is None
    assert registry.next_deadline() == 311.0
    assert registry.expire(310.9) == ([], [])
    assert registry.expire(311.0) == ([], [run])
    assert registry.next_deadline() == math.inf


def test_a_straggling_shard_does_not_revive_a_run_that_ended(registry: RunRegistry) -> None:
    admit(registry, 0.0, hello(), b"p0")
    registry.on_message(1.0, goodbye(), b"p0")
    assert registry.on_shard(2.0, shard()).state is RunState.ENDED
    late = Ack(run="job", incarnation=FIRST, command_id="0" * 8, outcome="applied", step=9, applied=Applied())
    assert registry.on_message(3.0, late, b"p0").state is RunState.ENDED


def test_silence_makes_a_run_vanish_and_a_word_brings_it_back(registry: RunRegistry) -> None:
    admit(registry, 0.0, hello(), b"p0")
    registry.on_message(30.0, heartbeat(), b"p0")
    assert registry.expire(89.9) == ([], [])
    assert [run.state for run in registry.expire(90.0)[0]] == [RunState.VANISHED]
    assert registry.expire(86489.0) == ([], [])
    run = registry.on_shard(86489.5, shard(step=7))
    assert (run.state, run.step) == (RunState.RUNNING, 7)
    assert registry.expire(86489.5 + 60) == ([run], [])
    assert run.state is RunState.VANISHED
    assert registry.expire(86489.5 + 60 + 86400) == ([], [run])


def test_goodbye_of_one_rank_and_silence_of_the_others_is_an_end(registry: RunRegistry) -> None:
    admit(registry, 0.0, hello(), b"p0")
    admit(registry, 0.0, hello(rank=1), b"p1")
    registry.on_message(1.0, goodbye(0), b"p0")
    ((run,), _) = registry.expire(61.0)
    assert run.state is RunState.ENDED


def test_a_new_incarnation_takes_over_for_good(registry: RunRegistry) -> None:
    admit(registry, 0.0, hello(), b"p0")
    taken = admit(registry, 1.0, hello(incarnation=SECOND), b"q0")
    assert taken.before is not None
    assert (taken.before.incarnation, taken.run.incarnation) == (FIRST, SECOND)
    for message in (heartbeat(), goodbye()):
        with pytest.raises(ProtocolError) as caught:
            registry.on_message(2.0, message, b"p0")
        assert caught.value.reason == "stale_incarnation"
    with pytest.raises(ProtocolError, match="now has the incarnation"):
        registry.on_shard(2.0, shard())
    with pytest.raises(ProtocolError, match="KOOPMON_RUN"):
        admit(registry, 3.0, hello(), b"p0")


def test_incarnations_retired_before_a_restart_stay_retired(registry: RunRegistry) -> None:
    with pytest.raises(ProtocolError, match="taken over"):
        admit(registry, 0.0, hello(), b"p0", retired=[FIRST])
    assert list(registry) == []
    admit(registry, 0.0, hello(incarnation=SECOND), b"p0", retired=[FIRST])
    with pytest.raises(ProtocolError, match="taken over"):
        admit(registry, 0.0, hello(), b"p0")


def test_too_many_runs_are_refused_until_one_is_over(registry: RunRegistry) -> None:
    admit(registry, 0.0, hello("a"), b"a")
    admit(registry, 0.0, hello("b"), b"b")
    with pytest.raises(ProtocolError, match="max_runs"):
        admit(registry, 1.0, hello("c"), b"c")
    registry.on_message(2.0, Goodbye(run="a", incarnation=FIRST, process_rank=0, step=1), b"a")
    admission = admit(registry, 3.0, hello("c"), b"c")
    assert admission.run.name == "c"
    assert [run.name for run in admission.removed] == ["a"]
    assert sorted(run.name for run in registry) == ["b", "c"]


def test_strangers_are_told_apart(registry: RunRegistry) -> None:
    with pytest.raises(ProtocolError) as caught:
        registry.on_message(0.0, heartbeat(), b"p0")
    assert caught.value.reason == "unknown_run"
    with pytest.raises(ProtocolError):
        registry.on_shard(0.0, shard())
    admit(registry, 0.0, hello(), b"p0")
    with pytest.raises(ProtocolError) as caught:
        registry.on_message(0.0, heartbeat(rank=3), b"p3")
    assert caught.value.reason == "unknown_run"


def test_only_rank_0_tells_what_is_applied_and_steps_never_fall(registry: RunRegistry) -> None:
    admit(registry, 0.0, hello(step=4), b"p0")
    admit(registry, 0.0, hello(rank=1, applied=Applied(lr_scale=0.1)), b"p1")
    half = Applied(lr_scale=0.5)
    run = registry.on_message(1.0, heartbeat(0, step=20, applied=half, loss=2.0), b"p0")
    registry.on_message(1.0, heartbeat(1, step=18, applied=Applied(lr_scale=0.25), loss=3.0), b"p1")
    assert (run.applied, run.step) == (half, 20)
    assert run.training == TrainingStep(step=20, loss=2.0, lr_scale=0.5)
