"""Scores of local signals, on series that are made up."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from benchmarks.campaign import Kept
from benchmarks.proving_ground.signals import (
    ONE_ALARM,
    SIGNALS,
    alarms,
    false_alarm_rate,
    lowest_threshold,
    score,
)
from benchmarks.proving_ground.training import Recipe

STEPS = np.arange(0, 500, 4)


def kept(lr: float, seed: int, level: Any, *, loss: Any = None, final: float = 2.0) -> Kept[Recipe]:
    """A run whose signals by layer equal `level`, one value for each snapshot."""
    level = np.broadcast_to(level, STEPS.shape).astype(float)
    layers = np.stack([level, level / 2], axis=1)
    names = ("max_logit", "stream_rms", "spectral_radius", "update_ratio", "expansive_mass", "reliable_mode_ratio")
    series = {
        "profile_step": STEPS,
        "loss": np.full(500, 2.0) if loss is None else loss,
        "grad_norm": np.ones(500),
        "update_rms": layers[:, :1],
        "log_partition": -layers[:, :1],
        "informative": np.ones((len(STEPS), 1)),
        **{name: np.clip(layers, 0, 1) if name.endswith(("mass", "mode_ratio")) else layers for name in names},
    }
    recipe = Recipe(family="pre", lr=lr, seed=seed)
    return Kept(recipe, {"diverged_at": None, "first_loss": 5.5, "final_loss": final}, series)


def test_alarms_that_follow_each_other_closely_are_one() -> None:
    steps, values = np.array([0, 4, 8, 8 + ONE_ALARM, 100]), np.array([0.0, 2.0, 2.0, 2.0, 1.0])
    assert alarms(steps, values, 1.0) == [4, 8 + ONE_ALARM]
    assert alarms(steps, values, 0.5) == [4, 8 + ONE_ALARM, 100]
    assert alarms(steps, np.full(5, np.nan), 1.0) == []


@pytest.mark.parametrize("allowed", [1, 2])
def test_the_threshold_allows_one_false_alarm_in_1000_steps(allowed: int) -> None:
    level = np.ones(len(STEPS))
    level[[10, 50, 90]] = (3.0, 5.0, 4.0)
    runs = [kept(0.003, seed, level if seed == 0 else 1.0) for seed in range(2 * allowed)]
    signal = SIGNALS["attention logit"]
    threshold = lowest_threshold(runs, signal)
    assert threshold == (4.0 if allowed == 1 else 3.0)
    assert false_alarm_rate(runs, signal, threshold) == 1.0


def test_a_signal_that_rises_before_the_loss_has_a_lead() -> None:
    rising = np.where(STEPS >= 100, 50.0, 1.0)
    late = np.where(np.arange(500) >= 200, 3.0, 2.0)
    chosen = [kept(0.003, 0, np.where(STEPS % 100 == 0, 2.0, 1.0))]
    tried = [kept(0.003, 10, 1.0), kept(0.03, 10, rising, loss=late, final=3.0)]
    rows = {row["signal"]: row for row in score(chosen, tried)}
    assert rows["attention logit"]["num_ruined"] == 1
    assert rows["attention logit"]["leads"] == [pytest.approx(100, abs=20)]
    assert rows["attention logit"]["false_alarms_per_1000"] == 0.0
    assert rows["loss, z-score"]["leads"] == [None], "equal losses have no z-score"
    assert rows["gradient norm"]["leads"] == [None]
    assert set(rows) == set(SIGNALS)
