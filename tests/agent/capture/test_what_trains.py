"""The stack that is watched is the one that trains."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.agent.models import VOCABULARY, Block, D, batch, paced
from tests.agent.scripted_monitor import ScriptedMonitor

Attach = Callable[..., Any]
EVERY_STEP = {"cadence": {"dense_every": 1, "warmup_steps": 1000}}


class Tower(nn.Module):
    def __init__(self, num_blocks: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, D)
        self.blocks = nn.ModuleList(Block(D) for _ in range(num_blocks))
        self.head = nn.Linear(D, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.embedding(tokens)
        for block in self.blocks:
            h = block(h)
        return self.head(h)


class Both(nn.Module):
    """A small student and a larger teacher in one module. `order` says who is called first."""

    def __init__(
        self, order: str = "teacher student", gradients: bool = False, sizes: tuple[int, int] = (3, 5)
    ) -> None:
        super().__init__()
        self.student, self.teacher = Tower(sizes[0]), Tower(sizes[1])
        self.order, self.gradients = order.split(), gradients

    def forward(self, tokens: Tensor) -> Tensor:
        out = {}
        for name in self.order:
            with torch.set_grad_enabled(name == "student" or self.gradients):
                out[name] = getattr(self, name)(tokens)
        return (out["student"] - out["teacher"]).square().mean()


def all_of(*modules: nn.Module) -> list[nn.Parameter]:
    return [parameter for module in modules for parameter in module.parameters()]


def frozen_teacher(model: Both) -> Iterable[nn.Parameter]:
    model.teacher.requires_grad_(False).eval()
    return all_of(model.student)


def frozen_teacher_in_the_optimizer(model: Both) -> Iterable[nn.Parameter]:
    model.teacher.requires_grad_(False)
    return all_of(model)


def teacher_without_gradients(model: Both) -> Iterable[nn.Parameter]:
    return all_of(model)


def teacher_outside_of_the_optimizer(model: Both) -> Iterable[nn.Parameter]:
    return all_of(model.student)


class LowRank(nn.Module):
    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.a, self.b = nn.Linear(base.in_features, 2, bias=False), nn.Linear(2, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.b(self.a(x))


def adapters_in_the_student(model: Both) -> Iterable[nn.Parameter]:
    model.requires_grad_(False)
    for block in model.student.blocks:
        block.up = LowRank(block.up)
    return [each for each in model.parameters() if each.requires_grad]


PREPARATIONS = [
    frozen_teacher,
    frozen_teacher_in_the_optimizer,
    teacher_without_gradients,
    teacher_outside_of_the_optimizer,
    adapters_in_the_student,
]


def trained(monitor: ScriptedMonitor, agents: Attach, model: nn.Module, parameters: Any, steps: int = 4) -> Any:
    optimizer = torch.optim.SGD(parameters, lr=0.01)
    agent = agents(model, optimizer, endpoint=monitor.endpoint, config=EVERY_STEP)
    monitor.wait(lambda: agent.status()["connected"])
    arrived = paced(agent, monitor)
    for step in range(steps):
        loss = model(batch(step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        arrived()
    return agent


@pytest.mark.parametrize("order", ["teacher student", "student teacher"])
@pytest.mark.parametrize("sizes", [(3, 5), (4, 4), (5, 3)])
@pytest.mark.parametrize("prepare", PREPARATIONS)
def test_the_student_is_watched(
    prepare: Callable[[Both], Any],
    sizes: tuple[int, int],
    order: str,
    monitor: ScriptedMonitor,
    agents: Attach,
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = Both(order, sizes=sizes)
    agent = trained(monitor, agents, model, prepare(model))
    assert (agent.status()["stack"], agent.status()["num_layers"]) == ("student.blocks", sizes[0])
    assert len(monitor.shards) == 3
    assert not any("the optimizer trains" in line for line in caplog.messages)


def test_a_frozen_tower_that_carries_gradients_is_not_watched(monitor: ScriptedMonitor, agents: Attach) -> None:
    model = Both(gradients=True)
    model.teacher.blocks.requires_grad_(False)
    agent = trained(monitor, agents, model, all_of(model))
    assert agent.status()["stack"] == "student.blocks"


def test_of_two_that_train_the_longer_is_watched(monitor: ScriptedMonitor, agents: Attach) -> None:
    model = Both(gradients=True)
    agent = trained(monitor, agents, model, all_of(model))
    assert agent.status()["stack"] == "teacher.blocks"


def test_a_stack_that_trains_in_part_is_said_to(
    monitor: ScriptedMonitor, agents: Attach, caplog: pytest.LogCaptureFixture
) -> None:
    tower = Tower(4)
    tower.blocks[:3].requires_grad_(False)
    agent = trained(monitor, agents, Loss(tower), [each for each in tower.parameters() if each.requires_grad])
    assert agent.status()["num_layers"] == 4
    (line,) = [line for line in caplog.messages if "the optimizer trains" in line]
    assert line == "koopmon: watches tower.blocks, of which the optimizer trains 1 of 4 blocks"


class Loss(nn.Module):
    def __init__(self, tower: nn.Module) -> None:
        super().__init__()
        self.tower = tower

    def forward(self, tokens: Tensor) -> Tensor:
        return self.tower(tokens).square().mean()


@pytest.mark.parametrize("gradients", [True, False])
def test_a_stack_that_does_not_train_is_said_to(
    gradients: bool, monitor: ScriptedMonitor, agents: Attach, caplog: pytest.LogCaptureFixture
) -> None:
    class Probe(Tower):
        def forward(self, tokens: Tensor) -> Tensor:
            with torch.set_grad_enabled(gradients):
                h = self.embedding(tokens)
                for block in self.blocks:
                    h = block(h)
            return self.head(h)

    tower = Probe(4)
    tower.requires_grad_(False).head.requires_grad_(True)
    agent = trained(monitor, agents, Loss(tower), tower.head.parameters())
    assert agent.status()["num_layers"] == 4
    (line,) = [line for line in caplog.messages if "the optimizer trains" in line]
    assert "trains 0 of 4 blocks" in line


def test_a_teacher_is_not_watched_in_place_of_a_student_that_is_no_chain(
    monitor: ScriptedMonitor, agents: Attach, caplog: pytest.LogCaptureFixture
) -> None:
    class SideBySide(Tower):
        def forward(self, tokens: Tensor) -> Tensor:
            h = self.embedding(tokens)
            return self.head(torch.stack([block(h) for block in self.blocks]).sum(0))

    model = Both()
    model.student = SideBySide(3)
    agent = trained(monitor, agents, model, frozen_teacher(model))
    assert not agent.enabled
    (line,) = [line for line in caplog.messages if "no snapshots" in line]
    assert "student.blocks: the output of student.blocks.0 is not the input" in line
    assert "teacher.blocks: is a chain that does not train, but 'student.blocks' does" in line


def test_parameters_that_are_added_later_count(monitor: ScriptedMonitor, agents: Attach) -> None:
    model = Both()
    optimizer = torch.optim.SGD(model.student.head.parameters(), lr=0.01)
    agent = agents(model, optimizer, endpoint=monitor.endpoint, config=EVERY_STEP)
    optimizer.add_param_group({"params": list(model.student.blocks.parameters())})
    monitor.wait(lambda: agent.status()["connected"])
    model(batch(0)).backward()
    optimizer.step()
    assert agent.status()["stack"] == "student.blocks"
