"""Counters of one agent: steps and their mean duration."""

from __future__ import annotations

import pytest

from koopmon.agent.stats import AgentStats


def test_steps_are_timed_from_edge_to_edge() -> None:
    stats = AgentStats()
    assert [stats.on_step_edge(now) for now in (100.0, 101.0, 103.0)] == [0.0, 1.0, 2.0]
    assert (stats.step, stats.elapsed_seconds) == (3, 3.0)
    assert stats.step_seconds == pytest.approx(1.0 + 0.2 * (2.0 - 1.0))
