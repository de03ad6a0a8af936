"""Requests to the loop: granted at one step edge, after a vote, and for how long."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from torch.optim import AdamW

import koopmon
from koopmon.agent.control.action import Completion, RequestRefusedError, towards
from koopmon.agent.control.loop_requests import CheckpointRequest, LoopRequest, StopRequest
from koopmon.agent.control.state import ControlState
from koopmon.agent.handle import Agent
from koopmon.wire.messages import Applied, Command
from tests.agent.bench import Bench, benches
from tests.agent.models import build, train_step


class Loop(Bench):
    """A training whose loop reads the requests."""

    def __init__(self, **limits: Any) -> None:
        super().__init__(**limits)
        self.agent = Agent(self.runtime)

    def after(self, *kinds: Any) -> tuple[bool, bool]:
        """Submit commands of these kinds and train one step; return what the loop reads after it."""
        for kind in kinds:
            self.submit(kind)
        self.train(1)
        return self.agent.should_stop, self.agent.should_checkpoint


@pytest.fixture
def loops() -> Iterator[Callable[..., Loop]]:
    with benches(Loop) as make:
        yield make


@pytest.fixture
def loop(loops: Callable[..., Loop]) -> Loop:
    return loops()


def test_a_stop_stays_and_a_checkpoint_is_read_once(loop: Loop) -> None:
    assert loop.after() == (False, False)
    assert [loop.after("checkpoint"), loop.after(), loop.after("stop"), loop.after("checkpoint"), loop.after()] == [
        (False, True),
        (False, False),
        (True, False),
        (True, True),
        (True, False),
    ]
    assert [each.outcome for each in loop.outcomes] == ["applied"] * 3
    assert [each.step for each in loop.outcomes] == [1, 3, 4]
    assert loop.agent.status()["errors"] == 0
    assert [each.detail for each in loop.outcomes] == [""] * 3


def test_a_request_that_no_loop_reads_says_so(loop: Loop) -> None:
    outcome = loop.command("stop")
    assert (outcome.outcome, outcome.detail) == ("applied", "the script has not read agent.should_stop")


def test_they_change_no_update_and_no_value_in_force(loop: Loop) -> None:
    twin = build()
    optimizer = AdamW(twin.parameters(), lr=0.01)
    for step, kinds in enumerate(((), ("stop", "checkpoint"), (), ("checkpoint",), ())):
        loop.after(*kinds)
        train_step(twin, optimizer, step)
    assert all(one.equal(other) for one, other in zip(loop.model.parameters(), twin.parameters(), strict=True))
    assert loop.runtime.lifecycle.applied() == Applied()


@pytest.mark.parametrize("kind", ["stop", "checkpoint"])
def test_a_request_that_the_ranks_do_not_agree_on_is_not_granted(
    kind: str, loop: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop.after()
    monkeypatch.setattr(loop.runtime.lifecycle.state._actuator, "_agree", lambda value: False)
    assert loop.after(kind) == (False, False)
    assert [(each.outcome, each.detail) for each in loop.outcomes] == [("failed", "the ranks did not agree on it")]


def test_a_second_request_of_one_step_is_refused(loop: Loop) -> None:
    loop.after()
    assert loop.after("stop", "stop") == (True, False)
    assert sorted(each.outcome for each in loop.outcomes) == ["applied", "refused"]


def test_an_agent_that_fails_ends_a_checkpoint_at_the_step_of_the_other_ranks(loop: Loop) -> None:
    assert loop.after("checkpoint", "stop") == (True, True)
    loop.runtime.breaker.trip("a test", RuntimeError("a test"))
    assert (loop.agent.should_stop, loop.agent.should_checkpoint) == (True, True)
    assert loop.after() == (True, False)


def test_a_closed_agent_still_says_stop(loop: Loop) -> None:
    loop.after("stop")
    loop.agent.close()
    assert loop.agent.should_stop is True
    assert loop.agent.should_checkpoint is False


def test_without_a_training_nothing_is_requested() -> None:
    agent = Agent(None, "a test")
    assert (agent.should_stop, agent.should_checkpoint) == (False, False)
    assert isinstance(koopmon.Agent.should_stop, property)


def test_an_agent_that_only_watches_refuses_both(loops: Callable[..., Loop]) -> None:
    loop = loops(act="never")
    assert loop.after("stop", "checkpoint") == (False, False)
    assert [each.outcome for each in loop.outcomes] == ["refused", "refused"]


def test_a_restarted_launch_is_not_stopped_again(loop: Loop) -> None:
    loop.runtime.lifecycle.restore(Applied(lr_scale=0.5))
    assert loop.after() == (False, False)
    assert loop.runtime.lifecycle.applied().lr_scale == 0.5


@pytest.mark.parametrize("request_of", [StopRequest, CheckpointRequest])
def test_the_vote_is_at_the_edge_after_the_step_of_the_command_only(request_of: type[LoopRequest]) -> None:
    action, votes = request_of(), []

    def agree(value: bool) -> bool:
        votes.append(value)
        return value

    name: dict[str, Any] = {"run": "job", "incarnation": "c0f0c0f0", "id": "c0f0c0f0", "reason": "a test"}
    command = Command(**name, kind=action.kind, expires_step=1 << 40)
    target = action.target(command, ControlState(), 7)
    assert (target.strength, target.parameters, target.acts) == (1.0, {"at_step": 7}, True)
    state = towards(ControlState(), action, target, 7, 0)
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
