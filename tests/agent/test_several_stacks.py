"""Several stacks of one model that train: each is a run of its own, and actions follow one of them."""

from __future__ import annotations

import copy
import itertools
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from koopmon.agent.lifecycle import StoodDown
from koopmon.agent.runtime import MAX_STACKS
from tests.agent.models import VOCABULARY, Block, batch
from tests.agent.scripted_monitor import ScriptedMonitor

Attach = Callable[..., Any]
EVERY_STEP = {"cadence": {"dense_every": 1, "warmup_steps": 1000}, "sampling": {"num_samples": 16}}
Sizes = tuple[tuple[int, int], ...]


class Towers(nn.Module):
    """Stacks of several depths and widths, one behind the other or side by side. `frozen` ones do not train."""

    def __init__(self, sizes: Sizes, *, in_turn: bool, frozen: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.in_turn = in_turn
        self.embeddings = nn.ModuleList(nn.Embedding(VOCABULARY, width) for _, width in sizes)
        for index, (depth, width) in enumerate(sizes):
            tower = nn.Module()
            tower.blocks = nn.ModuleList(Block(width) for _ in range(depth))
            self.add_module(f"tower_{'abcdefgh'[index]}", tower.requires_grad_(index not in frozen))
        widths = [width for _, width in sizes]
        self.bridges = nn.ModuleList(nn.Linear(one, other) for one, other in itertools.pairwise(widths))

    def forward(self, tokens: Tensor) -> Tensor:
        outputs: list[Tensor] = []
        for index, embedding in enumerate(self.embeddings):
            h = embedding(tokens) * 1.0
            if outputs and self.in_turn:
                h = h + torch.tanh(self.bridges[index - 1](outputs[-1]))
            for block in getattr(self, f"tower_{'abcdefgh'[index]}").blocks:
                h = block(h)
            outputs.append(h)
        return torch.stack([output.square().mean() for output in outputs]).sum()


def step(model: nn.Module, optimizer: torch.optim.Optimizer, number: int) -> float:
    loss = model(batch(number))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return float(loss.detach())


@pytest.mark.parametrize("in_turn", [True, False])
@pytest.mark.parametrize(
    ("sizes", "frozen", "kept", "beside"),
    [
        (((3, 16), (3, 16)), (), "tower_b", {"tower_a"}),
        (((4, 16), (3, 8)), (), "tower_a", {"tower_b"}),
        (((2, 8), (3, 16), (2, 24)), (), "tower_b", {"tower_a", "tower_c"}),
        (((4, 16), (3, 8)), (0,), "tower_b", set()),
        (((2, 8),) * 6, (), "tower_f", {"tower_e", "tower_d", "tower_c"}),
    ],
)
def test_every_stack_that_trains_is_watched_under_a_name(
    sizes: Sizes,
    frozen: tuple[int, ...],
    kept: str,
    beside: set[str],
    in_turn: bool,
    monitor: ScriptedMonitor,
    agents: Attach,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    torch.manual_seed(0)
    model = Towers(sizes, in_turn=in_turn, frozen=frozen)
    bare = copy.deepcopy(model)
    optimizer, bare_optimizer = (
        torch.optim.SGD([each for each in side.parameters() if each.requires_grad], lr=1e-3) for side in (model, bare)
    )
    agent = agents(model, optimizer, endpoint=monitor.endpoint, run="job", config=EVERY_STEP)
    monitor.wait(lambda: agent.status()["connected"])
    for number in range(3):
        assert step(model, optimizer, number) == step(bare, bare_optimizer, number)
    runs = {"job": kept, **{f"job.{name}.blocks": name for name in beside}}
    for number in range(3, 100):
        assert step(model, optimizer, number) == step(bare, bare_optimizer, number)
        if {header.run for header, _ in monitor.shards} >= runs.keys():
            break
    monitor.wait(lambda: {header.run for header, _ in monitor.shards} >= runs.keys())
    assert {header.run for header, _ in monitor.shards} == runs.keys()
    for header, _ in monitor.shards:
        depth, width = sizes["abcdefgh".index(runs[header.run][-1])]
        assert (header.num_layers, header.width) == (depth, width)
    lines = [line for line in caplog.messages if "actions follow" in line]
    assert len(lines) == (1 if beside else 0)
    assert all(f"{name}.blocks as run job.{name}.blocks" in lines[0] for name in beside)
    assert len(beside) < MAX_STACKS


def test_the_others_only_watch_and_end_with_the_first(monitor: ScriptedMonitor, agents: Attach) -> None:
    model = Towers(((3, 16), (3, 8)), in_turn=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    agent = agents(model, optimizer, endpoint=monitor.endpoint, run="job", config=EVERY_STEP)
    monitor.wait(lambda: agent.status()["connected"])
    for number in range(3):
        step(model, optimizer, number)
    (other,) = agent._runtime._beside
    agent.log(loss=3.5)
    assert (agent.status()["acts"], other.lifecycle.state.acts) == (True, False)
    assert other.stats.measured["loss"].get() == 3.5
    assert (other.stats.step, other._budget.num_sharers, agent._runtime._budget.num_sharers) == (3, 2, 2)
    later = torch.optim.SGD(model.embeddings.parameters(), lr=1e-3)
    agents(model, later, endpoint=monitor.endpoint)
    assert later in list(other.optimizers)
    agent.close()
    assert other.closed
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_the_name_of_a_run_is_that_of_the_unwrapped_blocks(monitor: ScriptedMonitor, agents: Attach) -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = Towers(((3, 16), (3, 8)), in_turn=True)

        def forward(self, tokens: Tensor) -> Tensor:
            return self.module(tokens)

    model = Wrapped()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    agent = agents(model, optimizer, endpoint=monitor.endpoint, run="job", config=EVERY_STEP)
    step(model, optimizer, 0)
    assert [other._roles.run for other in agent._runtime._beside] == ["job.tower_a.blocks"]


def test_a_named_stack_is_watched_alone(monitor: ScriptedMonitor, agents: Attach) -> None:
    model = Towers(((3, 16), (3, 8)), in_turn=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    config = {**EVERY_STEP, "model": {"stack": "tower_a.blocks"}}
    agent = agents(model, optimizer, endpoint=monitor.endpoint, run="job", config=config)
    for number in range(3):
        step(model, optimizer, number)
    assert agent.status()["stack"] == "tower_a.blocks"
    assert agent._runtime._beside == []


def test_a_later_stack_that_is_no_chain_is_told_with_a_remedy_and_its_run_ends(
    monitor: ScriptedMonitor, agents: Attach, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    model = Towers(((3, 16),), in_turn=True)
    model.later = nn.ModuleList(Block(16) for _ in range(3))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    agent = agents(model, optimizer, endpoint=monitor.endpoint, run="job", config=EVERY_STEP)
    monitor.wait(lambda: agent.status()["connected"])
    for number in range(12):
        loss = model(batch(number))
        if number > 2:
            h = torch.randn(4, 6, 16)
            loss = loss + sum(block(h).square().mean() for block in model.later)  # side by side
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    (line,) = [line for line in caplog.messages if "no snapshots" in line]
    assert "no snapshots of later, which trains too, as run job.later" in line
    assert "[model] stack" in line
    assert agent.status()["enabled"]
    (other,) = agent._runtime._beside
    assert isinstance(other.lifecycle.state, StoodDown)
