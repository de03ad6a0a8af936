"""Comparison of predicted and measured peak rates."""

from __future__ import annotations

import pytest

from benchmarks.max_rate import is_safe, overlaps, safe_rates, trainings
from benchmarks.sections import max_rate


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ({"0.001": [2.3], "0.003": [2.2], "0.01": [2.29], "0.03": [2.6]}, (0.01, 0.03)),
        ({"0.003": [2.0, 2.2], "0.01": [2.0, 2.6]}, (0.003, 0.01)),
        ({"0.003": [2.0], "0.03": [2.05]}, (0.03, None)),
    ],
)
def test_the_highest_safe_rate_ends_within_a_tenth_of_the_best(
    losses: dict[str, list[float]], expected: tuple[float, float | None]
) -> None:
    assert safe_rates(losses) == expected


def found(rate: float | None, low: float | None, high: float | None) -> dict[str, float | None]:
    return {"rate": rate, "low": low, "high": high}


@pytest.mark.parametrize(
    ("probe", "meets", "safe"),
    [
        (found(0.006, 0.003, 0.012), True, True),
        (found(0.02, 0.011, 0.04), False, False),
        (found(0.001, 0.0005, 0.002), False, True),
        (found(None, 0.008, None), True, False),
        (found(None, None, None), None, None),
    ],
)
def test_an_estimate_is_compared_with_the_range(
    probe: dict[str, float | None], meets: bool | None, safe: bool | None
) -> None:
    assert overlaps(probe, 0.003, 0.01) is meets
    assert is_safe(probe, 0.01) is safe


def test_a_grid_whose_highest_rate_is_safe_shows_no_unsafe_estimate() -> None:
    assert overlaps(found(0.5, 0.25, 1.0), 0.03, None)
    assert is_safe(found(0.5, 0.25, 1.0), None) is None


def test_the_trainings_are_those_of_the_proving_ground() -> None:
    assert trainings()["pre", 64] == (0.003, 0.01)


def test_the_table_counts_what_agrees() -> None:
    probe = {**found(0.006, 0.003, 0.012), "num_steps": 80, "cpu_seconds": 3.0, "overlaps": True, "is_safe": True}
    none = {**found(None, None, None), "num_steps": 0, "cpu_seconds": 1.0, "overlaps": None, "is_safe": None}
    models = [
        {"family": "pre", "width": 64, "safe": 0.003, "ruined": 0.01, "probes": [probe, {**probe, "is_safe": False}]},
        {"family": "post", "width": 64, "safe": 0.003, "ruined": 0.01, "probes": [none]},
    ]
    bare = {"width": 64, "safe": 0.001, "ruined": None, "calibrated": 0.0021}
    lines = max_rate({"models": models, "unnormalised": bare})
    assert "| Pre-LN, D 64 | 0.003 | 0.01 | 0.006, 0.006 | 2 of 2 | 1 of 2 | 80 | 3 s |" in lines
    assert "| Post-LN, D 64 | 0.003 | 0.01 | none | - | - | - | 1 s |" in lines
    assert "0.0021 survives with probability 95%" in " ".join(lines)
