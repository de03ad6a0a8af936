"""Stacks of convolutions are watched: tokens are places, and the training stays as it is."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import nn

from tests.agent.models import L, batch, loss_of
from tests.agent.scripted_monitor import ScriptedMonitor
from tests.convolutional import WATCHED, Basic, Convolutional, Plain, tokens_of

Attach = Callable[..., Any]
EVERY_STEP = {"cadence": {"dense_every": 1}, "sampling": {"num_samples": 64}}
STEPS = 4


def train(model: nn.Module, optimizer: torch.optim.Optimizer, after: Callable[[], None] = lambda: None) -> list[float]:
    losses = []
    for step in range(STEPS):
        loss = loss_of(model, batch(step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        after()
    return losses


def made(make: Callable[[], nn.Module]) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = make()
    return model, torch.optim.SGD(model.parameters(), lr=0.1)


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", list(WATCHED))
def test_a_snapshot_holds_the_channels_of_places(
    name: str, memory: torch.memory_format, monitor: ScriptedMonitor, agents: Attach
) -> None:
    def make() -> nn.Module:
        model = WATCHED[name]()
        return model if name in ("a line", "a volume") else model.to(memory_format=memory)

    expected = train(*made(make))
    model, optimizer = made(make)
    agent = agents(model, optimizer, endpoint=monitor.endpoint, config=EVERY_STEP)
    monitor.wait(lambda: agent.status()["connected"])
    states: list[list[Any]] = []
    assert isinstance(model, Convolutional)

    def after() -> None:
        states.append(model.states)
        monitor.wait(lambda: agent.status()["sent"] >= len(states) - 1)

    assert train(model, optimizer, after) == expected
    status = agent.status()
    assert (status["sent"], status["taps_missing"], status["errors"]) == (STEPS - 1, 0, 0)
    monitor.wait(lambda: len(monitor.shards) == STEPS - 1)
    last = model.last or name == "tokens"
    for header, sent in monitor.shards:
        rows = [tokens_of(state, last=last) for state in states[header.training.step]]
        assert header.num_points == L + 1
        for found, expected_rows in zip(sent, rows, strict=True):
            torch.testing.assert_close(found.sum(0), expected_rows.sum(0), rtol=1e-4, atol=1e-4)


def test_runs_of_several_widths_are_runs_of_their_own(monitor: ScriptedMonitor, agents: Attach) -> None:
    model, optimizer = made(lambda: Convolutional(Basic, widths=(8, 8, 8, 16, 16, 16, 16)))
    agent = agents(model, optimizer, endpoint=monitor.endpoint, run="job", config=EVERY_STEP)
    monitor.wait(lambda: agent.status()["connected"])
    train(model, optimizer)
    assert agent.status()["stack"] == "blocks[3:6]"
    monitor.wait(lambda: {"job", "job.blocks-0-2"} <= {header.run for header, _ in monitor.shards})


def test_plain_convolutions_are_told(
    monitor: ScriptedMonitor, agents: Attach, caplog: pytest.LogCaptureFixture
) -> None:
    model, optimizer = made(lambda: Convolutional(Plain))
    agent = agents(model, optimizer, endpoint=monitor.endpoint, config=EVERY_STEP)
    train(model, optimizer)
    assert agent.status()["sent"] == 0
    assert sum("do not carry their input forward" in line for line in caplog.messages) == 1


@pytest.mark.parametrize("name", list(WATCHED))
def test_a_snapshot_adds_no_node_to_the_graph_of_gradients(name: str, monitor: ScriptedMonitor, agents: Attach) -> None:
    counts: list[list[int]] = []
    for watched in (False, True):
        model, optimizer = made(WATCHED[name])
        if watched:
            status = agents(model, optimizer, endpoint=monitor.endpoint, config=EVERY_STEP).status
            monitor.wait(lambda status=status: status()["connected"])
        numbers: list[int] = []
        for step in range(6):
            with ThreadPoolExecutor(1) as pool:  # each thread counts from 0
                loss = pool.submit(loss_of, model, batch(step)).result()
            numbers += [each.grad_fn._sequence_nr() for each in (loss, loss * 1.0)]  # type: ignore[union-attr]
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        counts.append([*numbers[4::2], *(after - numbers[5] for after in numbers[5::2])])
    monitor.wait(lambda: len(monitor.shards) > 0)
    assert counts[1] == counts[0]
