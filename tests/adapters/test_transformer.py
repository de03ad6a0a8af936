"""Transformer adapter on third-party and hand-written models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import koopmon
from tests.adapters.zoo import CASES, B, D, Given, L, T

torch.set_num_threads(1)


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> Given:
    torch.manual_seed(0)
    factory, stack, shape = CASES[request.param]
    return factory(), stack, shape


def result(output: Any) -> Tensor:
    """Return the loss of the model if it has one, else its main output."""
    if isinstance(output, Tensor):
        return output
    loss = getattr(output, "loss", None)
    return loss if loss is not None else output[0]


def test_discovers_every_block(case: Given) -> None:
    (model, args, kwargs), stack, _ = case
    found = koopmon.discover(model, *args, **kwargs)
    assert found.verified
    assert found.adapter.name == "transformer"
    assert found.adapter.specificity(model) == 10
    assert "no-attention" not in found.flags
    assert [point.layer for point in found.points] == list(range(L))
    assert all(model.get_submodule(point.name) is point.module for point in found.points)
    if stack is not None:  # otherwise the library chooses its name
        assert found.stack.name == stack


def test_the_best_candidate_is_the_one_verified(case: Given) -> None:
    (model, args, kwargs), _, _ = case
    unverified = koopmon.discover(model)
    assert not unverified.verified
    assert unverified.stack == koopmon.discover(model, *args, **kwargs).stack


def test_taps_read_one_chain(case: Given) -> None:
    """Record whole tensors with hooks of the test. Inputs equal the outputs before them, all of one shape."""
    (model, args, kwargs), _, shape = case
    found = koopmon.discover(model, *args, **kwargs)
    entered: list[Tensor] = []
    left: list[Tensor] = []

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        state = found.adapter.block_input(module, args, kwargs)
        assert state is not None
        entered.append(state.detach().clone())

    def leave(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        state = found.adapter.block_output(module, output)
        assert state is not None
        left.append(state.detach().clone())

    handles = [point.entry.register_forward_pre_hook(enter, with_kwargs=True) for point in found.points]
    handles += [point.module.register_forward_hook(leave) for point in found.points]
    try:
        model.train()
        model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    assert len(entered) == len(left) == L
    assert {tuple(state.shape) for state in entered + left} == {shape}
    assert all(torch.equal(x, y) for x, y in zip(entered[1:], left[:-1], strict=True))
    assert not any(torch.equal(x, y) for x, y in zip(entered, left, strict=True)), "a block that does nothing"


def test_a_state_can_be_put_back(case: Given) -> None:
    (model, args, kwargs), _, _ = case
    found = koopmon.discover(model, *args, **kwargs)
    model.eval()
    before = result(model(*args, **kwargs))
    for point in found.points:
        for factor, same in ((1.0, True), (1.5, False)):

            def replace(module: nn.Module, args: tuple[Any, ...], output: Any, factor: float = factor) -> Any:
                state = found.adapter.block_output(module, output)
                assert state is not None
                # unequal over D, so that no normalisation behind the block can undo it
                return found.adapter.with_block_output(module, output, state * torch.linspace(1.0, factor, D))

            handle = point.module.register_forward_hook(replace)
            try:
                after = result(model(*args, **kwargs))
            finally:
                handle.remove()
            assert torch.equal(before, after) == same


def test_profiles(case: Given) -> None:
    (model, args, kwargs), _, shape = case
    profile = koopmon.profile(model, *args, num_samples=1000, svd_rank=4, **kwargs)
    assert profile.num_layers == L
    padded = any(isinstance(value, Tensor) and value.shape == (B, T) for value in (*args[1:], kwargs.get("mask")))
    padded |= "src_key_padding_mask" in kwargs
    assert profile.num_samples == shape[0] * shape[1] - (4 if padded else 0)
