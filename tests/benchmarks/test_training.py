"""A recorded training equals the plain training, and its profiles belong to its own states."""

from __future__ import annotations

from dataclasses import replace

import pytest

pytest.importorskip("scipy")

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.detectors import DETECTORS, cusum, forecast_by_loss, online, z_score
from benchmarks.early_warning import alarms, threshold
from benchmarks.faults import FAULTS, Fault, strike
from benchmarks.models import associative_recall_loss
from benchmarks.training import FIELDS, Recipe, train

torch.set_num_threads(1)
SMALL = Recipe(task="recall-2", width=32, num_layers=2, lr=0.003, seed=0, steps=12, warmup=4)


def plainly(recipe: Recipe) -> list[float]:
    """Repeat the same training without any recording."""
    model = recipe.model()
    optimizer = torch.optim.AdamW(model.parameters())
    losses = []
    for step in range(recipe.steps):
        tokens, labels = recipe.batch_at(step)
        loss = associative_recall_loss(model(tokens), labels)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.param_groups[0]["lr"] = recipe.lr * min(1.0, (step + 1) / recipe.warmup)
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_recording_changes_nothing() -> None:
    scalars, series = train(SMALL)
    assert series["loss"].tolist() == plainly(SMALL)
    assert scalars["died_at"] is None
    assert scalars["final_loss"] == pytest.approx(series["loss"].mean())
    assert series["profile_step"].tolist() == list(range(12))
    for field in FIELDS:
        assert series[field].shape == (12, 2)
        assert np.isfinite(series[field]).all()


def test_profiles_may_be_sparse_or_absent() -> None:
    _, series = train(replace(SMALL, profile_every=5))
    assert series["profile_step"].tolist() == [0, 5, 10]
    _, without = train(replace(SMALL, profile_every=0))
    assert set(without) == {"loss", "grad_norm"}
    assert without["loss"].tolist() == series["loss"].tolist()


def test_a_rate_that_kills_ends_the_run_at_its_death() -> None:
    scalars, series = train(replace(SMALL, lr=3.0, steps=60))
    assert scalars["died_at"] == len(series["loss"]) - 1
    assert scalars["final_loss"] is scalars["accuracy"] is None
    assert series["loss"][-1] > 50 or series["grad_norm"][-1] > 500 or np.isnan(series["loss"][-1])
    for detector in DETECTORS.values():
        assert np.isfinite(detector(campaign_run(scalars, series))).all()


def test_the_forecast_by_a_logged_loss_is_the_z_score_with_the_prior_a_step_later() -> None:
    scalars, series = train(replace(SMALL, lr=0.05, steps=30))
    run = campaign_run(scalars, series)
    known = np.array([risk.components["prior"] for risk in online(run)])
    at_once, later = DETECTORS["loss z-score, with prior"](run) - known, forecast_by_loss(run) - known
    told = np.arange(7, len(later))  # the monitor has six losses then
    assert later[told] == pytest.approx(at_once[told - 1], abs=1e-3)


def campaign_run(scalars: object, series: object) -> object:
    from benchmarks.campaign import Kept

    return Kept(SMALL, scalars, series)  # type: ignore[arg-type]


@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_changes_the_training_from_its_step_on(fault: Fault) -> None:
    sound, faulty = train(SMALL)[1]["loss"], train(replace(SMALL, fault=fault, fault_step=6))[1]["loss"]
    first = int(np.argmax(sound != faulty))
    assert first == {"bad_batch": 6, "optimizer_state": 7, "precision": 6, "no_warmup": 1}[fault]


def test_coarse_weights_keep_two_bits_of_mantissa() -> None:
    model = nn.Linear(64, 64)
    strike("precision", 0, model, torch.optim.SGD(model.parameters()), Tensor())
    mantissa, _ = torch.frexp(model.weight.detach())
    assert set((mantissa.abs() * 8).unique().tolist()) <= {0.0, 4.0, 5.0, 6.0, 7.0}


def test_z_scores_look_back_only() -> None:
    values = np.array([1.0] * 10 + [5.0] * 10)
    changed = values.copy()
    changed[15:] = 100.0
    assert z_score(values)[:15].tolist() == z_score(changed)[:15].tolist()
    assert z_score(values)[9] == 0.0
    assert z_score(values)[10] > 1000
    assert cusum(values)[9] == 0.0
    assert cusum(values)[10] == 9.5


def test_alarms_and_their_threshold() -> None:
    steps = np.arange(100)
    scores = np.zeros(100)
    scores[[10, 12, 40, 70]] = [1.0, 2.0, 3.0, 4.0]
    assert alarms(scores, steps, 0.5) == [10, 40, 70]
    assert threshold([(scores, steps)], 1000) == 3.0  # one alarm in 1,000 steps is allowed
    assert threshold([(scores, steps)], 100) == 4.0
