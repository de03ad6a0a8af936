"""torch.compile: compiled models and blocks are watched. A graph from before the attachment is not, which is logged and
counted. `capture/test_graph_taps.py` covers the graphs themselves.

The tests use Dynamo without code generation, because the backend does not change which hooks are traced away.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from koopmon.wire.messages import KssSettings
from tests.agent.models import L, Model, batch, build, loss_of, train_step
from tests.agent.scripted_monitor import ScriptedMonitor

pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),  # the tracer inspects it
    pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning"),  # in its imports
]
Attach = Callable[..., Any]
ADVICE = "compile them one by one"
EVERY_STEP = {"cadence": {"dense_every": 1}}
STEPS = 6
ROOT = Path(__file__).parents[2]


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


@pytest.mark.parametrize("compile_", [in_one_graph, in_one_full_graph, in_place])
def test_a_graph_from_before_is_refused_in_one_line(
    compile_: Callable[[Model], nn.Module], monitor: ScriptedMonitor, agents: Attach, caplog: pytest.LogCaptureFixture
) -> None:
    plain = compile_(build())
    expected = losses_of(plain, optimizer_of(plain))
    torch._dynamo.reset()
    model = compile_(build())
    optimizer = optimizer_of(model)
    found = [train_step(model, optimizer, step) for step in range(2)]
    agent = agents(model, optimizer, endpoint=monitor.endpoint, config=EVERY_STEP)
    found += [train_step(model, optimizer, step) for step in range(len(found), STEPS)]
    assert found == expected
    status = agent.status()
    assert status["taps_missing"] >= 1
    assert (status["sent"], status["errors"]) == (0, 0)
    (line,) = [line for line in caplog.messages if ADVICE in line]
    assert "attach before the first forward pass" in line


def test_blocks_compiled_in_place_run_their_hooks_also_late(monitor: ScriptedMonitor, agents: Attach) -> None:
    plain = blocks_in_place(build())
    expected = losses_of(plain, optimizer_of(plain))
    for late in (False, True):
        torch._dynamo.reset()
        model = blocks_in_place(build())
        optimizer = optimizer_of(model)
        found = [train_step(model, optimizer, 0)] if late else []
        agent = agents(model, optimizer, endpoint=monitor.endpoint, config=EVERY_STEP)
        monitor.wait(lambda agent=agent: agent.status()["connected"])
        for step in range(len(found), STEPS):
            found.append(train_step(model, optimizer, step))
            monitor.wait(lambda agent=agent: settled(agent.status()))
        assert found == expected
        assert agent.status()["sent"] == STEPS - 1 - late
        assert not agent._runtime.taps.stacks.chain.in_graph


def test_a_model_compiled_in_the_middle_of_a_training_is_watched_on(
    monitor: ScriptedMonitor, agents: Attach, caplog: pytest.LogCaptureFixture
) -> None:
    model = build()
    optimizer = optimizer_of(model)
    agent = agents(model, optimizer, endpoint=monitor.endpoint, config=EVERY_STEP)
    monitor.wait(lambda: agent.status()["connected"])
    called: nn.Module = model
    for step in range(STEPS):
        if step == 2:
            called = compiled(model)
        train_step(called, optimizer, step)
        monitor.wait(lambda: settled(agent.status()))
    assert agent.status()["taps_missing"] == 0
    assert [header.training.step for header, _ in monitor.shards] == list(range(1, STEPS))
    assert agent._runtime.taps.stacks.chain.in_graph
    assert not any(ADVICE in line for line in caplog.messages)


@pytest.mark.parametrize("num_steps", [0, 3])
def test_kss_is_refused_inside_a_graph(num_steps: int, monitor: ScriptedMonitor, agents: Attach) -> None:
    """A command that waits from the start meets the chain in the step that verifies it."""
    model = build()
    called, optimizer = compiled(model), optimizer_of(model)
    agent = agents(model, optimizer, endpoint=monitor.endpoint, config=EVERY_STEP)
    monitor.wait(lambda: agent.status()["connected"])
    for step in range(num_steps):
        train_step(called, optimizer, step)
    command = monitor.command("set_kss", kss=KssSettings(alpha=0.1))
    monitor.wait(lambda: train_step(called, optimizer, 3) and monitor.acked(command))
    ack = monitor.ack(command)
    assert (ack.outcome, "inside a compiled graph" in ack.detail) == ("refused", True)


def test_kss_in_force_ends_with_a_line_when_the_model_is_compiled(
    monitor: ScriptedMonitor, agents: Attach, caplog: pytest.LogCaptureFixture
) -> None:
    model = build()
    optimizer = optimizer_of(model)
    agent = agents(model, optimizer, endpoint=monitor.endpoint, config=EVERY_STEP)
    monitor.wait(lambda: train_step(model, optimizer, 0) and agent.status()["sent"])
    command = monitor.command("set_kss", kss=KssSettings(alpha=0.1))
    monitor.wait(lambda: train_step(model, optimizer, 1) and monitor.acked(command))
    assert monitor.ack(command).outcome == "applied"
    called = compiled(model)
    monitor.wait(lambda: train_step(called, optimizer, 2) and "no longer in force" in caplog.text)
    train_step(called, optimizer, 3)
    assert agent._runtime.lifecycle.applied().kss.alpha == 0.0


def test_a_back_off_acts_on_a_compiled_model(monitor: ScriptedMonitor, agents: Attach) -> None:
    model = build()
    called, optimizer = compiled(model), optimizer_of(model)
    agent = agents(model, optimizer, endpoint=monitor.endpoint, config=EVERY_STEP)
    monitor.wait(lambda: agent.status()["connected"])
    command = monitor.command("set_lr_scale", lr_scale=0.5)
    monitor.wait(lambda: train_step(called, optimizer, 0) and monitor.acked(command))
    for _ in range(100):  # the ramp
        train_step(called, optimizer, 0)
    before = model.head.bias.detach().clone()
    train_step(called, optimizer, 0)
    assert model.head.bias.grad is not None
    torch.testing.assert_close(before - model.head.bias.detach(), 0.005 * model.head.bias.grad)


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_a_compiled_optimizer_step_is_counted_and_koopmon_only_watches(
    whole: bool,
    kind: Callable[..., torch.optim.Optimizer],
    monitor: ScriptedMonitor,
    agents: Attach,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def train(agent: bool) -> tuple[list[float], int]:
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        model = build()
        optimizer = kind(model.parameters(), lr=torch.tensor(0.01))
        called = compiled(model) if whole else model
        if agent:
            attached = agents(model, optimizer, endpoint=monitor.endpoint, config=EVERY_STEP)
            monitor.wait(lambda: attached.status()["connected"])
        update = torch.compile(lambda: optimizer.step(), backend="eager")
        losses = []
        for step in range(STEPS):
            loss = loss_of(called, batch(step))
            optimizer.zero_grad()
            loss.backward()
            update()
            losses.append(loss.item())
            if agent:
                monitor.wait(lambda: settled(attached.status()))
        if agent:
            status = attached.status()
            # Each step is counted at the forward after it, and its snapshot is sent then.
            assert (status["step"], status["sent"]) == (STEPS - 1, STEPS - 2)
            assert (status["errors"], status["acts"]) == (0, False)
        return losses, torch._dynamo.utils.counters["stats"]["unique_graphs"]

    expected = train(agent=False)
    assert train(agent=True) == expected
    assert sum("watches, does not act: the optimizer's step is compiled" in line for line in caplog.messages) == 1
    assert [header.training.step for header, _ in monitor.shards] == list(range(1, STEPS - 1))


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


@pytest.mark.process
@pytest.mark.distributed
@pytest.mark.parametrize("order", ["inside", "outside"])
def test_ranks_of_a_compiled_model_are_watched_and_act(
    order: str, monitor: ScriptedMonitor, ranks: Callable[..., Any]
) -> None:
    """The optimizer is made first, as in many scripts. No hook then sees DistributedDataParallel around the model."""
    for output, _ in ranks("compiled_rank.py", monitor.endpoint, order).wait():
        found = json.loads(output.splitlines()[-1])
        assert found["watched"] == found["alone"]
        status = found["status"]
        assert (status["layout"], status["acts"], status["errors"], status["taps_missing"]) == ("ddp", True, 0, 0)
        assert status["sent"] >= 3


NANO = """
import time
import torch
from torch import nn
from tests.agent.models import build, batch, loss_of
model = build()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
model = torch.compile(model, backend="eager")
for step in range(30):
    time.sleep(0.3)  # a step is as long as those of real trainings; the monitor starts beside it
    for micro in range(2):
        loss = loss_of(model, batch(2 * step + micro))
        (loss / 2).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
print(f"loss {loss.item()!r}, {torch._dynamo.utils.counters['stats']['unique_graphs']} graphs")
"""


@pytest.mark.process
def test_an_unchanged_script_that_compiles_its_model_is_watched(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(NANO)
    home = {"XDG_STATE_HOME": str(tmp_path), "XDG_DATA_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}

    def run(*command: str) -> tuple[str, str]:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **home}
        done = subprocess.run(
            [sys.executable, *command], env=environment, capture_output=True, text=True, timeout=180, check=True
        )
        return done.stdout.strip(), done.stderr

    alone, _ = run(str(script))
    watched, log = run("-m", "koopmon", "run", "--", sys.executable, str(script))
    assert watched == alone
    assert alone.endswith(", 1 graphs")
    assert "snapshots up to step" in log
    assert "missed" not in log
