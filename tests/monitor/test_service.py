"""Handlers of messages without sockets: what many ranks and many runs cost."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from koopmon.config import from_mapping
from koopmon.monitor.registry import Run, RunRegistry
from koopmon.monitor.service import MANY_RANKS, SHOW_SECONDS
from koopmon.wire.messages import Applied, Goodbye, Heartbeat, Welcome
from tests.monitor.world import GOOD, World

NUM_RANKS = 1000


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    world = World(tmp_path / "history.sqlite3")
    yield world
    world.store.close()
    assert not world.errors
    assert world.internal_errors() == 0.0


def beat(world: World, rank: int, step: int) -> None:
    world.says(GOOD, Heartbeat, process_rank=rank, step=step, applied=Applied(), overhead_ratio=rank / 1e4)


def join(world: World, num_ranks: int) -> None:
    for rank in range(num_ranks):
        world.hello(GOOD, process_rank=rank, world_size=num_ranks, num_senders=num_ranks)


def intervals(world: World) -> list[float]:
    return [message.heartbeat_seconds for message in world.sent[GOOD] if isinstance(message, Welcome)]


def test_the_ranks_of_a_large_run_send_fewer_heartbeats_and_rank_0_does_not(world: World) -> None:
    join(world, NUM_RANKS)
    first, *others = intervals(world)
    assert first == 1.0
    assert set(others) == {10.0}


def test_each_rank_alone_keeps_a_run_from_vanishing(world: World) -> None:
    for vanished in (3.0, 12.0, 60.0):
        world.service.config = from_mapping({"monitor": {"vanished_after_seconds": vanished}})
        world.sent[GOOD].clear()
        join(world, 1000)
        assert max(intervals(world)) <= vanished / 3


@pytest.mark.parametrize("num_ranks", [1, 8, 100])
def test_the_ranks_of_a_small_run_keep_the_configured_heartbeat(world: World, num_ranks: int) -> None:
    join(world, num_ranks)
    assert set(intervals(world)) == {1.0}


def test_a_heartbeat_of_a_large_run_reads_no_other_rank(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    join(world, NUM_RANKS)
    reads = 0

    def counted(run: Run) -> Any:
        nonlocal reads
        reads += 1
        return real.__get__(run)

    real = Run.training
    monkeypatch.setattr(Run, "training", property(counted))
    for step in range(1, 4):
        world.now += SHOW_SECONDS
        for rank in range(NUM_RANKS):
            beat(world, rank, step)
            world.service.tick()
            world.service.next_deadline()
    assert reads <= 2 * 4, "two sinks, once for each interval"
    assert world.service.next_deadline() == world.now + 0.5
    world.now += SHOW_SECONDS
    world.service.tick()
    found = {name: value for (name, *_), value in world.series(GOOD).items()}
    assert found["koopmon_step"] == 3
    assert found["koopmon_agent_overhead_ratio"] == (NUM_RANKS - 1) / 1e4


@pytest.mark.parametrize("num_ranks", [1, MANY_RANKS])
def test_a_small_run_is_shown_with_each_message(world: World, num_ranks: int) -> None:
    join(world, num_ranks)
    beat(world, num_ranks - 1, 5)
    assert world.metrics.value("step", GOOD) == 5


def test_a_large_run_that_ended_or_vanished_is_shown_at_once(world: World) -> None:
    join(world, MANY_RANKS + 1)
    for rank in range(MANY_RANKS + 1):
        beat(world, rank, 7)
        world.says(GOOD, Goodbye, process_rank=rank, step=9)
    assert (world.metrics.value("run_state", GOOD), world.metrics.value("step", GOOD)) == (0, 9)
    join(world, MANY_RANKS + 1)
    beat(world, 0, 11)
    world.now += 61.0
    world.service.tick()
    world.service.tick()
    assert {name for name, *_ in world.series(GOOD)} == {"koopmon_run_state"}


def test_a_tick_looks_at_the_runs_that_are_due_alone(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.service.config = from_mapping({"monitor": {"max_runs": 1000}})
    registry = RunRegistry(world.service.config.monitor)
    world.service._registry = registry
    for number in range(500):
        world.sent[f"run-{number}"] = []
        world.hello(f"run-{number}")
    world.service.tick()
    looked: list[str] = []
    real = RunRegistry._deadline
    monkeypatch.setattr(RunRegistry, "_deadline", lambda self, run: (looked.append(run.name), real(self, run))[1])
    monkeypatch.setattr(RunRegistry, "__iter__", lambda self: pytest.fail("a walk over all runs"))
    for _ in range(100):
        world.service.tick()
        world.service.next_deadline()
        world.says("run-7", Heartbeat, process_rank=0, step=1, applied=Applied())
    assert len(looked) < 1500


def test_drops_of_a_large_run_are_counted_at_once(world: World) -> None:
    join(world, MANY_RANKS + 1)
    world.says(GOOD, Heartbeat, process_rank=3, step=1, applied=Applied(), dropped={"budget": 2})
    assert world.metrics.value("snapshots_dropped", GOOD, "budget") == 2
