"""A run of the monitor and its ranks: what they report, and what is recorded of it."""

from __future__ import annotations

import math
from typing import Any

import pytest

from koopmon.config import MonitorConfig
from koopmon.history.schema import RunState
from koopmon.monitor.registry import RunRegistry
from koopmon.monitor.run import Peer, Run
from koopmon.risk.band import BandReading
from koopmon.wire.messages import MAX_LOGGED, Applied, Heartbeat, Hello, LoggedScalar, TrainingStep
from tests import factories
from tests.factories import admit

FIRST = "aaaaaaaa"


def hello(run: str = "job", incarnation: str = FIRST, rank: int = 0, **fields: Any) -> Hello:
    return factories.hello(run, incarnation, process_rank=rank, **{"world_size": 8, "num_senders": 2, **fields})


def heartbeat(rank: int = 0, incarnation: str = FIRST, step: int = 5, run: str = "job", **fields: Any) -> Heartbeat:
    return factories.heartbeat(step, run, incarnation, process_rank=rank, **fields)


@pytest.fixture
def registry() -> RunRegistry:
    return RunRegistry(MonitorConfig(max_runs=2))


def test_dropped_shards_are_counted_from_totals() -> None:
    peer = Peer(b"p")
    assert peer.new_drops(heartbeat(dropped={"queue_full": 3, "budget": 0})) == {"queue_full": 3}
    assert peer.new_drops(heartbeat(dropped={"queue_full": 3})) == {}
    assert peer.new_drops(heartbeat(dropped={"queue_full": 5, "budget": 1})) == {"queue_full": 2, "budget": 1}
    assert peer.new_drops(heartbeat(dropped={"queue_full": 1})) == {}, "a total that fell is of a rank that restarted"
    assert peer.new_drops(heartbeat(dropped={"queue_full": 2})) == {"queue_full": 1}


def test_a_heartbeat_is_recorded_every_ten_seconds() -> None:
    peer = Peer(b"p")
    assert [now for now in (0.0, 5.0, 9.9, 10.0, 19.9, 25.0, 34.9, 35.0) if peer.row_due(now, {})] == [
        0.0,
        10.0,
        25.0,
        35.0,
    ]


def test_changes_of_a_run_are_told_once(registry: RunRegistry) -> None:
    run = admit(registry, 0.0, hello(), b"p0").run
    assert [run.applied_changed(), run.applied_changed()] == [True, False]
    registry.on_message(1.0, heartbeat(applied=Applied(lr_scale=0.5)), b"p0")
    assert [run.applied_changed(), run.applied_changed()] == [True, False]
    assert [run.newly_not_finite(step) for step in (0, 0, 4, 3, 4, 5)] == [True, False, True, False, False, True]


def test_the_scalars_of_a_run_are_means_over_its_ranks_and_the_settings_of_rank_0(registry: RunRegistry) -> None:
    run = admit(registry, 0.0, hello(rank=1, step=3), b"p1").run
    registry.on_message(1.0, heartbeat(1, step=7, loss=8.0, learning_rate=0.1, lr_scale=0.25), b"p1")
    assert run.training == TrainingStep(step=7, loss=8.0, learning_rate=0.1), (
        "a setting of another rank is not the run's"
    )
    admit(registry, 2.0, hello(step=4, applied=Applied(lr_scale=0.5)), b"p0")
    assert run.training == TrainingStep(step=7, loss=8.0, learning_rate=0.1, lr_scale=0.5)
    beat = heartbeat(0, step=6, loss=2.0, grad_norm=4.0, learning_rate=0.2, applied=Applied(lr_scale=0.5))
    registry.on_message(3.0, beat, b"p0")
    assert run.training == TrainingStep(step=7, loss=5.0, grad_norm=4.0, learning_rate=0.2, lr_scale=0.5)
    registry.on_message(4.0, heartbeat(1, step=8, loss=math.inf), b"p1")
    assert math.isnan(run.training.loss or 0.0)


@pytest.mark.parametrize(
    ("restore", "step", "left"),
    [
        (None, 0, Applied(lr_scale=0.5)),
        (None, 7, Applied(lr_scale=0.5)),
        (Applied(lr_scale=0.25), 0, Applied(lr_scale=0.25)),
        (Applied(lr_scale=0.25), 1, Applied(lr_scale=0.5)),
    ],
)
def test_a_launch_leaves_its_settings_or_those_it_has_not_put_in_force_yet(
    restore: Applied | None, step: int, left: Applied
) -> None:
    controller: Any = None
    run = Run(hello(), controller, 0.0, step, Applied(lr_scale=0.5), restore=restore)
    assert run.left_in_force == left
    run.state = RunState.VANISHED
    assert run.left_in_force == left, "it was killed"
    run.state = RunState.ENDED
    assert run.left_in_force is None


def test_without_a_heartbeat_a_run_shows_what_its_hello_said(registry: RunRegistry) -> None:
    run = admit(registry, 0.0, hello(step=7, applied=Applied(lr_scale=0.5)), b"p0").run
    assert run.training == TrainingStep(step=7, lr_scale=0.5)


def test_a_new_value_of_a_logged_scalar_is_recorded_sooner() -> None:
    peer = Peer(b"peer")

    def due(now: float, step: int) -> bool:
        return peer.row_due(now, {"kl": BandReading(step, 0.5)})

    assert due(0.0, 1)
    assert not due(1.0, 2)
    assert due(2.0, 2)
    assert not due(9.0, 2)
    assert due(12.0, 2)


def test_the_fastest_rank_sets_the_steps_of_a_time() -> None:
    registry = RunRegistry(MonitorConfig())
    admit(registry, 0.0, hello(), b"0")
    run = registry.get("job")
    assert run is not None
    assert run.lead_steps(2.0) is None
    for rank, seconds in enumerate((0.5, 0.25)):
        admit(registry, 0.0, hello(rank=rank), str(rank).encode())
        registry.on_message(0.0, heartbeat(rank, step_seconds=seconds), str(rank).encode())
    assert run.lead_steps(2.0) == 8


def test_a_name_that_is_not_read_holds_up_no_other() -> None:
    registry = RunRegistry(MonitorConfig())
    admit(registry, 0.0, hello("job", FIRST), b"p")
    run = registry.get("job")
    assert run is not None
    logged = {"loss": LoggedScalar(step=1, value=2.0), "kl": LoggedScalar(step=1, value=0.5)}
    assert list(run.read_logged(heartbeat(logged=logged))) == ["kl"]


def test_launches_do_not_multiply_the_names_of_a_run() -> None:
    registry, read = RunRegistry(MonitorConfig()), set()
    for launch, incarnation in enumerate((FIRST, "cccccccc", "dddddddd")):
        admit(registry, float(launch), hello("job", incarnation), b"p")
        run = registry.get("job")
        assert run is not None
        logged = {f"a{launch}_{number}": LoggedScalar(step=1, value=0.5) for number in range(20)}
        read |= run.read_logged(heartbeat(incarnation=incarnation, logged=logged)).keys()
    assert len(read) == MAX_LOGGED
