"""Commands count once as sent and once by their outcome, whatever the agent repeats."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from koopmon.history.reader import HistoryReader
from koopmon.monitor.pending_commands import MAX_REPLACED, MAX_SETTLED, RESEND_SECONDS, Answered, PendingCommands
from koopmon.wire.messages import Ack, Applied, Command, Goodbye
from tests import factories
from tests.monitor.world import GOOD, World

pytestmark = pytest.mark.usefixtures("one_snapshot_is_enough")

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
    """Return the nonzero counts of issued commands and of outcomes."""
    found = {}
    for labels, value in world.series(GOOD).items():
        if labels[0].startswith("koopmon_commands_") and ("kind", kind) in labels and value:
            found[dict(labels[1:]).get("outcome", "issued")] = value  # type: ignore[call-overload]
    return found


def recorded(world: World, path: Path, command: Command) -> str:
    world.store.commit()
    with HistoryReader.open(path) as history:
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
    assert counted(world) == {"issued": 1.0}
    answer(world, cut(world), "applied")
    assert counted(world) == {"issued": 1.0, "applied": 1.0}


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
    assert counted(world) == {"issued": 1.0, first: 1.0}
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
    assert counted(world) == {"issued": 1.0, "unanswered": 1.0}
    assert shown(world, command) == "unanswered"
    for _ in range(3):
        answer(world, command, "applied")
    assert counted(world) == {"issued": 1.0, "unanswered": 1.0}
    assert recorded(world, tmp_path / "history.sqlite3", command) == shown(world, command) == "applied"


def test_a_replaced_command_counts_when_its_answer_comes(world: World) -> None:
    alarm(world, 1)
    first = cut(world)
    alarm(world, 40)
    second = cut(world)
    assert first.id != second.id
    assert counted(world) == {"issued": 2.0}
    answer(world, first, "applied")
    answer(world, second, "refused")
    assert counted(world) == {"issued": 2.0, "applied": 1.0, "refused": 1.0}


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
    assert totals.pop("issued") == len(ids)
    assert sum(totals.values()) == len(ids)
    assert totals.get("failed", 0.0) == answered


# The list by itself


def asked(*numbers: int, kind: str = "set_lr_scale", **fields: Any) -> list[Command]:
    """Build commands of one decision, by number."""
    return [factories.command(number, kind=kind, **fields) for number in numbers]


def ids(commands: Iterable[Command]) -> list[str]:
    return [command.id for command in commands]


def test_a_command_is_due_a_second_after_it_was_offered_and_every_second_from_then_on() -> None:
    pending = PendingCommands()
    assert not pending
    pending.add(10.0, asked(1))
    assert pending
    assert pending.due(10.9) == []
    assert ids(pending.due(11.0)) == ids(asked(1))
    assert pending.due(11.9) == []
    assert ids(pending.due(12.0)) == ids(asked(1))
    assert RESEND_SECONDS == 1.0


def test_a_newer_command_replaces_those_of_its_kind_alone() -> None:
    pending = PendingCommands()
    (cadence,) = asked(1, kind="set_cadence")
    assert pending.add(0.0, [cadence, *asked(2)]) == []
    assert ids(pending.add(0.5, asked(3))) == ids(asked(2))
    assert pending.add(0.6, asked(4)) == asked(3), "what was replaced before is not named again"
    assert ids(pending.due(2.0)) == [cadence.id, *ids(asked(4))]
    assert pending


def test_a_list_of_replaced_commands_alone_waits_for_none() -> None:
    pending = PendingCommands()
    pending.add(0.0, asked(1))
    pending.add(0.0, asked(2))
    pending.acknowledge(asked(2)[0].id)
    assert not pending
    assert pending.due(9.0) == []


def test_a_command_is_sent_for_the_first_time_once() -> None:
    pending = PendingCommands()
    (one,) = asked(1)
    assert not pending.mark_sent(one), "nobody asked for it"
    pending.add(0.0, [one])
    assert pending.mark_sent(one)
    assert not pending.mark_sent(one)
    pending.acknowledge(one.id)
    assert not pending.mark_sent(one)


def test_an_ack_is_matched_with_its_command() -> None:
    pending = PendingCommands()
    first, second = asked(1, 2)
    pending.add(0.0, [first])
    pending.add(0.0, [second])
    matched = Answered("set_lr_scale", first=True, counts=True)
    assert pending.acknowledge(first.id) == (matched, None), "it does not belong to the newest command"
    assert pending.acknowledge(second.id) == (matched, second)
    again = Answered("set_lr_scale", first=False, counts=False)
    assert pending.acknowledge(first.id) == (again, None)
    assert pending.acknowledge("f" * 8) is None


def test_an_ack_of_an_expired_command_is_its_first_and_does_not_count() -> None:
    pending = PendingCommands()
    (one,) = asked(1, expires_step=60)
    pending.add(0.0, [one])
    assert [each.command for each in pending.expire(5.0, 61)] == [one]
    late = Answered("set_lr_scale", first=True, counts=False)
    assert pending.acknowledge(one.id) == (late, None)
    assert pending.acknowledge(one.id) == (Answered("set_lr_scale", first=False, counts=False), None)


@pytest.mark.parametrize(("now", "step", "expires"), [(11.0, 61, True), (10.9, 61, False), (11.0, 60, False)])
def test_a_command_expires_after_its_last_step_and_a_second_for_the_ack(now: float, step: int, expires: bool) -> None:
    pending = PendingCommands()
    pending.add(10.0, asked(1, expires_step=60))
    assert bool(pending.expire(now, step)) is expires
    assert bool(pending) is not expires


def test_a_few_replaced_commands_wait_for_their_acks() -> None:
    pending = PendingCommands()
    for number in range(4):
        pending.add(0.0, asked(number))
    assert pending.expire(0.0, 0) == []
    for number in range(4):
        found = pending.acknowledge(asked(number)[0].id)
        assert found is not None
        assert found[0].counts


def test_the_64_newest_replaced_commands_still_wait() -> None:
    pending = PendingCommands()
    for number in range(68):
        pending.add(0.0, asked(number))
    assert ids(each.command for each in pending.expire(0.0, 0)) == ids(asked(0, 1, 2)), "67 were replaced"
    assert pending.expire(0.0, 0) == []
    assert MAX_REPLACED == 64
    found = pending.acknowledge(asked(3)[0].id)
    assert found is not None
    assert found[0].counts


def test_the_256_commands_that_were_settled_last_are_known() -> None:
    pending = PendingCommands()
    for number in range(258):
        pending.add(0.0, asked(number))
        pending.acknowledge(asked(number)[0].id)
    assert pending.acknowledge(asked(1)[0].id) is None
    assert pending.acknowledge(asked(2)[0].id) is not None
    assert MAX_SETTLED == 256


def test_at_the_end_all_are_given_up_and_late_acks_do_not_count() -> None:
    pending = PendingCommands()
    pending.add(0.0, asked(1))
    pending.add(0.0, asked(2))
    assert ids(pending.abandon()) == ids(asked(1, 2))
    assert not pending
    assert pending.abandon() == []
    assert pending.acknowledge(asked(1)[0].id) == (Answered("set_lr_scale", first=True, counts=False), None)
