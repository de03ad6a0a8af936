"""Handlers of messages without sockets: what many ranks and many runs cost."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from koopmon.config import from_mapping
from koopmon.monitor.registry import LAST_STEP, RunRegistry
from koopmon.monitor.run import Run
from koopmon.monitor.service import MANY_RANKS, SHOW_SECONDS
from koopmon.wire.messages import MAX_STEP, Applied, Goodbye, Heartbeat, HeartbeatReply, Welcome
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
    assert (world.metrics.value("run_state", GOOD, "ended"), world.metrics.value("step", GOOD)) == (1, 9)
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
    assert world.metrics.value("agent_snapshots_dropped", GOOD, "budget") == 2


# The stride that the engine can judge


def overload(world: World, num_ranks: int, first_step: int = 0) -> None:
    """The engine judges one of four snapshots for some seconds."""
    for step in range(first_step, first_step + 48):
        world.now += 0.25
        for _ in range(3):
            world.service.on_dropped(GOOD, "superseded")
        for rank in range(num_ranks):
            world.shard(GOOD, 4 * step + 4, process_rank=rank, num_senders=num_ranks)
        world.results(finite=True)


def strides(world: World, rank: int, step: int) -> tuple[int, int]:
    world.says(GOOD, Heartbeat, process_rank=rank, step=step, applied=Applied(), step_seconds=0.05)
    reply = world.sent[GOOD][-1]
    assert isinstance(reply, HeartbeatReply)
    return reply.min_stride, reply.min_stride_from


def test_all_ranks_get_one_stride_ahead_of_their_steps(world: World) -> None:
    join(world, 2)
    assert {strides(world, rank, 1) for rank in (0, 1)} == {(1, 0)}
    assert world.metrics.value("min_stride", GOOD) == 1
    overload(world, 2)
    told = {strides(world, rank, 192) for rank in (0, 1)}
    assert len(told) == 1
    ((stride, from_step),) = told
    assert stride == 4
    known_by = 2.0 * max(intervals(world))
    assert from_step - 192 <= 3.0 / 0.05
    first = next(step for step in range(4, 193, 4) if from_step <= step + 3.0 / 0.05)
    assert from_step >= first + known_by / 0.05
    assert world.metrics.value("min_stride", GOOD) == 4


def test_a_run_whose_step_time_is_unknown_keeps_its_cadence(world: World) -> None:
    world.hello(GOOD)
    overload(world, 1)
    world.says(GOOD, Heartbeat, process_rank=0, step=192, applied=Applied())
    assert world.sent[GOOD][-1].min_stride == 1  # type: ignore[union-attr]


@pytest.mark.parametrize("seconds", [5e-324, 1e-9, 1e308])
def test_the_step_of_a_stride_is_legal_whatever_a_rank_says(world: World, seconds: float) -> None:
    world.hello(GOOD)
    world.says(GOOD, Heartbeat, process_rank=0, step=LAST_STEP, applied=Applied(), step_seconds=seconds)
    overload(world, 1)
    stride, from_step = strides(world, 0, LAST_STEP)
    assert stride == 4
    assert LAST_STEP < from_step <= MAX_STEP


def test_a_later_incarnation_starts_without_a_limit(world: World) -> None:
    world.hello(GOOD)
    strides(world, 0, 1)
    overload(world, 1)
    assert strides(world, 0, 192)[0] == 4
    run = world.service._registry.get(GOOD)
    assert run is not None
    hello = msgspec.structs.replace(run.hello, incarnation="bbbbbbbb")
    world.service.on_control(GOOD.encode(), hello)
    again = world.service._registry.get(GOOD)
    assert again is not None
    assert again.pacing.steps == 1
