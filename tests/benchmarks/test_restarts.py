"""A few kills of the restart benchmark, and its judgement of bad logs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import restarts


def launch(pid: int, *used: float) -> list[dict[str, Any]]:
    return [{"pid": pid, "scheduled": 2.0, "used": 2.0 * each} for each in used]


def test_a_rate_that_falls_over_the_launches_is_good() -> None:
    logs = [[launch(1, 1.0, 0.5), launch(2, 0.5, 0.5, 0.25), launch(3, 0.25)]] * 2
    told = restarts.judge(logs)
    assert (told["restarts"], told["updates"], told["above"], told["ranks_differ"]) == (2, 4, 0, 0)
    assert (told["largest_ratio"], told["last_factor"]) == (1.0, 0.25)


def test_each_update_above_the_rate_at_the_kill_and_each_difference_between_ranks_counts() -> None:
    rank_0 = [launch(1, 1.0, 0.5), launch(2, 1.0, 1.0, 0.5)]
    rank_1 = [launch(7, 1.0, 0.5), launch(8, 1.0, 0.5, 0.5)]
    told = restarts.judge([rank_0, rank_1])
    assert (told["above"], told["largest_ratio"], told["ranks_differ"]) == (2, 2.0, 1)


@pytest.mark.process
@pytest.mark.slow
def test_one_kill_of_a_real_job(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    assert restarts.main(["--kills", "1", "--ways", "job of one rank", "--out", str(out)]) == 0
    told = json.loads(out.read_text())["ways"]["job of one rank"]
    assert (told["restarts"], told["above"]) == (1, 0)
    assert told["last_factor"] < 0.99
