"""Commands are counted once as sent and once by what became of them, whatever the agent repeats."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from koopmon.wire.messages import Ack, Applied, Command, Goodbye
from tests.monitor.world import GOOD, World

OUTCOMES = ("applied", "expired", "refused", "failed", "duplicate")


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    made = World(tmp_path / "history.sqlite3")
    made.hello(GOOD)
    yield made
    made.store.close()


def alarm(world: World, step: int = 1) -> None:
    world.shard(GOOD, step)
    world.results(finite=False)


def counted(world: World, kind: str = "set_lr_scale") -> dict[str, float]:
    """How often each outcome was counted, where it was."""
    found = {}
    for labels, value in world.series(GOOD).items():
        if labels[0] == "koopmon_commands_total" and ("kind", kind) in labels and value:
            found[dict(labels[1:])["outcome"]] = value  # type: ignore[call-overload]
    return found


def recorded(world: World, path: Path, command: Command) -> str:
    world.store.commit()
    with world.store.open_readonly(path) as history:
        rows = [row for decision in history.decisions(GOOD) for row in decision.commands]
    return next(row.outcome for row in rows if row.command.id == command.id)


def shown(world: World, command: Command) -> str:
    view = world.board.view(GOOD)
    assert view is not None
    orders = [order for decided in view.decisions for order in decided.commands]
    return next(order.outcome for order in orders if order.command.id == command.id)


def answer(world: World, command: Command, outcome: str) -> None:
    applied = Applied(lr_scale=command.lr_scale or 1.0)
    world.says(GOOD, Ack, command_id=command.id, outcome=outcome, step=5, applied=applied)


def cut(world: World) -> Command:
    return next(command for command in reversed(world.commands(GOOD)) if command.kind == "set_lr_scale")


def test_a_command_that_nobody_took_was_not_sent(world: World) -> None:
    world.reachable = False
    alarm(world)
    for _ in range(5):
        world.now += 1.1
        world.service.tick()
    assert counted(world) == {}
    world.reachable = True
    for _ in range(5):
        world.now += 1.1
        world.service.tick()
    assert len([each for each in world.commands(GOOD) if each.kind == "set_lr_scale"]) == 5, "offered again and again"
    assert counted(world) == {"sent": 1.0}
    answer(world, cut(world), "applied")
    assert counted(world) == {"sent": 1.0, "applied": 1.0}


def test_without_a_rank_that_takes_commands_nothing_is_sent(world: World) -> None:
    world.hello(GOOD, process_rank=1, world_size=2)
    world.says(GOOD, Goodbye, process_rank=0, step=1)
    alarm(world)
    assert counted(world) == {}


@pytest.mark.parametrize("first", OUTCOMES)
def test_the_first_answer_counts_and_no_other(first: str, world: World, tmp_path: Path) -> None:
    alarm(world)
    command = cut(world)
    for outcome in (first, *OUTCOMES, first):
        answer(world, command, outcome)
    assert counted(world) == {"sent": 1.0, first: 1.0}
    assert not world.errors
    assert len([text for text in world.told if " set_lr_scale " in text and "step 5" in text]) == 1, "annotated once"
    if first != "duplicate":
        assert recorded(world, tmp_path / "history.sqlite3", command) == first
        assert shown(world, command) == first


def test_a_late_answer_is_recorded_and_not_counted_twice(world: World, tmp_path: Path) -> None:
    alarm(world)
    command = cut(world)
    world.shard(GOOD, 1000)
    world.now += 2.0
    world.service.tick()
    world.now += 2.0
    world.service.tick()
    assert counted(world) == {"sent": 1.0, "unanswered": 1.0}
    assert shown(world, command) == "unanswered"
    for _ in range(3):
        answer(world, command, "applied")
    assert counted(world) == {"sent": 1.0, "unanswered": 1.0}
    assert recorded(world, tmp_path / "history.sqlite3", command) == shown(world, command) == "applied"


def test_a_replaced_command_counts_when_its_answer_comes(world: World) -> None:
    alarm(world, 1)
    first = cut(world)
    alarm(world, 40)
    second = cut(world)
    assert first.id != second.id
    assert counted(world) == {"sent": 2.0}
    answer(world, first, "applied")
    answer(world, second, "refused")
    assert counted(world) == {"sent": 2.0, "applied": 1.0, "refused": 1.0}


@pytest.mark.parametrize("answered", [0, 1, 2])
def test_in_the_end_each_command_has_counted_once(world: World, answered: int) -> None:
    for step in (1, 40, 80):
        alarm(world, step)
    ids = list(dict.fromkeys(command.id for command in world.commands(GOOD)))
    for command in world.commands(GOOD)[:answered]:
        answer(world, command, "failed")
        answer(world, command, "applied")
    world.says(GOOD, Goodbye, process_rank=0, step=100)
    totals: dict[str, float] = {}
    for kind in ("set_lr_scale", "set_cadence"):
        for outcome, value in counted(world, kind).items():
            totals[outcome] = totals.get(outcome, 0.0) + value
    assert totals.pop("sent") == len(ids)
    assert sum(totals.values()) == len(ids)
    assert totals.get("failed", 0.0) == answered
