"""Requests to the loop: granted at one step edge, after a vote, and for how long."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from torch.optim import AdamW

import koopmon
from koopmon.agent.control.action import Completion, RequestRefusedError
from koopmon.agent.control.actuator import _towards
from koopmon.agent.control.loop_requests import CheckpointRequest, LoopRequest, StopRequest
from koopmon.agent.control.state import ControlState
from koopmon.agent.handle import Agent
from koopmon.agent.runtime import AgentRuntime
from koopmon.config import from_mapping
from koopmon.conformance.training import Notebook
from koopmon.plugins import select
from koopmon.wire.messages import Applied, Command
from tests.agent.models import build, train_step

NAME: dict[str, Any] = {"run": "job", "incarnation": "c0f0c0f0", "reason": "a test", "expires_step": 1 << 40}


class Bench:
    """A training in this process with an agent on it."""

    def __init__(self, **limits: Any) -> None:
        self.model = build()
        self.optimizer = AdamW(self.model.parameters(), lr=0.01)
        config = from_mapping({"limits": limits})
        self.runtime = AgentRuntime(
            self.model, self.optimizer, select(self.model), config, "ipc://bench", "job", io_thread=Notebook
        )
        self.agent = Agent(self.runtime)
        self.notebook: Any = self.runtime.io_thread
        self._ids = iter(range(1 << 20))

    def step(self, *kinds: Any) -> tuple[bool, bool]:
        """Submit commands of these kinds and train one step; return what the loop reads after it."""
        for kind in kinds:
            self.runtime.lifecycle.submit(Command(**NAME, id=f"{next(self._ids):08x}", kind=kind))
        train_step(self.model, self.optimizer, 0)
        return self.agent.should_stop, self.agent.should_checkpoint

    @property
    def outcomes(self) -> list[str]:
        return [each.outcome for each in self.notebook.outcomes]


@pytest.fixture
def bench() -> Iterator[Bench]:
    made = Bench()
    yield made
    made.runtime.close("")


def test_a_stop_stays_and_a_checkpoint_is_read_once(bench: Bench) -> None:
    assert bench.step() == (False, False)
    assert [bench.step("checkpoint"), bench.step(), bench.step("stop"), bench.step("checkpoint"), bench.step()] == [
        (False, True),
        (False, False),
        (True, False),
        (True, True),
        (True, False),
    ]
    assert bench.outcomes == ["applied"] * 3
    assert [each.step for each in bench.notebook.outcomes] == [1, 3, 4]
    assert bench.agent.status()["errors"] == 0
    assert [each.detail for each in bench.notebook.outcomes] == [""] * 3


def test_a_request_that_no_loop_reads_says_so() -> None:
    bench = Bench()
    try:
        bench.runtime.lifecycle.submit(Command(**NAME, id="c0f0c0f0", kind="stop"))
        train_step(bench.model, bench.optimizer, 0)
        (outcome,) = bench.notebook.outcomes
        assert (outcome.outcome, outcome.detail) == ("applied", "the script has not read agent.should_stop")
    finally:
        bench.runtime.close("")


def test_they_change_no_update_and_no_value_in_force(bench: Bench) -> None:
    twin = build()
    optimizer = AdamW(twin.parameters(), lr=0.01)
    for kinds in ((), ("stop", "checkpoint"), (), ("checkpoint",), ()):
        bench.step(*kinds)
        train_step(twin, optimizer, 0)
    assert all(one.equal(other) for one, other in zip(bench.model.parameters(), twin.parameters(), strict=True))
    assert bench.runtime.lifecycle.applied() == Applied()


@pytest.mark.parametrize("kind", ["stop", "checkpoint"])
def test_a_request_that_the_ranks_do_not_agree_on_is_not_granted(
    kind: str, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.step()
    monkeypatch.setattr(bench.runtime.lifecycle.state._actuator, "_agree", lambda value: False)
    assert bench.step(kind) == (False, False)
    assert [(each.outcome, each.detail) for each in bench.notebook.outcomes] == [
        ("failed", "the ranks did not agree on it")
    ]


def test_a_second_request_of_one_step_is_refused(bench: Bench) -> None:
    bench.step()
    assert bench.step("stop", "stop") == (True, False)
    assert sorted(bench.outcomes) == ["applied", "refused"]


def test_an_agent_that_fails_ends_a_checkpoint_at_the_step_of_the_other_ranks(bench: Bench) -> None:
    assert bench.step("checkpoint", "stop") == (True, True)
    bench.runtime.breaker.trip("a test", RuntimeError("a test"))
    assert (bench.agent.should_stop, bench.agent.should_checkpoint) == (True, True)
    assert bench.step() == (True, False)


def test_a_closed_agent_still_says_stop(bench: Bench) -> None:
    bench.step("stop")
    bench.agent.close()
    assert bench.agent.should_stop is True
    assert bench.agent.should_checkpoint is False


def test_without_a_training_nothing_is_requested() -> None:
    agent = Agent(None, "a test")
    assert (agent.should_stop, agent.should_checkpoint) == (False, False)
    assert isinstance(koopmon.Agent.should_stop, property)


def test_an_agent_that_only_watches_refuses_both() -> None:
    bench = Bench(act="never")
    try:
        assert bench.step("stop", "checkpoint") == (False, False)
        assert bench.outcomes == ["refused", "refused"]
    finally:
        bench.runtime.close("")


def test_a_restarted_launch_is_not_stopped_again(bench: Bench) -> None:
    bench.runtime.lifecycle.restore(Applied(lr_scale=0.5))
    assert bench.step() == (False, False)
    assert bench.runtime.lifecycle.applied().lr_scale == 0.5


@pytest.mark.parametrize("request_of", [StopRequest, CheckpointRequest])
def test_the_vote_is_at_the_edge_after_the_step_of_the_command_only(request_of: type[LoopRequest]) -> None:
    action, votes = request_of(), []

    def agree(value: bool) -> bool:
        votes.append(value)
        return value

    command = Command(**NAME, id="c0f0c0f0", kind=action.kind)
    target = action.target(command, ControlState(), 7)
    assert (target.strength, target.parameters, target.acts) == (1.0, {"at_step": 7}, True)
    state = _towards(ControlState(), action, target, 7, 0)
    assert [action.at_edge(state, step, agree) for step in (6, 7)] == [None, None]
    assert (action.granted, votes) == (False, [])
    unread = f"the script has not read agent.should_{action.kind}"
    assert action.at_edge(state, 8, agree) == Completion("applied", unread)
    action.was_read = True
    assert action.at_edge(state, 8, agree) == Completion("applied", "")
    votes.pop()
    assert (action.granted, votes) == (True, [True])
    assert action.at_edge(state, 9, agree) is None
    assert votes == [True]
    with pytest.raises(RequestRefusedError, match=rf"^no second {action.kind}: another one comes in force"):
        action.target(command, state, 7)
    assert action.target(command, state, 8).parameters == {"at_step": 8}
    released = action.target(Applied(), state, 9)
    assert (released.strength, released.acts) == (0.0, False)
