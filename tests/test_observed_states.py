"""Rows of a state that are measured."""

from __future__ import annotations

import torch

from koopmon.observed_states import SAMPLED_ROWS, sample_rows


def test_sampled_rows_are_spread_over_all_tokens() -> None:
    state = torch.arange(40 * 50.0).reshape(40, 50, 1)
    assert sample_rows(state).flatten().tolist() == [row * 2000 // SAMPLED_ROWS for row in range(SAMPLED_ROWS)]
    assert torch.equal(sample_rows(state.transpose(0, 1)), sample_rows(state.transpose(0, 1).contiguous()))
    assert torch.equal(sample_rows(state[:1, :3]), state[0, :3])
