"""torch.compile: blocks that are compiled one by one are tapped. Hooks do not fire inside one graph, which is logged
and counted.

The tests use Dynamo without code generation, because the backend does not change which hooks are traced away.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

from tests.agent.models import L, Model, build, train_step
from tests.agent.scripted_monitor import ScriptedMonitor

pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # the tracer inspects it
Attach = Callable[..., Any]
ADVICE = "compile them one by one"
EVERY_STEP = {"cadence": {"dense_every": 1}}
STEPS = 6


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(model: nn.Module, **options: Any) -> Any:
    return torch.compile(model, backend="eager", **options)


def settled(status: dict[str, Any]) -> bool:
    return bool(status["sent"] + sum(status["dropped"].values()) >= status["step"] - 1)


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.01)


def losses_of(called: nn.Module, optimizer: torch.optim.Optimizer, settle: Callable[[], Any] = lambda: None) -> Any:
    losses = []
    for step in range(STEPS):
        losses.append(train_step(called, optimizer, step))
        settle()
    return losses


def in_one_graph(model: Model) -> nn.Module:
    found: nn.Module = compiled(model)
    return found


def in_one_full_graph(model: Model) -> nn.Module:
    found: nn.Module = compiled(model, fullgraph=True)
    return found


def in_place(model: Model) -> nn.Module:
    model.compile(backend="eager")
    return model


def blocks_in_place(model: Model) -> nn.Module:
    for block in model.blocks:
        block.compile(backend="eager")
    return model


@pytest.mark.parametrize("compile_", [in_one_graph, in_one_full_graph, in_place, blocks_in_place])
@pytest.mark.parametrize("late", [False, True])
def test_a_model_in_one_graph_is_refused_in_one_line(
    compile_: Callable[[Model], nn.Module],
    late: bool,
    monitor: ScriptedMonitor,
    agents: Attach,
    caplog: pytest.LogCaptureFixture,
) -> None:
    plain = compile_(build())
    expected = losses_of(plain, optimizer_of(plain))
    torch._dynamo.reset()
    model = compile_(build())
    optimizer = optimizer_of(model)
    found = [train_step(model, optimizer, step) for step in range(2)] if late else []
    agent = agents(model, optimizer, endpoint=monitor.endpoint, config=EVERY_STEP)
    found += [train_step(model, optimizer, step) for step in range(len(found), STEPS)]
    assert found == expected
    status = agent.status()
    assert status["taps_missing"] >= 1
    assert (status["sent"], status["errors"]) == (0, 0)
    said = [record.message for record in caplog.records if "going" in record.message or "taps" in record.message]
    assert sum(ADVICE in line for line in caplog.messages) == 1, said


@pytest.mark.parametrize("late", [False, True])
def test_what_is_called_is_a_compiled_wrapper_of_what_was_attached(
    late: bool, monitor: ScriptedMonitor, agents: Attach, caplog: pytest.LogCaptureFixture
) -> None:
    model = build()
    optimizer = optimizer_of(model)
    called = compiled(model)
    if late:
        train_step(called, optimizer, 0)
    agent = agents(model, optimizer, endpoint=monitor.endpoint, config=EVERY_STEP)
    losses_of(called, optimizer)
    assert agent.status()["taps_missing"] >= 3
    assert sum(ADVICE in line for line in caplog.messages) == 1


def test_taps_that_stop_firing_as_the_model_is_compiled_are_counted_and_said_once(
    monitor: ScriptedMonitor, agents: Attach, caplog: pytest.LogCaptureFixture
) -> None:
    model = build()
    optimizer = optimizer_of(model)
    agent = agents(model, optimizer, endpoint=monitor.endpoint, config=EVERY_STEP)
    monitor.wait(lambda: agent.status()["connected"])
    for step in range(2):
        train_step(model, optimizer, step)
    monitor.wait(lambda: monitor.shards)
    called = compiled(model)
    for step in range(2, 10):
        train_step(called, optimizer, step)
    assert agent.status()["taps_missing"] >= 6
    assert sum(ADVICE in line for line in caplog.messages) == 1


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("fullgraph", [False, True])
def test_blocks_compiled_one_by_one_are_tapped_also_late(
    fullgraph: bool, late: bool, monitor: ScriptedMonitor, agents: Attach, caplog: pytest.LogCaptureFixture
) -> None:
    def blocks_compiled() -> Model:
        model = build()
        for index, block in enumerate(model.blocks):
            model.blocks[index] = compiled(block, fullgraph=fullgraph)
        return model

    plain = blocks_compiled()
    expected = losses_of(plain, optimizer_of(plain))
    torch._dynamo.reset()
    model = blocks_compiled()
    optimizer = optimizer_of(model)
    found = [train_step(model, optimizer, 0)] if late else []
    agent = agents(model, optimizer, endpoint=monitor.endpoint, config=EVERY_STEP)
    monitor.wait(lambda: agent.status()["connected"])
    for step in range(len(found), STEPS):
        found.append(train_step(model, optimizer, step))
        monitor.wait(lambda: settled(agent.status()))
    assert found == expected
    monitor.wait(lambda: len(monitor.shards) == STEPS - 1 - late)
    assert {header.num_points for header, _ in monitor.shards} == {L + 1}
    assert agent.status()["taps_missing"] == 0
    assert not any(ADVICE in line for line in caplog.messages)
