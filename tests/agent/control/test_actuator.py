"""Commands to one process: applied ones, their steps, and their acks. Ramps are pure functions of the step."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch.optim import SGD

from koopmon.agent.capture.schedule import OverheadBudget, SnapshotSchedule
from koopmon.agent.circuit_breaker import CircuitBreaker
from koopmon.agent.control.action import Completion
from koopmon.agent.control.actuator import (
    CALM_GROWTH,
    MAX_CALM_STEPS,
    MAX_PENDING,
    Actuator,
)
from koopmon.agent.control.all_actions import make_actions
from koopmon.agent.control.command_judge import MAX_REMEMBERED, CommandResult
from koopmon.agent.control.optimizer_set import OptimizerSet
from koopmon.agent.control.rank_group import MESSAGE_BYTES, _encoder
from koopmon.agent.control.rate_shares import as_parameters
from koopmon.agent.control.state import ActionState, ControlState, ControlUpdate, Ramp
from koopmon.agent.lifecycle import Acting, LifeCycle, RankParts
from koopmon.agent.parallelism import DataRanks, ParallelLayout
from koopmon.agent.rank_identity import RankContext
from koopmon.agent.stats import AgentStats
from koopmon.config import Config, from_mapping
from koopmon.plugins import select
from koopmon.wire.messages import MAX_SHARES, Ack, Applied, Command, KssSettings
from tests.agent.models import build, train_step
from tests.agent.scripted_monitor import ScriptedMonitor

NAME = {"run": "r", "incarnation": "0123456789abcdef", "reason": "a test"}
_next = iter(range(1 << 30))


def command(kind: str, **fields: Any) -> Command:
    return Command(**{**NAME, "id": f"{next(_next):08x}", "kind": kind, "expires_step": 1000, **fields})


class Bench:
    """An acting agent that trains alone, driven step by step."""

    def __init__(
        self,
        config: Config | None = None,
        *,
        group: Any = None,
        restored: Applied | None = None,
        report: Callable[[CommandResult], None] | None = None,
        keep: Callable[[Applied], None] | None = None,
    ) -> None:
        self.outcomes: list[CommandResult] = []
        self.stats = AgentStats()
        config = config or Config()
        actions = make_actions(config, self.stats, CircuitBreaker("a test"))
        self.lifecycle = LifeCycle(actions, self.stats, config.control)
        schedule = SnapshotSchedule(config.cadence, OverheadBudget(config.cadence), self.stats)
        layout = ParallelLayout("single", True)
        self.actuator = Actuator(
            actions,
            config,
            self.stats,
            schedule,
            layout=layout,
            requests=self.lifecycle.requests,
            report=report or self.outcomes.append,
            keep=keep,
            group=group,
            restored=restored,
        )
        rank = RankParts(RankContext(), DataRanks(0, 1), self.stats, schedule, None)
        self.lifecycle.enter(Acting(rank, layout, self.actuator))

    @property
    def lr_scale(self) -> float:
        """Return the learning-rate scale of the next step."""
        return self.applied().lr_scale

    def applied(self) -> Applied:
        return self.lifecycle.applied()

    def step(self, *commands: Command) -> float:
        """Submit a command and run one step; return its learning-rate scale."""
        for each in commands:
            self.lifecycle.submit(each)
        self.lifecycle.state.before_step(self.stats.step)
        scale = self.lr_scale
        self.stats.tick(0.1)
        self.lifecycle.state.after_step(self.stats.step)
        return scale

    def outcome_of(self, *commands: Command) -> list[str]:
        """Return the outcome of each command within one step."""
        before = len(self.outcomes)
        self.step(*commands)
        new = {each.command_id: each.outcome for each in self.outcomes[before:]}
        return [new[each.id] for each in commands]


def test_a_command_is_in_force_in_the_next_step() -> None:
    bench = Bench()
    for _ in range(3):
        assert bench.step() == 1.0
    assert bench.step(command("set_lr_scale", lr_scale=0.5)) == 0.5
    assert bench.outcomes[-1].outcome == "applied"
    assert bench.outcomes[-1].step == 3
    assert bench.step() == 0.5


def test_a_scale_ramps_geometrically_and_lands_exactly() -> None:
    bench = Bench()
    bench.step()
    scales = [bench.step(command("set_lr_scale", lr_scale=0.1, ramp_steps=4))] + [bench.step() for _ in range(5)]
    assert scales[3:] == [0.1] * 3
    assert scales[:3] == pytest.approx([0.1**0.25, 0.1**0.5, 0.1**0.75])
    back = [bench.step(command("set_lr_scale", lr_scale=1.0, ramp_steps=2)), bench.step()]
    assert back == [pytest.approx(0.1**0.5), 1.0]


def test_a_new_ramp_starts_from_where_the_old_one_is() -> None:
    bench = Bench()
    bench.step(command("set_lr_scale", lr_scale=0.25, ramp_steps=4))
    at = bench.step()
    assert bench.step(command("set_lr_scale", lr_scale=at, ramp_steps=3)) == pytest.approx(at)


def test_alpha_ramps_linearly_and_the_settings_switch_at_once() -> None:
    bench = Bench()
    kss = KssSettings(alpha=0.8, tau_u=1.7, svd_rank=9)
    bench.step(command("set_kss", kss=kss, ramp_steps=4))
    alphas = []
    for _ in range(6):
        applied = bench.applied()
        alphas.append(applied.kss.alpha)
        assert (applied.kss.tau_u, applied.kss.svd_rank) == (1.7, 9)
        bench.step()
    assert alphas == pytest.approx([0.4, 0.6, 0.8, 0.8, 0.8, 0.8])
    bench.step(command("set_kss", kss=KssSettings(alpha=0.0)))
    assert bench.applied().kss.alpha == 0.0


def test_the_next_launch_can_have_a_value_before_its_command_is_reported_as_applied() -> None:
    events: list[Any] = []
    bench = Bench(report=lambda result: events.append(result.outcome), keep=events.append)
    bench.step()
    bench.step(command("set_lr_scale", lr_scale=0.5))
    bench.step(command("set_lr_scale", lr_scale=0.25, expires_step=0))
    bench.step(command("set_cadence", cadence_steps=2))
    assert events == [Applied(lr_scale=0.5), "applied", "expired", Applied(lr_scale=0.5), "applied"]


def test_commands_of_one_step_are_all_applied_in_order() -> None:
    bench = Bench()
    kss = KssSettings(alpha=0.1)
    found = bench.outcome_of(
        command("set_lr_scale", lr_scale=0.2), command("set_kss", kss=kss), command("set_lr_scale", lr_scale=0.4)
    )
    assert found == ["applied"] * 3
    assert bench.applied() == Applied(lr_scale=0.4, kss=kss)


def test_a_repeated_command_is_a_duplicate_and_changes_nothing() -> None:
    bench = Bench()
    first = command("set_lr_scale", lr_scale=0.5)
    assert bench.outcome_of(first) == ["applied"]
    bench.step(command("set_lr_scale", lr_scale=0.9))
    assert bench.outcome_of(first) == ["duplicate"]
    assert bench.applied().lr_scale == 0.9


def test_a_repetition_is_not_answered_before_what_it_repeats() -> None:
    """A monitor repeats commands to hung ranks, and its audit log had "duplicate" for applied ones."""
    bench = Bench()
    first, later = command("set_lr_scale", lr_scale=0.5), command("set_lr_scale", lr_scale=0.9)
    bench.step(first, first, later, first)
    assert [(each.command_id, each.outcome) for each in bench.outcomes] == [
        (first.id, "applied"),
        (first.id, "duplicate"),
        (later.id, "applied"),
        (first.id, "duplicate"),
    ]
    assert bench.applied().lr_scale == 0.9


def test_a_command_is_not_applied_after_its_expiry() -> None:
    bench = Bench()
    for _ in range(5):
        bench.step()
    assert bench.outcome_of(command("set_lr_scale", lr_scale=0.5, expires_step=4)) == ["expired"]
    assert bench.outcome_of(command("set_lr_scale", lr_scale=0.5, expires_step=6)) == ["applied"]


def test_caps_hold_whatever_the_monitor_says() -> None:
    bench = Bench(from_mapping({"limits": {"min_lr_scale": 0.3, "max_kss_alpha": 2.0}}))
    bench.step(command("set_lr_scale", lr_scale=0.1))
    assert bench.outcomes[-1].detail == "lr_scale capped at 0.3"
    bench.step(command("set_kss", kss=KssSettings(alpha=500.0, beta=0.3)))
    assert bench.outcomes[-1].detail == "alpha capped at 2.0"
    assert bench.applied() == Applied(lr_scale=0.3, kss=KssSettings(alpha=2.0, beta=0.3))


def test_actions_per_hour_are_bounded_but_the_way_back_is_always_open() -> None:
    bench = Bench(from_mapping({"limits": {"max_actions_per_hour": 3}}))
    actions = [command("set_lr_scale", lr_scale=0.9 - 0.1 * n) for n in range(4)]
    assert bench.outcome_of(*actions) == ["applied"] * 3 + ["refused"]
    assert bench.outcome_of(command("set_kss", kss=KssSettings(alpha=1.0))) == ["refused"]
    assert bench.outcome_of(command("set_cadence", cadence_steps=5)) == ["applied"]
    assert bench.outcome_of(command("stop")) == bench.outcome_of(command("checkpoint")) == ["refused"]
    back = [command("set_lr_scale", lr_scale=1.0), command("set_kss", kss=KssSettings())]
    assert bench.outcome_of(*back) == ["applied"] * 2
    assert bench.applied() == Applied()


def test_more_commands_than_can_wait_are_refused() -> None:
    bench = Bench()
    found = bench.outcome_of(*[command("set_lr_scale", lr_scale=0.5) for _ in range(MAX_PENDING + 2)])
    assert found == ["applied"] * MAX_PENDING + ["refused"] * 2


def test_a_new_incarnation_takes_over_what_was_applied_unless_it_was_told_something_since() -> None:
    before = Applied(lr_scale=0.01, kss=KssSettings(alpha=100.0, svd_rank=5))
    bench = Bench()
    bench.lifecycle.restore(before)
    assert bench.step() == 0.05, "capped"
    assert bench.applied().kss == KssSettings(alpha=30.0, svd_rank=5)
    told = Bench()
    told.step(command("set_lr_scale", lr_scale=0.5))
    told.lifecycle.restore(before)
    assert told.step() == 0.5


@pytest.mark.parametrize(("choice", "expected"), [("hold", 0.25), ("ramp", 1.0)])
def test_a_lost_monitor_changes_nothing_or_ramps_back_as_configured(choice: str, expected: float) -> None:
    bench = Bench(from_mapping({"control": {"on_monitor_lost": choice, "ramp_back_steps": 10}}))
    bench.step(command("set_lr_scale", lr_scale=0.25), command("set_kss", kss=KssSettings(alpha=1.0, beta=0.2)))
    bench.lifecycle.monitor_lost()
    scales = [bench.step() for _ in range(12)]
    assert scales[-1] == expected
    assert scales == sorted(scales)
    assert scales[0] < 0.3
    assert (bench.applied().kss.alpha == 0.0) == (choice == "ramp")


@given(
    st.integers(0, 50),
    st.floats(0.05, 1.0),
    st.floats(0.05, 1.0),
    st.integers(0, 40),
    st.integers(-5, 200),
)
def test_ramps_stay_between_their_ends(first: int, start: float, target: float, num_steps: int, step: int) -> None:
    ramp = Ramp(first_step=first, start=start, target=target, num_steps=num_steps)
    for value in (ramp.linear(step), ramp.geometric(step)):
        assert min(start, target) - 1e-12 <= value <= max(start, target) + 1e-12
        if step < first:
            assert value == start
        if step >= first + num_steps - 1 and step >= first:
            assert value == target
    assert math.isclose(ramp.linear(step), ramp.linear(step))


@pytest.mark.parametrize(("step_seconds", "apart"), [(0.01, 5), (0.02, 3), (0.04, 2), (0.05, 1), (0.5, 1), (1e-5, 100)])
def test_exchanges_are_a_twentieth_of_a_second_apart(step_seconds: float, apart: int) -> None:
    launched: list[ControlUpdate] = []

    class Group:
        steps_may_differ = False
        in_flight = False
        ready = leads = True

        def is_due(self, step: int) -> bool:
            return True

        def launch(self, exchange: ControlUpdate) -> None:
            launched.append(exchange)

    bench = Bench(group=Group())
    bench.stats.tick(step_seconds)
    bench.actuator.after_step(1)
    assert launched[0].next_step == 1 + apart


def test_the_largest_exchange_fits() -> None:
    ramp = Ramp(first_step=1 << 52, start=1 / 3, target=1 / 7, num_steps=1 << 60)
    parameters: dict[str, int | float] = dict.fromkeys(KssSettings.__struct_fields__, 1 / 3)
    cap: dict[str, int | float] = {
        "max_rate": 1 / 3,
        **dict.fromkeys(("capped_from", "warmup_from", "warmup_steps"), 1 << 52),
    }
    rewind: dict[str, int | float] = {
        **dict.fromkeys(("interval", "at_step", "copy_step", "bounded_at"), 1 << 52),
        **as_parameters({(1 << 16) - 1 - each: 1 / 3 for each in range(MAX_SHARES)}),
    }
    state = ControlState(
        version=1 << 60,
        actions={
            "set_lr_scale": ActionState(ramp=ramp, parameters=cap),
            "set_kss": ActionState(ramp=ramp, parameters=parameters),
            "rewind": ActionState(ramp=ramp, parameters=rewind),
        },
        cadence_steps=1 << 60,
        cadence_until_step=1 << 60,
    )
    exchange = ControlUpdate(step=1 << 52, state=state, snapshots=(1 << 52, 1 << 52, 1 << 52), next_step=1 << 52)
    assert len(_encoder.encode(exchange)) < 3 * MESSAGE_BYTES // 4


def test_over_the_wire(monitor: ScriptedMonitor, agents: Callable[..., Any]) -> None:
    import torch

    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    agent = agents(model, optimizer, endpoint=monitor.endpoint)
    monitor.wait(lambda: agent.status()["connected"])

    def until_acked(command_id: str) -> Ack:
        while not monitor.acked(command_id):
            train_step(model, optimizer, 0)
            time.sleep(0.01)
        return monitor.ack(command_id)

    ack = until_acked(monitor.command("set_lr_scale", lr_scale=0.5))
    assert (ack.outcome, ack.applied.lr_scale) == ("applied", 0.5)
    ack = until_acked(monitor.command("set_lr_scale", lr_scale=0.7, id=ack.command_id))
    assert [each.outcome for each in monitor.of(Ack)] == ["applied"] or ack.outcome == "applied"
    monitor.wait(lambda: train_step(model, optimizer, 0) and len(monitor.of(Ack)) == 2)
    assert monitor.of(Ack)[1].outcome == "duplicate"
    ack = until_acked(monitor.command("set_lr_scale", lr_scale=0.9, expires_step=0))
    assert (ack.outcome, ack.applied.lr_scale) == ("expired", 0.5)
    ack = until_acked(monitor.command("set_lr_scale", lr_scale=0.9, incarnation="00000000"))
    assert (ack.outcome, ack.applied.lr_scale) == ("refused", 0.5)
    assert not agent.should_stop
    assert until_acked(monitor.command("stop")).outcome == "applied"
    assert agent.should_stop


def test_a_watch_only_agent_says_so_over_the_wire(monitor: ScriptedMonitor, agents: Callable[..., Any]) -> None:
    import torch

    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    agent = agents(model, optimizer, endpoint=monitor.endpoint, config={"limits": {"act": "never"}})
    monitor.wait(lambda: agent.status()["connected"])
    assert monitor.ack(monitor.command("set_lr_scale", lr_scale=0.5)).outcome == "refused"
    assert not agent.status()["acts"]
    assert all(not hello.acts for hello in monitor.heard if hasattr(hello, "acts"))


# Bounds


def test_the_allowance_is_that_of_the_last_hour(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr("koopmon.agent.control.command_judge.time.monotonic", lambda: now[0])
    bench = Bench(from_mapping({"limits": {"max_actions_per_hour": 2}}))

    def cut() -> str:
        return bench.outcome_of(command("set_lr_scale", lr_scale=0.5))[0]

    assert [cut(), cut(), cut()] == ["applied", "applied", "refused"]
    assert "2 actions" in bench.outcomes[-1].detail
    now[0] = 1000.0 + 3599.9
    assert cut() == "refused"
    now[0] = 1000.0 + 3600.0
    assert [cut(), cut(), cut()] == ["applied", "applied", "refused"]


def test_no_action_is_allowed_where_the_allowance_is_none() -> None:
    bench = Bench(from_mapping({"limits": {"max_actions_per_hour": 0}}))
    assert bench.outcome_of(command("set_lr_scale", lr_scale=0.5)) == ["refused"]
    assert bench.outcome_of(command("set_lr_scale", lr_scale=1.0)) == ["applied"]
    assert bench.applied() == Applied()


def test_the_last_4096_commands_are_recognised() -> None:
    bench = Bench()
    first, second = command("set_cadence", cadence_steps=1), command("set_cadence", cadence_steps=1)
    bench.step(first, second)
    for _ in range(MAX_REMEMBERED // 32 - 1):
        bench.step(*[command("set_cadence", cadence_steps=1) for _ in range(32)])
    while len(bench.outcomes) < MAX_REMEMBERED:
        bench.step(command("set_cadence", cadence_steps=1))
    assert bench.outcome_of(first) == ["duplicate"]
    bench.step(command("set_cadence", cadence_steps=1))
    assert bench.outcome_of(second) == ["duplicate"]
    assert bench.outcome_of(first) == ["applied"], "the oldest is forgotten"
    assert MAX_REMEMBERED == 4096


def test_a_command_at_its_last_step_is_applied() -> None:
    for last, outcome in ((2, "expired"), (3, "applied")):
        bench = Bench()
        for _ in range(3):
            bench.step()
        assert bench.outcome_of(command("set_lr_scale", lr_scale=0.5, expires_step=last)) == [outcome]


def test_as_many_commands_wait_as_are_allowed() -> None:
    bench = Bench()
    for _ in range(MAX_PENDING):
        bench.actuator.submit(command("set_cadence", cadence_steps=5))
    assert bench.outcomes == []
    bench.actuator.submit(command("set_cadence", cadence_steps=5))
    assert [each.outcome for each in bench.outcomes] == ["refused"]
    assert MAX_PENDING == 64


# What a command does


def test_a_cadence_without_an_end_holds_to_the_end_of_the_run() -> None:
    bench = Bench()
    bench.step(command("set_cadence", cadence_steps=3))
    state = bench.actuator.state
    assert (state.version, state.cadence_steps, state.cadence_until_step) == (1, 3, 1 << 53)
    bench.step(command("set_cadence", cadence_steps=4, cadence_until_step=77))
    state = bench.actuator.state
    assert (state.version, state.cadence_steps, state.cadence_until_step) == (2, 4, 77)


def test_caps_of_rank_and_samples_are_named() -> None:
    bench = Bench(from_mapping({"limits": {"max_kss_svd_rank": 8, "max_kss_samples": 32}}))
    bench.step(command("set_kss", kss=KssSettings(alpha=0.5, svd_rank=9, num_samples=64)))
    assert bench.outcomes[-1].detail == "svd_rank capped at 8, num_samples capped at 32"
    assert bench.applied().kss == KssSettings(alpha=0.5, svd_rank=8, num_samples=32)
    bench.step(command("set_kss", kss=KssSettings(alpha=0.5, svd_rank=8, num_samples=32)))
    assert bench.outcomes[-1].detail == ""


# Between ranks, by a group in the hands of the test


class Exchange:
    """A group of ranks: what it was given, and what it hands back."""

    splits_tokens = False
    steps_may_differ = False
    next_exchange: int | None = None

    def __init__(self, *, leads: bool = True) -> None:
        self.leads, self.ready, self.in_flight = leads, True, False
        self.due: set[int] = set()
        self.launched: list[ControlUpdate | None] = []
        self.failures: list[str] = []
        self.arriving: ControlUpdate | None = None

    def is_due(self, step: int) -> bool:
        return step in self.due

    def is_overdue(self, step: int) -> bool:
        return self.steps_may_differ and not self.in_flight and step in self.due

    def launch(self, exchange: ControlUpdate | None) -> None:
        self.launched.append(exchange)
        self.arriving, self.in_flight = exchange, True

    def receive(self) -> ControlUpdate | None:
        self.in_flight = False
        return self.arriving

    def fail(self, reason: str) -> None:
        self.failures.append(reason)


def test_a_command_waits_for_an_exchange_and_is_in_force_in_the_step_after_it() -> None:
    group = Exchange()
    bench = Bench(group=group)
    bench.step(command("set_lr_scale", lr_scale=0.5))
    assert bench.outcomes == [], "no exchange is due"
    group.due = {2}
    assert bench.step() == 1.0
    assert len(group.launched) == 1
    assert bench.outcomes == [], "it is under way"
    assert bench.step() == 0.5
    assert [(each.outcome, each.step) for each in bench.outcomes] == [("applied", 2)]


def test_a_failed_exchange_changes_nothing_and_the_command_may_come_again() -> None:
    group = Exchange()
    bench = Bench(group=group)
    cut = command("set_lr_scale", lr_scale=0.5)
    group.due = {1, 2, 3, 4}
    bench.step(cut)
    group.arriving = None
    assert bench.step() == 1.0
    assert [(each.outcome, each.detail) for each in bench.outcomes] == [
        ("failed", "the exchange between the ranks failed")
    ]
    bench.step(cut)
    assert bench.step() == 0.5
    assert [each.outcome for each in bench.outcomes] == ["failed", "applied"]


def test_a_restore_whose_exchange_failed_is_tried_again() -> None:
    group = Exchange()
    bench = Bench(group=group)
    group.due = {1, 2, 3, 4}
    bench.lifecycle.restore(Applied(lr_scale=0.25))
    bench.step()
    group.arriving = None
    assert bench.step() == 1.0
    assert bench.step() == 0.25
    assert bench.outcomes == []


def test_a_state_of_another_step_ends_the_group() -> None:
    group = Exchange(leads=False)
    bench = Bench(group=group)
    group.due = {1}
    bench.step()
    assert group.launched == [None], "rank 0 decides"
    group.arriving = ControlUpdate(step=5, state=ControlState(version=9), snapshots=(0, -1, 1), next_step=6)
    bench.step()
    assert len(group.failures) == 1
    assert bench.actuator.state.version == 0


def test_a_rank_with_another_count_of_steps_follows_rank_0_where_collectives_are_the_time() -> None:
    group = Exchange(leads=False)
    group.steps_may_differ = True
    bench = Bench(group=group)
    group.due = {1}
    bench.step()
    ramp = ActionState(ramp=Ramp(first_step=5, start=1.0, target=0.25, num_steps=2))
    state = ControlState(version=9, actions={"set_lr_scale": ramp})
    group.arriving = ControlUpdate(step=5, state=state, snapshots=(0, -1, 1), next_step=6)
    assert bench.step() == 0.5
    assert bench.stats.step == 6
    assert bench.step() == 0.25
    assert group.failures == []


@pytest.mark.parametrize("leads", [True, False])
def test_a_rank_that_does_not_step_takes_part_at_its_forwards(leads: bool) -> None:
    group = Exchange(leads=leads)
    group.steps_may_differ = True
    bench = Bench(group=group)
    bench.step()
    forward = bench.lifecycle.state.before_forward
    forward(1)
    assert group.launched == [], "no exchange is due"
    group.due = {1}
    bench.lifecycle.submit(command("set_lr_scale", lr_scale=0.5))
    forward(1)
    assert len(group.launched) == 1
    assert bench.lr_scale == 1.0
    if not leads:
        state = ControlState(version=1, actions={"set_lr_scale": ActionState(ramp=Ramp(first_step=1, target=0.5))})
        group.arriving = ControlUpdate(step=1, state=state, snapshots=(0, -1, 1), next_step=6)
    group.due = set()
    forward(1)
    assert not group.in_flight, "the other ranks have all launched: they train on"
    assert bench.lr_scale == 0.5


def test_an_exchange_after_a_step_is_received_before_the_next_step_or_the_second_forward() -> None:
    group = Exchange()
    group.steps_may_differ = True
    bench = Bench(group=group)
    group.due = {1}
    bench.step()
    forward = bench.lifecycle.state.before_forward
    forward(1)
    assert group.in_flight
    group.due = set()
    forward(1)
    assert not group.in_flight


def test_another_rank_takes_state_and_snapshots_from_rank_0() -> None:
    group = Exchange(leads=False)
    bench = Bench(group=group)
    group.due = {1}
    bench.step()
    state = ControlState(version=3, cadence_steps=2)
    group.arriving = ControlUpdate(step=1, state=state, snapshots=(3, 7, 4), next_step=8)
    group.due = set()
    bench.actuator.before_step(1)
    assert bench.actuator.state is state
    assert [step for step in range(2, 9) if bench.actuator.after_step(step)] == [3, 7]
    calm = Config().cadence
    assert bench.actuator.after_step(9) == (9 % calm.dense_every == 0), "beyond what is agreed, by the step alone"


def test_rank_0_plans_the_snapshots_up_to_the_next_exchange() -> None:
    group = Exchange()
    bench = Bench(from_mapping({"cadence": {"dense_every": 3}}), group=group)
    bench.stats.tick(0.01)
    group.due = {1}
    bench.actuator.after_step(1)
    (update,) = group.launched
    assert update is not None
    assert (update.step, update.next_step) == (1, 6)
    assert list(update.snapshot_steps()) == [2, 5]


def test_exchanges_are_rare_while_no_snapshot_comes_and_soon_after_each_one() -> None:
    """A command follows a snapshot."""
    every = 40
    group = Exchange()
    cadence = {"dense_every": every, "calm_every": every}
    bench = Bench(from_mapping({"cadence": cadence}), group=group)
    step, exchanges, snapshots = 1, [], []
    while step < 2 + 2 * every:
        bench.stats.tick(0.1)
        group.due = {step}
        bench.actuator.after_step(step)
        update = group.launched[-1]
        assert update is not None
        assert bench.actuator.before_step(step) is None
        exchanges.append(step)
        snapshots += list(update.snapshot_steps())
        step = update.next_step
    assert snapshots == [2, 2 + every, 2 + 2 * every]
    assert len(exchanges) <= 5 * len(snapshots)
    for snapshot in snapshots[:-1]:
        after = [each - snapshot for each in exchanges if snapshot < each <= snapshot + every]
        assert after[0] <= 2
        assert max(later - earlier for earlier, later in pairwise([*after, every + 2])) <= MAX_CALM_STEPS
        waits = [(earlier, later - earlier) for earlier, later in pairwise(after)]
        assert all(wait <= CALM_GROWTH * earlier + 2 for earlier, wait in waits), "the sooner, the shorter"


def test_with_several_ranks_the_steps_between_exchanges_have_no_work() -> None:
    group = Exchange()
    bench = Bench(from_mapping({"limits": {"max_rewinds": 0}}), group=group)
    assert bench.actuator.next_work(1) == 2, "no exchange is agreed"
    group.arriving = ControlUpdate(step=1, state=ControlState(), snapshots=(7, 7, 1), next_step=9)
    group.in_flight = True
    bench.actuator.before_step(1)
    group.next_exchange = 9
    assert bench.actuator.next_work(2) == 7
    assert bench.actuator.next_work(7) == 9
    group.next_exchange = None
    assert bench.actuator.next_work(2) == 3, "one is in flight, or control is down"
    group.next_exchange = 9
    bench.lifecycle.submit(command("set_lr_scale", lr_scale=0.5))
    assert bench.actuator.next_work(2) == 3, "a command waits"


def test_before_any_step_is_timed_an_exchange_follows_the_next_step() -> None:
    group = Exchange()
    bench = Bench(group=group)
    group.due = {0}
    bench.actuator.after_step(0)
    (update,) = group.launched
    assert update is not None
    assert update.next_step == 1


def test_while_the_group_is_down_commands_fail_at_once() -> None:
    group = Exchange()
    bench = Bench(group=group)
    group.ready = False
    assert not bench.actuator.ready
    bench.actuator.submit(command("set_lr_scale", lr_scale=0.5))
    assert [each.outcome for each in bench.outcomes] == ["failed"]
    assert Bench().actuator.ready, "a process that trains alone needs no group"


def test_kss_is_refused_for_good_where_ranks_of_one_model_hold_different_tokens() -> None:
    group = Exchange()
    group.splits_tokens = True
    bench = Bench(group=group)
    group.due = {1}
    bench.step(command("set_kss", kss=KssSettings(alpha=0.5)), command("set_kss", kss=KssSettings()))
    bench.step()
    assert [(each.outcome, each.permanent) for each in bench.outcomes] == [("refused", True), ("applied", False)]
    bench = Bench(group=group)
    group.due = {1}
    bench.lifecycle.restore(Applied(lr_scale=0.5, kss=KssSettings(alpha=0.5, svd_rank=5)))
    bench.step()
    bench.step()
    assert (bench.applied().lr_scale, bench.applied().kss.alpha) == (0.5, 0.0)


def test_a_return_starts_from_the_values_in_force_and_keeps_the_settings() -> None:
    bench = Bench(from_mapping({"control": {"on_monitor_lost": "ramp", "ramp_back_steps": 4}}))
    bench.step(command("set_lr_scale", lr_scale=0.25), command("set_kss", kss=KssSettings(alpha=0.8, svd_rank=9)))
    bench.lifecycle.monitor_lost()
    scales, alphas = [], []
    for _ in range(5):
        scales.append(bench.step())
        alphas.append(bench.applied().kss.alpha)
    assert scales == pytest.approx([0.25**0.75, 0.25**0.5, 0.25**0.25, 1.0, 1.0])
    assert alphas == pytest.approx([0.4, 0.2, 0.0, 0.0, 0.0])
    assert bench.applied().kss.svd_rank == 9


def test_a_process_that_trains_alone_has_the_snapshots_of_its_schedule() -> None:
    bench = Bench(from_mapping({"cadence": {"dense_every": 3}}))
    assert [step for step in range(1, 12) if bench.actuator.after_step(step)] == [1, 4, 7, 10]


def test_before_and_after_an_agreement_snapshots_go_by_the_step_alone() -> None:
    """A failed exchange ends the agreement, also for steps that it was made for."""
    group = Exchange(leads=False)
    bench = Bench(from_mapping({"cadence": {"dense_every": 2}}), group=group)
    assert [step for step in range(6) if bench.actuator.after_step(step)] == [0, 2, 4]
    group.launch(None)
    group.arriving = ControlUpdate(step=6, state=ControlState(version=1), snapshots=(7, 9, 2), next_step=20)
    bench.actuator.before_step(6)
    assert [step for step in range(7, 11) if bench.actuator.after_step(step)] == [7, 9]
    group.launch(None)
    bench.actuator.before_step(11)
    assert [step for step in range(11, 17) if bench.actuator.after_step(step)] == [12, 14, 16]


def test_the_snapshots_of_an_exchange_end_with_the_next_one() -> None:
    group = Exchange()
    bench = Bench(group=group)
    bench.stats.tick(0.03)
    group.due = {1}
    bench.actuator.after_step(1)
    (update,) = group.launched
    assert update is not None
    assert (update.next_step, update.snapshots) == (3, (2, 3, 1))


def test_what_is_refused_is_answered_at_once_and_what_is_applied_when_it_is() -> None:
    group = Exchange()
    bench = Bench(group=group)
    group.due = {1}
    good, late = command("set_lr_scale", lr_scale=0.5), command("set_lr_scale", lr_scale=0.5, expires_step=0)
    bench.step(good, late)
    assert [(each.command_id, each.outcome, each.permanent) for each in bench.outcomes] == [(late.id, "expired", False)]
    bench.step()
    assert [(each.command_id, each.outcome) for each in bench.outcomes[1:]] == [(good.id, "applied")]


def test_a_return_whose_exchange_failed_is_tried_again() -> None:
    group = Exchange()
    bench = Bench(from_mapping({"control": {"on_monitor_lost": "ramp", "ramp_back_steps": 1}}), group=group)
    group.due = set(range(1, 9))
    bench.step(command("set_lr_scale", lr_scale=0.5))
    assert bench.step() == 0.5
    bench.lifecycle.monitor_lost()
    bench.step()
    group.arriving = None
    assert bench.step() == 0.5
    assert bench.step() == 1.0


def test_an_action_leaves_the_allowance_an_hour_after_it_was_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("koopmon.agent.control.command_judge.time.monotonic", lambda: now[0])
    bench = Bench(from_mapping({"limits": {"max_actions_per_hour": 2}}))
    outcomes = []
    for at in (0.0, 3000.0, 3599.0, 3600.0, 3601.0, 6599.0, 6600.0):
        now[0] = at
        outcomes += bench.outcome_of(command("set_lr_scale", lr_scale=0.5))
    assert outcomes == ["applied", "applied", "refused", "applied", "refused", "refused", "applied"]
    assert not any(each.permanent for each in bench.outcomes)


@pytest.mark.parametrize(
    ("step", "parameters", "flaw"),
    [(1, {}, ""), (2, {}, "rank 0 is at step 2, this rank at step 1"), (1, {"svd_rank": 0}, "out of bounds")],
)
def test_an_update_that_does_not_fit_is_not_applied(step: int, parameters: dict[str, Any], flaw: str) -> None:
    kss = ActionState(ramp=Ramp(target=0.5), parameters=parameters)
    update = ControlUpdate(
        step=step, state=ControlState(version=1, actions={"set_kss": kss}), snapshots=(0, -1, 1), next_step=9
    )
    failures: list[str] = []

    class Group:
        steps_may_differ = False
        in_flight = ready = True
        leads = splits_tokens = False

        def receive(self) -> ControlUpdate:
            return update

        def fail(self, reason: str) -> None:
            failures.append(reason)

    bench = Bench(group=Group())
    bench.actuator.before_step(1)
    assert bench.actuator.state.version == (0 if flaw else 1)
    assert [flaw in failure for failure in failures] == ([True] if flaw else [])


def test_a_completion_belongs_to_a_command_that_waits_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks that do not decide complete commands that rank 0 reports. An edge without a completion reports nothing."""
    bench = Bench()
    action = bench.actuator._actions["set_lr_scale"]
    done: list[Completion | None] = [Completion("failed", "of another rank"), None]
    monkeypatch.setattr(action, "at_edge", lambda *_: done.pop(0))
    bench.step()
    assert bench.outcomes == []
    monkeypatch.setattr(type(action), "completes_at_edge", True)
    bench.step(command("set_lr_scale", lr_scale=0.5))
    assert bench.outcomes == []


def test_a_return_within_a_ramp_starts_from_the_value_of_the_step_before() -> None:
    bench = Bench(from_mapping({"control": {"on_monitor_lost": "ramp", "ramp_back_steps": 4}}))
    scales = [bench.step(command("set_lr_scale", lr_scale=0.25, ramp_steps=4)), bench.step()]
    bench.lifecycle.monitor_lost()
    scales += [bench.step() for _ in range(5)]
    assert scales == pytest.approx([0.25**0.25, 0.5, 0.5**0.75, 0.5**0.5, 0.5**0.25, 1.0, 1.0])


def test_what_an_action_refuses_is_answered_with_its_reason() -> None:
    bench = Bench()
    assert bench.outcome_of(command("set_lr_scale", lr_scale=0.5, max_rate=0.1)) == ["refused"]
    (result,) = bench.outcomes
    assert (result.detail, result.permanent) == ("max_rate is refused: the optimizer has no learning rate", False)
    assert bench.applied() == Applied()


def test_a_value_that_cannot_be_restored_leaves_the_others() -> None:
    bench = Bench()
    bench.lifecycle.restore(Applied(lr_scale=0.5, max_rate=0.1, kss=KssSettings(alpha=0.5, svd_rank=5)))
    bench.step()
    assert bench.applied() == Applied(kss=KssSettings(alpha=0.5, svd_rank=5))


@pytest.mark.parametrize(
    ("restored", "said"),
    [
        (Applied(lr_scale=0.25), "learning rate x 0.25"),
        (Applied(max_rate=0.05), "peak rate at most 0.05"),
        (Applied(kss=KssSettings(alpha=2.0)), "KSS weight 2"),
        (
            Applied(lr_scale=0.5, max_rate=0.1, kss=KssSettings(alpha=1.5)),
            "learning rate x 0.5, peak rate at most 0.1, KSS weight 1.5",
        ),
        (
            Applied(max_rate=0.05, rate_shares={0: 1.0}),
            "peak rate at most 0.05, parameter groups with a bound on their rate: 1",
        ),
        (Applied(), ""),
    ],
)
def test_what_is_in_force_again_is_said_once(restored: Applied, said: str, caplog: pytest.LogCaptureFixture) -> None:
    bench, model = Bench(from_mapping({"control": {"on_monitor_lost": "ramp"}})), build()
    optimizer = SGD(model.parameters(), lr=0.2)
    for each in bench.actuator._actions.values():
        each.inspect(model, OptimizerSet(optimizer), select(model))
    bench.lifecycle.restore(restored)
    for _ in range(3):
        bench.step()
    wanted = [f"koopmon: in force again, as when the launch before was killed: {said}"] if said else []
    assert [record.getMessage() for record in caplog.records] == wanted
    caplog.clear()
    bench.lifecycle.monitor_lost()
    bench.step()
    assert not [record for record in caplog.records if "in force again" in record.getMessage()]


@pytest.mark.parametrize(("leads", "lines"), [(None, 1), (True, 1), (False, 0)])
def test_what_a_killed_launch_left_is_in_force_from_the_first_step_and_said_by_one_rank(
    leads: bool | None, lines: int, caplog: pytest.LogCaptureFixture
) -> None:
    group = None if leads is None else Exchange(leads=leads)
    bench = Bench(group=group, restored=Applied(lr_scale=0.5))
    assert bench.step() == 0.5
    assert [record.getMessage() for record in caplog.records] == [
        "koopmon: in force again, as when the launch before was killed: learning rate x 0.5"
    ] * lines
    assert Bench(group=group).step() == 1.0
