"""The blocks have hooks in the steps that need them. In the others the model is as without them."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.agent.models import B, T, batch, build, checkpointed, loss_of, pretend_compiled, train_step
from tests.agent.scripted_monitor import ScriptedMonitor

Attach = Callable[..., Any]
EVERY = 4
SNAPSHOTS = [1, 5, 9]
"""Steps with a snapshot, of the first twelve."""
CONFIG = {"cadence": {"dense_every": EVERY, "warmup_steps": 1000}, "sampling": {"num_samples": 20}}


@pytest.fixture(autouse=True)
def nothing_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other tests of this process may have called torch.compile."""
    pretend_compiled(monkeypatch, False)


def attached(agents: Attach, monitor: ScriptedMonitor, model: nn.Module, config: Any = CONFIG) -> tuple[Any, Any]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    agent = agents(model, optimizer, endpoint=monitor.endpoint, config=config)
    monitor.wait(lambda: agent.status()["connected"])
    return optimizer, agent


def num_hooks(block: nn.Module) -> int:
    return len(block._forward_hooks) + len(block._forward_pre_hooks) + len(block._forward_pre_hooks_with_kwargs)


@pytest.mark.parametrize("options", [{}, {"run": checkpointed}, {"in_place": True}])
def test_the_blocks_have_hooks_in_the_steps_with_a_snapshot_only(
    options: dict[str, Any], monitor: ScriptedMonitor, agents: Attach
) -> None:
    model = build(**options)
    optimizer, agent = attached(agents, monitor, model)
    seen = []
    for step in range(3 * EVERY):
        seen.append({num_hooks(block) for block in model.blocks})
        train_step(model, optimizer, step)
        monitor.wait(lambda: agent.status()["sent"] == len(monitor.shards))
    assert seen[0] == {3}, "the first forward verifies the chain"
    assert seen == [{3} if step in (0, *SNAPSHOTS) else {0} for step in range(3 * EVERY)]
    monitor.wait(lambda: len(monitor.shards) >= len(SNAPSHOTS))
    assert [shard.training.step for shard, _ in monitor.shards] == SNAPSHOTS
    assert agent.status()["taps_missing"] == 0


def test_a_loop_that_bypasses_the_root_keeps_them(monitor: ScriptedMonitor, agents: Attach) -> None:
    model = build()
    optimizer, agent = attached(agents, monitor, model)

    def step(number: int, bypass: bool) -> None:
        h = model.embedding(batch(number))
        for block in model.blocks if bypass else ():
            h = block(h)
        loss = h.square().mean() if bypass else loss_of(model, batch(number))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    step(0, bypass=False)
    assert {num_hooks(block) for block in model.blocks} == {3}, "the next step is a snapshot"
    step(1, bypass=False)
    assert {num_hooks(block) for block in model.blocks} == {0}
    for number in range(2, 3 * EVERY):
        step(number, bypass=True)
        first = SNAPSHOTS[1] - 1  # forwards are not followed before it: the next snapshot finds the bypass
        assert {num_hooks(block) for block in model.blocks} == ({3} if number >= first else {0})
        assert agent.status()["step"] == number + 1
        monitor.wait(lambda: agent.status()["sent"] == len(monitor.shards))
    monitor.wait(lambda: len(monitor.shards) >= len(SNAPSHOTS))
    assert [shard.training.step for shard, _ in monitor.shards] == SNAPSHOTS


def test_a_block_with_hooks_of_the_user_keeps_them_and_their_order(monitor: ScriptedMonitor, agents: Attach) -> None:
    model = build()
    optimizer, agent = attached(agents, monitor, model)
    user = model.blocks[0].register_forward_hook(lambda module, args, output: None)
    later: list[Tensor] = []
    for step in range(EVERY - 1):
        train_step(model, optimizer, step)
    assert [num_hooks(block) for block in model.blocks][:2] == [2, 0]
    # A hook that comes while koopmon's is out changes what follows, and not the snapshot: the tap was first.
    model.blocks[1].register_forward_hook(lambda module, args, output: later.append(output) or output + 1.0)
    for step in range(EVERY - 1, SNAPSHOTS[1] + 1):
        train_step(model, optimizer, step)
    monitor.wait(lambda: len(monitor.shards) == 2)
    shard, states = monitor.shards[1]
    assert shard.num_samples == min(20, B * T)
    rows = later[-1].detach().flatten(0, 1)
    kept = states[2]
    assert all(bool((rows == row).all(1).any()) for row in kept)
    user.remove()
    agent.close()
    assert [len(block._forward_hooks) for block in model.blocks][:3] == [0, 1, 0]


@pytest.mark.parametrize("pauses", [False, True])
def test_close_leaves_none_behind(pauses: bool, monitor: ScriptedMonitor, agents: Attach) -> None:
    model = build()
    optimizer, agent = attached(agents, monitor, model)
    for step in range(2 if pauses else 1):
        train_step(model, optimizer, step)
    assert {num_hooks(block) for block in model.blocks} == {0 if pauses else 3}
    agent.close()
    for step in range(EVERY):
        train_step(model, optimizer, step)
    assert not any(num_hooks(module) for module in model.modules())


@pytest.mark.slow
@pytest.mark.process
@pytest.mark.parametrize("how", ["model", "in place", "blocks"])
def test_a_model_that_is_compiled_while_the_hooks_are_out_is_still_watched(
    how: str, monitor: ScriptedMonitor, python: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    assert python(COMPILED_LATE, monitor.endpoint, how).stdout.split() == ["0", "3"]
    monitor.wait(lambda: len(monitor.shards) >= len(SNAPSHOTS))
    assert [shard.training.step for shard, _ in monitor.shards] == SNAPSHOTS


COMPILED_LATE = """
import sys, time, warnings, torch, koopmon
warnings.simplefilter("ignore")
from tests.agent.models import build, train_step
endpoint, how = sys.argv[1:]
torch.set_num_threads(1)
model = called = build()
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
config = {"cadence": {"dense_every": 4, "warmup_steps": 1000}, "sampling": {"num_samples": 20}}
agent = koopmon.attach(model, optimizer, endpoint=endpoint, config=config)
while not agent.status()["connected"]:
    time.sleep(0.01)
for step in range(3):
    train_step(model, optimizer, step)
print(len(model.blocks[0]._forward_hooks))
if how == "model":
    called = torch.compile(model, backend="aot_eager")
elif how == "in place":
    model.compile(backend="aot_eager")
else:
    for index in range(3):
        model.blocks[index] = torch.compile(model.blocks[index], backend="aot_eager")
for step in range(3, 12):
    train_step(called, optimizer, step)
    time.sleep(0.05)
print(agent.status()["sent"])
agent.close()
"""
"""A training that is compiled in its fourth step. In a process of its own: the hooks stay in one that compiles."""
