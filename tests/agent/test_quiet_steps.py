"""Steps without work for the agent: a few short calls of the optimizer's hooks and of one of the model's."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median, median_low
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import koopmon
from koopmon.agent.capture.training_forwards import MAX_RESTED
from koopmon.wire.messages import Ack
from tests.agent.models import batch, build, loss_of, pretend_compiled, train_step
from tests.agent.scripted_monitor import ScriptedMonitor

Attach = Callable[..., Any]
PACKAGE = str(Path(koopmon.__file__).parent)
EVERY = 12
SNAPSHOTS = [1, 13, 25]
"""Steps with a snapshot, of the first thirty."""
CONFIG = {"cadence": {"dense_every": 1, "warmup_steps": 1, "calm_every": EVERY}}
MAX_CALLS = 24
"""Python calls of koopmon's code in a quiet step, whatever the model. Before there were quiet steps, there were 180."""
MAX_SNAPSHOT_CALLS = 500
"""The same in a step with a snapshot, of a model of three blocks."""


@pytest.fixture(autouse=True)
def nothing_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other tests of this process may have called torch.compile."""
    pretend_compiled(monkeypatch, False)


@pytest.fixture
def watched(monitor: ScriptedMonitor, agents: Attach) -> tuple[nn.Module, Any, Any]:
    """Return a model, its optimizer and the agent, after the first step."""
    model = build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    agent = agents(model, optimizer, endpoint=monitor.endpoint, config=CONFIG)
    monitor.wait(lambda: agent.status()["connected"])
    train_step(model, optimizer, 0)
    return model, optimizer, agent


def is_quiet(agent: Any) -> bool:
    return bool(agent._runtime.steps.quiet.on)


def until_quiet(model: nn.Module, optimizer: Any, agent: Any) -> None:
    for _ in range(2 * EVERY):
        if is_quiet(agent):
            return
        train_step(model, optimizer, agent.status()["step"])
    raise AssertionError("no step was quiet")


@contextmanager
def calls_counted() -> Iterator[list[str]]:
    """Yield the list of the calls of koopmon's functions in this thread."""
    found: list[str] = []

    def note(frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(PACKAGE):
            found.append(frame.f_code.co_qualname)

    sys.setprofile(note)
    try:
        yield found
    finally:
        sys.setprofile(None)


def num_hooks(module: nn.Module) -> int:
    return len(module._forward_hooks) + len(module._forward_pre_hooks)


def test_a_quiet_step_costs_a_few_calls(watched: tuple[nn.Module, Any, Any]) -> None:
    model, optimizer, agent = watched
    quiet: list[int] = []
    snapshots: list[int] = []
    for step in range(1, 30):
        before, due = is_quiet(agent), agent._runtime.taps.due
        with calls_counted() as calls:
            train_step(model, optimizer, step)
        if due and step > SNAPSHOTS[0]:  # the first one is announced
            snapshots.append(len(calls))
        if before:
            assert not due
            quiet.append(len(calls))
    assert len(quiet) >= 12
    # The median: a message of the monitor may arrive in a step, or the garbage collector run.
    assert 0 < median(quiet) <= MAX_CALLS
    assert median_low(snapshots) <= MAX_SNAPSHOT_CALLS
    assert agent.status()["step"] == 30


def test_the_model_has_one_hook_in_a_quiet_step(watched: tuple[nn.Module, Any, Any]) -> None:
    model, optimizer, agent = watched
    seen = set()
    for step in range(1, 30):
        if is_quiet(agent):
            seen.add(sum(map(num_hooks, model.modules())))
        elif agent._runtime.taps.due:
            assert num_hooks(model) == 2
        train_step(model, optimizer, step)
    assert seen == {1}, "it sees a compiler before that traces the forward"


def test_snapshots_losses_and_counts_are_those_of_every_step(
    watched: tuple[nn.Module, Any, Any], monitor: ScriptedMonitor
) -> None:
    model, optimizer, agent = watched
    alone = build()
    other = torch.optim.AdamW(alone.parameters(), lr=0.01)
    schedules = [torch.optim.lr_scheduler.ExponentialLR(each, 0.9) for each in (optimizer, other)]
    train_step(alone, other, 0)
    for step in range(1, 30):
        assert train_step(model, optimizer, step) == train_step(alone, other, step)
        assert agent._runtime.stats.measured["learning_rate"].get() == other.param_groups[0]["lr"]
        monitor.wait(lambda: agent.status()["sent"] == len(monitor.shards))
        for schedule in schedules:
            schedule.step()
    monitor.wait(lambda: len(monitor.shards) >= len(SNAPSHOTS))
    assert [shard.training.step for shard, _ in monitor.shards] == SNAPSHOTS
    assert agent.status()["taps_missing"] == 0
    stats = agent._runtime.stats
    assert stats.step == 30
    assert 0.0 < stats.step_seconds < stats.elapsed_seconds


def test_steps_of_other_models_leave_the_quiet_steps_alone(watched: tuple[nn.Module, Any, Any]) -> None:
    model, optimizer, agent = watched
    other = build()
    beside = torch.optim.AdamW(other.parameters(), lr=0.01)
    until_quiet(model, optimizer, agent)
    train_step(other, beside, 0)
    assert is_quiet(agent)
    beside.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    train_step(other, beside, 0)
    assert is_quiet(agent)
    beside.add_param_group({"params": [model.head.weight]})
    train_step(other, beside, 0)
    assert not is_quiet(agent), "it updates the model too"


def test_a_command_acts_in_the_step_after_its_arrival(
    watched: tuple[nn.Module, Any, Any], monitor: ScriptedMonitor
) -> None:
    model, optimizer, agent = watched
    until_quiet(model, optimizer, agent)
    command = monitor.command("set_lr_scale", lr_scale=0.5, ramp_steps=0)
    monitor.wait(lambda: bool(agent._runtime.lifecycle.requests))
    step = agent.status()["step"]
    train_step(model, optimizer, step)
    assert not is_quiet(agent)
    monitor.wait(lambda: monitor.acked(command))
    assert [ack.step for ack in monitor.of(Ack)] == [step]
    assert agent.status()["applied"]["lr_scale"] == 0.5


def test_a_change_of_the_cadence_acts_at_once(watched: tuple[nn.Module, Any, Any], monitor: ScriptedMonitor) -> None:
    model, optimizer, agent = watched
    until_quiet(model, optimizer, agent)
    monitor.command("set_cadence", cadence_steps=1)
    monitor.wait(lambda: bool(agent._runtime.lifecycle.requests))
    assert not agent._runtime.taps.due
    train_step(model, optimizer, agent.status()["step"])
    assert agent._runtime.taps.due


def test_another_optimizer_ends_them(watched: tuple[nn.Module, Any, Any]) -> None:
    model, optimizer, agent = watched
    until_quiet(model, optimizer, agent)
    head = torch.optim.SGD([torch.zeros(2, requires_grad=True)], lr=0.1)
    agent._runtime.steps.add_optimizer(head)
    assert not is_quiet(agent)
    assert num_hooks(model) == 2
    for step in range(2 * EVERY):
        train_step(model, optimizer, step)
        assert not is_quiet(agent), "two optimizers: only the forwards show a step"


def test_a_compiler_finds_the_hooks(watched: tuple[nn.Module, Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer, agent = watched
    until_quiet(model, optimizer, agent)
    pretend_compiled(monkeypatch, True)
    train_step(model, optimizer, agent.status()["step"])
    assert num_hooks(model) == 2
    assert {num_hooks(block) for block in model.blocks} == {2}


def test_an_update_without_a_gradient_of_its_own_is_no_step(watched: tuple[nn.Module, Any, Any]) -> None:
    model, optimizer, agent = watched
    until_quiet(model, optimizer, agent)
    step = agent.status()["step"]
    train_step(model, optimizer, step)
    optimizer.step()
    assert agent.status()["step"] == step + 1
    for number in range(3):
        train_step(model, optimizer, number)
        assert agent.status()["step"] == step + 2 + number
        assert not is_quiet(agent)


def test_a_step_that_raises_is_not_counted(
    watched: tuple[nn.Module, Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, optimizer, agent = watched
    until_quiet(model, optimizer, agent)
    step = agent.status()["step"]

    def fail(*_: Any) -> Tensor:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patches:
        patches.setattr(type(optimizer), "_init_group", fail)
        loss_of(model, batch(0)).backward()
        with pytest.raises(RuntimeError, match="out of memory"):
            optimizer.step()
    assert agent.status()["step"] == step
    train_step(model, optimizer, 1)
    assert agent.status()["step"] == step + 1


def test_an_optimizer_that_takes_over_is_followed(
    watched: tuple[nn.Module, Any, Any], monitor: ScriptedMonitor
) -> None:
    model, optimizer, agent = watched
    until_quiet(model, optimizer, agent)
    other, before = torch.optim.SGD(model.parameters(), lr=0.01), agent.status()["sent"]
    for step in range(3 * EVERY):
        train_step(model, other, step)
    monitor.wait(lambda: agent.status()["sent"] > before)


def test_cleared_hooks_are_put_back(watched: tuple[nn.Module, Any, Any], monitor: ScriptedMonitor) -> None:
    model, optimizer, agent = watched
    until_quiet(model, optimizer, agent)
    optimizer._optimizer_step_pre_hooks.clear()
    optimizer._optimizer_step_post_hooks.clear()
    before = agent.status()["sent"]
    for step in range(3 * EVERY):
        train_step(model, optimizer, step)
    monitor.wait(lambda: agent.status()["sent"] > before)


def test_steps_without_hooks_are_told(watched: tuple[nn.Module, Any, Any], caplog: pytest.LogCaptureFixture) -> None:
    model, optimizer, agent = watched
    until_quiet(model, optimizer, agent)

    def descend() -> None:
        with torch.no_grad():
            for each in model.parameters():
                each -= 0.01 * each.grad

    optimizer.step = descend
    for step in range(4 * MAX_RESTED):
        train_step(model, optimizer, step)
    assert not is_quiet(agent)
    assert sum("no attached optimizer steps" in line for line in caplog.messages) == 1


def test_a_closed_agent_counts_nothing_more(watched: tuple[nn.Module, Any, Any]) -> None:
    model, optimizer, agent = watched
    until_quiet(model, optimizer, agent)
    agent.close()
    step = agent.status()["step"]
    train_step(model, optimizer, 1)
    assert agent.status()["step"] == step
    assert sum(map(num_hooks, model.modules())) == 0
