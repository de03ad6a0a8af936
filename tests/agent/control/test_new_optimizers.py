"""Optimizers that replace those of an attached training are followed, and others are left alone."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, Optimizer

from koopmon.agent.control import new_optimizers
from tests.agent.models import build, train_step
from tests.agent.scripted_monitor import ScriptedMonitor

Attach = Callable[..., Any]


class Listener:
    def __init__(self) -> None:
        self.steps: list[Optimizer] = []

    def on_any_step(self, optimizer: Optimizer) -> None:
        self.steps.append(optimizer)


def test_a_listener_hears_every_optimizer_while_it_lives() -> None:
    listener = Listener()
    new_optimizers.listen(listener)
    new_optimizers.listen(listener)
    optimizers = [SGD(nn.Linear(2, 2).parameters(), lr=0.1), Adam(nn.Linear(2, 2).parameters())]
    for optimizer in optimizers:
        optimizer.step()
    assert listener.steps == optimizers
    steps = listener.steps
    del listener
    gc.collect()
    optimizers[0].step()
    assert steps == optimizers


def test_a_listener_that_is_ignored_is_not_called() -> None:
    first, second = Listener(), Listener()
    for each in (first, second):
        new_optimizers.listen(each)
    optimizer = SGD(nn.Linear(2, 2).parameters(), lr=0.1)
    optimizer.step()
    for _ in range(2):
        new_optimizers.ignore(first)
    optimizer.step()
    assert (len(first.steps), len(second.steps)) == (1, 2)


def test_a_closed_training_costs_later_ones_nothing(agents: Attach) -> None:
    """One process may train many models in turn, and none of them need be collected."""
    kept = []
    before = len(new_optimizers._listeners)
    for _ in range(3):
        model = build()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        agent = agents(model, optimizer, endpoint="tcp://127.0.0.1:9")
        kept.append((model, optimizer, agent))
        train_step(model, optimizer, 0)
        agent.close()
    assert len(new_optimizers._listeners) <= before


def members(agent: Any) -> list[Optimizer]:
    return list(agent._runtime.optimizers)


def test_one_that_replaces_the_first_is_scaled_from_its_second_step(monitor: ScriptedMonitor, agents: Attach) -> None:
    model, bare = build(), build()
    first = SGD(model.parameters(), lr=0.1)
    agent = agents(model, first, endpoint=monitor.endpoint)
    monitor.wait(lambda: agent.status()["connected"])
    train_step(model, first, 0)
    command = monitor.command("set_lr_scale", lr_scale=0.5)
    monitor.wait(lambda: train_step(model, first, 0) and monitor.acked(command))
    bare.load_state_dict(model.state_dict())
    second, alone = SGD(model.parameters(), lr=0.1), SGD(bare.parameters(), lr=0.1)
    train_step(model, second, 1)
    train_step(bare, alone, 1)
    assert all(torch.equal(*pair) for pair in zip(model.parameters(), bare.parameters(), strict=True))
    assert members(agent) == [first, second]
    steps = agent.status()["step"]
    alone.param_groups[0]["lr"] = 0.05
    for step in (2, 3, 4):
        train_step(model, second, step)
        train_step(bare, alone, step)
    assert all(torch.equal(*pair) for pair in zip(model.parameters(), bare.parameters(), strict=True))
    assert second.param_groups[0]["lr"] == 0.1
    assert agent.status()["step"] == steps + 3


class Around(Optimizer):
    """A wrapper that hides the optimizer that it calls."""

    def __init__(self, inner: Optimizer) -> None:
        self.param_groups = inner.param_groups
        super().__init__(inner.param_groups, {})
        self.inner = lambda: inner

    def step(self, closure: Any = None) -> Any:
        return self.inner().step(closure)


def test_wrappers_and_strangers_do_not_join(
    monitor: ScriptedMonitor, agents: Attach, caplog: pytest.LogCaptureFixture
) -> None:
    model, other = build(), build(1)
    inner = SGD(model.parameters(), lr=0.1)
    agent = agents(model, inner, endpoint=monitor.endpoint)
    around, stranger = Around(inner), SGD(other.parameters(), lr=0.1)
    with caplog.at_level(logging.INFO, "koopmon"):
        for step in range(4):
            train_step(other, stranger, step)
            train_step(model, around, step)
    assert members(agent) == [inner]
    assert agent.status()["step"] == 4
    assert not any("follows" in line for line in caplog.messages)
