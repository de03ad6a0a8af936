"""Origin of states by the graph of gradients and by values."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from koopmon.lineage import Lineage, ValueLineage

Between = Callable[[Tensor, Tensor, Tensor], Tensor]


def drawn(seed: int, rows: int = 64, width: int = 32) -> Tensor:
    return torch.randn((rows, width), generator=torch.Generator().manual_seed(seed))


FROM_OUTPUT: dict[str, Between] = {
    "unchanged": lambda h, y, first: y,
    "the embedding again": lambda h, y, first: 0.9 * y + 0.2 * first,
    "a skip": lambda h, y, first: y + 0.5 * drawn(7),
    "normalised": lambda h, y, first: torch.nn.functional.rms_norm(y, y.shape[-1:]),
    "the output added": lambda h, y, first: h + 0.3 * y,
}
NOT_FROM_OUTPUT: dict[str, Between] = {
    "in parallel": lambda h, y, first: h,
    "scaled": lambda h, y, first: 2.0 * h,
    "another stream": lambda h, y, first: drawn(8),
    "the embedding added": lambda h, y, first: h + 0.2 * drawn(9),
    "zeros": lambda h, y, first: torch.zeros_like(h),
    "not finite": lambda h, y, first: torch.full_like(h, torch.nan),
}


@pytest.mark.parametrize("size", [1.0, 1e-2, 1e-4])
@pytest.mark.parametrize("case", [*FROM_OUTPUT, *NOT_FROM_OUTPUT])
def test_values_show_from_which_output_an_input_was_computed(case: str, size: float) -> None:
    if case in ("a skip", "the embedding again") and size < 1.0:
        return  # the rest of the input hides a small change
    between = FROM_OUTPUT.get(case) or NOT_FROM_OUTPUT[case]
    lineage: ValueLineage[str] = ValueLineage()
    first = drawn(0)
    h = first + drawn(1)
    assert lineage.sources(h) == frozenset()
    y = h + size * drawn(2)
    lineage.note_output("block 0", y)
    expected = frozenset({"block 0"}) if case in FROM_OUTPUT else frozenset()
    assert lineage.sources(between(h, y, first)) == expected


def test_an_identity_shows_nothing() -> None:
    lineage: ValueLineage[str] = ValueLineage()
    h = drawn(0)
    lineage.sources(h)
    lineage.note_output("block 0", h.clone())
    assert lineage.sources(h + drawn(1)) == frozenset()


def test_only_the_latest_call_is_compared_and_only_states_of_one_shape() -> None:
    lineage: ValueLineage[str] = ValueLineage()
    h = drawn(0)
    outputs = []
    for number in range(3):
        lineage.sources(h)
        lineage.sources(drawn(5, width=8))
        h = h + drawn(10 + number)
        outputs.append(h)
        lineage.note_output(f"block {number}", h)
        lineage.note_output(f"mask {number}", drawn(6, rows=1))
    assert lineage.sources(h) == frozenset({"block 2"})


def test_the_graph_and_the_values_agree_on_a_chain() -> None:
    by_graph, by_values = Lineage[int](), ValueLineage[int]()
    h = drawn(0).requires_grad_()
    for number in range(4):
        sources = [each.sources(h) for each in (by_graph, by_values)]
        assert sources == [frozenset({number - 1} if number else ())] * 2
        h = h + torch.tanh(h @ drawn(20 + number, 32, 32))
        for each in (by_graph, by_values):
            each.note_output(number, h)
        h = 0.9 * h
