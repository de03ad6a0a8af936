"""The interface of actions: calls of the runtime, and a new kind from a class alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from koopmon.agent.control.action import Completion, ControlAction, Injection, NextForwards, Target, Update
from koopmon.agent.control.state import ActionState, ControlState, Ramp
from koopmon.wire.messages import Applied, Command
from tests.agent.models import L, batch, build, checkpointed, loss_of, train_step
from tests.agent.scripted_monitor import ScriptedMonitor


class Recorder(ControlAction):
    """Action that adds its strength to the output of block 1 and records each call."""

    kind = "set_lr_scale"
    neutral = 1.0

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.offset = 0.0
        self.fails = False
        self.completion: Completion | None = None

    def target(self, request: Command | Applied, state: ControlState, step: int) -> Target:
        assert request.lr_scale is not None
        return Target(request.lr_scale)

    def apply(self, state: ControlState, step: int, update: Update) -> None:
        if self.fails:
            raise RuntimeError("the action is broken")
        self.calls.append(("apply", step, self.strength(state, step)))

    def revert(self) -> None:
        self.calls.append(("revert",))

    def at_edge(self, state: ControlState, step: int, agree: Callable[[bool], bool]) -> Completion | None:
        self.calls.append(("at_edge", step, agree(True), agree(False)))
        return self.completion

    def end(self) -> None:
        self.calls.append(("end",))

    def before_forwards(self, state: ControlState, step: int, forwards: NextForwards) -> Injection | None:
        self.calls.append(("before_forwards", step, forwards._replace(stack=None)))
        self.offset = 1.0 - self.strength(state, step)
        return self if self.offset else None

    def on_forward(self) -> None:
        self.calls.append(("on_forward",))

    def enter(self, layer: int, state: Tensor, mask: Tensor | None) -> None:
        self.calls.append(("enter", layer))

    def leave(self, layer: int, state: Tensor) -> Tensor | None:
        return state + self.offset if layer == 1 else None


class Lasting(Recorder):
    kind = "set_kss"
    lasting = True


@pytest.fixture
def recorders(monkeypatch: pytest.MonkeyPatch) -> tuple[Recorder, Lasting]:
    """Replace the kinds of action of new agents."""
    made = Recorder(), Lasting()
    monkeypatch.setattr("koopmon.agent.runtime.make_actions", lambda config, stats, breaker: made)
    return made


def prepared(monitor: ScriptedMonitor, agents: Callable[..., Any], **options: Any) -> tuple[Any, ...]:
    model = build(**options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    agent = agents(model, optimizer, endpoint=monitor.endpoint)
    monitor.wait(lambda: agent.status()["connected"])
    return agent, model, optimizer


def test_the_order_of_calls_in_a_step(
    recorders: tuple[Recorder, Lasting], monitor: ScriptedMonitor, agents: Callable[..., Any]
) -> None:
    agent, model, optimizer = prepared(monitor, agents)
    train_step(model, optimizer, 0)
    for each in recorders:
        each.calls.clear()
    train_step(model, optimizer, 1)
    for each in recorders:
        assert each.calls == [
            ("on_forward",),
            ("apply", 1, 1.0),
            ("revert",),
            ("at_edge", 2, True, False),
            ("before_forwards", 2, NextForwards(num_layers=L, num_microbatches=1, data_rank=0)),
        ]
        each.calls.clear()
    agent.close()
    assert [each.calls for each in recorders] == [[("revert",), ("end",)], [("revert",), ("end",)]]


@pytest.mark.parametrize(
    ("forwards", "microbatches"),
    [
        ([1, 1, 3, 1, 1], [1, 1, 1, 1, 1]),  # a GradScaler skipped two steps before the third
        ([5, 1, 1], [5, 1, 1]),  # and at the start of the training
        ([4, 4, 1, 4, 4], [4, 4, 4, 4, 4]),  # an epoch ended
        ([2, 2, 6, 6, 6], [2, 2, 2, 6, 6]),  # the loop accumulates more from here on
    ],
)
def test_the_microbatches_of_a_step_are_those_of_most_steps_before(
    forwards: list[int],
    microbatches: list[int],
    recorders: tuple[Recorder, Lasting],
    monitor: ScriptedMonitor,
    agents: Callable[..., Any],
) -> None:
    _, model, optimizer = prepared(monitor, agents)
    for step, count in enumerate(forwards):
        for _ in range(count):
            loss_of(model, batch(step)).backward()
        optimizer.step()
    told = [call[2].num_microbatches for call in recorders[0].calls if call[0] == "before_forwards"]
    assert told == microbatches


@pytest.mark.parametrize("run", [None, checkpointed])
def test_a_command_reaches_the_action_of_its_kind_which_may_change_the_stream(
    run: Any, recorders: tuple[Recorder, Lasting], monitor: ScriptedMonitor, agents: Callable[..., Any]
) -> None:
    _, model, optimizer = prepared(monitor, agents, run=run)
    plain = build()
    train_step(model, optimizer, 0)
    command = monitor.command("set_lr_scale", lr_scale=0.75)
    monitor.wait(lambda: train_step(model, optimizer, 1) and monitor.acked(command))
    recorder, other = recorders
    assert other.offset == 0.0
    assert (recorder.offset, monitor.ack(command).outcome) == (0.25, "applied")
    plain.load_state_dict(model.state_dict())
    plain.blocks[1].register_forward_hook(lambda module, args, output: output + 0.25)
    recorder.calls.clear()
    plain_optimizer = torch.optim.SGD(plain.parameters(), lr=0.01)
    assert train_step(model, optimizer, 2) == train_step(plain, plain_optimizer, 2)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))
    entered = [call[1] for call in recorder.calls if call[0] == "enter"]
    # Under checkpointing each block runs again in the backward pass, the last one first.
    assert entered == [0, 1, 2, *([2, 1, 0] if run is checkpointed else [])]


def test_an_action_that_fails_ends_the_agent_and_not_the_lasting_actions(
    recorders: tuple[Recorder, Lasting], monitor: ScriptedMonitor, agents: Callable[..., Any]
) -> None:
    agent, model, optimizer = prepared(monitor, agents)
    train_step(model, optimizer, 0)
    recorder, lasting = recorders
    recorder.fails = True
    lasting.calls.clear()
    for step in range(1, 3):
        train_step(model, optimizer, step)
    assert "the action is broken" in agent.status()["reason"]
    assert [call for call in lasting.calls if call[0] != "on_forward"] == [
        ("end",),
        ("apply", 1, 1.0),
        ("revert",),
        ("apply", 2, 1.0),
        ("revert",),
    ]


def test_a_command_that_completes_at_the_edge_is_answered_with_what_came_of_it(
    recorders: tuple[Recorder, Lasting],
    monitor: ScriptedMonitor,
    agents: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Recorder, "completes_at_edge", True)
    _, model, optimizer = prepared(monitor, agents)
    recorders[0].completion = Completion("failed", "it came to nothing")
    command = monitor.command("set_lr_scale", lr_scale=0.75)
    monitor.wait(lambda: train_step(model, optimizer, 0) and monitor.acked(command))
    assert (monitor.ack(command).outcome, monitor.ack(command).detail) == ("failed", "it came to nothing")
    recorders[0].completion = Completion("applied", "done")
    again = monitor.command("set_lr_scale", lr_scale=0.75)
    monitor.wait(lambda: train_step(model, optimizer, 0) and monitor.acked(again))
    assert (monitor.ack(again).outcome, monitor.ack(again).detail) == ("applied", "done")


def test_by_default_the_way_back_keeps_the_parameters_and_is_always_open() -> None:
    recorder = Recorder()
    ramp = Ramp(first_step=2, start=1.0, target=0.5, num_steps=2)
    state = ControlState(actions={"set_lr_scale": ActionState(ramp=ramp, parameters={"size": 3})})
    assert recorder.released(state) == Target(1.0, {"size": 3}, acts=False)
    assert [recorder.effective(state, step) for step in (1, 2, 3)] == [1.0, 0.75, 0.5]
