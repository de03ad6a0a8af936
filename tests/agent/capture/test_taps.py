"""Content of a snapshot: the same tokens at every depth, of the first training forward after a step."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from koopmon.agent.capture.sampler import all_finite
from koopmon.spectral import stack_exponent, update_exponent
from koopmon.token_sampling import choose_rows
from tests.agent.models import (
    B,
    D,
    L,
    Model,
    T,
    batch,
    build,
    checkpointed,
    checkpointed_reentrant,
    loss_of,
    train_step,
)
from tests.agent.scripted_monitor import Hello, ScriptedMonitor

Attach = Callable[..., Any]
EVERY_STEP = {"cadence": {"dense_every": 1, "warmup_steps": 1000}, "sampling": {"num_samples": 20}}


def attached(agents: Attach, monitor: ScriptedMonitor, model: nn.Module, config: Any = EVERY_STEP) -> tuple[Any, Any]:
    """An optimizer without an effect, and an agent that the monitor has welcomed."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    agent = agents(model, optimizer, endpoint=monitor.endpoint, config=config)
    monitor.wait(lambda: agent.status()["connected"])
    return optimizer, agent


def received(monitor: ScriptedMonitor, agent: Any) -> list[tuple[Any, Tensor]]:
    """Return the shards after all sent ones have arrived. Called after each step, it keeps the steps at the speed of
    the sender.
    """
    outstanding = agent.status
    monitor.wait(lambda: len(monitor.shards) >= outstanding()["sent"] and settled(outstanding()))
    return monitor.shards


def settled(status: dict[str, Any]) -> bool:
    return status["sent"] + sum(status["dropped"].values()) >= max(0, status["step"] - 1)


def states_of(model: Model, tokens: Tensor) -> list[Tensor]:
    """Return the state before the first block and after each, from a forward without koopmon."""
    plain = copy.deepcopy(model)
    plain.run = None
    h = plain.embedding(tokens) * 1.0
    states = [h.detach().clone()]
    for block in plain.blocks:
        h = block(h)
        states.append(h.detach().clone())
    return states


@pytest.mark.parametrize(
    ("options", "accumulate"),
    [
        ({}, 1),
        ({"in_place": True}, 1),
        ({"run": checkpointed}, 1),
        ({"run": checkpointed_reentrant}, 1),
        ({}, 3),
        ({"run": checkpointed}, 2),
    ],
)
def test_rows_are_the_same_tokens_of_the_first_microbatch(
    options: dict[str, Any], accumulate: int, monitor: ScriptedMonitor, agents: Attach
) -> None:
    model = build(**options)
    at_first = states_of(model, batch(0))
    optimizer, agent = attached(agents, monitor, model)
    for step in range(4):
        for micro in range(accumulate):
            loss_of(model, batch(10 * step + micro)).backward()
        optimizer.step()
        received(monitor, agent)
    shards = received(monitor, agent)
    assert [header.step for header, _ in shards] == [1, 2, 3], "the first forward verifies the chain"
    for header, states in shards:
        rows = choose_rows(B * T, 20, seed=0, step=header.step)
        expected = torch.stack([state.reshape(-1, D)[rows] for state in states_of(model, batch(10 * header.step))])
        assert torch.equal(states, expected)
        assert (header.num_points, header.num_samples, header.width, header.dtype) == (L + 1, 20, D, "float32")
        assert (header.first_point, header.num_senders, header.masked, header.last_stage) == (0, 1, False, True)
    assert agent.status()["taps_missing"] == 0
    monitor.wait(lambda: monitor.of(Hello)[-1].num_layers)
    hello = monitor.of(Hello)[-1]
    assert (hello.num_layers, hello.width, hello.adapter, hello.acts) == (L, D, "transformer", True)
    rows = [state.reshape(-1, D) for state in at_first]
    exponents = [update_exponent(x, y).item() for x, y in pairwise(rows)]
    assert hello.update_exponent == pytest.approx(stack_exponent(exponents), abs=1e-4)
    assert not hello.rate_sized_steps, "SGD's are as long as the gradient says"


def test_only_training_forwards_count(monitor: ScriptedMonitor, agents: Attach) -> None:
    model = build()
    optimizer, agent = attached(agents, monitor, model)
    for step in range(4):
        model.eval()
        model(batch(100 + step))
        model.train()
        with torch.no_grad():
            model(batch(200 + step))
        loss_of(model, batch(step)).backward()
        model(batch(300 + step))
        optimizer.step()
        received(monitor, agent)
    shards = received(monitor, agent)
    assert [header.step for header, _ in shards] == [1, 2, 3]
    for header, states in shards:
        rows = choose_rows(B * T, 20, seed=0, step=header.step)
        assert torch.equal(states[0], states_of(model, batch(header.step))[0].reshape(-1, D)[rows])


def test_a_forward_that_raises_is_counted_and_the_next_is_whole(monitor: ScriptedMonitor, agents: Attach) -> None:
    failing = {"now": False}

    def run(block: nn.Module, h: Tensor) -> Tensor:
        if failing["now"] and block is model.blocks[1]:
            raise RuntimeError("out of memory")
        return block(h)

    model = build(run=run)
    optimizer, agent = attached(agents, monitor, model)
    for step in range(4):
        failing["now"] = step == 2
        if failing["now"]:
            with pytest.raises(RuntimeError, match="out of memory"):
                loss_of(model, batch(step))
        failing["now"] = False
        loss_of(model, batch(step)).backward()
        optimizer.step()
        received(monitor, agent)
    assert [header.step for header, _ in received(monitor, agent)] == [1, 3]
    assert agent.status()["dropped"]["incomplete"] == 1
    assert agent.enabled


@pytest.mark.parametrize(
    ("dtype", "wire"), [(torch.bfloat16, "bfloat16"), (torch.float32, "float32"), (torch.float64, "float32")]
)
def test_states_travel_as_they_are_or_as_float32(
    dtype: torch.dtype, wire: str, monitor: ScriptedMonitor, agents: Attach
) -> None:
    model = build(dtype=dtype)
    optimizer, agent = attached(agents, monitor, model)
    for step in range(2):
        loss_of(model, batch(step)).backward()
        optimizer.step()
        received(monitor, agent)
    ((header, states),) = received(monitor, agent)
    rows = choose_rows(B * T, 20, seed=0, step=1)
    assert header.dtype == wire
    expected = torch.stack([state.reshape(-1, D)[rows] for state in states_of(model, batch(1))])
    assert torch.equal(states, expected.to(states.dtype))


def test_under_autocast_the_wider_type_travels(monitor: ScriptedMonitor, agents: Attach) -> None:
    class Halving(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(D, D)

        def forward(self, h: Tensor) -> Tensor:
            return h.to(torch.bfloat16) + self.linear(h)

    model = build()
    model.blocks = nn.ModuleList(Halving() for _ in range(L))
    optimizer, agent = attached(agents, monitor, model, {**EVERY_STEP, "model": {"stack": "blocks"}})
    for step in range(3):
        with torch.autocast("cpu", torch.bfloat16):
            loss_of(model, batch(step)).backward()
        optimizer.step()
        received(monitor, agent)
    assert agent.status()["reason"] == ""
    for header, states in received(monitor, agent):
        assert header.dtype == "float32"
        rows = choose_rows(B * T, 20, seed=0, step=header.step)
        start = (model.embedding(batch(header.step)) * 1.0).reshape(-1, D)[rows]
        assert torch.equal(states[0], start)


def test_padding_does_not_travel(monitor: ScriptedMonitor, agents: Attach) -> None:
    model = build()
    optimizer, agent = attached(agents, monitor, model)
    mask = torch.ones(B, T, dtype=torch.long)
    mask[:, 3:] = 0
    mask[0] = 0
    for step in range(2):
        loss_of(model, batch(step), attention_mask=mask).backward()
        optimizer.step()
        received(monitor, agent)
    ((header, states),) = received(monitor, agent)
    assert header.masked
    assert header.num_samples == int(mask.sum()) == 9
    first = states_of(model, batch(1))[0].reshape(-1, D)[mask.flatten().bool()]
    assert sorted(map(tuple, states[0].tolist())) == sorted(map(tuple, first.tolist()))


def test_a_batch_of_padding_alone_is_dropped(monitor: ScriptedMonitor, agents: Attach) -> None:
    model = build()
    optimizer, agent = attached(agents, monitor, model)
    for step in range(3):
        loss_of(model, batch(step), attention_mask=torch.zeros(B, T)).backward()
        optimizer.step()
        received(monitor, agent)
    assert received(monitor, agent) == []
    assert agent.status()["dropped"]["incomplete"] == 2


def test_batches_may_change_their_shape(monitor: ScriptedMonitor, agents: Attach) -> None:
    model = build()
    optimizer, agent = attached(agents, monitor, model)
    for step, (size, length) in enumerate([(4, 8), (2, 3), (1, 7), (6, 8), (2, 2)]):
        loss_of(model, batch(step).repeat(2, 1)[:size, :length]).backward()
        optimizer.step()
        received(monitor, agent)
    assert [header.num_samples for header, _ in received(monitor, agent)] == [6, 7, 20, 4]


def test_blocks_that_stop_being_called_are_counted_and_said_once(
    monitor: ScriptedMonitor, agents: Attach, caplog: pytest.LogCaptureFixture
) -> None:
    model = build()
    optimizer, agent = attached(agents, monitor, model)
    for step in range(10):
        if step == 3:
            model.run = lambda block, h: block.forward(h)  # calls no hooks
        train_step(model, optimizer, step)
    monitor.wait(lambda: len(monitor.shards) == 2)
    assert [header.step for header, _ in monitor.shards] == [1, 2]
    assert agent.status()["taps_missing"] == 7
    assert sum("taps did not fire" in record.message for record in caplog.records) == 1


def test_the_model_may_be_called_by_its_parts(monitor: ScriptedMonitor, agents: Attach) -> None:
    model = build()
    optimizer, agent = attached(agents, monitor, model)
    for step in range(4):
        h = model.embedding(batch(step)) * 1.0
        for block in model.blocks:
            h = block(h)
        model.head(h).sum().backward()
        optimizer.step()
        received(monitor, agent)
        with torch.no_grad():
            model.blocks[0](h)
    assert [header.step for header, _ in received(monitor, agent)] == [1, 2, 3]


def test_the_global_random_state_is_left_alone(monitor: ScriptedMonitor, agents: Attach) -> None:
    def drawn(attach: bool) -> Tensor:
        model = build()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        if attach:
            agent = agents(model, optimizer, endpoint=monitor.endpoint, config=EVERY_STEP)
            monitor.wait(lambda: agent.status()["connected"])
        torch.manual_seed(3)
        for step in range(4):
            train_step(model, optimizer, step)
        return torch.rand(8)

    assert torch.equal(drawn(False), drawn(True))
    assert monitor.wait(lambda: monitor.shards)


@pytest.mark.process
def test_non_finite_states_are_counted_and_do_not_travel(python: Callable[..., Any], monitor: ScriptedMonitor) -> None:
    program = """
import sys, time, torch, koopmon
from tests.agent.models import build, train_step
for bad in (torch.nan, torch.inf):
    for dtype in (torch.float32, torch.bfloat16):
        model = build(dtype=dtype)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        config = {"cadence": {"dense_every": 1}}
        with koopmon.attach(model, optimizer, endpoint=sys.argv[1], config=config) as agent:
            while not agent.status()["connected"]:
                time.sleep(0.01)
            for step in range(12):
                if step == 6:
                    with torch.no_grad():
                        model.blocks[1].up.bias[0] = bad
                        model.blocks[1].down.weight.fill_(1.0 if bad == torch.nan else bad)
                train_step(model, optimizer, step)
                time.sleep(0.02)
        status = agent.status()
        assert status["sent"] >= 3, status
        assert status["dropped"]["not_finite"] >= 3, status
        assert status["errors"] == 0, status
"""
    python(program, monitor.endpoint)
    assert all(torch.isfinite(states.float()).all() for _, states in monitor.shards)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 5, 7), (5, 300, 256)])
def test_states_that_are_not_finite_are_noticed(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    states = torch.full(shape, torch.finfo(dtype).max, dtype=dtype)
    assert all_finite(states)
    assert all_finite(states[:, :3]), "a mask may leave out the last rows"
    for place in ((0, 0, 0), (1, 4, 3), (-1, -1, -1)):
        for value in (float("nan"), float("inf"), -float("inf")):
            broken = states.clone()
            broken[place] = value
            assert not all_finite(broken)
