"""Rows that are drawn ahead are those of `order_rows`, whatever the snapshots do."""

from __future__ import annotations

from itertools import accumulate

import pytest
import torch

from koopmon.agent.capture import rows_ahead
from koopmon.agent.capture.rows_ahead import MAX_AHEAD, MAX_ROWS, RowsAhead
from koopmon.token_sampling import order_rows


@pytest.mark.parametrize(
    "gaps",
    [
        [1] * 40,
        [10] * 40,
        [0, 1, 1, 1, 10, 10, 10, 1, 1, 7, 7, 7, 7, 3, 20, 20, 20],
        [5, 5, 5, 5, -12, 5, 5, 5, 0, 0, 5],
    ],
)
@pytest.mark.parametrize("sizes", [[30], [30, 30, 30, 41], [8, 500]])
def test_each_snapshot_has_the_rows_of_its_step(gaps: list[int], sizes: list[int]) -> None:
    ahead = RowsAhead(3, 2, 20)
    for index, step in enumerate(accumulate(gaps)):
        num_tokens = sizes[index % len(sizes)]
        rows = ahead.at(step, num_tokens)
        assert torch.equal(rows, order_rows(num_tokens, 20, seed=3, step=step, data_rank=2)[0])
        assert rows.device.type == "cpu"


def drawn(monkeypatch: pytest.MonkeyPatch, num_samples: int, steps: range, num_tokens: int = 1 << 16) -> list[int]:
    """Return the number of draws at each step."""
    counts: list[int] = []

    def draw(*args: int, **kwargs: int) -> tuple[torch.Tensor, torch.Tensor]:
        counts[-1] += 1
        return torch.arange(min(num_samples, num_tokens)), torch.tensor(0)

    monkeypatch.setattr(rows_ahead, "order_rows", draw)
    ahead = RowsAhead(0, 0, num_samples)
    for step in steps:
        counts.append(0)
        ahead.at(step, num_tokens)
    return counts


def test_a_steady_interval_is_drawn_together(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = drawn(monkeypatch, 100, range(10, 400, 10))
    assert counts[:2] == [1, MAX_AHEAD], "the first interval is from step 0"
    assert counts[2:] == ([0] * (MAX_AHEAD - 1) + [MAX_AHEAD]) * 2 + [0] * (len(counts) - 2 - 2 * MAX_AHEAD)


def test_many_rows_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(drawn(monkeypatch, MAX_ROWS + 1, range(0, 60, 5))) == {1}
    assert max(drawn(monkeypatch, MAX_ROWS // 4, range(0, 60, 5))) == 4
