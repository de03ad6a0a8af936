"""Exchanges between ranks: here groups of one process over one store; tests/agent/test_ranks.py has processes."""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist

from koopmon.agent.control import rank_group
from koopmon.agent.control.rank_group import (
    CONNECT_SECONDS,
    FIRST_PAUSE_SECONDS,
    HEALTHY_SECONDS,
    MESSAGE_BYTES,
    NUM_PACES,
    OPERATION_SECONDS,
    START_STEPS,
    RankGroup,
    ReplicaFingerprint,
)
from koopmon.agent.control.state import ActionState, ControlState, ControlUpdate, Ramp
from koopmon.agent.rank_identity import RankContext
from koopmon.agent.stats import AgentStats
from koopmon.config import ControlConfig

pytest.importorskip("torch.distributed")

Make = Callable[..., list[RankGroup]]


@pytest.fixture
def groups() -> Iterator[Make]:
    """Makes the ranks of one training, and waits until they are ready."""
    made: list[RankGroup] = []

    def make(
        size: int = 2,
        *,
        steps: tuple[int, ...] = (),
        shares: tuple[ReplicaFingerprint, ...] = (),
        collectives: tuple[Callable[[], int] | None, ...] = (),
        wait: bool = True,
    ) -> list[RankGroup]:
        store = dist.HashStore()
        ranks = []
        for rank in range(size):
            stats = AgentStats()
            stats.step = steps[rank] if steps else 0
            config = ControlConfig(timeout_seconds=5.0)
            share = shares[rank] if shares else None
            count = collectives[rank] if collectives else None
            ranks.append(RankGroup(RankContext(rank, size, store), config, stats, "place", share, count))
        made.extend(ranks)
        if wait:
            until(lambda: all(each.ready for each in ranks))
        return ranks

    yield make
    for each in made:
        each.close()
    for each in made:
        each.close(wait=True)


def until(true: Callable[[], bool], seconds: float = 15.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not come to it"
        time.sleep(0.01)


def update(step: int, next_step: int, **fields: Any) -> ControlUpdate:
    return ControlUpdate(
        step=step, state=ControlState(version=step, **fields), snapshots=(1, 0, 1), next_step=next_step
    )


def exchanged(ranks: list[RankGroup], sent: ControlUpdate) -> list[ControlUpdate | None]:
    for each in ranks:
        each.launch(sent if each.leads else None)
    assert all(each.in_flight for each in ranks)
    found = [each.receive() for each in ranks]
    assert not any(each.in_flight for each in ranks)
    return found


def test_all_ranks_agree_on_a_first_step_ahead_of_every_rank(groups: Make) -> None:
    ranks = groups(3, steps=(4, 11, 7))
    first = 11 + START_STEPS
    for each in ranks:
        assert [each.is_due(step) for step in range(first)] == [False] * first
        assert each.is_due(first)
    assert [each.leads for each in ranks] == [True, False, False]


class Collectives:
    """A counter of the collectives of a training."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self) -> int:
        return self.count


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let collectives be the common time from the first generation on, as after a failure."""
    monkeypatch.setattr(rank_group, "COUNTED_FROM", 0)


def stepped(ranks: list[RankGroup], counter: Collectives, pace: int) -> None:
    """Take the steps that show each rank if its steps contain collectives."""
    for _ in range(NUM_PACES + 1):
        counter.count += pace
        for each in ranks:
            assert not each.is_due(0)


@pytest.mark.usefixtures("counted")
def test_ranks_with_different_counts_of_steps_meet_at_one_count_of_collectives(groups: Make) -> None:
    counter = Collectives()
    ranks = groups(3, steps=(4, 40, 7), collectives=(counter,) * 3, wait=False)
    stepped(ranks, counter, 3)
    until(lambda: all(each.ready for each in ranks))
    assert all(each.steps_may_differ for each in ranks)
    begin = counter.count
    first = begin + 3 * START_STEPS
    counter.count = first - 1
    assert not any(each.is_overdue(0) for each in ranks)
    counter.count = first + 1
    assert [each.is_overdue(step) for each, step in zip(ranks, (4, 40, 7), strict=True)] == [True] * 3
    (found, *others) = exchanged(ranks, update(4, 6))
    assert found is not None
    assert others == [found] * 2
    assert found.next_count == first + 1 + 2 * 3, "two steps of three collectives"
    counter.count = found.next_count - 1
    assert not any(each.is_overdue(0) for each in ranks)
    counter.count += 1
    assert ranks[0].is_due(6)
    assert ranks[1].is_overdue(40)
    for each in ranks:
        each.launch(update(6, 7) if each.leads else None)
    assert not any(each.is_overdue(0) for each in ranks), "once"
    assert all(each.receive() is not None for each in ranks)


@pytest.mark.usefixtures("counted")
@pytest.mark.parametrize("paces", [(2, 0), (0, 0)])
def test_steps_are_the_time_of_a_training_whose_steps_contain_no_collectives(
    groups: Make, paces: tuple[int, int]
) -> None:
    counters = (Collectives(), Collectives())
    ranks = groups(steps=(4, 4), collectives=counters, wait=False)
    for rank, counter, pace in zip(ranks, counters, paces, strict=True):
        stepped([rank], counter, pace)
    until(lambda: all(each.ready for each in ranks))
    assert not any(each.steps_may_differ for each in ranks)
    first = 4 + START_STEPS
    assert [each.is_due(first) for each in ranks] == [True, True]
    assert not any(each.is_overdue(first) for each in ranks)


@pytest.mark.usefixtures("counted")
def test_steps_are_the_time_if_one_rank_cannot_count_collectives(groups: Make) -> None:
    counter = Collectives()
    ranks = groups(collectives=(counter, None), wait=False)
    stepped(ranks[:1], counter, 3)
    until(lambda: all(each.ready for each in ranks))
    assert not any(each.steps_may_differ for each in ranks)


@pytest.mark.usefixtures("counted")
def test_no_exchange_is_agreed_before_each_rank_has_taken_some_steps(groups: Make) -> None:
    counter = Collectives()
    ranks = groups(collectives=(counter, counter), wait=False)
    stepped(ranks[:1], counter, 3)
    time.sleep(0.3)
    assert not any(each.ready for each in ranks)
    stepped(ranks[1:], counter, 3)
    until(lambda: all(each.ready for each in ranks))


def test_collectives_are_the_time_after_a_failure_alone(groups: Make) -> None:
    counter = Collectives()
    ranks = groups(collectives=(counter, counter), wait=False)
    until(lambda: all(each.ready for each in ranks))
    assert not any(each.steps_may_differ for each in ranks)
    for each in ranks:
        each.fail("a test")
    stepped(ranks, counter, 3)
    until(lambda: all(each.ready for each in ranks))
    assert all(each.steps_may_differ for each in ranks)


@pytest.mark.usefixtures("counted")
def test_a_default_group_that_was_made_again_leaves_the_steps_as_the_time(groups: Make) -> None:
    counter = Collectives()
    ranks = groups(collectives=(counter, counter), wait=False)
    counter.count = 100
    stepped(ranks, counter, 3)
    counter.count = -3
    stepped(ranks, counter, 3)
    until(lambda: all(each.ready for each in ranks))
    assert not any(each.steps_may_differ for each in ranks)


class Running:
    """Counters of a rank whose step goes on between two reads."""

    step_seconds = None

    def __init__(self, *steps: int) -> None:
        self._steps = iter(steps)

    @property
    def step(self) -> int:
        return next(self._steps)


@pytest.mark.parametrize(
    ("steps", "first"),
    [((0, 2), START_STEPS), ((0, 3, 3, 14), 3 + 4 * START_STEPS), ((0, 9, 9, 50, 50, 51), 50 + 16 * START_STEPS)],
)
def test_a_rank_that_reached_the_step_meanwhile_asks_for_a_later_one(steps: tuple[int, ...], first: int) -> None:
    """Its exchange after that step may have been skipped. The lead grows four times with each attempt."""
    stats: Any = Running(*steps)
    group = RankGroup(RankContext(0, 1, dist.HashStore()), ControlConfig(timeout_seconds=5.0), stats, "place")
    until(lambda: group.ready)
    assert group._next == first
    group.close(wait=True)


def test_short_steps_have_a_longer_lead(groups: Make) -> None:
    """The first exchange is at least a third of a second ahead."""
    store, ranks = dist.HashStore(), []
    for rank in range(2):
        stats = AgentStats()
        stats.tick(0.01)
        ranks.append(RankGroup(RankContext(rank, 2, store), ControlConfig(timeout_seconds=5.0), stats, "place"))
    until(lambda: all(each.ready for each in ranks))
    assert [step for step in range(100) if ranks[0]._next == step] == [1 + 30]
    for each in ranks:
        each.close(wait=True)


def test_what_rank_0_decides_reaches_every_rank(groups: Make) -> None:
    ranks = groups(3)
    first = ranks[0]._next
    assert first is not None
    sent = update(first, first + 5, actions={"set_lr_scale": ActionState(ramp=Ramp(target=0.5))})
    assert exchanged(ranks, sent) == [sent] * 3
    for each in ranks:
        assert not each.is_due(first + 4)
        assert each.is_due(first + 5)
    again = update(first + 5, first + 6)
    assert exchanged(ranks, again) == [again] * 3, "a shorter message after a longer one"


def test_an_exchange_that_was_missed_turns_control_off(groups: Make, caplog: pytest.LogCaptureFixture) -> None:
    ranks = groups()
    first = ranks[0]._next
    assert first is not None
    with caplog.at_level(logging.INFO, "koopmon.agent"):
        assert not ranks[0].is_due(first + 1)
    assert not ranks[0].ready
    assert "missed" in caplog.text
    assert not ranks[0].is_due(first)
    assert ranks[1].ready


def test_the_largest_message_fits_and_a_larger_one_is_an_error(groups: Make) -> None:
    ranks = groups()
    first = ranks[0]._next
    assert first is not None

    def sized(excess: int) -> ControlUpdate:
        empty = len(rank_group._encoder.encode(update(first, first + 5, actions={"": ActionState(ramp=Ramp())})))
        key = "k" * (MESSAGE_BYTES - 2 - empty - 2 + excess)  # keys of over 255 bytes have two bytes more of length
        return update(first, first + 5, actions={key: ActionState(ramp=Ramp())})

    assert len(rank_group._encoder.encode(sized(0))) == MESSAGE_BYTES - 2
    with pytest.raises(ValueError, match=f"at most {MESSAGE_BYTES - 2}"):
        ranks[0].launch(sized(1))
    assert exchanged(ranks, sized(0)) == [sized(0)] * 2


def test_an_exchange_that_cannot_be_read_turns_control_off(groups: Make) -> None:
    ranks = groups()
    for each in ranks:
        each._buffer.fill_(255)
        each.launch(None)
    assert [each.receive() for each in ranks] == [None, None]
    assert not any(each.ready for each in ranks)


def test_ranks_form_a_new_group_once_all_have_lost_the_old_one(groups: Make) -> None:
    ranks = groups()
    ranks[0].fail("a test")
    time.sleep(0.2)
    assert not ranks[0].ready
    failed = time.monotonic()
    ranks[1].fail("a test")
    until(lambda: all(each.ready for each in ranks))
    assert time.monotonic() - failed >= FIRST_PAUSE_SECONDS
    first = ranks[0]._next
    assert first is not None
    sent = update(first, first + 2)
    assert exchanged(ranks, sent) == [sent] * 2


def test_pauses_double_up_to_a_minute_and_start_again_after_a_healthy_time(
    groups: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    (alone, _) = groups()
    pauses: list[float] = []
    now = [1000.0]
    monkeypatch.setattr(rank_group.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(
        alone, "_start", lambda target, *args: pauses.append(args[1]) if target == alone._form else None
    )
    for _ in range(9):
        alone.fail("a test")
        now[0] += HEALTHY_SECONDS - 0.5
    assert pauses == [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0, 60.0]
    now[0] += 0.5
    alone.fail("a test")
    assert pauses[-1] == 1.0


def test_the_end_of_other_ranks_and_repeated_failures_are_no_warning(
    groups: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (alone, _) = groups()
    monkeypatch.setattr(alone, "_start", lambda *_: None)
    with caplog.at_level(logging.DEBUG, "koopmon.agent"):
        for reason in ("connection closed by peer", "read: connection reset by peer", "other", "other"):
            alone.fail(reason)
    levels = [record.levelno for record in caplog.records if "control is off" in record.message]
    assert levels == [logging.INFO, logging.INFO, logging.WARNING, logging.DEBUG]


@pytest.mark.parametrize(
    ("shares", "splits"),
    [
        (((0, 5), (0, 5)), False),
        (((0, 5), (0, 6)), True),
        (((0, 5), (1, 6)), False),
        (((0, 5), (0, 5), (1, 7), (1, 8)), True),
        (((0, 5), (0, 5), (1, 5), (1, 5)), False),
    ],
)
def test_ranks_of_one_model_with_different_tokens_are_told_apart(
    groups: Make, shares: tuple[tuple[int, int], ...], splits: bool
) -> None:
    ranks = groups(len(shares), shares=tuple(ReplicaFingerprint(*share) for share in shares))
    assert [each.splits_tokens for each in ranks] == [splits] * len(shares)


def test_without_a_share_nothing_is_split(groups: Make) -> None:
    assert not any(each.splits_tokens for each in groups())


def test_a_closed_group_is_not_ready_and_does_not_form_again(groups: Make) -> None:
    ranks = groups()
    ranks[0].close(wait=True)
    ranks[0].close(wait=True)
    assert not ranks[0].ready
    ranks[0].fail("a test")
    assert not any(thread.is_alive() for thread in ranks[0]._threads)


def test_a_group_closes_while_it_waits_for_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_group, "POLL_SECONDS", 0.001)
    before, store = set(threading.enumerate()), dist.HashStore()
    group = RankGroup(RankContext(0, 2, store), ControlConfig(), AgentStats(), "place")
    (thread,) = set(threading.enumerate()) - before
    assert (thread.name, thread.daemon) == ("koopmon-control", True)
    until(lambda: store.add("place/control/0/ready", 0) > 0)
    time.sleep(0.1)
    assert store.add("place/control/0/ready", 0) == 1, "a rank registers once, however often it looks"
    assert not group.ready
    assert not group.is_due(1_000_000)
    group.close(wait=True)
    assert not thread.is_alive()


def test_after_a_failure_a_rank_registers_for_the_next_generation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_group, "FIRST_PAUSE_SECONDS", 0.01)
    store = dist.HashStore()
    group = RankGroup(RankContext(0, 2, store), ControlConfig(), AgentStats(), "place")
    until(lambda: store.add("place/control/0/ready", 0) == 1)
    group.fail("a test")
    until(lambda: store.add("place/control/1/ready", 0) == 1)
    group.fail("a test")
    until(lambda: store.add("place/control/2/ready", 0) == 1)
    group.close(wait=True)
    until(lambda: store.add("place/control/2/ready", 0) == 0)


def test_a_group_forms_at_once_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[tuple[Any, ...]] = []
    monkeypatch.setattr(RankGroup, "_start", lambda self, target, *args: started.append((target.__name__, *args)))
    RankGroup(RankContext(0, 2, dist.HashStore()), ControlConfig(), AgentStats(), "place")
    assert started == [("_form", 0, 0.0)]


def test_a_group_that_cannot_form_is_tried_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    limits: list[timedelta] = []

    def unable(store: Any, rank: int, size: int, timeout: timedelta) -> None:
        limits.append(timeout)
        raise RuntimeError("no network")

    monkeypatch.setattr(rank_group.dist, "ProcessGroupGloo", unable)
    monkeypatch.setattr(rank_group, "FIRST_PAUSE_SECONDS", 0.01)
    with caplog.at_level(logging.WARNING, "koopmon.agent"):
        group = RankGroup(RankContext(0, 1, dist.HashStore()), ControlConfig(), AgentStats(), "place")
        until(lambda: len(limits) > 1)
        group.close(wait=True)
    assert set(limits) == {timedelta(seconds=CONNECT_SECONDS)}
    assert caplog.messages[0].endswith("no group of 1 ranks: no network")


@pytest.mark.parametrize(("size", "seconds"), [(2, CONNECT_SECONDS), (1000, 20.0)])
def test_many_ranks_have_more_time_to_connect(size: int, seconds: float) -> None:
    group = RankGroup(RankContext(0, size, dist.HashStore()), ControlConfig(), AgentStats(), "place")
    assert group._connect_seconds == seconds
    group.close(wait=True)


@pytest.mark.parametrize(("wait", "limit"), [(5.0, OPERATION_SECONDS), (2 * OPERATION_SECONDS, 2 * OPERATION_SECONDS)])
def test_operations_last_longer_than_the_training_threads_wait(
    wait: float, limit: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits: list[timedelta] = []
    made = SimpleNamespace(set_timeout=limits.append)
    monkeypatch.setattr(rank_group.dist, "ProcessGroupGloo", lambda *_: made)
    monkeypatch.setattr(RankGroup, "_agree", lambda *_: None)
    config = ControlConfig(timeout_seconds=wait)
    group = RankGroup(RankContext(0, 1, dist.HashStore()), config, AgentStats(), "place")
    until(lambda: bool(limits))
    group.close(wait=True)
    assert limits == [timedelta(seconds=limit)]


def test_a_rank_that_never_connects_costs_the_others_a_bounded_wait(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(rank_group, "CONNECT_SECONDS", 0.3)
    store = dist.HashStore()
    store.add("place/control/0/ready", 1)  # it has registered, and was closed since
    group = RankGroup(RankContext(0, 2, store), ControlConfig(), AgentStats(), "place")
    with caplog.at_level(logging.WARNING, "koopmon.agent"):
        until(lambda: "no group of 2 ranks" in caplog.text)
    group.close(wait=True)
    assert not group.ready


def test_close_waits_while_the_ranks_connect(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_group, "CONNECT_SECONDS", 1.0)
    store = dist.HashStore()
    store.add("place/control/0/ready", 1)
    group = RankGroup(RankContext(0, 2, store), ControlConfig(), AgentStats(), "place")
    until(group._connecting.locked)
    group.close(wait=True)
    assert not group._connecting.locked()
    assert not any(thread.is_alive() for thread in group._threads)


def test_a_rank_that_is_closed_before_the_others_register_is_not_waited_for() -> None:
    store = dist.HashStore()
    group = RankGroup(RankContext(0, 2, store), ControlConfig(), AgentStats(), "place")
    until(lambda: store.add("place/control/0/ready", 0) == 1)
    group.close(wait=True)
    assert store.add("place/control/0/ready", 0) == 0


def test_an_operation_without_the_other_ranks_outlives_its_group_in_python(groups: Make) -> None:
    ranks = groups()
    first = ranks[0]._next
    assert first is not None
    ranks[1].launch(None)
    work = ranks[1]._work
    ranks[1].close(wait=True)
    (thread,) = (each for each in ranks[1]._threads if each.is_alive())
    assert not work.is_completed()
    ranks[0].launch(update(first, first + 1))
    thread.join(10.0)
    assert not thread.is_alive()


def test_an_exchange_that_cannot_be_sent_turns_control_off(groups: Make) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("connection reset by peer")

    ranks = groups()
    first = ranks[0]._next
    assert first is not None
    ranks[0]._group = SimpleNamespace(broadcast=broken)
    ranks[0].launch(update(first, first + 1))
    assert not ranks[0].ready


def test_a_closed_group_has_no_exchange_in_flight_and_none_is_due(groups: Make) -> None:
    ranks = groups()
    first = ranks[0]._next
    assert first is not None
    ranks[0].launch(update(first, first + 1))
    buffer = ranks[0]._buffer
    ranks[0].close()
    assert not ranks[0].in_flight
    assert not ranks[0].is_due(first)
    assert ranks[0]._buffer is not buffer, "an operation may still write to the old one"
    ranks[1].close()


def test_threads_that_have_ended_are_forgotten(groups: Make) -> None:
    ranks = groups()
    for _ in range(20):
        ranks[0]._start(lambda: None)
        ranks[0]._threads[-1].join()
    assert len(ranks[0]._threads) <= 2


def test_a_step_waits_for_the_agreement_that_is_still_in_transit(
    groups: Make, caplog: pytest.LogCaptureFixture
) -> None:
    """Rank 0 may know the first step before the other ranks have agreed."""
    ranks = groups()
    first = ranks[0]._next
    assert first is not None
    ranks[0]._agreed.clear()
    timer = threading.Timer(0.1, ranks[0]._agreed.set)
    timer.start()
    assert ranks[0].is_due(first)
    timer.join()
    ranks[0]._agreed.clear()
    ranks[0]._timeout_seconds = 0.05
    with caplog.at_level(logging.INFO, "koopmon.agent"):
        assert not ranks[0].is_due(first)
    assert "did not agree on a first step" in caplog.text
    assert ranks[0]._next is None


def test_operations_outlast_the_training_threads_wait() -> None:
    assert ControlConfig().timeout_seconds < OPERATION_SECONDS


def voted(ranks: list[RankGroup], votes: list[bool]) -> list[bool]:
    with ThreadPoolExecutor(len(ranks)) as pool:
        return list(pool.map(RankGroup.agree, ranks, votes))


def test_a_vote_passes_if_every_rank_is_in_favour(groups: Make) -> None:
    ranks = groups(3)
    assert voted(ranks, [True, True, True]) == [True] * 3
    assert voted(ranks, [True, False, True]) == [False] * 3
    assert voted(ranks, [True, True, True]) == [True] * 3
    first = ranks[0]._next
    assert first is not None
    sent = update(first, first + 5)
    assert exchanged(ranks, sent) == [sent] * 3, "the exchanges go on"


def test_a_vote_that_a_rank_does_not_join_fails_and_turns_control_off(
    groups: Make, caplog: pytest.LogCaptureFixture
) -> None:
    ranks = groups()
    ranks[0]._timeout_seconds = 0.2
    started = time.monotonic()
    with caplog.at_level(logging.INFO, "koopmon.agent"):
        assert not ranks[0].agree(True)
    assert time.monotonic() - started < 3.0
    assert "control is off" in caplog.text
    assert not ranks[0].agree(True), "there is no group now"


def test_a_group_that_failed_while_it_formed_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its ranks form another one already."""
    made: list[RankGroup] = []
    known, reduced = threading.Event(), threading.Event()

    def reduce(*_: Any) -> int:
        known.wait(10.0)
        made[0]._generation += 1
        reduced.set()
        return 5

    monkeypatch.setattr(RankGroup, "_all_reduce", reduce)
    made.append(RankGroup(RankContext(0, 1, dist.HashStore()), ControlConfig(), AgentStats(), "place"))
    (thread,) = made[0]._threads
    known.set()
    thread.join(10.0)
    assert reduced.is_set()
    assert not made[0].ready
    assert made[0]._next is None


@pytest.mark.parametrize(
    ("text", "reason"),
    [("", "ValueError"), ("  \n ", "ValueError"), ("first\nsecond", "first"), ("x" * 201, "x" * 200)],
)
def test_the_reason_of_an_error_is_one_line_of_bounded_length(text: str, reason: str) -> None:
    assert rank_group._reason(ValueError(text)) == reason


EXIT = """
import sys, weakref
import torch.distributed as dist
from koopmon.agent.control.rank_group import RankGroup
from koopmon.agent.rank_identity import RankContext
from koopmon.agent.stats import AgentStats
from koopmon.config import ControlConfig

store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
context = RankContext(0, 2, store.clone())
if sys.argv[1] == "connecting":
    store.add("place/control/0/ready", 1)
group = RankGroup(context, ControlConfig(), AgentStats(), "place")
while not (group._connecting.locked() if sys.argv[1] == "connecting" else store.add("place/control/0/ready", 0)):
    pass
weakref.finalize(RankGroup, group.close, wait=True)
"""


@pytest.mark.process
@pytest.mark.parametrize("state", ["registered", "connecting"])
def test_a_process_whose_group_never_forms_ends_in_order(state: str) -> None:
    """A thread that returns from a wait in torch into an interpreter that ends would abort the process."""
    done = subprocess.run([sys.executable, "-c", EXIT, state], capture_output=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr.decode()
    assert b"terminate" not in done.stderr
