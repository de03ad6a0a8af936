"""Chain verification with states that meet or break the rule."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from koopmon.chain_verifier import ChainVerifier
from tests.mixing import NO_STACKS, Mixing
from tests.stacks import B, Block, D, L, Listed, NoSynchronisation, Pair, Stacked, T, in_turn, parallel

torch.set_num_threads(1)


def verdict(model: nn.Module, *names: str, residual: bool = True, batch: Tensor | None = None) -> Any:
    adapter = Listed(*names, residual=residual)
    verifier = ChainVerifier(adapter, adapter.stacks(model))
    with verifier.watch():
        model(torch.randn(B, T, D) if batch is None else batch)
    return verifier.verdict()


def test_a_chain_is_kept_and_no_hook_stays() -> None:
    model = Stacked(in_turn)
    kept, reasons = verdict(model, "blocks")
    assert kept is not None
    assert kept.name == "blocks"
    assert reasons == {}
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def between(change: Callable[[Tensor], Tensor]) -> Callable[[nn.ModuleList, Tensor], Tensor]:
    def run(blocks: nn.ModuleList, h: Tensor) -> Tensor:
        for block in blocks:
            h = change(block(h))
        return h

    return run


def again(blocks: nn.ModuleList, h: Tensor) -> Tensor:
    return in_turn(blocks, in_turn(blocks, h))


def backwards(blocks: nn.ModuleList, h: Tensor) -> Tensor:
    for block in reversed(list(blocks)):
        h = block(h)
    return h


def skipping(blocks: nn.ModuleList, h: Tensor) -> Tensor:
    return blocks[2](blocks[0](h))


def stopping(blocks: nn.ModuleList, h: Tensor) -> Tensor:
    return blocks[1](blocks[0](h))


def nothing(blocks: nn.ModuleList, h: Tensor) -> Tensor:
    return h


def nested_calls(blocks: nn.ModuleList, h: Tensor) -> Tensor:
    handle = blocks[0].linear.register_forward_hook(lambda *_: blocks[1](h))
    try:
        return blocks[2](blocks[0](h))
    finally:
        handle.remove()


@pytest.mark.parametrize(
    ("run", "reason"),
    [
        (between(lambda h: h[:, :-1]), "blocks.1 takes shape (2, 4, 8) where the chain began with (2, 5, 8)"),
        (parallel, "the output of blocks.0 is not the input of blocks.1"),
        (backwards, "blocks.2 was called out of turn"),
        (skipping, "blocks.2 was called out of turn"),
        (stopping, "only 2 of its 3 blocks were called"),
        (nested_calls, "blocks.1 was called out of turn"),
        (nothing, "none of its blocks was called"),
    ],
)
def test_what_is_no_chain_is_told(run: Callable[[nn.ModuleList, Tensor], Tensor], reason: str) -> None:
    assert verdict(Stacked(run), "blocks") == (None, {"blocks": reason})


@pytest.mark.parametrize(
    "change",
    [lambda h: 2 * h, lambda h: h.mul_(2), nn.functional.tanh, lambda h: h + torch.ones(D), lambda h: h.flip(-1)],
)
def test_a_change_between_blocks_leaves_each_block_s_own_transition(change: Callable[[Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    model = Stacked(between(change))
    stack, reasons = verdict(model, "blocks")
    assert stack is not None
    assert (stack.chained, stack.num_states, reasons) == (False, 2 * L, {})
    with torch.no_grad():
        assert verdict(model, "blocks").reasons == {"blocks": "the output of blocks.0 is not the input of blocks.1"}


def test_a_chain_comes_before_a_longer_stack_with_changes_between_its_blocks() -> None:
    model = Pair(2, 4)
    model.second.run = between(torch.tanh)
    stack, reasons = verdict(model, "first.blocks", "second.blocks")
    assert stack is not None
    assert stack.name == "first.blocks"
    assert reasons["second.blocks"] == "is a stack of 4 blocks, but 'first.blocks' is unchanged between its blocks"


@pytest.mark.parametrize("case", NO_STACKS)
def test_what_is_no_stack_is_told(case: str) -> None:
    run, block, reason = NO_STACKS[case]
    torch.manual_seed(0)
    stack, reasons = verdict(Mixing(run, block=block), "blocks", batch=torch.arange(40).reshape(4, 10) % 11)
    assert stack is None
    assert reason in reasons["blocks"]


@pytest.mark.parametrize(
    ("f", "reason"),
    [
        (lambda h: {"h": h}, "blocks.0 returns no floating-point tensor that could be a state"),
        (lambda h: h.sum(), "blocks.0 returns a float32 tensor of shape (), no state of shape (..., T, D)"),
        (lambda h: h[..., :4], "blocks.0 returns shape (2, 5, 4) where the chain began with (2, 5, 8)"),
        (lambda h: h.long(), "blocks.0 returns a int64 tensor of shape (2, 5, 8), no state of shape (..., T, D)"),
        (lambda h: h[:0], "blocks.0 returns a float32 tensor of shape (0, 5, 8), no state of shape (..., T, D)"),
    ],
)
def test_what_is_no_state_is_told(f: Callable[[Tensor], Any], reason: str) -> None:
    model = Stacked(lambda blocks, h: (blocks[0](h), h)[1], [Block(f), Block()])
    assert verdict(model, "blocks") == (None, {"blocks": reason})


@pytest.mark.parametrize(
    "change",
    [
        lambda h: h,
        lambda h: h.clone(),
        lambda h: h.view_as(h),
        lambda h: h.transpose(0, 1).contiguous().transpose(0, 1),
        lambda h: h.to(torch.bfloat16),  # the effect of mixed precision at a block's input
        lambda h: h.double(),
    ],
)
def test_equal_values_are_one_state(change: Callable[[Tensor], Tensor]) -> None:
    model = Stacked(between(change), [Block(lambda h: h + h.roll(1, -1)) for _ in range(L)])
    assert verdict(model, "blocks").stack is not None


def test_a_state_that_is_changed_in_place_inside_blocks_is_one_chain() -> None:
    model = Stacked(in_turn, [Block(lambda h: h.add_(h.roll(1, -1))) for _ in range(L)])
    assert verdict(model, "blocks").stack is not None


def test_non_finite_states_chain_all_the_same() -> None:
    model = Stacked(in_turn, [Block(lambda h: h + float("nan")) for _ in range(L)])
    assert verdict(model, "blocks").stack is not None


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_blocks_chain_and_their_recomputation_comes_too_late_to_matter(reentrant: bool) -> None:
    def run(blocks: nn.ModuleList, h: Tensor) -> Tensor:
        for block in blocks:
            h = checkpoint(block, h, use_reentrant=reentrant)
        return h

    model = Stacked(run)
    assert verdict(model, "blocks", batch=torch.randn(B, T, D, requires_grad=True)).stack is not None


def test_the_rule_needs_no_gradients() -> None:
    def run(blocks: nn.ModuleList, h: Tensor) -> Tensor:
        with torch.no_grad():
            h = blocks[0](h)
        return in_turn(nn.ModuleList([*blocks][1:]), h)

    assert verdict(Stacked(run), "blocks").stack is not None


@pytest.mark.parametrize(
    ("first", "second", "kept", "reason"),
    [
        (2, 3, "second.blocks", "is a chain of 2 blocks, but 'second.blocks' is longer"),
        (3, 2, "first.blocks", "is a chain of 2 blocks, but 'first.blocks' is longer"),
        (2, 2, "second.blocks", "is a chain of 2 blocks, but 'second.blocks' comes later"),
    ],
)
def test_the_longest_chain_is_kept_and_of_equals_the_last(first: int, second: int, kept: str, reason: str) -> None:
    for names in (("first.blocks", "second.blocks"), ("second.blocks", "first.blocks")):
        stack, reasons = verdict(Pair(first, second), *names)
        assert stack is not None
        assert stack.name == kept
        assert list(reasons.values()) == [reason]


def test_an_inner_chain_loses_to_the_chain_around_it() -> None:
    model = Stacked(in_turn, [Stacked(in_turn) for _ in range(2)])
    stack, reasons = verdict(model, "blocks", "blocks.0.blocks", "blocks.1.blocks")
    assert stack is not None
    assert stack.name == "blocks"
    assert set(reasons.values()) == {"is a chain, but inside a block of 'blocks'"}


def test_sublayers_are_not_taken_for_blocks_where_the_blocks_fail() -> None:
    model = Stacked(parallel, [Stacked(in_turn) for _ in range(2)])
    stack, reasons = verdict(model, "blocks", "blocks.0.blocks")
    assert stack is None
    assert reasons["blocks.0.blocks"] == "is a chain, but inside a block of 'blocks'"


def test_stages_that_change_the_shape_leave_the_place_to_their_blocks() -> None:
    model = Stacked(between(lambda h: h[:, 1:]), [Stacked(in_turn) for _ in range(2)])
    stack, _ = verdict(model, "blocks", "blocks.0.blocks", "blocks.1.blocks")
    assert stack is not None
    assert stack.name == "blocks.1.blocks"


def test_a_chain_must_show_that_it_is_residual_unless_known_to_be() -> None:
    torch.manual_seed(0)
    batch = torch.randn(8, T, D)
    lost = Stacked(in_turn, [Block(lambda h: h.roll(1, 0)) for _ in range(L)])
    assert verdict(lost, "blocks", residual=True, batch=batch).stack is not None
    stack, reasons = verdict(lost, "blocks", residual=False, batch=batch)
    assert stack is None
    assert "do not carry their input forward" in reasons["blocks"]
    assert verdict(Stacked(in_turn), "blocks", residual=False, batch=batch).stack is not None
    stack, reasons = verdict(Stacked(in_turn), "blocks", residual=False, batch=torch.ones(1, 1, D))
    assert stack is None
    assert "the same at every token" in reasons["blocks"]


def test_a_verifier_can_be_reset_and_tried_again() -> None:
    model = Stacked(in_turn)
    adapter = Listed("blocks")
    verifier = ChainVerifier(adapter, adapter.stacks(model))
    with verifier.watch():
        model.blocks[1](torch.randn(B, T, D))
    assert verifier.verdict().stack is None
    verifier.reset()
    with verifier.watch():
        model(torch.randn(B, T, D))
    assert verifier.verdict().stack is not None


@pytest.mark.parametrize("residual", [True, False])
def test_observing_never_waits_for_the_device(residual: bool) -> None:
    model = Stacked(between(lambda h: h.transpose(0, 1).contiguous().transpose(0, 1)))
    adapter = Listed("blocks", residual=residual)
    verifier = ChainVerifier(adapter, adapter.stacks(model))
    with verifier.watch(), NoSynchronisation():
        model(torch.randn(B, T, D))
    assert verifier.verdict().stack is not None
