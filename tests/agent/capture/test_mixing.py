"""Snapshots of models that mix between their blocks: pairs of each block's input and output."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from koopmon.agent.capture.graph_taps import supported
from koopmon.token_sampling import choose_rows
from koopmon.wire.messages import KssSettings
from tests.agent.models import D, batch, paced
from tests.agent.scripted_monitor import ScriptedMonitor
from tests.mixing import ENTRIES, MODELS, NO_STACKS, Branch, L, Mixing

Attach = Callable[..., Any]
EVERY_STEP = {"cadence": {"dense_every": 1, "warmup_steps": 1000}, "sampling": {"num_samples": 20}}


def train_step(model: Mixing, optimizer: torch.optim.Optimizer, call: Callable[[Tensor], Tensor], step: int) -> float:
    torch.manual_seed(step)
    loss = call(batch(step))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return float(loss.detach())


@pytest.mark.parametrize("root", [True, False])
@pytest.mark.parametrize("case", MODELS)
def test_a_snapshot_holds_the_input_and_the_output_of_each_block(
    case: str, root: bool, monitor: ScriptedMonitor, agents: Attach
) -> None:
    torch.manual_seed(0)
    model = Mixing(*MODELS[case])
    bare = copy.deepcopy(model)
    optimizer, bare_optimizer = (torch.optim.SGD(each.parameters(), lr=0.001) for each in (model, bare))
    agent = agents(model, optimizer, endpoint=monitor.endpoint, config=EVERY_STEP)
    monitor.wait(lambda: agent.status()["connected"])
    arrived, expected = paced(agent, monitor), {}
    for step in range(5):
        loss = train_step(model, optimizer, model if root else model.forward, step)
        assert loss == train_step(bare, bare_optimizer, bare, step)
        expected[step] = bare.states
        arrived()
    status = agent.status()
    assert (status["reason"], status["errors"], status["num_layers"]) == ("", 0, L)
    assert len(monitor.shards) >= 3
    for header, states in monitor.shards:
        full = expected[header.step]
        rows = choose_rows(full[0].shape[:-1].numel(), 20, seed=0, step=header.step)
        assert torch.equal(states, torch.stack([state.reshape(-1, D)[rows] for state in full]))
        assert (header.paired, header.num_points, header.num_layers) == (True, 2 * L, L)


@pytest.mark.parametrize("case", MODELS)
def test_blocks_that_begin_as_identities_are_pairs(case: str, monitor: ScriptedMonitor, agents: Attach) -> None:
    """nanochat's output projections begin at zero."""
    torch.manual_seed(0)
    model = Mixing(*MODELS[case])
    for block in model.blocks:
        for parameter in (*block.attention.out_proj.parameters(), *block.down.parameters()):
            torch.nn.init.zeros_(parameter)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.001)
    agent = agents(model, optimizer, endpoint=monitor.endpoint, config=EVERY_STEP)
    monitor.wait(lambda: agent.status()["connected"])
    arrived = paced(agent, monitor)
    for step in range(3):
        train_step(model, optimizer, model, step)
        arrived()
    assert {(header.paired, header.num_points) for header, _ in monitor.shards} == {(True, 2 * L)}


@pytest.mark.skipif(not supported(), reason="the compiler of this torch gets no taps")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # the tracer inspects it
@pytest.mark.parametrize("case", ["embedding again", "value skips", "normalised between", "zeros"])
def test_a_model_that_mixes_inside_a_compiled_graph(case: str, monitor: ScriptedMonitor, agents: Attach) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = Mixing(*MODELS["embedding again" if case == "zeros" else case])
    if case == "zeros":
        for block in model.blocks:
            for parameter in (*block.attention.out_proj.parameters(), *block.down.parameters()):
                torch.nn.init.zeros_(parameter)
    model.call = partial(call_without_states, model)  # type: ignore[method-assign]
    bare = copy.deepcopy(model)
    bare.call = partial(call_without_states, bare)  # type: ignore[method-assign]
    optimizer, bare_optimizer = (torch.optim.SGD(each.parameters(), lr=0.001) for each in (model, bare))
    bare_losses = [train_step(bare, bare_optimizer, torch.compile(bare, backend="eager"), step) for step in range(6)]
    torch._dynamo.reset()
    agent = agents(model, optimizer, endpoint=monitor.endpoint, config=EVERY_STEP)
    monitor.wait(lambda: agent.status()["connected"])
    arrived, called = paced(agent, monitor), torch.compile(model, backend="eager", fullgraph=True)
    for step in range(6):
        assert train_step(model, optimizer, called, step) == bare_losses[step]
        arrived()
    status = agent.status()
    assert (status["reason"], status["errors"], status["num_layers"]) == ("", 0, L)
    assert len(monitor.shards) >= 2
    assert {(header.paired, header.num_points) for header, _ in monitor.shards} == {(True, 2 * L)}
    torch._dynamo.reset()


def call_without_states(model: Mixing, layer: int, h: Tensor) -> Tensor:
    found: Tensor = model.blocks[layer](h)
    return found


@pytest.mark.parametrize("case", ENTRIES)
def test_a_snapshot_of_branches_holds_the_input_of_each(case: str, monitor: ScriptedMonitor, agents: Attach) -> None:
    torch.manual_seed(0)
    model = Mixing(*ENTRIES[case], block=Branch)
    bare = copy.deepcopy(model)
    optimizer, bare_optimizer = (torch.optim.SGD(each.parameters(), lr=0.001) for each in (model, bare))
    agent = agents(model, optimizer, endpoint=monitor.endpoint, config=EVERY_STEP)
    monitor.wait(lambda: agent.status()["connected"])
    arrived, expected = paced(agent, monitor), {}
    for step in range(5):
        loss = train_step(model, optimizer, model, step)
        assert loss == train_step(bare, bare_optimizer, bare, step)
        expected[step] = bare.states[::2]
        arrived()
    status = agent.status()
    assert (status["reason"], status["errors"], status["num_layers"]) == ("", 0, L - 1)
    assert len(monitor.shards) >= 3
    for header, states in monitor.shards:
        full = expected[header.step]
        rows = choose_rows(full[0].shape[:-1].numel(), 20, seed=0, step=header.step)
        assert torch.equal(states, torch.stack([state.reshape(-1, D)[rows] for state in full]))
        assert (header.paired, header.num_points) == (False, L)


@pytest.mark.parametrize("never", [set(), {L - 1}], ids=["at random", "one never"])
@pytest.mark.parametrize("case", MODELS)
def test_a_block_that_is_skipped_in_a_model_that_mixes(
    case: str, never: set[int], monitor: ScriptedMonitor, agents: Attach
) -> None:
    torch.manual_seed(0)
    model = Mixing(*MODELS[case])
    bare = copy.deepcopy(model)
    optimizer, bare_optimizer = (torch.optim.SGD(each.parameters(), lr=0.001) for each in (model, bare))
    agent = agents(model, optimizer, endpoint=monitor.endpoint, config=EVERY_STEP)
    monitor.wait(lambda: agent.status()["connected"])
    arrived, expected = paced(agent, monitor), {}
    for step in range(16):
        skipped = {layer for layer in range(L) if (layer * 7 + step * 5) % 11 < 2} | never
        model.skipped = bare.skipped = skipped
        assert train_step(model, optimizer, model, step) == train_step(bare, bare_optimizer, bare, step)
        states, full = list(bare.states), []
        for layer in range(L):
            if layer not in skipped:
                full += [states.pop(0), states.pop(0)]
            else:  # an identity: the state that enters the next block, or leaves the last one
                full += [states[0] if states else full[-1]] * 2
        expected[step] = full
        arrived()
    status = agent.status()
    assert (status["reason"], status["errors"], status["num_layers"]) == ("", 0, L)
    assert len(monitor.shards) >= 3
    for header, sent in monitor.shards:
        full = expected[header.step]
        rows = choose_rows(full[0].shape[:-1].numel(), 20, seed=0, step=header.step)
        assert torch.equal(sent, torch.stack([state.reshape(-1, D)[rows] for state in full]))
        assert (header.paired, header.num_points) == (True, 2 * L)


@pytest.mark.parametrize("case", NO_STACKS)
def test_what_is_no_stack_is_refused(
    case: str, monitor: ScriptedMonitor, agents: Attach, caplog: pytest.LogCaptureFixture
) -> None:
    run, block, reason = NO_STACKS[case]
    torch.manual_seed(0)
    model = Mixing(run, block=block)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.001)
    agent = agents(model, optimizer, endpoint=monitor.endpoint, config=EVERY_STEP)
    for step in range(4):
        train_step(model, optimizer, model, step)
    assert not agent.enabled
    (line,) = [line for line in caplog.messages if "no snapshots" in line]
    assert reason in line


@pytest.mark.parametrize(
    ("make", "outcome", "detail"),
    [
        (lambda: Mixing(*MODELS["embedding again"]), "applied", ""),
        (lambda: Mixing(*ENTRIES["added outside"], block=Branch), "refused", "adds the blocks' outputs to the state"),
    ],
)
def test_kss_shapes_each_block_s_own_transition(
    make: Callable[[], Mixing], outcome: str, detail: str, monitor: ScriptedMonitor, agents: Attach
) -> None:
    torch.manual_seed(0)
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.001)
    agent = agents(model, optimizer, endpoint=monitor.endpoint, config=EVERY_STEP)
    monitor.wait(lambda: agent.status()["connected"])
    for step in range(3):
        train_step(model, optimizer, model, step)
    command = monitor.command("set_kss", kss=KssSettings(alpha=0.5, svd_rank=4, num_samples=16))
    monitor.wait(lambda: train_step(model, optimizer, model, 3) and monitor.acked(command))
    assert monitor.ack(command).outcome == outcome
    assert detail in monitor.ack(command).detail
    assert agent.status()["errors"] == 0
