"""A slice of the campaign of benchmarks.unchanged_script in real processes, and its judgement of given results."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.unchanged_script import Case, Result, run, saved

STEPS = 80


@pytest.mark.slow
@pytest.mark.science
@pytest.mark.distributed
@pytest.mark.timeout(600)
def test_a_rate_that_kills_is_survived_and_a_safe_one_is_left_alone(tmp_path: Path) -> None:
    unguarded = run(Case(lr=0.008, seed=0, steps=STEPS), tmp_path)
    assert unguarded.died_at is not None
    guarded = run(Case(lr=0.008, seed=0, steps=STEPS, guarded=True), tmp_path)
    assert guarded.died_at is None
    assert guarded.num_actions > 0
    assert guarded.min_lr_scale >= 1 / 8
    assert guarded.final_loss < 0.75 * guarded.first_loss
    assert guarded.max_latency_steps is not None
    assert guarded.max_latency_steps <= 10
    assert len(set(guarded.digests)) == 1
    plain, watched = (
        run(Case(lr=0.001, seed=0, steps=STEPS // 2, norm=True, guarded=guard), tmp_path) for guard in (False, True)
    )
    assert watched.num_actions == 0
    assert watched.max_risk is not None
    assert set(plain.digests) == set(watched.digests)


def result(**fields: object) -> Result:
    first = Result(
        case=Case(lr=0.01, seed=0, steps=10, guarded=True),
        died_at=None,
        first_loss=5.5,
        final_loss=2.1,
        digests=("a", "a"),
        num_actions=1,
        min_lr_scale=0.25,
        max_risk=0.9,
        max_latency_steps=1,
        seconds_per_step=0.1,
    )
    return replace(first, **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("fields", "good", "why"),
    [
        ({}, True, "1.05 x best"),
        ({"died_at": 40, "final_loss": math.inf}, False, "died at 40"),
        ({"final_loss": 2.3}, False, "1.15 x best"),
        ({"final_loss": 6.0}, False, "learned nothing"),
        ({"min_lr_scale": 0.1}, False, "scale 0.1"),
    ],
)
def test_the_verdict(fields: dict[str, object], good: bool, why: str) -> None:
    verdict, told = saved(result(**fields), best=2.0)
    assert verdict is good
    assert why in told
