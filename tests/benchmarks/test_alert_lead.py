"""Computation of the lead of an alert. tests/grafana/test_stack.py has the measuring stack."""

from __future__ import annotations

import math
from typing import Any

import pytest

from benchmarks.alert_lead import WINDOW, lead, left_band, summary
from benchmarks.alert_stack import Step


def steps(losses: list[float]) -> list[Step]:
    """Losses one second apart, the first at 100 s."""
    return [Step(step, loss, 100.0 + step) for step, loss in enumerate(losses)]


CALM = [3.4, 3.5] * 20


@pytest.mark.parametrize("loss", [3.86, 50.0, math.inf, math.nan])
def test_a_loss_a_tenth_above_all_before_it_has_left_its_band(loss: float) -> None:
    out = left_band(steps([*CALM, loss, 3.4]))
    assert out is not None
    assert out.step == len(CALM)


def test_a_loss_within_its_band_has_not() -> None:
    assert left_band(steps([*CALM, 3.84])) is None
    assert left_band(steps([9.0, *[1.0] * (WINDOW - 2), 9.0])) is None, "before there is a band nothing leaves it"
    assert left_band(steps([9.0 - 0.1 * step for step in range(40)])) is None


def test_the_lead_counts_from_the_step_last_told() -> None:
    told = steps([*CALM, 9.0])
    assert lead(told, 130.5) == 10
    assert lead(told, 145.0) == 0
    assert lead(steps(CALM), 130.5) is None
    assert lead(steps([*CALM, 9.0, 9.0, 9.0]), 142.0) == -2, "the loss was first"


def row(lead: int | None, **guarded: Any) -> dict[str, Any]:
    told = {"acted_at": [9], "resolved_at": 80, **guarded}
    return {"left_band_at": 40, "warned_at": None if lead is None else 40 - lead, "lead": lead, "guarded": told}


def test_a_run_without_a_warning_counts_against_us() -> None:
    total = summary([row(12), row(5), row(4), row(None, acted_at=[], resolved_at=None)])
    assert (total["num_five_steps_before"], total["num_left_band"], total["num_warned"]) == (2, 4, 3)
    assert (total["median_lead"], total["least_lead"]) == (4.5, 0)
    assert (total["num_acted"], total["num_resolved"]) == (3, 3)
