"""Times of snapshots: the schedule, requests of the monitor, and the budget that bounds both."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from koopmon.agent.capture.schedule import LAST, OverheadBudget, SnapshotSchedule
from koopmon.agent.control.state import ControlState
from koopmon.agent.stats import AgentStats, StrideLimit
from koopmon.config import CadenceConfig

CONFIG = CadenceConfig(warmup_steps=10, dense_every=2, calm_every=7)
CALM = ControlState()


def schedule(config: CadenceConfig = CONFIG, stats: AgentStats | None = None) -> SnapshotSchedule:
    return SnapshotSchedule(config, OverheadBudget(config), stats or AgentStats())


def planned(cadence: SnapshotSchedule, steps: range, state: ControlState = CALM, window: int = 1) -> list[int]:
    taken: list[int] = []
    for first in range(steps.start, steps.stop, window):
        taken += cadence.plan(first, min(first + window, steps.stop) - 1, state)
    return taken


def test_dense_in_warm_up_and_sparse_when_calm() -> None:
    assert planned(schedule(), range(1, 30)) == [1, 3, 5, 7, 9, 16, 23]


@pytest.mark.parametrize(
    ("asked", "expected"), [(3, [13, 16, 19, 22, 25, 28, 31, 38]), (1, [13, 15, 17, 19, 21, 23, 25, 27, 29, 31, 38])]
)
def test_the_monitor_may_ask_for_more_until_a_step_but_for_no_more_than_dense(asked: int, expected: list[int]) -> None:
    state = ControlState(cadence_steps=asked, cadence_until_step=31)
    assert planned(schedule(), range(13, 45), state) == expected


def test_the_monitor_cannot_ask_for_less() -> None:
    state = ControlState(cadence_steps=1000, cadence_until_step=1000)
    assert planned(schedule(), range(1, 30), state) == planned(schedule(), range(1, 30))


@given(window=st.integers(1, 9), start=st.integers(0, 20))
def test_windows_of_any_length_give_the_strides_asked_for(window: int, start: int) -> None:
    config = CadenceConfig(warmup_steps=1, dense_every=1, calm_every=4)
    taken = planned(schedule(config), range(start + 1, start + 60), window=window)
    assert all(b - a == 4 for a, b in itertools.pairwise(taken))


@given(
    warmup=st.integers(1, 20),
    dense=st.integers(1, 9),
    calm=st.integers(1, 9),
    asked=st.integers(0, 5),
    until=st.integers(-1, 30),
    limit=st.tuples(st.integers(1, 9), st.integers(0, 30)),
)
def test_no_snapshot_is_due_before_the_next_one_that_is_told(
    warmup: int, dense: int, calm: int, asked: int, until: int, limit: tuple[int, int]
) -> None:
    stats = AgentStats()
    stats.stride_limit = StrideLimit(*limit, before=4)
    config = CadenceConfig(warmup_steps=warmup, dense_every=dense, calm_every=calm)
    state = ControlState(cadence_steps=asked, cadence_until_step=until)
    cadence, next_due = schedule(config, stats), 0
    for step in range(1, 50):
        if cadence.plan(step, step, state):
            assert step >= next_due
        next_due = cadence.next_due(step, state)
        assert next_due > step


def test_steps_since_the_last_snapshot_are_counted() -> None:
    cadence = schedule()
    assert cadence.steps_since(5) == 0
    last = cadence.plan(6, 6, CALM)[-1]
    assert [cadence.steps_since(step) for step in (last - 1, last, last + 3)] == [-1, 0, 3]


def test_a_snapshot_that_is_due_and_not_affordable_is_not_the_last_one() -> None:
    budget = OverheadBudget(CONFIG)
    cadence = SnapshotSchedule(CONFIG, budget, AgentStats())
    [taken] = cadence.plan(14, 14, CALM)
    budget.spend(2.0 * budget.credit_seconds)
    assert not cadence.plan(21, 21, CALM)
    assert cadence.steps_since(22) == 22 - taken
    assert cadence.next_due(22, CALM) == 28, "the cadence goes on from what was due"


def test_the_next_change_of_the_interval_is_the_first_step_with_another_one() -> None:
    cadence, after = schedule(), CONFIG.warmup_steps + 1
    asked = ControlState(cadence_steps=1, cadence_until_step=after + 10)
    assert cadence.next_change(CONFIG.warmup_steps - 1, asked) == CONFIG.warmup_steps
    assert cadence.next_change(after, asked) == after + 11
    assert cadence.next_change(after + 10, asked) == after + 11
    assert cadence.next_change(after + 11, asked) == LAST


def test_a_change_of_the_interval_counts_from_its_own_step_on() -> None:
    cadence = schedule(CadenceConfig(warmup_steps=5, dense_every=1, calm_every=10), AgentStats())
    assert list(cadence.plan(4, 4, CALM)) == [4]
    assert cadence.next_due(3, CALM) == 5, "the interval of step 5 may be another one"
    assert cadence.next_due(4, CALM) == 14


def test_what_cannot_be_afforded_is_skipped_counted_and_not_made_up_for() -> None:
    stats, budget = AgentStats(), OverheadBudget(CONFIG)
    cadence = SnapshotSchedule(CONFIG, budget, stats)
    budget.spend(2.0 * budget.credit_seconds)
    assert list(cadence.plan(1, 4, CALM)) == []
    assert stats.dropped["budget"] == 2
    assert not cadence.unagreed(4, CALM)
    assert stats.dropped["budget"] == 3
    budget.earn(1e9)
    assert not cadence.unagreed(5, CALM)
    assert list(cadence.plan(5, 6, CALM)) == [6]
    assert stats.dropped["budget"] == 3


@given(st.integers(0, 1000), st.integers(0, 50), st.integers(-1, 1000))
def test_without_agreement_every_rank_comes_to_the_same_steps(step: int, asked: int, until: int) -> None:
    state = ControlState(cadence_steps=asked, cadence_until_step=until)
    one, other = schedule(), schedule()
    planned(other, range(1, 5))
    assert one.unagreed(step, state) == other.unagreed(step, state)


def test_in_the_long_run_the_budget_is_the_share_of_step_time() -> None:
    budget = OverheadBudget(CadenceConfig(budget_ratio=0.005, initial_credit_seconds=1.0, max_bytes_per_second=1e12))
    spent = elapsed = 0.0
    early = 0.0
    for step in range(200_000):
        cost = 0.0
        if budget.affords(requested=True):
            cost = 0.003
            spent += cost
        budget.spend(cost)
        budget.earn(0.1)
        elapsed += 0.1
        if step == 300:
            early = spent
    assert early > 0.9, "the credit may be spent at once"
    assert spent <= 0.005 * elapsed + 1.0 + 0.003
    assert spent >= 0.005 * elapsed


def test_half_of_the_credit_is_kept_for_the_snapshots_that_the_monitor_requests() -> None:
    config = CadenceConfig(warmup_steps=1, dense_every=1, calm_every=10, initial_credit_seconds=1.0)
    stats, budget = AgentStats(), OverheadBudget(config)
    cadence, asked = SnapshotSchedule(config, budget, stats), ControlState(cadence_steps=1, cadence_until_step=1000)

    def taken(state: ControlState, steps: range) -> int:
        count = 0
        for step in steps:
            if cadence.plan(step, step, state):
                count += 1
                budget.spend(0.01)
        return count

    assert taken(CALM, range(1, 1001)) == 50, "0.5 of 1.0 s, at 0.01 s each"
    assert taken(asked, range(1001, 2001)) == 0, "the request is over"
    asked = ControlState(cadence_steps=1, cadence_until_step=3000)
    assert taken(asked, range(2001, 3001)) == 50
    assert budget.credit_seconds == pytest.approx(0.0, abs=1e-9)


def test_bytes_are_bounded_too_and_a_snapshot_larger_than_a_second_of_them_is_possible() -> None:
    budget = OverheadBudget(CadenceConfig(max_bytes_per_second=1000.0))
    assert budget.affords(requested=True)
    budget.spend(0.0, 2500)
    for _ in range(15):
        assert not budget.affords(requested=True)
        budget.earn(0.1)
    budget.earn(0.1)
    assert budget.affords(requested=True)
    budget.earn(1e6)
    budget.spend(0.0, 1000)
    assert not budget.affords(requested=True), "what was not sent is not saved up"


def test_no_initial_credit_still_lets_the_share_build_up() -> None:
    budget = OverheadBudget(CadenceConfig(initial_credit_seconds=0.0, budget_ratio=0.01))
    assert not budget.affords(requested=True)
    budget.earn(1.0)
    assert budget.affords(requested=True)
    assert budget.affords(requested=False), "nothing is kept of no credit"


def test_a_running_total_is_charged_once() -> None:
    budget = OverheadBudget(CadenceConfig(initial_credit_seconds=1.0))
    for total in (0.25, 0.25, 0.75):
        budget.charge(total)
    assert budget.credit_seconds == 0.25


@given(st.lists(st.tuples(st.sampled_from(["earn", "spend"]), st.floats(0, 100), st.integers(0, 10_000)), max_size=40))
def test_credit_never_exceeds_its_capacity(moves: list[tuple[str, float, int]]) -> None:
    """However long nothing is spent: the initial credit, and what may be sent in a second."""
    config = CadenceConfig(budget_ratio=0.5, initial_credit_seconds=2.0, max_bytes_per_second=1000.0)
    budget, seconds, nbytes = OverheadBudget(config), 2.0, 1000.0
    for move, amount, size in moves:
        if move == "earn":
            budget.earn(amount)
            seconds, nbytes = min(seconds + 0.5 * amount, 2.0), min(nbytes + 1000.0 * amount, 1000.0)
        else:
            budget.spend(amount, size)
            seconds, nbytes = seconds - amount, nbytes - size
        assert (budget.credit_seconds, budget.credit_bytes) == pytest.approx((seconds, nbytes))
        assert budget.affords(requested=True) == (budget.credit_seconds > 0.0 and budget.credit_bytes > 0.0)


def test_without_initial_credit_a_tenth_of_a_second_may_be_saved_up() -> None:
    budget = OverheadBudget(CadenceConfig(initial_credit_seconds=0.0, budget_ratio=0.5))
    budget.earn(1e6)
    assert budget.credit_seconds == pytest.approx(0.1)
    before = budget.credit_bytes
    budget.spend(0.1)
    assert budget.credit_bytes == before, "time costs no bytes"
    assert not budget.affords(requested=True), "nothing is left"


def test_the_warm_up_ends_at_its_step() -> None:
    cadence = schedule()
    assert [cadence.stride(step, CALM) for step in (0, 9, 10, 11)] == [2, 2, 7, 7]


def test_a_request_holds_until_its_step_and_zero_is_no_request() -> None:
    cadence = schedule()
    asked = ControlState(cadence_steps=3, cadence_until_step=20)
    assert [cadence.stride(step, asked) for step in (10, 20, 21)] == [3, 3, 7]
    assert cadence.stride(10, ControlState(cadence_steps=0, cadence_until_step=20)) == 7
    assert cadence.stride(10, ControlState(cadence_steps=1, cadence_until_step=20)) == 2, "dense is the densest"


def test_a_plan_starts_at_the_first_step_and_goes_on_from_the_last_snapshot() -> None:
    cadence = schedule()
    assert cadence.plan(3, 3, CALM) == range(3, 4, 2)
    assert list(cadence.plan(4, 4, CALM)) == []
    assert list(cadence.plan(5, 8, CALM)) == [5, 7]
    assert list(cadence.plan(20, 40, CALM)) == [20, 27, 34]
    assert list(cadence.plan(40, 42, CALM)) == [41]


def test_steps_that_were_taken_without_agreement_count() -> None:
    cadence = schedule()
    assert [step for step in range(1, 15) if cadence.unagreed(step, CALM)] == [2, 4, 6, 8, 14]
    assert list(cadence.plan(15, 21, CALM)) == [21]


def test_the_largest_plan_that_is_not_affordable_is_counted_whole() -> None:
    stats, budget = AgentStats(), OverheadBudget(CONFIG)
    budget.spend(0.0, int(2 * budget.credit_bytes))
    assert not SnapshotSchedule(CONFIG, budget, stats).plan(10, 40, CALM)
    assert stats.dropped["budget"] == 5


def test_the_last_byte_of_a_second_is_enough_for_a_snapshot() -> None:
    budget = OverheadBudget(CadenceConfig(max_bytes_per_second=1000.0))
    budget.spend(0.0, 999)
    assert budget.affords(requested=True)
    budget.spend(0.0, 1)
    assert not budget.affords(requested=True)


def test_agents_of_one_process_share_the_step_time_and_the_bytes() -> None:
    config = CadenceConfig(initial_credit_seconds=0.0, budget_ratio=0.01, max_bytes_per_second=1e9)
    alone, shared = OverheadBudget(config), OverheadBudget(config)
    shared.num_sharers = 4
    for budget in (alone, shared):
        budget.spend(0.0, 1_000_000_000)
        budget.earn(0.2)
    assert shared.credit_seconds == pytest.approx(alone.credit_seconds / 4)
    assert (alone.credit_bytes, shared.credit_bytes) == (pytest.approx(2e8), pytest.approx(5e7))


# The cadence that the monitor can judge


def limited(*replies: tuple[int, int]) -> AgentStats:
    stats = AgentStats()
    for steps, from_step in replies:
        stats.stride_limit = stats.stride_limit.followed_by(steps, from_step)
    return stats


def test_from_its_step_on_the_limit_is_in_force_and_goes_again() -> None:
    stats = limited((8, 10))
    cadence = schedule(CadenceConfig(warmup_steps=100), stats)
    taken = planned(cadence, range(1, 30))
    stats.stride_limit = stats.stride_limit.followed_by(1, 40)
    assert [*taken, *planned(cadence, range(30, 44))] == [*range(1, 10), 17, 25, 33, 40, 41, 42, 43]


@given(st.integers(1, 1024), st.integers(0, 200), st.integers(0, 50), st.integers(1, 9))
def test_no_request_makes_the_cadence_denser_than_the_limit(limit: int, step: int, asked: int, window: int) -> None:
    cadence = schedule(stats=limited((limit, 0)))
    state = ControlState(cadence_steps=asked, cadence_until_step=1000)
    assert cadence.stride(step, state) >= limit
    taken = planned(cadence, range(1, 3000), state, window)
    assert all(b - a >= limit for a, b in itertools.pairwise(taken))


@given(st.lists(st.tuples(st.sampled_from([1, 2, 4, 64]), st.integers(5, 60)), max_size=4), st.data())
def test_ranks_that_hear_a_limit_at_different_steps_take_the_same_snapshots(
    changes: list[tuple[int, int]], data: st.DataObject
) -> None:
    """Each change comes into force after all ranks know it, and the next one is made after that."""
    replies, at = [], 0
    for steps, lead in changes:
        replies.append((at, (steps, at + lead)))
        at += lead + 1
    taken: list[list[int]] = []
    for _ in range(2):
        stats, known = AgentStats(), list(replies)
        delays = [data.draw(st.integers(0, from_step - sent - 1)) for sent, (_, from_step) in replies]
        cadence, mine = schedule(stats=stats), []
        for step in range(at + 100):
            while known and step >= known[0][0] + delays[len(replies) - len(known)]:
                stats.stride_limit = stats.stride_limit.followed_by(*known.pop(0)[1])
            if cadence.unagreed(step, CALM):
                mine.append(step)
        taken.append(mine)
    assert taken[0] == taken[1]


@pytest.mark.parametrize("limit", [2, 4, 16, 1024])
def test_a_rank_that_does_not_know_the_limit_yet_takes_part_in_every_snapshot_of_the_others(limit: int) -> None:
    config = CadenceConfig(warmup_steps=100, dense_every=3, calm_every=10)
    knows, late = schedule(config, limited((limit, 0))), schedule(config)
    assert all(late.unagreed(step, CALM) for step in range(5000) if knows.unagreed(step, CALM))


def test_the_same_limit_again_changes_nothing() -> None:
    limit = StrideLimit().followed_by(8, 100)
    assert limit.followed_by(8, 100) is limit
    assert [limit.at(step) for step in (0, 99, 100)] == [1, 1, 8]
