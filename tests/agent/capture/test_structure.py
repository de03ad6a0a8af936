"""Changes of a model that are changes of its blocks, and those that are not."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

from koopmon.agent.capture.structure import Structure, same_blocks, unwrapped
from koopmon.plugins import select
from tests.agent.models import Block, D, Model, build


def append(model: Model) -> None:
    model.blocks.append(Block(D))


def insert(model: Model) -> None:
    model.blocks.insert(0, Block(D))


def remove(model: Model) -> None:
    del model.blocks[1]


def replace(model: Model) -> None:
    model.blocks[1] = copy.deepcopy(model.blocks[1])


def reorder(model: Model) -> None:
    model.blocks = nn.ModuleList(reversed(model.blocks))


class Outer(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)


def wrap_one(model: Model) -> None:
    model.blocks[1] = Outer(model.blocks[1])


@pytest.mark.parametrize("change", [append, insert, remove, replace, reorder, wrap_one])
def test_surgery_is_a_change(change: Callable[[Model], None]) -> None:
    model = build()
    before = select(model).candidates
    structure = Structure(before)
    structure.note(model)
    assert not structure.has_changed(model)
    change(model)
    assert structure.has_changed(model)
    assert not same_blocks(before[0], select(model).candidates)
    structure.note(model)
    assert not structure.has_changed(model)


def compile_one(model: Model) -> None:
    model.blocks[1] = torch.compile(model.blocks[1], backend="eager")  # type: ignore[assignment]


def compile_the_list(model: Model) -> None:
    for index, block in enumerate(model.blocks):
        model.blocks[index] = torch.compile(block, backend="eager")  # type: ignore[assignment]


def train_mode(model: Model) -> None:
    model.eval().double()
    model.blocks[1].up = nn.Linear(D, 2 * D)


@pytest.mark.parametrize("change", [compile_one, compile_the_list, train_mode])
def test_wrappers_and_parts_of_blocks_are_none(change: Callable[[Model], None]) -> None:
    model = build()
    structure = Structure(select(model).candidates[:1])
    structure.note(model)
    change(model)
    assert not structure.has_changed(model)


def test_a_change_beside_the_blocks_leaves_them_the_same() -> None:
    model = build()
    before = select(model).candidates
    structure = Structure(before)
    structure.note(model)
    model.head = nn.Linear(D, 3)
    assert structure.has_changed(model)
    assert same_blocks(before[0], select(model).candidates)


def test_a_module_of_one_child_is_no_wrapper() -> None:
    outer = Outer(build())
    assert unwrapped(outer) is outer
