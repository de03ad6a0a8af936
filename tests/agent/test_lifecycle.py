"""States of the agent on one rank: accepted events, status, and transitions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from koopmon.agent.capture.schedule import OverheadBudget, SnapshotSchedule
from koopmon.agent.circuit_breaker import CircuitBreaker
from koopmon.agent.control.actuator import Actuator
from koopmon.agent.control.all_actions import make_actions
from koopmon.agent.control.command_judge import CommandResult
from koopmon.agent.control.loop_requests import LoopRequest
from koopmon.agent.lifecycle import (
    Acting,
    LifeCycle,
    LifeCycleState,
    RankParts,
    StoodDown,
    Verifying,
    WaitingForRanks,
    Watching,
)
from koopmon.agent.parallelism import UNKNOWN, DataRanks, ParallelLayout
from koopmon.agent.rank_identity import Identity, RankContext
from koopmon.agent.stats import AgentStats
from koopmon.config import Config, from_mapping
from koopmon.wire.messages import Applied, Command
from tests.agent.models import build, train_step
from tests.agent.scripted_monitor import ScriptedMonitor

DDP = ParallelLayout("ddp", True)
CADENCE = {"cadence": {"warmup_steps": 1, "dense_every": 1, "calm_every": 4}}


class Mailbox:
    """Stub of the I/O thread of a rank."""

    connected = True
    identity: Identity | None = Identity("job", "0123456789abcdef")

    def __init__(self) -> None:
        self.results: list[CommandResult] = []

    def post(self, item: Any) -> None:
        self.results.append(item)


class Desk:
    """Build the parts of one rank of `size`, and a life cycle that waits for them."""

    def __init__(self, config: Config | None = None, size: int = 1) -> None:
        self.config = config or from_mapping(CADENCE)
        self.stats, self.mailbox = AgentStats(), Mailbox()
        self.actions = make_actions(self.config, self.stats, CircuitBreaker("a test"))
        self.lifecycle = LifeCycle(self.actions, self.stats, self.config.control)
        self.budget = OverheadBudget(self.config.cadence)
        schedule = SnapshotSchedule(self.config.cadence, self.budget, self.stats)
        sender: Any = type("Sender", (), {"io_thread": self.mailbox, "sampler": None})()
        self.rank = RankParts(RankContext(0, size), DataRanks(0, size), self.stats, schedule, sender)

    def acting(self) -> Acting:
        actuator = Actuator(
            self.actions,
            self.config,
            self.stats,
            self.rank.schedule,
            layout=DDP,
            requests=self.lifecycle.requests,
            report=self.rank.report,
        )
        return Acting(self.rank, DDP, actuator)

    def command(self, **fields: Any) -> Command:
        name = {"run": "job", "incarnation": "0123456789abcdef", "reason": "a test", "id": "00000001"}
        return Command(**{**name, "expires_step": 100, "kind": "set_lr_scale", "lr_scale": 0.5, **fields})

    def granted(self, kind: str) -> bool:
        found = [each for each in self.actions if isinstance(each, LoopRequest) and each.kind == kind]
        return found[0].granted

    def outcomes(self) -> list[str]:
        return [each.outcome for each in self.mailbox.results]


def in_state(desk: Desk, state: Callable[[Desk], LifeCycleState]) -> LifeCycleState:
    desk.lifecycle.enter(state(desk))
    return desk.lifecycle.state


@pytest.mark.parametrize(
    "state",
    [
        lambda desk: WaitingForRanks(),
        lambda desk: Verifying(desk.rank),
        lambda desk: Watching(desk.rank, UNKNOWN),
        lambda desk: StoodDown(Watching(desk.rank, UNKNOWN)),
    ],
)
def test_only_an_acting_agent_applies_commands(state: Callable[[Desk], LifeCycleState]) -> None:
    desk = Desk()
    current = in_state(desk, state)
    desk.lifecycle.submit(desk.command())
    desk.lifecycle.submit(desk.command(kind="stop", lr_scale=None, id="00000002"))
    desk.lifecycle.restore(Applied(lr_scale=0.25))
    current.before_step(0)
    current.after_step(1)
    assert (current.acts, current.ready, desk.lifecycle.ready) == (False, False, False)
    assert desk.lifecycle.applied() == Applied()
    assert not any(desk.granted(kind) for kind in ("stop", "checkpoint"))
    answered = isinstance(current, (Verifying, Watching))
    assert desk.outcomes() == (["refused", "refused"] if answered else [])
    assert all(each.detail == "this agent is watch-only" for each in desk.mailbox.results)


def test_an_acting_agent_applies_a_command_in_the_next_step() -> None:
    desk = Desk()
    current = in_state(desk, Desk.acting)
    assert (current.acts, current.ready, desk.lifecycle.ready) == (True, True, True)
    desk.lifecycle.submit(desk.command())
    assert desk.lifecycle.applied() == Applied()
    current.before_step(0)
    assert desk.outcomes() == ["applied"]
    assert desk.lifecycle.applied().lr_scale == 0.5


def test_a_restore_that_comes_before_the_role_is_known_is_in_force_before_the_first_step() -> None:
    """A restarted run gets back its settings before its first step. Its first forward must show its layout first."""
    desk = Desk()
    in_state(desk, lambda desk: Verifying(desk.rank))
    desk.lifecycle.restore(Applied(lr_scale=0.25))
    in_state(desk, Desk.acting).before_step(0)
    assert desk.lifecycle.applied().lr_scale == 0.25


@pytest.mark.parametrize(("choice", "expected"), [("hold", 0.5), ("ramp", 1.0)])
def test_the_loss_of_the_monitor_ramps_back_if_the_configuration_says_so(choice: str, expected: float) -> None:
    desk = Desk(from_mapping({"control": {"on_monitor_lost": choice, "ramp_back_steps": 1}}))
    current = in_state(desk, Desk.acting)
    desk.lifecycle.submit(desk.command())
    current.before_step(0)
    desk.lifecycle.monitor_lost()
    current.before_step(1)
    assert desk.lifecycle.applied(1).lr_scale == expected


def test_what_is_in_force_stays_in_force_after_the_agent_has_stood_down() -> None:
    desk = Desk()
    acting = in_state(desk, Desk.acting)
    desk.lifecycle.submit(desk.command(ramp_steps=2))
    acting.before_step(0)
    stood_down = in_state(desk, lambda desk: StoodDown(desk.lifecycle.state))
    assert stood_down.control == acting.control
    assert [desk.lifecycle.applied(step).lr_scale for step in (0, 1, 9)] == [pytest.approx(0.5**0.5), 0.5, 0.5]
    assert not stood_down.ready


def test_the_last_state_is_never_left() -> None:
    """The I/O thread may stand the agent down while the training thread enters another state."""
    desk = Desk()
    stood_down = in_state(desk, lambda desk: StoodDown(WaitingForRanks()))
    assert in_state(desk, Desk.acting) is stood_down


def test_each_state_says_what_is_known() -> None:
    desk = Desk(size=4)
    unknown = {"run": None, "incarnation": None, "process_rank": None, "world_size": None, "layout": None}
    assert desk.lifecycle.state.facts() == {**unknown, "connected": False}
    rank = {"run": "job", "incarnation": "0123456789abcdef", "process_rank": 0, "world_size": 4, "connected": True}
    assert in_state(desk, lambda desk: Verifying(desk.rank)).facts() == {**rank, "layout": None}
    assert in_state(desk, lambda desk: Watching(desk.rank, UNKNOWN)).facts() == {**rank, "layout": "unknown"}
    assert in_state(desk, Desk.acting).facts() == {**rank, "layout": "ddp"}
    gone = in_state(desk, lambda desk: StoodDown(desk.lifecycle.state)).facts()
    assert gone == {**rank, "layout": "ddp", "connected": False}
    desk.mailbox.identity = None
    assert Verifying(desk.rank).facts()["run"] is None, "rank 0 has not named the run yet"


def snapshots(state: LifeCycleState, steps: range) -> list[int]:
    return [step for step in steps if state.after_step(step)]


def test_snapshots_are_taken_while_watching_and_acting_and_only_then() -> None:
    assert snapshots(Watching(Desk().rank, UNKNOWN), range(1, 10)) == [1, 5, 9]
    assert snapshots(Desk().acting(), range(1, 10)) == [1, 5, 9]
    # Ranks without an exchange agree by the number of the step alone.
    assert snapshots(Watching(Desk(size=2).rank, UNKNOWN), range(1, 10)) == [4, 8]
    assert snapshots(Verifying(Desk(size=2).rank), range(1, 10)) == []
    assert snapshots(StoodDown(Desk().acting()), range(1, 10)) == []
    poor = Desk(size=2)
    poor.budget.spend(1e9)
    assert snapshots(Watching(poor.rank, UNKNOWN), range(1, 10)) == []
    assert poor.stats.dropped["budget"] == 2


def test_the_states_of_a_run_in_one_process(monitor: ScriptedMonitor, agents: Callable[..., Any]) -> None:
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    agent = agents(model, optimizer, endpoint=monitor.endpoint)
    lifecycle = agent._runtime.lifecycle
    assert type(lifecycle.state) is Acting, "one process has a layout that is known at once"
    monitor.wait(lambda: agent.status()["connected"])
    command = monitor.command("set_lr_scale", lr_scale=0.5)
    monitor.wait(lambda: train_step(model, optimizer, 0) and monitor.acked(command))
    agent._runtime.breaker.trip("a test", RuntimeError("broken"))
    assert type(lifecycle.state) is StoodDown
    status = agent.status()
    assert (status["acts"], status["applied"]["lr_scale"], status["layout"]) == (False, 0.5, "single")


def test_ranks_that_are_announced_are_waited_for_until_the_first_forward(
    monitor: ScriptedMonitor, agents: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    agent = agents(model, optimizer, endpoint=monitor.endpoint, config={"limits": {"act": "never"}})
    lifecycle = agent._runtime.lifecycle
    assert type(lifecycle.state) is WaitingForRanks
    optimizer.step()
    assert type(lifecycle.state) is WaitingForRanks
    assert agent.status()["applied"]["lr_scale"] == 1.0
    model(torch.zeros(1, 2, dtype=torch.long))
    assert type(lifecycle.state) is Watching
