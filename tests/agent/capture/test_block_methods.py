"""Blocks that the model calls by other methods than forward: their first layers show the states."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from koopmon.token_sampling import choose_rows
from tests.agent.models import VOCABULARY, D, L, batch, loss_of, paced
from tests.agent.scripted_monitor import ScriptedMonitor

Attach = Callable[..., Any]
EVERY_STEP = {"cadence": {"dense_every": 1, "warmup_steps": 1000}, "sampling": {"num_samples": 20}}


class Halves(nn.Module):
    """Attention and feed-forward layers are methods of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(D, 2, batch_first=True)
        self.norm1, self.norm2 = nn.LayerNorm(D), nn.LayerNorm(D)
        self.mlp = nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, D))

    def attend(self, h: Tensor) -> Tensor:
        y = self.norm1(h)
        return h + self.attention(y, y, y, need_weights=False)[0]

    def think(self, h: Tensor) -> Tensor:
        return h + self.mlp(self.norm2(h))


class Recurrent(nn.Module):
    """One step of a recurrence: the state of the layer goes in and out."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mixer, self.out = nn.LayerNorm(D), nn.Linear(D, D), nn.Linear(D, D)

    def step(self, h: Tensor, cache: Tensor) -> tuple[Tensor, Tensor]:
        cache = 0.9 * cache + self.mixer(self.norm(h))
        return h + self.out(torch.tanh(cache)), cache


class Unnormalised(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(D, 2 * D), nn.Linear(2 * D, D)

    def update(self, h: Tensor) -> Tensor:
        return h + self.down(torch.tanh(self.up(h)))


class Weights(nn.Module):
    """Without layers of its own, nothing of it is called."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(0.1 * torch.randn(D, D)), nn.Parameter(0.1 * torch.randn(D, D))

    def update(self, h: Tensor) -> Tensor:
        return h + torch.tanh(h @ self.up) @ self.down


class Model(nn.Module):
    """`call(block, h)` calls a block; `states` holds the input of each."""

    def __init__(self, block: Callable[[], nn.Module], call: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(VOCABULARY, D), nn.Linear(D, VOCABULARY)
        self.blocks = nn.ModuleList(block() for _ in range(L + 1))
        self.call = call
        self.states: list[Tensor] = []

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.embedding(tokens)
        self.states = []
        for block in self.blocks:
            self.states.append(h.detach().clone())
            h = self.call(block, h)
        return self.head(h)


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[Any, Tensor], Tensor], str]] = {
    "two methods": (Halves, lambda block, h: block.think(block.attend(h)), "norm1"),
    "unbound methods": (Halves, lambda block, h: Halves.think(block, Halves.attend(block, h)), "norm1"),
    "forward itself": (
        lambda: nn.TransformerEncoderLayer(D, 2, D, 0.0, batch_first=True, norm_first=True),
        lambda block, h: block.forward(h),
        "norm1",
    ),
    "a recurrence": (Recurrent, lambda block, h: block.step(h, torch.zeros_like(h))[0], "norm"),
    "without normalisation": (Unnormalised, lambda block, h: block.update(h), "up"),
}


def train_step(model: Model, optimizer: torch.optim.Optimizer, step: int) -> float:
    loss = loss_of(model, batch(step))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


@pytest.mark.parametrize("case", MODELS)
def test_a_snapshot_holds_the_input_of_each_block(case: str, monitor: ScriptedMonitor, agents: Attach) -> None:
    block, call, layer = MODELS[case]
    torch.manual_seed(0)
    model = Model(block, call)
    bare = copy.deepcopy(model)
    optimizer, bare_optimizer = (torch.optim.SGD(each.parameters(), lr=0.01) for each in (model, bare))
    agent = agents(model, optimizer, endpoint=monitor.endpoint, config=EVERY_STEP)
    monitor.wait(lambda: agent.status()["connected"])
    arrived, expected = paced(agent, monitor), {}
    for step in range(5):
        assert train_step(model, optimizer, step) == train_step(bare, bare_optimizer, step)
        expected[step] = bare.states
        arrived()
    status = agent.status()
    assert (status["stack"], status["num_layers"], status["errors"]) == (f"blocks.*.{layer}", L, 0)
    assert len(monitor.shards) >= 3
    for header, states in monitor.shards:
        full = expected[header.step]
        rows = choose_rows(full[0].shape[:-1].numel(), 20, seed=0, step=header.step)
        assert torch.equal(states, torch.stack([state.reshape(-1, D)[rows] for state in full]))


def test_blocks_that_are_called_come_first(monitor: ScriptedMonitor, agents: Attach) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(D, 2, D, 0.0, batch_first=True, norm_first=True)
    model = Model(lambda: copy.deepcopy(layer), lambda block, h: block(h))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    agent = agents(model, optimizer, endpoint=monitor.endpoint, config=EVERY_STEP)
    train_step(model, optimizer, 0)
    assert (agent.status()["stack"], agent.status()["num_layers"]) == ("blocks", L + 1)


def test_blocks_without_layers_are_told(
    monitor: ScriptedMonitor, agents: Attach, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    model = Model(Weights, lambda block, h: block.update(h))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    agents(model, optimizer, endpoint=monitor.endpoint, config=EVERY_STEP)
    for step in range(8):
        train_step(model, optimizer, step)
    assert sum("its blocks are not called" in line for line in caplog.messages) == 1
