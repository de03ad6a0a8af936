"""Snapshots and injections where the state is not the first argument or not the first result."""

from __future__ import annotations

import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.agent.control.test_action import Recorder
from tests.agent.models import paced
from tests.agent.scripted_monitor import ScriptedMonitor
from tests.test_state_position import CASES, B, D, Model, T

Attach = Callable[..., Any]
EVERY_STEP = {
    "cadence": {"dense_every": 1, "warmup_steps": 1000},
    "sampling": {"num_samples": 16},
    "model": {"stack": "blocks"},
}


def states_of(model: Model, x: Tensor) -> list[Tensor]:
    states = [x]
    for block in model.blocks:
        states.append(block.f(states[-1]))
    return states


def inputs(step: int) -> Tensor:
    return torch.randn(B, T, D, generator=torch.Generator().manual_seed(step))


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> float:
    loss = model(inputs(step)).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return float(loss.detach())


@pytest.mark.parametrize("case", CASES)
def test_a_snapshot_holds_the_stream_and_the_losses_are_equal(
    case: str, monitor: ScriptedMonitor, agents: Attach
) -> None:
    model = Model(*CASES[case][:2])
    bare = copy.deepcopy(model)
    optimizer, bare_optimizer = (torch.optim.SGD(each.parameters(), lr=0.05) for each in (model, bare))
    agent = agents(model, optimizer, endpoint=monitor.endpoint, config=EVERY_STEP)
    monitor.wait(lambda: agent.status()["connected"])
    arrived, expected = paced(agent, monitor), {}
    for step in range(4):
        expected[step] = [state.detach() for state in states_of(bare, inputs(step))]
        assert train_step(model, optimizer, step) == train_step(bare, bare_optimizer, step)
        arrived()
    assert [header.step for header, _ in monitor.shards] == [1, 2, 3]
    for header, states in monitor.shards:
        for found, state in zip(states, expected[header.step], strict=True):
            assert sorted(map(tuple, found.tolist())) == sorted(map(tuple, state.reshape(-1, D).tolist()))


@pytest.mark.parametrize("case", [name for name in CASES if name != "ordered dict"])
def test_an_action_changes_the_stream_and_nothing_else(
    case: str, monitor: ScriptedMonitor, agents: Attach, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = Recorder()
    monkeypatch.setattr("koopmon.agent.runtime.make_actions", lambda config, stats, breaker: (recorder,))
    model = Model(*CASES[case][:2])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    agent = agents(model, optimizer, endpoint=monitor.endpoint, config=EVERY_STEP)
    monitor.wait(lambda: agent.status()["connected"])
    train_step(model, optimizer, 0)
    command = monitor.command("set_lr_scale", lr_scale=0.75)
    monitor.wait(lambda: train_step(model, optimizer, 1) and monitor.acked(command))
    first, second, third = model.blocks
    expected = third.f(second.f(first.f(inputs(2))) + 0.25)
    assert torch.equal(model(inputs(2)), expected)
    assert agent.status()["reason"] == ""


@pytest.mark.parametrize("case", CASES)
def test_a_snapshot_adds_no_node_to_the_graph_of_gradients(case: str, monitor: ScriptedMonitor, agents: Attach) -> None:
    """Its number in a thread decides when the gradient of a node is added to those of other threads."""
    counts: list[list[int]] = []
    for watched in (False, True):
        model = Model(*CASES[case][:2])
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        if watched:
            status = agents(model, optimizer, endpoint=monitor.endpoint, config=EVERY_STEP).status
            monitor.wait(lambda status=status: status()["connected"])
        numbers: list[int] = []
        for step in range(6):
            with ThreadPoolExecutor(1) as pool:  # each thread counts from 0
                loss = pool.submit(lambda step=step, model=model: model(inputs(step)).square().mean()).result()
            numbers += [loss.grad_fn._sequence_nr(), (loss * 1.0).grad_fn._sequence_nr()]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        counts.append([*numbers[4::2], *(after - numbers[5] for after in numbers[5::2])])
    monitor.wait(lambda: len(monitor.shards) > 0)
    assert counts[1] == counts[0]
