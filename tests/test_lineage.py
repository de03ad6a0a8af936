"""The origin of states in the graph of gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from koopmon.lineage import MAX_NODES, Lineage


def leaf() -> Tensor:
    return torch.randn(3, 4, requires_grad=True)


def test_the_nearest_outputs_are_the_sources() -> None:
    lineage: Lineage[str] = Lineage()
    h = leaf()
    first = h.sin()
    lineage.note_output("first", first)
    second = first.cos()
    lineage.note_output("second", second)
    assert lineage.sources(second * 2) == {"second"}
    assert lineage.sources(second * 2 + first) == {"first", "second"}
    assert lineage.sources(second) == {"second"}
    assert lineage.sources(h.exp()) == set()
    assert lineage.sources(second.detach()) == set()
    assert lineage.sources(leaf()) == set()


def test_parts_of_one_output_are_one_source() -> None:
    lineage: Lineage[int] = Lineage()
    left, right = leaf().sin().unbind(0)[:2]
    lineage.note_output(0, left)
    lineage.note_output(1, right)
    assert lineage.sources(left + 1) == {0, 1}


def test_an_output_that_is_changed_in_place_stays_the_source() -> None:
    lineage: Lineage[int] = Lineage()
    h = leaf().sin()
    lineage.note_output(0, h)
    lineage.sources(h)
    h.mul_(2)
    assert lineage.sources(h) == {0}


def test_long_computations_are_not_followed_to_their_end() -> None:
    lineage: Lineage[int] = Lineage()
    h = leaf().sin()
    lineage.note_output(0, h)
    for _ in range(MAX_NODES + 2):
        h = h + 1
    assert lineage.sources(h) == set()
