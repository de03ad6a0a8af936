"""Trainings of many forms, each run twice: alone and watched. A case is a generator that yields its losses.

`watch(model, *optimizers)` attaches koopmon in the watched run and does nothing in the other one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

V, T, D, B = 11, 6, 12, 4
Watch = Callable[..., Any]
Script = Callable[[Watch], Iterator[Tensor | float]]


@dataclass(frozen=True)
class Case:
    """`stack` and `layers` are those that must be watched at the end; None if nothing can be watched."""

    name: str
    script: Script
    stack: str | None
    layers: int
    least: int
    """Snapshots at least."""
    told: str
    """A pattern of a line that must be logged; empty if none may be."""
    lines: int
    """Lines at most."""

    def __str__(self) -> str:
        return self.name


class Battery:
    """The cases of one kind."""

    def __init__(self) -> None:
        self.cases: list[Case] = []

    def case(
        self, stack: str | None = "blocks", layers: int = 4, least: int = 4, told: str = "", lines: int = 1
    ) -> Callable[[Script], Script]:
        """Add the decorated script."""

        def add(script: Script) -> Script:
            name = script.__name__.replace("_", " ").strip()
            self.cases.append(Case(name, script, stack, layers, least, told, lines if told else 0))
            return script

        return add


class Block(nn.Module):
    """A pre-normalised residual block."""

    def __init__(self, width: int = D) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def update(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return self.down(nn.functional.gelu(self.up(x + x.mean(-2, keepdim=True))))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.update(x)


def blocks(count: int = 4, kind: Callable[[], nn.Module] = Block) -> nn.ModuleList:
    return nn.ModuleList(kind() for _ in range(count))


class Net(nn.Module):
    """Tokens to logits. `run(blocks, x)` calls the blocks."""

    def __init__(
        self,
        run: Callable[[nn.ModuleList, Tensor], Tensor] | None = None,
        count: int = 4,
        kind: Callable[[], nn.Module] = Block,
    ) -> None:
        super().__init__()
        self.embedding, self.blocks, self.head = nn.Embedding(V, D), blocks(count, kind), nn.Linear(D, V)
        self.run = run or through

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.run(self.blocks, self.embedding(tokens)))


def through(stack: Any, x: Tensor) -> Tensor:
    for block in stack:
        x = block(x)
    return x


def tokens(step: int) -> Tensor:
    return torch.randint(V, (B, T), generator=torch.Generator().manual_seed(step))


def vectors(step: int, *shape: int) -> Tensor:
    return torch.randn(*(shape or (B, T, D)), generator=torch.Generator().manual_seed(step))


def loss_of(model: nn.Module, step: int) -> Tensor:
    batch = tokens(step)
    return nn.functional.cross_entropy(model(batch).flatten(0, 1), batch.flatten())


def update(loss: Tensor, *optimizers: torch.optim.Optimizer) -> Tensor:
    for optimizer in optimizers:
        optimizer.zero_grad()
    loss.backward()
    for optimizer in optimizers:
        optimizer.step()
    return loss.detach()


def sgd(*modules: nn.Module, lr: float = 0.02) -> torch.optim.Optimizer:
    return torch.optim.SGD([each for module in modules for each in module.parameters() if each.requires_grad], lr=lr)


def train(watch: Watch, model: nn.Module, steps: int = 8) -> Iterator[Tensor]:
    """Train `model` on tokens under one optimizer."""
    optimizer = sgd(model)
    watch(model, optimizer)
    for step in range(steps):
        yield update(loss_of(model, step), optimizer)
