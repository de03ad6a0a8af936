"""Lists of blocks that are run in different ways, and an adapter for given ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from koopmon.api import ArchitectureAdapter, Stack
from koopmon.block_finder import block_lists

B, T, D, L = 2, 5, 8, 3


class Listed(ArchitectureAdapter):
    """Adapter for the stacks that the test names."""

    name = "listed"

    def __init__(self, *names: str, residual: bool = True) -> None:
        self.names, self.residual = names, residual

    def specificity(self, model: nn.Module) -> int:
        return 1

    def stacks(self, model: nn.Module) -> list[Stack]:
        by_name = {blocks.name: blocks for blocks in block_lists(model)}
        return [by_name[name].stack(residual=self.residual) for name in self.names]


class Block(nn.Module):
    """h + f(h), with a given `f`."""

    def __init__(self, f: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.linear = nn.Sequential(nn.Linear(D, D))
        self.f = f

    def forward(self, h: Tensor) -> Tensor:
        return h + self.linear(h) if self.f is None else self.f(h)


class Stacked(nn.Module):
    """List of blocks, run as `run` says."""

    def __init__(self, run: Callable[[nn.ModuleList, Tensor], Tensor], blocks: list[nn.Module] | None = None) -> None:
        super().__init__()
        self.run = run
        self.blocks = nn.ModuleList(blocks or [Block() for _ in range(L)])

    def forward(self, h: Tensor) -> Tensor:
        return self.run(self.blocks, h)


def in_turn(blocks: nn.ModuleList, h: Tensor) -> Tensor:
    for block in blocks:
        h = block(h)
    return h


def parallel(blocks: nn.ModuleList, h: Tensor) -> Tensor:
    return sum((block(h) for block in blocks), 0 * h)


class Pair(nn.Module):
    """Two stacks, one after the other."""

    def __init__(self, first: int, second: int) -> None:
        super().__init__()
        self.first = Stacked(in_turn, [Block() for _ in range(first)])
        self.second = Stacked(in_turn, [Block() for _ in range(second)])

    def forward(self, h: Tensor) -> Tensor:
        return self.second(self.first(h).tanh())


class NoSynchronisation(TorchDispatchMode):
    """Mode that raises on operations whose result the host would wait for with tensors on a GPU."""

    WAITING: ClassVar = {
        torch.ops.aten._local_scalar_dense.default,
        torch.ops.aten.equal.default,
        torch.ops.aten.is_nonzero.default,
        torch.ops.aten.masked_select.default,
        torch.ops.aten.nonzero.default,
    }

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func not in self.WAITING, f"{func} waits for the device"
        return func(*args, **(kwargs or {}))
