"""States of convolutions: the width is dimension 1, and blocks of one width are a stack."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import koopmon
from koopmon.api import ArchitectureAdapter
from koopmon.errors import DiscoveryError
from tests.agent.models import L, batch
from tests.convolutional import WATCHED, Basic, Convolutional, Plain


def adapter() -> ArchitectureAdapter:
    return koopmon.discover(Convolutional(Basic)).adapter


@pytest.mark.parametrize("name", list(WATCHED))
def test_blocks_of_convolutions_are_a_chain(name: str) -> None:
    torch.manual_seed(0)
    model = WATCHED[name]()
    found = koopmon.discover(model, batch(0))
    assert (found.verified, found.stack.name, found.stack.num_layers, found.stack.position) == (True, "blocks", L, None)


@pytest.mark.parametrize(
    ("widths", "stack", "num_layers"),
    [
        ((8, 16, 16, 16, 16), "blocks[1:4]", 3),
        ((8, 8, 8, 16, 16, 16, 16, 32, 32), "blocks[3:6]", 3),
        ((8, 8, 8, 16, 16, 16), "blocks[3:5]", 2),
    ],
    ids=["a wider first block", "stages in one list", "of equal ones the later"],
)
def test_the_longest_run_of_one_width_is_kept(widths: tuple[int, ...], stack: str, num_layers: int) -> None:
    torch.manual_seed(0)
    found = koopmon.discover(Convolutional(Basic, widths=widths), batch(0))
    assert (found.stack.name, found.stack.num_layers) == (stack, num_layers)
    assert [point.layer for point in found.points] == list(range(num_layers))


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (lambda: Convolutional(Plain), "do not carry their input forward"),
        (lambda: Convolutional(Basic, widths=(4, 8, 16, 32)), "convolve a plane, and no two neighbours are alike"),
    ],
    ids=["nothing is added", "a new width in each block"],
)
def test_other_convolutions_are_refused_with_the_reason(model: object, reason: str) -> None:
    torch.manual_seed(0)
    assert callable(model)
    with pytest.raises(DiscoveryError, match=reason):
        koopmon.discover(model(), batch(0))


@pytest.mark.parametrize(
    ("block", "shape", "read"),
    [
        (nn.Conv1d(4, 4, 1), (2, 4, 5), (2, 5, 4)),
        (nn.Conv2d(4, 8, 1), (2, 8, 3, 5), (2, 3, 5, 8)),
        (nn.ConvTranspose3d(4, 4, 1), (2, 4, 3, 5, 6), (2, 3, 5, 6, 4)),
        (nn.Conv2d(4, 4, 1), (2, 5, 4), (2, 5, 4)),
        (nn.Conv2d(4, 4, 1), (2, 3, 5, 4), (2, 3, 5, 4)),
        (nn.Sequential(nn.Conv2d(4, 4, 1), nn.LayerNorm(4), nn.Linear(4, 4)), (2, 4, 4, 4), "moved"),
        (nn.Sequential(nn.LayerNorm(4), nn.Conv2d(4, 4, 1), nn.Linear(4, 4)), (2, 4, 4, 4), "as it is"),
        (nn.Linear(4, 4), (2, 4, 4, 4), "as it is"),
        (nn.Linear(4, 4), (3, 4), (3, 4)),
    ],
)
def test_the_axis_of_the_width(block: nn.Module, shape: tuple[int, ...], read: tuple[int, ...] | str) -> None:
    block = block if isinstance(block, nn.Sequential) else nn.Sequential(block)
    given = torch.randn(shape)
    state = adapter().block_input(block, (given,), {})
    assert state is not None
    if isinstance(read, tuple):
        assert state.shape == read
    else:
        torch.testing.assert_close(state, given.movedim(1, -1) if read == "moved" else given)
    torch.testing.assert_close(adapter().block_output(block, (given, None)), state)
    torch.testing.assert_close(adapter().with_block_output(block, given, state), given)
    torch.testing.assert_close(adapter().with_block_output(block, (given, None), state)[0], given)
