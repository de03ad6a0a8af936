"""Choice of tokens: pure, without repetition, and only tokens that count."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from koopmon.token_sampling import align_mask, choose_rows, order_rows, take_rows
from tests.stacks import NoSynchronisation

SEEDS = st.integers(min_value=0, max_value=2**31 - 1)
COUNTS = st.integers(min_value=1, max_value=300)


@given(num_tokens=COUNTS, num_samples=COUNTS, seed=SEEDS, step=SEEDS, rank=SEEDS, mask_seed=SEEDS)
def test_choice_is_pure_distinct_and_masked(
    num_tokens: int, num_samples: int, seed: int, step: int, rank: int, mask_seed: int
) -> None:
    mask = torch.rand(num_tokens, generator=torch.Generator().manual_seed(mask_seed)) < 0.5
    key = {"seed": seed, "step": step, "data_rank": rank}
    for given_mask in (None, mask):
        counting = num_tokens if given_mask is None else int(mask.sum())
        state = torch.get_rng_state()
        rows = choose_rows(num_tokens, num_samples, **key, mask=given_mask)
        assert torch.equal(torch.get_rng_state(), state), "the global generator was used"
        assert rows.dtype == torch.int64
        assert len(rows) == len(set(rows.tolist())) == min(num_samples, counting)
        assert given_mask is None or bool(mask[rows].all())
        assert torch.equal(rows, choose_rows(num_tokens, num_samples, **key, mask=given_mask))
        ordered, num_valid = order_rows(num_tokens, num_samples, **key, mask=given_mask)
        assert len(ordered) == len(set(ordered.tolist())) == min(num_samples, num_tokens)
        assert torch.equal(ordered[: int(num_valid)], rows)


@pytest.mark.parametrize("changed", ["seed", "step", "data_rank"])
def test_another_seed_step_or_rank_is_another_choice(changed: str) -> None:
    key = {"seed": 1, "step": 1, "data_rank": 1}
    rows = choose_rows(1000, 100, **key)
    assert not torch.equal(rows, choose_rows(1000, 100, **{**key, changed: 2}))


def test_every_token_is_as_likely() -> None:
    """Each of 20 tokens is in about half of 400 draws of 10 (standard deviation 10)."""
    counts = torch.zeros(20)
    for step in range(400):
        counts[choose_rows(20, 10, seed=0, step=step)] += 1
    assert counts.min() > 150
    assert counts.max() < 250


def test_bad_arguments_name_the_value() -> None:
    with pytest.raises(ValueError, match="num_samples = 0"):
        choose_rows(4, 0, seed=0)
    with pytest.raises(ValueError, match="mask has 3 elements for 4 tokens"):
        choose_rows(4, 2, seed=0, mask=torch.ones(3, dtype=torch.bool))


def test_ordering_and_taking_rows_never_wait_for_the_device() -> None:
    state, mask = torch.randn(5, 4, 3).transpose(0, 1), torch.rand(4, 5) < 0.5
    with NoSynchronisation():
        rows, num_valid = order_rows(20, 10, seed=0, mask=mask)
        take_rows(state, rows)
    with pytest.raises(AssertionError, match="waits for the device"), NoSynchronisation():
        int(num_valid)


@given(shape=st.lists(st.integers(1, 5), min_size=1, max_size=3), permuted=st.booleans(), seed=SEEDS)
def test_rows_of_a_state_are_its_flattened_tokens(shape: list[int], permuted: bool, seed: int) -> None:
    state = torch.randn(*shape, 3)
    if permuted:
        state = state.permute(*reversed(range(len(shape))), len(shape))
    num_tokens = state.shape[:-1].numel()
    rows = choose_rows(num_tokens, num_tokens, seed=seed)
    taken = take_rows(state, rows)
    assert torch.equal(taken, state.reshape(-1, 3)[rows])
    assert taken.untyped_storage().data_ptr() != state.untyped_storage().data_ptr()


def test_masks_are_laid_out_as_the_state() -> None:
    mask = torch.tensor([[True, True, False], [True, False, False]])
    assert align_mask(None, torch.Size([2, 3])) is None
    assert align_mask(mask, torch.Size([2, 3])) is mask
    transposed = align_mask(mask, torch.Size([3, 2]))
    assert transposed is not None
    assert torch.equal(transposed, mask.T)
    assert align_mask(mask, torch.Size([2, 4])) is None
    assert align_mask(mask.T, torch.Size([2, 4])) is None
