"""The benchmark of the taps in a compiled graph: its goals can fail."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.compiled_taps import missed

MET: dict[str, Any] = {
    "cpu": {"ratio": 1.004},
    "equal_losses": True,
    "graphs": {"with": 1, "without": 1},
    "in_graph": True,
}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, []),
        ({"cpu": {"ratio": 1.006}}, ["x1.0060, the goal is x1.005"]),
        ({"equal_losses": False}, ["the losses differ"]),
        ({"graphs": {"with": 2, "without": 1}}, ["2 graphs instead of 1"]),
        ({"in_graph": False}, ["the graph has no taps"]),
    ],
)
def test_a_goal_that_is_missed_is_a_failure(change: dict[str, Any], words: list[str]) -> None:
    assert missed(MET | change) == words
