"""The overhead benchmark: its ratios, its goals, and the section that it fills."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.agent_overhead import GOALS, SHAPES, STAGES, analyse, missed
from benchmarks.sections import agent_overhead

BLOCK = 4


def rows(plain: float, snapshot: float) -> list[tuple[bool, bool, float, float]]:
    """Return steps of watched and bare blocks in turn. Bare steps take 1 s, and the first watched one is a snapshot."""
    found = []
    for block in range(40):
        watched = block % 4 in (0, 3)
        for step in range(BLOCK):
            taken = watched and step == 0
            seconds = (snapshot if taken else plain) if watched else 1.0
            found.append((watched, taken, seconds, 2.0 * seconds))
    return found


def result(plain: float, snapshot: float) -> dict[str, Any]:
    clocks = {clock: analyse(rows(plain, snapshot), BLOCK, column, 0) for clock, column in (("wall", 2), ("cpu", 3))}
    settings = {**SHAPES["tiny"], "monitor": "nice", "device": "cpu"}
    return {"stages": dict.fromkeys(STAGES, clocks), "goals": GOALS, "settings": settings, "against": "a bare one"}


@pytest.mark.parametrize(("plain", "snapshot"), [(1.0, 1.0), (1.002, 1.03), (1.5, 3.0)])
def test_ratios_are_those_of_the_steps(plain: float, snapshot: float) -> None:
    found = analyse(rows(plain, snapshot), BLOCK, 3, 0)
    assert found["plain_step"]["ratio"] == pytest.approx(plain)
    assert found["snapshot_step"]["ratio"] == pytest.approx(snapshot)
    assert found["mean_step"]["ratio"] == pytest.approx((3 * plain + snapshot) / 4)
    assert found["step_seconds_without"] == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("plain", "snapshot", "words"),
    [
        (1.0, 1.01, []),
        (1.002, 1.03, ["long: mean step"]),
        (1.006, 1.001, ["start: plain step", "long: plain step"]),
        (1.0, 1.05, ["start: snapshot step", "long: mean step", "long: snapshot step"]),
    ],
)
def test_a_ratio_above_its_goal_is_a_failure(plain: float, snapshot: float, words: list[str]) -> None:
    assert [line.split(" x")[0] for line in missed(result(plain, snapshot))] == words


def test_the_section_has_both_stages_and_both_clocks() -> None:
    told = " ".join(agent_overhead(result(1.002, 1.03)))
    assert "In the long run, the mean step takes 1.009 times (95%: 1.009 to 1.009) as long as a bare one" in told
    assert told.count("its CPU time") == len(STAGES)
    assert told.startswith("1 rank trains a model of D 64 and L 2 on the CPU, with the monitor at nice 19.")
